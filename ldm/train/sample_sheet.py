"""What a training draws while it goes on: the same prompts under the same seeds every time."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.artifacts import write_whole
from ldm.cache import LatentCache
from ldm.config import Sampling, Train
from ldm.device import device_of
from ldm.errors import UserError
from ldm.grid import captioned_grid
from ldm.images import encode_png
from ldm.models import Encoders
from ldm.sampling import Painter, Request
from ldm.schedulers import make_sampler
from ldm.unet import Network

COLUMNS, DEFAULT_PROMPTS = 4, 12


def expect_drawable(sampling: Sampling, schedule: dict[str, Any]) -> None:
    """UserError where ``sampling`` cannot follow a noise schedule; all processes may ask."""
    try:
        make_sampler(sampling.sampler, schedule, sampling.steps, sampling.implementation)
    except UserError as error:
        raise UserError(
            f"evaluate.sampling: cannot draw the training's sheets ({error}); change that, or set "
            "train.sample_every to null"
        ) from error


def sheet_name(step: int) -> str:
    """Of its file, in the run's folder."""
    return f"samples-{step:08d}.png"


@dataclass(frozen=True)
class SampleSheet:
    """Draws with a painter that shares the training's network."""

    painter: Painter
    prompts: tuple[str, ...]
    sampling: Sampling

    @classmethod
    def of(
        cls,
        config: Train,
        sampling: Sampling,
        held_out: LatentCache,
        encoders: Encoders,
        unet: Network,
        schedule: dict[str, Any],
    ) -> SampleSheet | None:
        """What a training is to draw, with the very network that it trains; None for nothing."""
        if config.sample_every is None:
            return None
        captions = dict.fromkeys(held_out.caption(sample) for sample in range(len(held_out)))
        # The sheet's font has no other letters.
        first = sorted(captions, key=lambda caption: not caption.isascii())[:DEFAULT_PROMPTS]
        device = device_of()
        vae, text_encoder = encoders.vae.to(device), encoders.text_encoder.to(device)
        # One that has been used is saved with other settings.
        tokenizer = deepcopy(encoders.tokenizer)
        painter = Painter(vae, tokenizer, text_encoder, unet, schedule, device)
        return cls(painter, config.sample_prompts or tuple(first), sampling)

    def draw(
        self, run: Path, step: int, between: Callable[[], None], *, writes: bool = True
    ) -> Path:
        """Write ``samples-NNNNNNNN.png`` into the run's folder; or draw it only, for another.

        What is called ``between`` the steps of sampling may raise, to break off.
        """
        requests = [Request(prompt, number) for number, prompt in enumerate(self.prompts)]
        pictures = list(self.painter.draw(requests, self.sampling, between=between))
        sheet = captioned_grid(pictures, self.prompts, COLUMNS)
        path = run / sheet_name(step)
        if writes:
            write_whole(path, encode_png(sheet))
        return path
