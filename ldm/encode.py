"""Pre-encoding: pictures to posterior moments, captions to hidden states, once.

The cache holds the posterior's mean and log-variance unscaled, so that each epoch can draw its own
sample; text states are stored once a distinct caption, the empty one (for dropout) among them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

from ldm.artifacts import digest_json, opening, writing
from ldm.config import Encode, Pretrained
from ldm.device import device_of
from ldm.errors import UserError
from ldm.images import decode_image, to_model
from ldm.latents import ABOUT, IDS, MOMENTS, STATES, TEXTS, text_key, to_npy
from ldm.models import digest_weights, load_text_encoder, load_vae, locate
from ldm.progress import progress, say
from ldm.shards import ShardReader, ShardWriter
from ldm.text import tokenize

SPLITS = ("train", "validation")


def encode(config: Encode, pretrained: Pretrained, images: Path, out: Path) -> None:
    """Encode the images artifact into a latents artifact (see :mod:`ldm.latents`)."""
    pictures = opening(images, "images", "ingest")
    source = locate(pretrained.pipeline, pretrained.revision)
    device = device_of()
    vae = load_vae(source).to(device, getattr(torch, config.compute))
    tokenizer, text_encoder = load_text_encoder(source)
    text_encoder = text_encoder.to(device, getattr(torch, config.compute))
    settings = {
        "compute": config.compute,
        "storage": config.storage,
        "scaling_factor": vae.config.scaling_factor,
        "shift_factor": vae.config.shift_factor or 0.0,
    }
    inputs = {
        "images": pictures.digest,
        "vae": digest_weights(vae),
        "text_encoder": digest_weights(text_encoder),
        "tokenizer": digest_json(tokenizer.get_vocab()),
    }
    counts: dict[str, int] = {}
    extension = pictures.config["image_format"]
    with writing(out, "latents", config=settings, inputs=inputs, counts=counts) as fresh:
        captions = {""}
        for split in SPLITS:
            reader = ShardReader(images, split, frozenset({extension, "json"}))
            counts[split] = len(reader)
            captions |= _encode_split(config, vae, reader, extension, split, fresh, device)
        counts["texts"] = len(captions)
        _encode_texts(config, tokenizer, text_encoder, sorted(captions), fresh, device)
    say(
        f"encode: {counts['train']} training and {counts['validation']} validation pictures, "
        f"{counts['texts']} distinct captions -> {out}"
    )


def _encode_split(
    config: Encode,
    vae: AutoencoderKL,
    reader: ShardReader,
    extension: str,
    split: str,
    fresh: Path,
    device: torch.device,
) -> set[str]:
    captions = set()
    bar = progress(reader.keys, f"encode {split}", len(reader), "pictures")
    with ShardWriter(fresh, split, config.samples_per_shard) as shards:
        for keys in _batches(bar, config.batch_size):
            pixels = np.stack([decode_image(reader.read(key, extension)) for key in keys])
            moments = posterior_moments(vae, pixels, device).astype(config.storage)
            for key, values in zip(keys, moments, strict=True):
                if not np.isfinite(values).all():
                    raise UserError(f"{split} sample {key}: its latents are not finite")
                caption = json.loads(reader.read(key, "json"))["caption"]
                captions.add(caption)
                about = json.dumps(
                    {"caption": caption, "text": text_key(caption)}, ensure_ascii=False
                )
                shards.write(key, {MOMENTS: to_npy(values), ABOUT: about.encode()})
    return captions


@torch.no_grad()
def posterior_moments(vae: AutoencoderKL, pixels: np.ndarray, device: torch.device) -> np.ndarray:
    """uint8 (n, h, w, 3) to float32 (n, 2 x channels, h/8, w/8): mean above log-variance."""
    images = to_model(pixels).to(device, vae.dtype)
    return vae.encode(images).latent_dist.parameters.float().cpu().numpy()


def _encode_texts(
    config: Encode,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    captions: Sequence[str],
    fresh: Path,
    device: torch.device,
) -> None:
    bar = progress(captions, "encode captions", len(captions), "captions")
    with ShardWriter(fresh, TEXTS, config.samples_per_shard) as shards:
        for batch in _batches(bar, config.batch_size):
            ids = tokenize(tokenizer, batch)
            with torch.no_grad():
                states = text_encoder(ids.to(device)).last_hidden_state.float().cpu().numpy()
            for caption, states_of, ids_of in zip(batch, states, ids.numpy(), strict=True):
                members = {STATES: to_npy(states_of.astype(config.storage)), IDS: to_npy(ids_of)}
                shards.write(text_key(caption), members)


def _batches(items: Iterator[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
