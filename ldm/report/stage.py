"""One page about a training: what it draws, how it compares, how it went and what it came from."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ldm.artifacts import Manifest, opening, write_whole, writing
from ldm.config import Registry
from ldm.device import device_of
from ldm.errors import UserError
from ldm.images import decode_image, psnr, to_pixels
from ldm.latents import MOMENTS, SAMPLE_MEMBERS, from_npy
from ldm.memory import keep_memory
from ldm.models import Source, load_vae
from ldm.progress import progress, say
from ldm.report.chart import Curves
from ldm.report.page import Group, Link, Page, Picture, Reconstruction, Sample, render
from ldm.report.verdict import GROUPS, compared_with, comparison, registered, verdict
from ldm.run_log import LOG, entries
from ldm.shards import ShardReader
from ldm.tracking.connection import may_exist, tracking_uri

if TYPE_CHECKING:
    from ldm.registry.standing import Standing

PAGE = "index.html"
SHOWN, MEASURED, BATCH = 8, 64, 8
"""Reconstructions shown, and measured; decoded so many at a time."""
CRISP = 128
"""Pictures up to this side, in pixels, are shown pixel by pixel; larger ones are scaled down."""
STARTS = {"pretrained": "the pretrained UNet", "random": "random weights"}
TABLE_LIMIT = 300_000
"""Largest ``skipped.csv``, in bytes, that the page carries along."""


def report(
    registry: Registry, images: Path, latents: Path, model: Path, evaluation: Path, out: Path
) -> None:
    """Write ``index.html``, one page that needs no other file, to ``out``.

    Raises :class:`UserError` when an artefact is missing or was not made from the one before it.
    The registry may be missing: the page then says that the model is not registered.
    """
    made = _opened(images, latents, model, evaluation)
    standing = _standing(registry, made["model"].digest)
    metrics = json.loads((evaluation / "metrics.json").read_text())
    lines = comparison(metrics, standing, registry.gate)
    curves = read_curves(model / LOG)
    reconstructions = _reconstructions(made["images"], latents, model)
    page = Page(
        verdict=verdict(standing, lines),
        registered=registered(standing),
        groups=_groups(evaluation, metrics),
        champion=compared_with(standing),
        lines=lines,
        curves=curves,
        training=_training(made["model"], curves),
        ingest=json.loads((images / "report.json").read_text()),
        skipped_csv=_carried(images / "skipped.csv"),
        reconstructions=reconstructions[:SHOWN],
        mean_psnr=fmean(one.psnr for one in reconstructions),
        measured=len(reconstructions),
        chain=_chain(made),
        made_by=made["eval"].made_by,
    )
    inputs = {kind: manifest.digest for kind, manifest in made.items()}
    with writing(out, "report", config={}, inputs=inputs) as fresh:
        write_whole(fresh / PAGE, render(page).encode())
    say(f"report: {page.verdict.claim}: {page.verdict.reason} -> {out / PAGE}")


def _opened(images: Path, latents: Path, model: Path, evaluation: Path) -> dict[str, Manifest]:
    """The four manifests, each made from the one before it."""
    stages = {"images": "ingest", "latents": "encode", "model": "train", "eval": "evaluate"}
    paths = dict(zip(stages, (images, latents, model, evaluation), strict=True))
    made = {kind: opening(paths[kind], kind, stage) for kind, stage in stages.items()}
    for before, after in pairwise(stages):
        if made[after].inputs[before] != made[before].digest:
            raise UserError(
                f"{paths[after]}: was made from another {before} than {paths[before]}; "
                f"run `ldm {stages[after]}` again"
            )
    return made


def _standing(registry: Registry, model_digest: str) -> Standing | None:
    """What the registry knows of the model."""
    if not may_exist(tracking_uri(registry.tracking_uri)):
        return None
    from ldm.registry.standing import standing

    return standing(registry, model_digest)


def _groups(evaluation: Path, metrics: Mapping[str, Any]) -> list[Group]:
    samples: dict[str, list[Sample]] = {group: [] for group in GROUPS}
    for number, line in enumerate((evaluation / "samples.jsonl").read_text().splitlines()):
        told = json.loads(line)
        drawn, before = (
            _picture(decode_image((evaluation / folder / f"{number:03d}.png").read_bytes()))
            for folder in ("model", "start")
        )
        prompt = told["prompt"]
        chinese = any("一" <= letter <= "鿿" for letter in prompt)
        samples.setdefault(told["group"], []).append(
            Sample(
                prompt=prompt,
                language="zh" if chinese else "en" if prompt.isascii() else "",
                gloss="" if prompt.isascii() else told["english"],
                judged=told["scene"] is not None,
                fault=told["fault"],
                start_fault=told["start_fault"],
                picture=drawn,
                start_picture=before,
            )
        )
    return [
        Group(name, meaning, metrics["start"].get(metric), metrics.get(metric), samples[group])
        for group, (metric, name, meaning) in GROUPS.items()
        if samples[group]
    ]


def _picture(pixels: np.ndarray) -> Picture:
    """uint8 (h, w, 3) as WebP: without loss if it is small, else at most twice ``CRISP``."""
    image = Image.fromarray(pixels)
    crisp = max(image.size) <= CRISP
    if not crisp:
        image.thumbnail((2 * CRISP, 2 * CRISP))
    buffer = BytesIO()
    image.save(buffer, "WEBP", lossless=crisp, quality=85)
    return Picture(_data_uri("image/webp", buffer.getvalue()), crisp)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _carried(table: Path) -> str:
    """A table as an address that holds it; nothing if it is too long."""
    content = table.read_bytes()
    return _data_uri("text/csv", content) if len(content) <= TABLE_LIMIT else ""


def read_curves(log: Path) -> Curves:
    """The curves in a training's log; what is not a number is left out."""
    lines = entries(log)
    trained = [line for line in lines if math.isfinite(line.get("loss", math.nan))]
    return Curves(
        steps=[line["step"] for line in trained],
        losses=[line["loss"] for line in trained],
        rates=[line["lr"] for line in trained],
        validated=[
            (line["step"], line["val_loss"])
            for line in lines
            if math.isfinite(line.get("val_loss", math.nan))
        ],
    )


def _training(model: Manifest, curves: Curves) -> list[str]:
    config = model.config
    facts = [
        f"{config['steps']:,} steps of {config['batch_size']} samples",
        f"started from {STARTS.get(config['init'], config['init'])}",
        f"learning rate {config['learning_rate']:g}",
    ]
    if curves.validated:
        step, best = min(curves.validated, key=lambda point: point[1])
        last_step, last = curves.validated[-1]
        lowest = "its lowest" if step == last_step else f"lowest {best:.4f} at step {step:,}"
        facts.append(f"validation loss {last:.4f}, {lowest}")
    return facts


@torch.no_grad()
def _reconstructions(images: Manifest, latents: Path, model: Path) -> list[Reconstruction]:
    """The first validation pictures, decoded from the cached posterior's mean."""
    extension = images.config["image_format"]
    pictures = ShardReader(images.path, "validation", frozenset({extension, "json"}))
    cached = ShardReader(latents, "validation", SAMPLE_MEMBERS)
    device = device_of()
    keep_memory(device)
    vae = load_vae(Source(str(model))).to(device)
    keys = pictures.keys[:MEASURED]
    found = []
    starts = range(0, len(keys), BATCH)
    for start in progress(starts, "report", len(starts), "batches"):
        batch = keys[start : start + BATCH]
        originals = np.stack([decode_image(pictures.read(key, extension)) for key in batch])
        moments = np.stack([from_npy(cached.read(key, MOMENTS)) for key in batch])
        means = torch.from_numpy(np.split(moments.astype(np.float32), 2, axis=1)[0])
        decoded = to_pixels(vae.decode(means.to(device)).sample)
        quality = psnr(originals, decoded)
        for at, key in enumerate(batch):
            caption = json.loads(pictures.read(key, "json"))["caption"]
            pair = _picture(originals[at]), _picture(decoded[at])
            found.append(Reconstruction(caption, *pair, float(quality[at])))
    return found


def _chain(made: Mapping[str, Manifest]) -> list[Link]:
    """From the lists to the evaluation; the lists are known by the digests of their files."""
    lists = {**made["images"].inputs, "prompts": made["eval"].inputs["prompts"]}
    links = [Link("data", (), lists, {}, {})]
    for kind, manifest in made.items():
        counts = [f"{count:,} {name}" for name, count in manifest.counts.items()]
        parts = {
            name: digest
            for name, digest in manifest.inputs.items()
            if name not in made and name not in lists
        }
        settings = {**dict(_flat(manifest.config)), "made by": manifest.made_by}
        links.append(Link(kind, counts, {kind: manifest.digest}, parts, settings))
    return links


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)
