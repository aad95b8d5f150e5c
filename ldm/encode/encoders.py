"""The frozen encoders: each result is a function of its item alone (:mod:`ldm.batches`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel

from ldm import code
from ldm.artifacts import digest_json
from ldm.batches import in_full_batches
from ldm.config import Encode
from ldm.images import decode_image, size_of, to_model

LIBRARIES = ("diffusers", "pillow", "torch", "transformers")
CODE = ("batches", "device", "encode/encoders")
PICTURE_CODE = (*CODE, "images")
"""Modules of ``ldm`` that decide a result."""
MIRROR = b"mirrored:"
"""Stands before a picture's bytes where its mirror image is meant; no picture file begins so."""
APPLIED_AT_LOAD = {"scaling_factor", "shift_factor"}


@dataclass(frozen=True)
class Encoder:
    """Items, as bytes, to an array of results (items, ...); equal fingerprints, equal results."""

    run: Callable[[list[bytes]], np.ndarray]
    shape: Callable[[bytes], Hashable]
    """Only items of equal shape can be in one batch."""
    basis: str
    """Digest of all that decides a result beside the item."""
    batch_size: int
    device: torch.device

    def fingerprint(self, item: bytes) -> str:
        """sha256 over all that the item's result depends on."""
        return hashlib.sha256(self.basis.encode() + item).hexdigest()

    def results(self, items: Iterable[bytes]) -> Iterator[np.ndarray]:
        """Each item's result, in order; two batches for each thread are held at a time.

        A new batch begins where the shape changes, so items of a shape had better come together.
        """
        at_a_time = torch.get_num_threads() if self.device.type == "cpu" else 1
        return in_full_batches(self.run, items, self.batch_size, at_a_time, self.shape)


def picture_encoder(
    vae: AutoencoderKL, digest: str, config: Encode, device: torch.device
) -> Encoder:
    """A picture's encoded bytes to its posterior moments, in the type of storage.

    Of its mirror image, where ``MIRROR`` stands before them. ``digest`` is that of the weights
    (:func:`ldm.models.digests`).
    """
    basis = _basis(digest, vae.config, config, PICTURE_CODE)
    vae = vae.to(device, getattr(torch, config.compute))

    def run(pictures: list[bytes]) -> np.ndarray:
        pixels = np.stack([_pixels(picture) for picture in pictures])
        return posterior_moments(vae, pixels, device).astype(config.storage)

    def shape(picture: bytes) -> tuple[int, int]:
        return size_of(picture.removeprefix(MIRROR))

    return Encoder(run, shape, basis, config.batch_size, device)


def _pixels(picture: bytes) -> np.ndarray:
    """uint8 (height, width, 3) of a picture's bytes, or of its mirror image."""
    pixels = decode_image(picture.removeprefix(MIRROR))
    return np.ascontiguousarray(pixels[:, ::-1]) if picture.startswith(MIRROR) else pixels


def text_encoder(clip: CLIPTextModel, digest: str, config: Encode, device: torch.device) -> Encoder:
    """A caption's int64 token ids, as bytes, to its states (tokens, width), in that type."""
    basis = _basis(digest, clip.config.to_dict(), config, CODE)
    clip = clip.to(device, getattr(torch, config.compute))

    @torch.no_grad()
    def run(captions: list[bytes]) -> np.ndarray:
        ids = np.stack([np.frombuffer(caption, np.int64) for caption in captions])
        states = clip(torch.from_numpy(ids).to(device)).last_hidden_state
        return states.float().cpu().numpy().astype(config.storage)

    return Encoder(run, len, basis, config.batch_size, device)


@torch.no_grad()
def posterior_moments(vae: AutoencoderKL, pixels: np.ndarray, device: torch.device) -> np.ndarray:
    """uint8 (n, h, w, 3) to float32 (n, 2 x channels, h/s, w/s), where a latent is s pixels wide.

    The mean is above the log-variance.
    """
    inputs = to_model(pixels).to(device, vae.dtype)
    return vae.encode(inputs).latent_dist.parameters.float().cpu().numpy()


def _basis(weights: str, shape: Mapping[str, Any], config: Encode, modules: Sequence[str]) -> str:
    return digest_json(
        {
            "weights": weights,
            "shape": {
                key: value
                for key, value in shape.items()
                if not key.startswith("_") and key not in APPLIED_AT_LOAD
            },
            "settings": config.model_dump(include={"batch_size", "compute", "storage"}),
            "code": code.digests(*modules),
            "libraries": code.versions(*LIBRARIES),
        }
    )
