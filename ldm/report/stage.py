"""One page about a training: what it draws, how it compares, how it went and what it came from."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.artifacts import Manifest, opening, write_whole, writing
from ldm.config import Registry
from ldm.config.section import as_text, flat
from ldm.device import device_of
from ldm.errors import UserError
from ldm.evaluation_prompts import GROUPS, Prompt, lines_of
from ldm.image_shards import ImageReader
from ldm.images import decode_image, psnr, to_pixels
from ldm.latents import MOMENTS, SampleReader, from_npy
from ldm.memory import keep_memory
from ldm.models import Source, load_vae
from ldm.progress import progress, say
from ldm.registry.standing import Standing, standing
from ldm.report.chart import Curves
from ldm.report.page import Group, Link, Page, Picture, Reconstruction, Sample, render
from ldm.report.verdict import (
    SHARES,
    compared_with,
    comparison,
    heading,
    registered,
    verdict,
)
from ldm.run_log import LOG, entries
from ldm.tracking.connection import may_exist, tracking_uri

PAGE = "index.html"
SHOWN, MEASURED = 8, 64
"""Reconstructions shown, and measured."""
CRISP = 128
"""Pictures up to this side, in pixels, are shown pixel by pixel; larger ones are scaled down."""
STARTS = {"pretrained": "the pretrained UNet", "random": "random weights"}
TABLE_LIMIT = 300_000
"""Largest ``skipped.csv``, in bytes, that the page carries along."""


def report(
    registry: Registry, images: Path, latents: Path, model: Path, evaluation: Path, out: Path
) -> None:
    """Write ``index.html``, one page that needs no other file, to ``out``.

    Raises :class:`UserError` when an artifact is missing or was not made from the one before it.
    The registry may be missing: the page then says that the model is not registered.
    """
    made = _opened(images, latents, model, evaluation)
    found = _standing(registry, made["model"].digest)
    metrics = json.loads((evaluation / "metrics.json").read_text())
    lines = comparison(metrics, found, registry.gate)
    curves = read_curves(model / LOG)
    reconstructions = _reconstructions(made["images"], made["latents"], model)
    page = Page(
        verdict=verdict(found, lines),
        registered=registered(found),
        groups=_groups(evaluation, metrics),
        champion=compared_with(found),
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
    known = may_exist(tracking_uri(registry.tracking_uri))
    return standing(registry, model_digest) if known else None


def _groups(evaluation: Path, metrics: Mapping[str, Any]) -> list[Group]:
    samples: dict[str, list[Sample]] = {group: [] for group in GROUPS}
    for number, line in enumerate(lines_of(evaluation / "samples.jsonl")):
        told = json.loads(line)
        fault, start_fault = told.pop("fault"), told.pop("start_fault")
        prompt = Prompt(**told)
        drawn, before = (
            _picture(decode_image((evaluation / folder / f"{number:03d}.png").read_bytes()))
            for folder in ("model", "start")
        )
        samples[prompt.group].append(
            Sample(
                prompt=prompt.prompt,
                language=prompt.language,
                gloss="" if prompt.prompt.isascii() else prompt.english,
                judged=prompt.scene is not None,
                fault=fault,
                start_fault=start_fault,
                picture=drawn,
                start_picture=before,
            )
        )
    return [
        Group(
            heading(SHARES[metric][0]),
            SHARES[metric][1],
            metrics["start"].get(metric),
            metrics.get(metric),
            samples[group],
        )
        for group, metric in GROUPS.items()
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
def _reconstructions(images: Manifest, latents: Manifest, model: Path) -> list[Reconstruction]:
    """Some validation pictures, decoded from the cached posterior's mean.

    They are the first by name, a hash, so that each aspect bucket has its share of them.
    """
    pictures = ImageReader(images, "validation")
    cached = SampleReader(latents, "validation")
    device = device_of()
    keep_memory(device)
    vae = load_vae(Source(str(model))).to(device)
    keys = sorted(pictures)[:MEASURED]
    found = []
    for key in progress(keys, "report", len(keys), "pictures"):
        original = decode_image(pictures.picture(key))
        moments = from_npy(cached.read(key, MOMENTS)).astype(np.float32)
        mean = torch.from_numpy(np.split(moments, 2)[0])[None]
        decoded = to_pixels(vae.decode(mean.to(device)).sample)
        (quality,) = psnr(original[None], decoded)
        pair = _picture(original), _picture(decoded[0])
        found.append(Reconstruction(pictures.caption(key), *pair, float(quality)))
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
        settings = {name: as_text(value) for name, value in flat(manifest.config)}
        settings["made by"] = manifest.made_by
        links.append(Link(kind, counts, {kind: manifest.digest}, parts, settings))
    return links
