"""What the first stage's parts are worth, on held-out pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import CLIPModel, CLIPTokenizer

from ldm.first_stage.clip import order_accuracy, retrieval
from ldm.first_stage.layout import latents_of, layout_accuracy
from ldm.first_stage.loop import Run
from ldm.first_stage.parts import Parts
from ldm.first_stage.split import Split
from ldm.first_stage.vae import sheet_of
from ldm.run_log import LOG, entries

CANDIDATES = 100
"""Captions among which retrieval picks."""


def measure(
    parts: Parts, held_out: Split, run: Run, device: torch.device
) -> tuple[dict[str, Any], np.ndarray]:
    """Figures on held-out pictures, and a sheet of some above their reconstructions."""
    # What the VAE's last step was measured to be.
    measured: dict[str, Any] = {"vae_psnr_db": entries(run.folder / "vae" / LOG)[-1]["val_psnr_db"]}
    if parts.clip is not None:
        measured |= _measure_text(parts, parts.clip, held_out, device)
    return measured, sheet_of(parts.vae, held_out, device)


def _measure_text(
    parts: Parts, clip: CLIPModel, held_out: Split, device: torch.device
) -> dict[str, Any]:
    pixels, captions = held_out.pictures(np.arange(len(held_out))), held_out.captions
    tokenizer = parts.tokenizer
    measured = {
        "clip_retrieval": _mean_retrieval(clip, tokenizer, pixels, captions, device),
        "clip_order": order_accuracy(clip, tokenizer, pixels, captions, device),
    }
    if parts.reader is not None:
        latents = latents_of(parts.vae, held_out.pictures, len(captions))
        measured["text_order"] = layout_accuracy(
            parts.text_encoder, parts.reader, tokenizer, latents, captions, device
        )
    return measured


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
