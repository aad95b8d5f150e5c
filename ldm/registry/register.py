"""Registering: a training and its evaluation become a version of the registered model.

The version is named ``challenger``, and its tags say what made it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import __version__
from ldm.artifacts import Manifest, digest_json, manifest_of, opening
from ldm.config import Registry, Sampling
from ldm.config.section import flat
from ldm.errors import UserError
from ldm.image_shards import SPLITS
from ldm.latents import SampleReader
from ldm.progress import say
from ldm.registry.gate import starting
from ldm.run_log import LOG, entries, metrics_of
from ldm.tracking import runs, versions
from ldm.tracking.commit import code_commit
from ldm.tracking.liveness import connected
from ldm.tracking.registered import SAMPLES

if TYPE_CHECKING:
    from mlflow import MlflowClient


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
    client = connected(config)
    same = {versions.MODEL_DIGEST: trained.digest, versions.EVAL_DIGEST: judged.digest}
    if known := versions.find_version(client, config.model, same):
        done = Registered(config.model, str(known.version), known.run_id, new=False)
    else:
        done = _new_version(client, config, trained, judged, metrics, tags, _samples(latents))
    client.set_registered_model_alias(config.model, versions.CHALLENGER, done.version)
    what = _figures(metrics) if done.new else "registered before"
    say(f"register: {what} -> {config.model} version {done.version}, {versions.CHALLENGER}")
    return done


def _new_version(
    client: MlflowClient,
    config: Registry,
    trained: Manifest,
    judged: Manifest,
    metrics: dict[str, Any],
    tags: dict[str, str],
    samples: str | None,
) -> Registered:
    from ldm.registry.serving import store_model

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
    version = run.name_version(config.model, source, tags, _figures(metrics))
    return Registered(config.model, version, run.identity, new=True)


def _followed(client: MlflowClient, experiment: str, model_digest: str) -> str | None:
    """The run that showed the training as it went, if it is no version's yet."""
    made_it = f"tags.{versions.MODEL_DIGEST} = '{model_digest}'"
    found = runs.runs_of(client, experiment, made_it)
    free = (run for run in found if versions.EVAL_DIGEST not in run.data.tags)
    return next((run.info.run_id for run in free), None)


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
    keys = {split: SampleReader(made, split) for split in SPLITS}
    if any(len(keys[split]) != made.counts.get(split, 0) for split in SPLITS):
        return None
    return "".join(f"{split} {key}\n" for split in SPLITS for key in sorted(keys[split]))


def _lineage(
    trained: Manifest, judged: Manifest, images: Path | None, latents: Path | None
) -> dict[str, str]:
    """Digests of all that made the model, back to the lists of URLs where they can be followed."""
    tags = {
        versions.MODEL_DIGEST: trained.digest,
        versions.EVAL_DIGEST: judged.digest,
        versions.PROMPTS: judged.inputs["prompts"],
        versions.SAMPLING: digest_json(judged.config["sampling"]),
        **({versions.JUDGE: judged.inputs["clip"]} if "clip" in judged.inputs else {}),
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


def _figures(metrics: Mapping[str, float]) -> str:
    """What was measured of the starting model too, in one line."""
    before = starting(metrics)
    return ", ".join(
        f"{name} {value:.2f} (start {before[name]:.2f})"
        for name, value in metrics.items()
        if name in before
    )
