"""How the registry has a model: its version, aliases, and what the gate decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ldm.config import Registry
from ldm.registry.gate import GATE, START, Decision, Row
from ldm.tracking import versions
from ldm.tracking.liveness import connected


@dataclass(frozen=True)
class Standing:
    """What the registry knows of a model.

    ``reference`` holds the metrics it was compared with, None where that version is gone.
    """

    model: str
    version: str
    run_id: str
    aliases: tuple[str, ...]
    commit: str | None
    decision: Decision | None
    reference: Mapping[str, float] | None


def standing(config: Registry, model_digest: str) -> Standing | None:
    """How the registry has the model with that manifest digest; none if it is not registered."""
    client = connected(config)
    known = versions.find_version(client, config.model, {versions.MODEL_DIGEST: model_digest})
    if known is None:
        return None
    version = str(known.version)
    named = versions.aliases(client, config.model)
    decision = _decision(known.run_id) if "gate" in known.tags else None
    reference = None
    if decision is not None and decision.against != START:
        other = decision.against.removeprefix("version ")
        if versions.exists(client, config.model, other):
            reference = versions.version_of(client, config.model, other)[1]
    aliases = tuple(sorted(alias for alias, holder in named.items() if holder == version))
    commit = known.tags.get("commit")
    return Standing(config.model, version, known.run_id, aliases, commit, decision, reference)


def _decision(run_id: str) -> Decision:
    """The decision that :func:`~ldm.registry.promotion.promote` left in the run."""
    from mlflow.artifacts import load_dict

    stored = load_dict(f"runs:/{run_id}/{GATE}")
    return Decision(**{**stored, "rows": tuple(Row(**row) for row in stored["rows"])})
