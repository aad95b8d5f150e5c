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
    from mlflow.entities.model_registry import ModelVersion

OTHERWISE = {
    versions.PROMPTS: "on other prompts",
    versions.SAMPLING: "by pictures drawn with other settings",
    versions.JUDGE: "by another CLIP",
}
"""What a decision notes where two versions' tags differ."""
# Tags of a version that promotion and rollback write.
REPLACED, ROLLED_BACK = "replaced", "rolled_back"
FAILED = "failed"


def promote(config: Registry, version: str | None = None) -> Decision:
    """Let the gate decide on the challenger, or on ``version``; champion if it passes.

    The decision stays with the version: tags ``gate``, ``gate_against`` and ``gate_reason``, and
    ``gate.json`` in its run. Weights that were rolled back return only when their version is named.
    The champion's own, drawn with its settings and judged anew, take its place, and the former
    champion stays the former one.
    """
    client = connected(config)
    named = versions.aliases(client, config.model)
    chosen, champion = version or named.get(versions.CHALLENGER), named.get(versions.CHAMPION)
    if chosen is None:
        raise UserError(f"{config.model}: has no challenger; run `ldm register` first")
    if chosen == champion:
        say(f"promote: {config.model} version {chosen} is champion already")
        return Decision(config.model, chosen, f"version {chosen}", (), False, "champion already")
    by_name = version is not None
    decision, former = _decide(client, config, chosen, champion, by_name=by_name)
    if decision.promoted:
        if former and versions.exists(client, config.model, former):
            client.set_model_version_tag(config.model, chosen, REPLACED, former)
            client.set_registered_model_alias(config.model, versions.PREVIOUS, former)
        # Last, so that what is cut off before it is simply done again.
        client.set_registered_model_alias(config.model, versions.CHAMPION, chosen)
    outcome = "is champion" if decision.promoted else "is not promoted"
    say(f"promote: {config.model} version {chosen} {outcome}: {decision.reason}")
    return decision


def _decide(
    client: MlflowClient, config: Registry, chosen: str, champion: str | None, *, by_name: bool
) -> tuple[Decision, str | None]:
    """The decision, and which champion the version would replace, if any."""
    candidate, metrics = versions.version_of(client, config.model, chosen)
    against, reference, note, same, former = START, starting(metrics), "", False, champion
    if champion is not None:
        current, reference = versions.version_of(client, config.model, champion)
        against, same = f"version {champion}", _is_the_same(candidate, current)
        former = current.tags.get(REPLACED) if same else champion
        others = [
            words
            for tag, words in OTHERWISE.items()
            if tag in current.tags and current.tags[tag] != candidate.tags.get(tag)
        ]
        if others:
            note = f" ({against} was judged {' and '.join(others)})"
    # Of the same weights the figures are no reason; one may have metrics that the other has not.
    rows = () if same else judge(config.gate, metrics, reference, against)
    promoted, reason = verdict(rows, against)
    marked = versions.with_tag(client, config.model, ROLLED_BACK, candidate)
    if same:
        promoted, reason = True, f"has the weights of {against}, judged anew"
    elif marked and not by_name:
        promoted, reason = False, "it was rolled back, and returns only when promoted by number"
    elif champion is None and candidate.tags.get("gate") == FAILED and not by_name:
        promoted, reason = False, "the gate refused it; promote it by number all the same"
    elif promoted:
        for number in marked:
            client.delete_model_version_tag(config.model, number, ROLLED_BACK)
    decision = Decision(config.model, chosen, against, rows, promoted, reason + note)
    client.log_dict(candidate.run_id, asdict(decision), GATE)
    outcome = "passed" if promoted else FAILED
    told = {"gate": outcome, "gate_against": against, "gate_reason": decision.reason}
    for key, value in told.items():
        client.set_model_version_tag(config.model, chosen, key, value)
    return decision, former


def _is_the_same(version: ModelVersion, other: ModelVersion) -> bool:
    """Whether they draw the same pictures by default."""
    same = (versions.MODEL_DIGEST, versions.SAMPLING)
    return all(tag in other.tags and version.tags.get(tag) == other.tags[tag] for tag in same)


def rollback(config: Registry) -> str:
    """Put the former champion back; its version.

    The version that leaves is marked, so that the next unattended :func:`promote` leaves it out.
    Raises :class:`UserError` when no champion was replaced, or that version is gone.
    """
    client = connected(config)
    named = versions.aliases(client, config.model)
    champion, former = named.get(versions.CHAMPION), named.get(versions.PREVIOUS)
    if champion is None or former is None:
        raise UserError(f"{config.model}: has no former champion; promote a version by number")
    earlier = versions.version_of(client, config.model, former)[0].tags.get(REPLACED)
    if champion != former:  # Equal where an earlier call was cut off in between.
        client.set_model_version_tag(config.model, champion, ROLLED_BACK, former)
    client.set_registered_model_alias(config.model, versions.CHAMPION, former)
    if earlier and versions.exists(client, config.model, earlier):
        client.set_registered_model_alias(config.model, versions.PREVIOUS, earlier)
    else:
        client.delete_registered_model_alias(config.model, versions.PREVIOUS)
    say(f"rollback: {config.model} version {former} is champion again, in place of {champion}")
    return former
