"""Promotion: which version is champion, by the gate or by name, and the way back."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from ldm.config import Registry
from ldm.errors import UserError
from ldm.progress import say
from ldm.registry.gate import GATE, START, Decision, judge, starting, verdict
from ldm.tracking import versions
from ldm.tracking.liveness import connected

if TYPE_CHECKING:
    from mlflow import MlflowClient

OTHERWISE = {
    versions.PROMPTS: "on other prompts",
    versions.SAMPLING: "by pictures drawn with other settings",
}
"""What a decision notes where two versions' tags differ."""
# Tags of a version that promotion and rollback write.
REPLACED, ROLLED_BACK = "replaced", "rolled_back"


def promote(config: Registry, version: str | None = None) -> Decision:
    """Let the gate decide on the challenger, or on ``version``; champion if it passes.

    The decision stays with the version: tags ``gate``, ``gate_against`` and ``gate_reason``, and
    ``gate.json`` in its run. A version that was rolled back returns only when it is named.
    """
    client = connected(config)
    named = versions.aliases(client, config.model)
    chosen, champion = version or named.get(versions.CHALLENGER), named.get(versions.CHAMPION)
    if chosen is None:
        raise UserError(f"{config.model}: has no challenger; run `ldm register` first")
    if chosen == champion:
        say(f"promote: {config.model} version {chosen} is champion already")
        return Decision(config.model, chosen, f"version {chosen}", (), False, "champion already")
    decision = _decide(client, config, chosen, champion, by_name=version is not None)
    if decision.promoted:
        if champion is not None:
            client.set_model_version_tag(config.model, chosen, REPLACED, champion)
            client.set_registered_model_alias(config.model, versions.PREVIOUS, champion)
        # Last, so that what is cut off before it is simply done again.
        client.set_registered_model_alias(config.model, versions.CHAMPION, chosen)
    outcome = "is champion" if decision.promoted else "is not promoted"
    say(f"promote: {config.model} version {chosen} {outcome}: {decision.reason}")
    return decision


def _decide(
    client: MlflowClient, config: Registry, chosen: str, champion: str | None, *, by_name: bool
) -> Decision:
    candidate, metrics = versions.version_of(client, config.model, chosen)
    against, reference, note = START, starting(metrics), ""
    if champion is not None:
        current, reference = versions.version_of(client, config.model, champion)
        against = f"version {champion}"
        differ = (tag for tag in OTHERWISE if candidate.tags.get(tag) != current.tags.get(tag))
        if others := [OTHERWISE[tag] for tag in differ]:
            note = f" ({against} was judged {' and '.join(others)})"
    rows = judge(config.gate, metrics, reference, against)
    promoted, reason = verdict(rows, against)
    if ROLLED_BACK in candidate.tags and not by_name:
        promoted, reason = False, "it was rolled back, and returns only when promoted by number"
    elif ROLLED_BACK in candidate.tags and promoted:
        client.delete_model_version_tag(config.model, chosen, ROLLED_BACK)
    decision = Decision(config.model, chosen, against, rows, promoted, reason + note)
    client.log_dict(candidate.run_id, asdict(decision), GATE)
    outcome = "passed" if promoted else "failed"
    told = {"gate": outcome, "gate_against": against, "gate_reason": decision.reason}
    for key, value in told.items():
        client.set_model_version_tag(config.model, chosen, key, value)
    return decision


def rollback(config: Registry) -> str:
    """Put the former champion back; its version.

    The version that leaves is marked, so that the next unattended :func:`promote` leaves it out.
    Raises :class:`UserError` when no champion was replaced.
    """
    client = connected(config)
    named = versions.aliases(client, config.model)
    champion, former = named.get(versions.CHAMPION), named.get(versions.PREVIOUS)
    if champion is None or former is None:
        raise UserError(f"{config.model}: has no former champion; promote a version by number")
    if champion != former:  # Equal where an earlier call was cut off in between.
        client.set_model_version_tag(config.model, champion, ROLLED_BACK, former)
    client.set_registered_model_alias(config.model, versions.CHAMPION, former)
    earlier = versions.version_of(client, config.model, former)[0].tags.get(REPLACED)
    if earlier:
        client.set_registered_model_alias(config.model, versions.PREVIOUS, earlier)
    else:
        client.delete_registered_model_alias(config.model, versions.PREVIOUS)
    say(f"rollback: {config.model} version {former} is champion again, in place of {champion}")
    return former
