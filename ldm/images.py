"""Pictures between their three forms: encoded bytes, uint8 pixels, model input in [-1, 1]."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image


def decode_image(content: bytes) -> np.ndarray:
    """Encoded picture to uint8 RGB of shape (height, width, 3)."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def size_of(content: bytes) -> tuple[int, int]:
    """Width and height of an encoded picture, by its header."""
    with Image.open(io.BytesIO(content)) as image:
        return image.size


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 RGB of shape (height, width, 3) to PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def to_model(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (n, height, width, 3) to float32 (n, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """Float (n, 3, height, width) in [-1, 1], clipped, to uint8 (n, height, width, 3)."""
    scaled = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()


def psnr(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each picture in dB: uint8 (n, ...) twice to float64 (n,)."""
    error = (first.astype(np.float64) - second.astype(np.float64)) ** 2
    mean = error.reshape(len(error), -1).mean(axis=1)
    return 10 * np.log10(255.0**2 / np.maximum(mean, 1e-10))
