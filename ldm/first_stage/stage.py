"""``ldm first-stage``: VAE, tokenizer and CLIP from random weights, for a domain of one's own.

The output is a folder in Stable Diffusion layout without a UNet, which ``pretrained.pipeline`` and
``pretrained.clip`` may name: encode with it, then train with ``train.init: random``. Killed and
started again with the same settings and images, it goes on from the newest whole checkpoint.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionModel

from ldm import code
from ldm.artifacts import Manifest, digest_json, making, opening, write_json, write_whole
from ldm.config import FirstStage, Registry
from ldm.device import device_of, plain_attention, precision_of
from ldm.errors import UserError
from ldm.first_stage.clip import order_accuracy, retrieval, train_clip
from ldm.first_stage.layout import LayoutReader, latents_of, layout_accuracy, train_layout
from ldm.first_stage.loop import SHEETS, Run
from ldm.first_stage.perceptual import load_tower
from ldm.first_stage.tokenizer import train_tokenizer
from ldm.first_stage.vae import compared, reconstruct, train_vae
from ldm.image_shards import SPLITS, ImageReader
from ldm.images import decode_image, encode_png, psnr
from ldm.locks import held
from ldm.memory import keep_memory
from ldm.models import digest_weights
from ldm.pipeline import forget_origin
from ldm.progress import say
from ldm.run_log import LOG
from ldm.tracking.live import Live
from ldm.tracking.liveness import LOCK

PARTS = ("vae", "clip", "layout")
DECIDING = (
    "autoencoder",
    "clip_score",
    "device",
    "images",
    "learning_rate",
    "nn/attention",
    "text",
)
"""Modules that decide what is trained, besides those of this package."""
CANDIDATES = 100
"""Captions among which retrieval picks."""
SHOWN = 8
"""Held-out pictures whose reconstructions are shown."""


class Split:
    """A split of an images artifact: ``captions``, and pictures by their numbers."""

    def __init__(self, images: Manifest, split: str) -> None:
        self._reader = ImageReader(images, split)
        self._keys = self._reader.keys
        self.captions = [self._reader.caption(key) for key in self._keys]

    def __len__(self) -> int:
        return len(self.captions)

    def pictures(self, numbers: np.ndarray) -> np.ndarray:
        """uint8 (n, height, width, 3)."""
        files = (self._reader.picture(self._keys[number]) for number in numbers)
        return np.stack([decode_image(file) for file in files])


@dataclass(frozen=True)
class Parts:
    """What is trained. ``reader`` reads the text encoder's states, where layout was learned."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    clip: CLIPModel
    text_encoder: CLIPTextModel
    reader: LayoutReader | None


def first_stage(
    config: FirstStage, images: Path, out: Path, runs: Path, registry: Registry | None = None
) -> None:
    """Train on the images artifact's training split, measure on its validation split.

    Writes ``vae``, ``text_encoder``, ``tokenizer``, ``clip`` (both towers), ``log.jsonl``,
    ``reconstructions.png`` (held-out pictures above what the VAE makes of them) and
    ``measured.json`` {vae_psnr_db, clip_retrieval, clip_order, text_order}, the last with a layout
    phase. Checkpoints go to a folder of ``runs`` named by a digest of the settings, the images and
    the code that decides the result. With ``registry`` MLflow shows the training as it goes, and
    what was measured.

    Raises :class:`SystemExit` after SIGTERM or Ctrl-C, with all steps taken on disk, and UserError
    while another process writes the same.
    """
    pictures = opening(images, "images", "ingest")
    if "bucket_step" in pictures.config:
        raise UserError(
            f"{images}: has aspect buckets, first-stage learns from squares; run `ldm ingest` with "
            "ingest.bucket_step null into another folder"
        )
    device = device_of()
    keep_memory(device)
    config = settled_first_stage(config, device)
    tower = None
    inputs = {"images": pictures.digest}
    if config.vae.perceptual:
        tower = load_tower(config.vae.perceptual, config.vae.perceptual_revision).to(device)
        inputs["perceptual"] = digest_weights(tower)
    settings = settings_of_result(config)
    deciding = code.digests(*DECIDING, "first_stage")
    name = digest_json({"config": settings, "inputs": inputs, "code": deciding})[:12]
    folder = runs / f"first-stage-{name}"
    training, held_out = (Split(pictures, split) for split in SPLITS)
    with (
        held(folder / LOCK, f"{folder}: another process trains it; wait for it, or stop it"),
        making(out) as write,
        Live(registry, folder, settings, "first-stage") if registry else nullcontext() as live,
        plain_attention(device),
    ):
        every = config.checkpoint_every, config.log_every, config.sheet_every
        run = Run(folder, *every, live)
        parts = _train(config, training, held_out, run, device, tower)
        measured, sheet = _measure(parts, held_out, device)
        counts = {"train": len(training)}
        with write("first-stage", config=settings, inputs=inputs, counts=counts) as fresh:
            _save(parts, fresh)
            write_json(fresh / "measured.json", measured)
            write_whole(fresh / f"{SHEETS}.png", encode_png(sheet))
            write_whole(fresh / LOG, _logs(run))
        if live:
            live.write({"part": "held_out", "step": 0, **measured})
            live.picture(out / f"{SHEETS}.png", SHEETS)
            live.finish(opening(out, "first-stage", "first-stage").digest)
    say(
        f"first-stage: VAE {measured['vae_psnr_db']} dB, CLIP finds "
        f"{measured['clip_retrieval']:.0%} among {CANDIDATES} -> {out}"
    )


def settled_first_stage(config: FirstStage, device: torch.device) -> FirstStage:
    """The same settings with the precision that the device gives ``auto``."""
    parts = {part: getattr(config, part) for part in PARTS}
    return config.model_copy(
        update={
            part: one.model_copy(update={"compute": precision_of(one.compute, device)})
            for part, one in parts.items()
        }
    )


def settings_of_result(config: FirstStage) -> dict[str, Any]:
    """The settings that decide the result; how often to save and what to show do not."""
    how = {"log_every", "checkpoint_every", "sheet_every", "track"}
    return {key: value for key, value in config.as_dict().items() if key not in how}


def _train(
    config: FirstStage,
    training: Split,
    held_out: Split,
    run: Run,
    device: torch.device,
    tower: CLIPVisionModel | None,
) -> Parts:
    """One part after another; those that were finished before come from their last checkpoint."""
    captions = training.captions
    side = training.pictures(np.arange(1)).shape[1]
    shown = held_out.pictures(np.arange(min(SHOWN, len(held_out))))
    vae = train_vae(config.vae, training.pictures, len(captions), side, device, run, tower, shown)
    tokenizer = train_tokenizer(config.clip, captions)
    clip = train_clip(config.clip, tokenizer, training.pictures, captions, side, device, run)
    text_encoder, reader = text_encoder_of(clip), None
    if config.layout.steps:
        latents = latents_of(vae, training.pictures, len(captions))
        reader = train_layout(
            config.layout, text_encoder, tokenizer, latents, captions, device, run
        )
    return Parts(vae, tokenizer, clip, text_encoder, reader)


def text_encoder_of(clip: CLIPModel) -> CLIPTextModel:
    """A copy of CLIP's text tower."""
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    return text_encoder.eval()


def _measure(
    parts: Parts, held_out: Split, device: torch.device
) -> tuple[dict[str, Any], np.ndarray]:
    """Figures on held-out pictures, and a sheet of some above their reconstructions."""
    pixels, captions = held_out.pictures(np.arange(len(held_out))), held_out.captions
    tokenizer, clip = parts.tokenizer, parts.clip
    decoded = reconstruct(parts.vae, pixels, device)
    measured = {
        "vae_psnr_db": round(float(psnr(pixels, decoded).mean()), 2),
        "clip_retrieval": _mean_retrieval(clip, tokenizer, pixels, captions, device),
        "clip_order": order_accuracy(clip, tokenizer, pixels, captions, device),
    }
    if parts.reader is not None:
        latents = latents_of(parts.vae, held_out.pictures, len(captions))
        measured["text_order"] = layout_accuracy(
            parts.text_encoder, parts.reader, tokenizer, latents, captions, device
        )
    return measured, compared(pixels[:SHOWN], decoded[:SHOWN])


def _mean_retrieval(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    pixels: np.ndarray,
    captions: list[str],
    device: torch.device,
) -> float:
    """Retrieval among the held-out pictures, ``CANDIDATES`` of distinct captions at a time."""
    distinct = list({caption: number for number, caption in enumerate(captions)}.values())
    groups = [distinct[i : i + CANDIDATES] for i in range(0, len(distinct), CANDIDATES)]
    whole = [group for group in groups if len(group) == CANDIDATES] or groups
    rates = [
        retrieval(clip, tokenizer, pixels[group], [captions[n] for n in group], device)
        for group in whole
    ]
    return round(float(np.mean(rates)), 4)


def _save(parts: Parts, folder: Path) -> None:
    # Half precision halves the folder and moves the PSNR by less than 0.01 dB.
    parts.vae.half().save_pretrained(folder / "vae")
    parts.clip.half().save_pretrained(folder / "clip")
    parts.tokenizer.save_pretrained(folder / "clip")
    parts.tokenizer.save_pretrained(folder / "tokenizer")
    parts.text_encoder.half().save_pretrained(folder / "text_encoder")
    forget_origin(folder)


def _logs(run: Run) -> bytes:
    """The lines of all parts that were trained, in turn."""
    logs = (run.folder / part / LOG for part in PARTS)
    return b"".join(log.read_bytes() for log in logs if log.is_file())
