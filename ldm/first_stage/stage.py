"""``ldm first-stage``: VAE, tokenizer and CLIP from random weights, for a domain of one's own.

The output is a folder in Stable Diffusion layout without a UNet, which ``pretrained.pipeline`` and
``pretrained.clip`` may name: encode with it, then train with ``train.init: random``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPModel, CLIPTextModel

from ldm.artifacts import opening, write_json, writing
from ldm.config import FirstStage
from ldm.device import device_of
from ldm.errors import UserError
from ldm.first_stage.clip import order_accuracy, retrieval, train_clip
from ldm.first_stage.layout import latents_of, layout_accuracy, train_layout
from ldm.first_stage.tokenizer import train_tokenizer
from ldm.first_stage.vae import reconstruction_psnr, train_vae
from ldm.images import decode_image
from ldm.pipeline_folder import forget_origin
from ldm.progress import say
from ldm.shards import ShardReader

CANDIDATES = 100
"""Captions among which retrieval picks."""


def first_stage(config: FirstStage, images: Path, out: Path) -> None:
    """Train on the images artifact's training split, measure on its validation split.

    Writes ``vae``, ``text_encoder``, ``tokenizer``, ``clip`` (both towers) and ``measured.json``
    {vae_psnr_db, clip_retrieval, clip_order, text_order, seconds}.
    """
    pictures = opening(images, "images", "ingest")
    if "bucket_step" in pictures.config:
        raise UserError(
            f"{images}: has aspect buckets, first-stage learns from squares; run `ldm ingest` with "
            "ingest.bucket_step null into another folder"
        )
    device = device_of()
    extension = pictures.config["image_format"]
    pixels_of, captions = _split(images, "train", extension)
    held_out_of, held_out_captions = _split(images, "validation", extension)
    held_out = held_out_of(np.arange(len(held_out_captions)))
    side = held_out.shape[1]
    with writing(
        out,
        "first-stage",
        config=config.as_dict(),
        inputs={"images": pictures.digest},
        counts={"train": len(captions)},
    ) as fresh:
        started = time.monotonic()
        vae = train_vae(config.vae, pixels_of, len(captions), side, device)
        between = time.monotonic()
        tokenizer = train_tokenizer(config.clip, captions)
        clip = train_clip(config.clip, tokenizer, pixels_of, captions, side, device)
        after_clip = time.monotonic()
        measured: dict[str, Any] = {
            "vae_psnr_db": round(reconstruction_psnr(vae, held_out, device), 2),
            "clip_retrieval": _mean_retrieval(clip, tokenizer, held_out, held_out_captions, device),
            "clip_order": order_accuracy(clip, tokenizer, held_out, held_out_captions, device),
            "seconds": {
                "vae": round(between - started),
                "clip": round(after_clip - between),
            },
        }
        text_encoder = text_encoder_of(clip)
        if config.layout.steps:
            latents = latents_of(vae, pixels_of, len(captions), device)
            reader = train_layout(config.layout, text_encoder, tokenizer, latents, captions, device)
            measured["text_order"] = layout_accuracy(
                text_encoder,
                reader,
                tokenizer,
                latents_of(vae, held_out_of, len(held_out_captions), device),
                held_out_captions,
                device,
            )
            measured["seconds"]["layout"] = round(time.monotonic() - after_clip)
        # Half precision halves the folder and moves the PSNR by less than 0.01 dB.
        vae.half().save_pretrained(fresh / "vae")
        clip.half().save_pretrained(fresh / "clip")
        tokenizer.save_pretrained(fresh / "clip")
        tokenizer.save_pretrained(fresh / "tokenizer")
        text_encoder.half().save_pretrained(fresh / "text_encoder")
        forget_origin(fresh)
        write_json(fresh / "measured.json", measured)
    say(
        f"first-stage: VAE {measured['vae_psnr_db']} dB, CLIP finds "
        f"{measured['clip_retrieval']:.0%} among {CANDIDATES} -> {out}"
    )


def text_encoder_of(clip: CLIPModel) -> CLIPTextModel:
    """A copy of CLIP's text tower."""
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    return text_encoder.eval()


def _split(
    images: Path, split: str, extension: str
) -> tuple[Callable[[np.ndarray], np.ndarray], list[str]]:
    """A function from sample numbers to uint8 (n, h, w, 3), and the captions by number."""
    reader = ShardReader(images, split, frozenset({extension, "json"}))
    keys = reader.keys
    captions = [str(json.loads(reader.read(key, "json"))["caption"]) for key in keys]

    def pixels(numbers: np.ndarray) -> np.ndarray:
        return np.stack([decode_image(reader.read(keys[number], extension)) for number in numbers])

    return pixels, captions


def _mean_retrieval(
    clip: torch.nn.Module,
    tokenizer: object,
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
