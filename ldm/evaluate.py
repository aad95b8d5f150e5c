"""Batch sampling over the evaluation prompts, judged by a reader that is no part of the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import CLIPModel, CLIPTokenizer

from ldm.artifacts import Manifest, digest_file, opening, write_json, write_whole, writing
from ldm.autoencoder import pixels_a_latent
from ldm.clip_score import clip_scores
from ldm.config import Evaluate, Pretrained
from ldm.device import device_of, settled_sampling
from ldm.errors import UserError
from ldm.evaluation_prompts import GROUPS, Prompt, read_prompts
from ldm.grid import captioned_grid
from ldm.images import encode_png
from ldm.models import (
    Source,
    digest_weights,
    load_clip,
    load_text_encoder,
    locate,
    locate_clip,
    starting_model,
)
from ldm.pipeline import load_unet
from ldm.progress import progress, say
from ldm.run_log import last_val_loss
from ldm.sampling import Painter, Request
from ldm.scenes.lists import read_description
from ldm.scenes.reader import mismatch, read_scene
from ldm.scenes.world import CANVAS
from ldm.text import tokenize
from ldm.unet import random_like

SHEET_COLUMNS, SHEET_ROWS = 8, 3


@dataclass(frozen=True)
class Judged:
    """A model's pictures, uint8 (n, h, w, 3), and what is wrong with each (None: nothing)."""

    pixels: np.ndarray
    faults: list[str | None]

    def adherence(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """The share of faultless pictures of each group that has scenes, by metric."""
        rates = {}
        for group, metric in GROUPS.items():
            faults = [
                fault
                for fault, prompt in zip(self.faults, prompts, strict=True)
                if prompt.group == group and prompt.scene
            ]
            if faults:
                rates[metric] = round(sum(fault is None for fault in faults) / len(faults), 4)
        return rates


def evaluate(
    config: Evaluate, pretrained: Pretrained, model: Path, prompts_file: Path, out: Path
) -> None:
    """Draw every prompt with the trained model and with what it started from, judge and compare.

    Writes ``metrics.json``, ``samples.png`` (captioned grid), ``samples.jsonl`` (a line a prompt)
    and the pictures, ``model/NNN.png`` and ``start/NNN.png``.
    """
    prompts = read_prompts(prompts_file, config.sampling.seed)
    trained = opening(model, "model", "train")
    sampling = settled_sampling(config.sampling, device_of())
    config = config.model_copy(update={"sampling": sampling})
    clip = load_clip(locate_clip(pretrained.clip, pretrained.clip_revision))
    inputs = {
        "model": trained.digest,
        "prompts": digest_file(prompts_file),
        "clip": digest_weights(clip[1]),
    }
    with writing(
        out, "eval", config=config.as_dict(), inputs=inputs, counts={"prompts": len(prompts)}
    ) as fresh:
        painter = Painter.load(Source(str(model)), pretrained.network)
        _expect_readable(painter, prompts, prompts_file)
        start = _start(trained, pretrained, painter)
        judged = _judge(config, painter, prompts, "evaluate model")
        before = _judge(config, start, prompts, "evaluate start")
        metrics: dict[str, Any] = {
            **judged.adherence(prompts),
            "clip_score": _clip_score(*clip, prompts, judged.pixels),
            "val_loss": last_val_loss(model),
            "start": {
                **before.adherence(prompts),
                "clip_score": _clip_score(*clip, prompts, before.pixels),
            },
        }
        write_json(fresh / "metrics.json", metrics)
        _write_samples(fresh, prompts, judged, before)
    told = ", ".join(
        f"{name.replace('_', ' ')} {value:.2f} (was {metrics['start'][name]:.2f})"
        for name, value in metrics.items()
        if name in metrics["start"]
    )
    say(f"evaluate: {told} -> {out}")


def _expect_readable(painter: Painter, prompts: Sequence[Prompt], file: Path) -> None:
    """Raise :class:`UserError` if a scene is asked for, and drawn larger or smaller than scenes."""
    side = painter.latent_size(None, None)[0] * pixels_a_latent(painter.vae)
    for number, prompt in enumerate(prompts, start=1):
        if prompt.scene and side != CANVAS:
            raise UserError(
                f"{file}:{number}: has a scene, which is read from {CANVAS} pixels, and the model "
                f"draws {side}; take the scenes out, and CLIP alone judges"
            )


def _start(trained: Manifest, pretrained: Pretrained, painter: Painter) -> Painter:
    """The model before its training: the UNet it started from, with the pipeline's text encoder."""
    init = trained.config["init"]
    source = starting_model(init, pretrained)
    if source is None:
        unet = random_like(painter.unet, trained.config["seed"])
    else:
        unet = load_unet(source, pretrained.network)
    if digest_weights(unet) != trained.inputs["start"]:
        raise UserError(
            f"{trained.path}: its training did not start from what train.init {init!r} is now; "
            "run `ldm train` again, or `dvc repro --force --single-item train`"
        )
    _, text_encoder = load_text_encoder(locate(pretrained.pipeline, pretrained.revision))
    return replace(
        painter,
        text_encoder=text_encoder.to(painter.device),
        unet=unet.to(painter.device).eval().requires_grad_(False),
    )


def _judge(config: Evaluate, painter: Painter, prompts: Sequence[Prompt], what: str) -> Judged:
    requests = [Request(prompt.prompt, prompt.seed) for prompt in prompts]
    drawn = painter.draw(requests, config.sampling)
    pixels = np.stack(list(progress(drawn, what, len(requests), "pictures")))
    faults = [
        mismatch(read_scene(picture), read_description(prompt.scene)) if prompt.scene else None
        for picture, prompt in zip(pixels, prompts, strict=True)
    ]
    return Judged(pixels, faults)


def _clip_score(
    tokenizer: CLIPTokenizer, clip: CLIPModel, prompts: Sequence[Prompt], pixels: np.ndarray
) -> float:
    device = device_of()
    ids = tokenize(tokenizer, [prompt.prompt for prompt in prompts])
    return round(float(clip_scores(clip.to(device), pixels, ids, device).mean()), 3)


def _write_samples(fresh: Path, prompts: Sequence[Prompt], judged: Judged, before: Judged) -> None:
    for name, pictures in (("model", judged.pixels), ("start", before.pixels)):
        (fresh / name).mkdir()
        for number, pixels in enumerate(pictures):
            (fresh / name / f"{number:03d}.png").write_bytes(encode_png(pixels))
    lines = [
        json.dumps({**asdict(prompt), "fault": fault, "start_fault": earlier}, ensure_ascii=False)
        for prompt, fault, earlier in zip(prompts, judged.faults, before.faults, strict=True)
    ]
    write_whole(fresh / "samples.jsonl", ("\n".join(lines) + "\n").encode())
    shown = _shown(prompts)
    sheet = captioned_grid(
        [judged.pixels[number] for number in shown],
        [_caption(prompts[number], number) for number in shown],
        min(SHEET_COLUMNS, len(shown)),
        [judged.faults[number] is None if prompts[number].scene else None for number in shown],
    )
    write_whole(fresh / "samples.png", encode_png(sheet))


def _shown(prompts: Sequence[Prompt]) -> list[int]:
    """The first prompts of each group that there is, of each as many, by number."""
    numbers = {
        group: [number for number, prompt in enumerate(prompts) if prompt.group == group]
        for group in GROUPS
    }
    there = [own for own in numbers.values() if own]
    most = SHEET_COLUMNS * (SHEET_ROWS // len(there))
    return [number for own in there for number in own[:most]]


def _caption(prompt: Prompt, number: int) -> str:
    """A prompt in the letters that a sheet has: one in others by its English wording, or file."""
    if prompt.prompt.isascii():
        return prompt.prompt
    told = prompt.english or f"{number:03d}.png"
    return f"[{prompt.language}] {told}" if prompt.language else told
