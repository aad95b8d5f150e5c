"""``ldm encode`` over the bare encoders, at ``tiny`` and at the size of Stable Diffusion."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch

from bench import SMALL
from bench.compare import compare
from bench.sd_encoders import TOKENS, sd_encoders
from bench.synthetic import write_images
from ldm.artifacts import opening
from ldm.config import Encode, Pretrained
from ldm.device import device_of
from ldm.encode.stage import encode
from ldm.image_shards import ImageReader
from ldm.images import decode_image, to_model
from ldm.memory import keep_large_memory
from ldm.models import load_encoders, locate
from ldm.text import tokenize

ROUNDS = 1 if SMALL else 5


def speed() -> None:
    """The whole of ``encode``, from shards to shards, over VAE and CLIP on batches in memory."""
    few, many, side = (4, 128, 64) if SMALL else (64, 8192, 256)
    keep_large_memory(device_of())  # As ``encode`` does; what it has begun, the bare loop has too.
    with tempfile.TemporaryDirectory() as folder:
        over_bare("tiny", Pretrained().pipeline, Path(folder), many, 64, 64, ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        write_sd(Path(folder) / "sd")
        over_bare("SD", f"{folder}/sd", Path(folder), few, side, 4, min(ROUNDS, 2))


def over_bare(
    name: str, pipeline: str, folder: Path, pictures: int, side: int, batch: int, rounds: int
) -> None:
    images = folder / "images"
    write_images(images, pictures, side)
    compare(
        f"encode, {name}, {pictures} pictures of {side} pixels with a caption each: a second",
        ("bare encoders", bare_encoders(images, pipeline, batch)),
        ("ldm encode", lambda: encode_aside(images, pipeline, batch)),
        pictures,
        rounds,
    )


def write_sd(folder: Path) -> None:
    """What ``encode`` reads of a pipeline, of the size of Stable Diffusion 1."""
    vae, clip = sd_encoders(small=SMALL)
    tokenizer = load_encoders(locate("tiny")).tokenizer
    tokenizer.model_max_length = TOKENS
    for part, one in {"vae": vae, "text_encoder": clip, "tokenizer": tokenizer}.items():
        one.save_pretrained(folder / part)


def bare_encoders(images: Path, pipeline: str, batch_size: int) -> Callable[[], None]:
    """A function that encodes what it holds in memory, and forgets the results."""
    device = device_of()
    encoders = load_encoders(locate(pipeline))
    vae, clip = encoders.vae.to(device), encoders.text_encoder.to(device)
    reader = ImageReader(opening(images, "images", "ingest"), "train")
    pictures = np.stack([decode_image(reader.picture(key)) for key in reader])
    captions = [reader.caption(key) for key in reader]
    pixels = to_model(pictures).split(batch_size)
    ids = tokenize(encoders.tokenizer, captions).split(batch_size)

    @torch.no_grad()
    def run() -> None:
        for batch in pixels:
            vae.encode(batch.to(device)).latent_dist.parameters.cpu()
        for batch in ids:
            clip(batch.to(device)).last_hidden_state.cpu()

    return run


def encode_aside(images: Path, pipeline: str, batch_size: int) -> None:
    """``ldm encode`` without its process's start, quietly, where nothing is known yet."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        latents, runs = (Path(folder) / name for name in ("latents", "runs"))
        config = Encode(batch_size=batch_size)
        encode(config, Pretrained(pipeline=pipeline), images, latents, runs)
