"""Batch sampling over the evaluation prompts, judged by a reader that is no part of the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm.artifacts import Manifest, digest_file, opening, write_json, write_whole, writing
from ldm.clip_score import clip_scores
from ldm.config import Evaluate, Pretrained
from ldm.device import device_of, settled_sampling
from ldm.errors import UserError
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
from ldm.text import tokenize
from ldm.unet import random_like

GROUPS = {"known": "adherence", "new": "adherence_new", "heldout": "adherence_heldout"}
"""Prompt group to metric: the share of its pictures that show exactly what was asked."""
GRID_A_GROUP = 8


@dataclass(frozen=True)
class Prompt:
    """A line of ``prompts.jsonl``; ``seed`` is the picture's own.

    ``scene`` is the description that the reader holds the picture against; prompts of the open
    world have none and are scored by CLIP alone. ``english`` is the gloss of a prompt in another
    script.
    """

    prompt: str
    seed: int
    group: str = "known"
    english: str = ""
    scene: dict[str, Any] | None = None


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
    trained = opening(model, "model", "train")
    sampling = settled_sampling(config.sampling, device_of())
    config = config.model_copy(update={"sampling": sampling})
    prompts = read_prompts(prompts_file, config.sampling.seed)
    inputs = {"model": trained.digest, "prompts": digest_file(prompts_file)}
    with writing(
        out, "eval", config=config.as_dict(), inputs=inputs, counts={"prompts": len(prompts)}
    ) as fresh:
        painter = Painter.load(Source(str(model)), pretrained.network)
        start = _start(trained, pretrained, painter)
        judged = _judge(config, painter, prompts, "evaluate model")
        before = _judge(config, start, prompts, "evaluate start")
        metrics: dict[str, Any] = {
            **judged.adherence(prompts),
            "clip_score": _clip_score(pretrained, prompts, judged.pixels),
            "val_loss": last_val_loss(model),
            "start": {
                **before.adherence(prompts),
                "clip_score": _clip_score(pretrained, prompts, before.pixels),
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


def read_prompts(path: Path, seed: int) -> list[Prompt]:
    """The evaluation prompts; picture ``i`` is drawn with seed ``seed + i``."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; run `ldm scenes` to write it")
    prompts = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            prompts.append(Prompt(**json.loads(line), seed=seed + number - 1))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}:{number}: is not an evaluation prompt ({error})") from error
    return prompts


def gloss(prompt: Prompt) -> str:
    """The prompt in Latin letters: Chinese ones by their English wording, marked."""
    return prompt.prompt if prompt.prompt.isascii() else f"[zh] {prompt.english}".strip()


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
            "run `ldm train` again"
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


def _clip_score(pretrained: Pretrained, prompts: Sequence[Prompt], pixels: np.ndarray) -> float:
    tokenizer, clip = load_clip(locate_clip(pretrained.clip, pretrained.clip_revision))
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
    shown = [
        number
        for group in GROUPS
        for number in [i for i, prompt in enumerate(prompts) if prompt.group == group][
            :GRID_A_GROUP
        ]
    ]
    grid = captioned_grid(
        [judged.pixels[i] for i in shown],
        [gloss(prompts[i]) for i in shown],
        [judged.faults[i] is None for i in shown],
        columns=GRID_A_GROUP,
    )
    write_whole(fresh / "samples.png", encode_png(grid))
