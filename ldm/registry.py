"""Registered models: what made them, which one is champion, and the gate between.

A training becomes one MLflow run and one version of the registered model. Aliases say what a
version is: ``challenger`` (registered last), ``champion`` (in use), ``previous`` (champion before).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import __version__
from ldm.artifacts import Manifest, digest_json, manifest_of, opening
from ldm.config import Registry, Sampling
from ldm.config.section import flat
from ldm.errors import UserError
from ldm.gate import START, Decision, Row, judge, verdict
from ldm.latents import SAMPLE_MEMBERS
from ldm.live import metrics_of, note_dead
from ldm.progress import say
from ldm.registered import SAMPLES, USES
from ldm.run_log import LOG, entries
from ldm.shards import ShardReader
from ldm.tracking import connection, runs, versions
from ldm.tracking.commit import code_commit

if TYPE_CHECKING:
    from mlflow import MlflowClient

GATE = "gate.json"
EVAL_DIGEST, PROMPTS, SAMPLING = "eval_digest", "prompts_digest", "sampling_digest"
OTHERWISE = {PROMPTS: "on other prompts", SAMPLING: "by pictures drawn with other settings"}
"""What a decision notes where two versions' tags differ."""
CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
# Tags of a version that promotion and rollback write.
REPLACED, ROLLED_BACK = "replaced", "rolled_back"


@dataclass(frozen=True)
class Registered:
    """A version of the registered model; ``new`` is false when it was there already."""

    model: str
    version: str
    run_id: str
    new: bool


def register(
    config: Registry,
    model: Path,
    evaluation: Path,
    images: Path | None = None,
    latents: Path | None = None,
) -> Registered:
    """Log a training and its evaluation to MLflow, as a new version named ``challenger``.

    The same model with the same evaluation finds its version again. ``latents``, and ``images``
    behind them, extend the lineage where they are there; ``latents`` tell the samples too. Raises
    :class:`UserError` when the evaluation is of another model, or the model of other latents.
    """
    trained, judged = opening(model, "model", "train"), opening(evaluation, "eval", "evaluate")
    if judged.inputs["model"] != trained.digest:
        raise UserError(f"{evaluation}: judges another model than {model}; run `ldm evaluate`")
    metrics = dict(flat(json.loads((evaluation / "metrics.json").read_text())))
    tags = _lineage(trained, judged, images, latents)
    client = _connected(config)
    same = {versions.MODEL_DIGEST: trained.digest, EVAL_DIGEST: judged.digest}
    if known := versions.find_version(client, config.model, same):
        done = Registered(config.model, str(known.version), known.run_id, new=False)
    else:
        done = _new_version(client, config, trained, judged, metrics, tags, _samples(latents))
    client.set_registered_model_alias(config.model, CHALLENGER, done.version)
    what = _adherence(metrics) if done.new else "registered before"
    say(f"register: {what} -> {config.model} version {done.version}, {CHALLENGER}")
    return done


def _connected(config: Registry) -> MlflowClient:
    """A client; trainings that died are seen as such by whoever looks on."""
    client = connection.connect(connection.tracking_uri(config.tracking_uri))
    note_dead(config, client)
    return client


def _new_version(
    client: MlflowClient,
    config: Registry,
    trained: Manifest,
    judged: Manifest,
    metrics: dict[str, Any],
    tags: dict[str, str],
    samples: str | None,
) -> Registered:
    from ldm.serving import store_model

    points = _curves(trained.path / LOG)
    last = max((step for _, step in points), default=0)
    known = _followed(client, config.experiment, trained.digest)
    points = {} if known else points
    points |= {(name, last): value for name, value in metrics.items()}
    settings = {**trained.config, "evaluate": judged.config}
    name = trained.digest[:12]
    with runs.writing_run(client, config.experiment, name, tags, known) as run:
        run.log(dict(flat(settings)), points)
        for name in ("metrics.json", "samples.png", "samples.jsonl"):
            client.log_artifact(run.identity, str(judged.path / name))
        if samples is not None:
            client.log_text(run.identity, samples, SAMPLES)
        source = store_model(trained.path, Sampling.model_validate(judged.config["sampling"]))
    version = run.name_version(config.model, source, tags, _adherence(metrics))
    return Registered(config.model, version, run.identity, new=True)


def _followed(client: MlflowClient, experiment: str, model_digest: str) -> str | None:
    """The run that showed the training as it went, if it is no version's yet."""
    made_it = f"tags.{versions.MODEL_DIGEST} = '{model_digest}'"
    found = runs.runs_of(client, experiment, made_it)
    return next((run.info.run_id for run in found if EVAL_DIGEST not in run.data.tags), None)


def _curves(log: Path) -> runs.Points:
    """The training's figures by step."""
    return {
        (name, line["step"]): value
        for line in entries(log)
        for name, value in metrics_of(line).items()
    }


def _samples(latents: Path | None) -> str | None:
    """A line with split and key for each sample, if the latents are there with all their shards."""
    made = None if latents is None else manifest_of(latents)
    if made is None:
        return None
    keys = {split: ShardReader(made.path, split, SAMPLE_MEMBERS) for split in USES}
    if any(len(keys[split]) != made.counts.get(split, 0) for split in USES):
        return None
    return "".join(f"{split} {key}\n" for split in USES for key in sorted(keys[split]))


def _lineage(
    trained: Manifest, judged: Manifest, images: Path | None, latents: Path | None
) -> dict[str, str]:
    """Digests of all that made the model, back to the lists of URLs where they can be followed."""
    tags = {
        versions.MODEL_DIGEST: trained.digest,
        EVAL_DIGEST: judged.digest,
        PROMPTS: judged.inputs["prompts"],
        SAMPLING: digest_json(judged.config["sampling"]),
        "ldm_version": __version__,
        **{f"{name}_digest": digest for name, digest in trained.inputs.items()},
    }
    if commit := code_commit():
        tags["commit"] = commit
    # Each link is named by the one before; a link that is not there ends the chain.
    for name, path, stage in (("latents", latents, "train"), ("images", images, "encode")):
        made = None if path is None else manifest_of(path)
        if made is None or f"{name}_digest" not in tags:
            break
        if tags[f"{name}_digest"] != made.digest:
            raise UserError(f"{path}: is not what the model was made from; run `ldm {stage}`")
        tags |= {f"{key}_digest": digest for key, digest in made.inputs.items()}
    return tags


def promote(config: Registry, version: str | None = None) -> Decision:
    """Let the gate decide on the challenger, or on ``version``; champion if it passes.

    The decision stays with the version: tags ``gate``, ``gate_against`` and ``gate_reason``, and
    ``gate.json`` in its run. A version that was rolled back returns only when it is named.
    """
    client = _connected(config)
    named = versions.aliases(client, config.model)
    chosen, champion = version or named.get(CHALLENGER), named.get(CHAMPION)
    if chosen is None:
        raise UserError(f"{config.model}: has no challenger; run `ldm register` first")
    if chosen == champion:
        say(f"promote: {config.model} version {chosen} is champion already")
        return Decision(config.model, chosen, f"version {chosen}", (), False, "champion already")
    decision = _decide(client, config, chosen, champion, by_name=version is not None)
    if decision.promoted:
        if champion is not None:
            client.set_model_version_tag(config.model, chosen, REPLACED, champion)
            client.set_registered_model_alias(config.model, PREVIOUS, champion)
        # Last, so that what is cut off before it is simply done again.
        client.set_registered_model_alias(config.model, CHAMPION, chosen)
    outcome = "is champion" if decision.promoted else "is not promoted"
    say(f"promote: {config.model} version {chosen} {outcome}: {decision.reason}")
    return decision


def _decide(
    client: MlflowClient, config: Registry, chosen: str, champion: str | None, *, by_name: bool
) -> Decision:
    candidate, metrics = versions.version_of(client, config.model, chosen)
    against, reference, note = START, _starting(metrics), ""
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


@dataclass(frozen=True)
class Standing:
    """What the registry knows of a model; ``reference`` holds the metrics it was compared with."""

    model: str
    version: str
    run_id: str
    aliases: tuple[str, ...]
    commit: str | None
    decision: Decision | None
    reference: Mapping[str, float] | None


def standing(config: Registry, model_digest: str) -> Standing | None:
    """How the registry has the model with that manifest digest; none if it is not registered."""
    client = _connected(config)
    known = versions.find_version(client, config.model, {versions.MODEL_DIGEST: model_digest})
    if known is None:
        return None
    version = str(known.version)
    named = versions.aliases(client, config.model)
    decision = _decision(known.run_id) if "gate" in known.tags else None
    reference = None
    if decision is not None and decision.against != START:
        other = decision.against.removeprefix("version ")
        reference = versions.version_of(client, config.model, other)[1]
    aliases = tuple(sorted(alias for alias, holder in named.items() if holder == version))
    commit = known.tags.get("commit")
    return Standing(config.model, version, known.run_id, aliases, commit, decision, reference)


def _decision(run_id: str) -> Decision:
    """The decision that :func:`promote` left in the run."""
    from mlflow.artifacts import load_dict

    stored = load_dict(f"runs:/{run_id}/{GATE}")
    return Decision(**{**stored, "rows": tuple(Row(**row) for row in stored["rows"])})


def rollback(config: Registry) -> str:
    """Put the former champion back; its version.

    The version that leaves is marked, so that the next unattended :func:`promote` leaves it out.
    Raises :class:`UserError` when no champion was replaced.
    """
    client = _connected(config)
    named = versions.aliases(client, config.model)
    champion, former = named.get(CHAMPION), named.get(PREVIOUS)
    if champion is None or former is None:
        raise UserError(f"{config.model}: has no former champion; promote a version by number")
    if champion != former:  # Equal where an earlier call was cut off in between.
        client.set_model_version_tag(config.model, champion, ROLLED_BACK, former)
    client.set_registered_model_alias(config.model, CHAMPION, former)
    earlier = versions.version_of(client, config.model, former)[0].tags.get(REPLACED)
    if earlier:
        client.set_registered_model_alias(config.model, PREVIOUS, earlier)
    else:
        client.delete_registered_model_alias(config.model, PREVIOUS)
    say(f"rollback: {config.model} version {former} is champion again, in place of {champion}")
    return former


def _adherence(metrics: Mapping[str, float]) -> str:
    """The figures in one line, each beside the starting model's."""
    before = _starting(metrics)
    return ", ".join(
        f"{name} {value:.2f} (start {before.get(name, math.nan):.2f})"
        for name, value in metrics.items()
        if name.startswith("adherence")
    )


def _starting(metrics: Mapping[str, float]) -> dict[str, float]:
    """The starting model's metrics, under their plain names."""
    marked = {name for name in metrics if name.startswith(f"{START}.")}
    return {name.removeprefix(f"{START}."): metrics[name] for name in marked}
