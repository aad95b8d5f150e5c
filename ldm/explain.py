"""Diffusion to look at: a picture into noise, and noise into a picture, as filmstrips and a GIF."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ldm.artifacts import write_whole
from ldm.autoencoder import decode, encode, pixels_a_latent
from ldm.config import Sampling
from ldm.diffusion import Levels, add_noise
from ldm.errors import UserError
from ldm.grid import captioned_grid
from ldm.images import encode_png, to_model, to_pixels
from ldm.models import locate
from ldm.progress import say
from ldm.sampling import Painter, Request

LOOKS = (0, 25, 70, 100)
"""Where the filmstrips look, in percent of the way from the picture to noise."""
STEPS = 20
"""Of the way back, and frames of the GIF each way."""
FRAME_MS, HOLD_MS = 90, 1200


def explain(
    model: str, picture: Path, prompt: str, seed: int, out: Path, network: str = "ldm"
) -> None:
    """Write ``forward.png``, ``reverse.png`` and ``diffusion.gif`` to ``out``.

    Forward: the picture's latents with more and more noise (see :func:`ldm.diffusion.add_noise`),
    decoded. Reverse: from noise alone, step by step (DDIM), to a picture of ``prompt``.
    """
    painter = Painter.load(locate(model), network)
    there = forward(painter, read_picture(picture, painter), seed)
    back = reverse(painter, prompt, seed)
    out.mkdir(parents=True, exist_ok=True)
    ways = {"forward": there, "reverse": back[::-1]}
    for name, frames in ways.items():
        shown = LOOKS if name == "forward" else LOOKS[::-1]
        tiles = [frames[look * STEPS // 100] for look in shown]
        captions = [f"{look} % noise" for look in shown]
        strip = captioned_grid(tiles, captions, columns=len(shown))
        write_whole(out / f"{name}.png", encode_png(strip))
    write_whole(out / "diffusion.gif", animation([*there, *back]))
    say(f"explain: forward.png, reverse.png, diffusion.gif -> {out}")


def read_picture(path: Path, painter: Painter) -> np.ndarray:
    """A picture file, cropped to the middle, at the model's own size: uint8 (h, w, 3)."""
    rows, columns = painter.latent_size(None, None)
    scale = pixels_a_latent(painter.vae)
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path}: is no picture that can be read ({error}); give a PNG or JPEG file"
        ) from error
    # Not np.asarray: torch warns of memory that is not to be written.
    return np.array(ImageOps.fit(upright, (columns * scale, rows * scale)))


@torch.inference_mode()
def forward(painter: Painter, pixels: np.ndarray, seed: int) -> list[np.ndarray]:
    """The picture with 0, 5, ... 100 % of the way to noise behind it: STEPS + 1 frames."""
    latents = encode(painter.vae, to_model(pixels[None]))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    levels = Levels.of(painter.schedule)
    frames = [to_pixels(decode(painter.vae, latents))[0]]
    for step in range(1, STEPS + 1):
        timestep = torch.tensor([step * len(levels) // STEPS - 1])
        noisy = add_noise(levels, latents, noise.to(latents), timestep)
        frames.append(to_pixels(decode(painter.vae, noisy))[0])
    return frames


def reverse(painter: Painter, prompt: str, seed: int) -> list[np.ndarray]:
    """Noise, and what each of STEPS steps leaves of it: STEPS + 1 frames."""
    sampling = Sampling(sampler="ddim", steps=STEPS)
    walk = painter.trajectory([Request(prompt, seed)], sampling)
    return [to_pixels(decode(painter.vae, latents))[0] for latents in walk]


def animation(frames: list[np.ndarray]) -> bytes:
    """An endless GIF; the first, the middle and the last frame stand still for a while."""
    shown = [Image.fromarray(one).resize((256, 256), Image.Resampling.BICUBIC) for one in frames]
    still = {0, STEPS, len(frames) - 1}
    times = [HOLD_MS if number in still else FRAME_MS for number in range(len(frames))]
    buffer = io.BytesIO()
    shown[0].save(buffer, "GIF", save_all=True, append_images=shown[1:], duration=times, loop=0)
    return buffer.getvalue()
