"""The reverse process in batches: prompts to pictures, each under its own seed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

from ldm.autoencoder import decode, pixels_a_latent
from ldm.batches import in_full_batches
from ldm.config import Sampling
from ldm.device import autocast, device_of
from ldm.errors import UserError
from ldm.images import to_pixels
from ldm.memory import keep_memory
from ldm.models import Source
from ldm.pipeline import load_model
from ldm.schedulers import Sampler, make_sampler
from ldm.text import tokenize
from ldm.unet import Network, denoise

LARGEST = 8
"""Sides of a picture, in sides of what the model was trained for."""
SMALL, LANES = 32 * 32, 10
"""On a CPU, pictures of at most so many latents are drawn in batches of so many, one a thread."""


@dataclass(frozen=True)
class Request:
    """One picture to draw."""

    prompt: str
    seed: int
    negative: str = ""


@dataclass(frozen=True)
class Painter:
    """A loaded model, ready to draw."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: Network
    schedule: dict[str, Any]
    device: torch.device

    @classmethod
    def load(cls, source: Source, network: str = "ldm") -> Painter:
        """Load every part of a pipeline folder, hub id or checkpoint.

        ``network`` says whose code runs the UNet: ``ldm`` or ``diffusers``.
        """
        device = device_of()
        keep_memory(device)
        encoders, unet, schedule = load_model(source, network)
        return cls(
            encoders.vae.to(device),
            encoders.tokenizer,
            encoders.text_encoder.to(device),
            unet.to(device).eval().requires_grad_(False),
            schedule,
            device,
        )

    def draw(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        height: int | None = None,
        width: int | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> Iterator[np.ndarray]:
        """Yield one uint8 (height, width, 3) picture a request, in order.

        A picture depends on its own request and settings alone: noise comes from one CPU generator
        a request, and all batches have one shape, on a CPU whatever ``batch_size`` says. On a GPU
        another batch size may give other last bits, as much as one level of 255. What is called
        ``between`` the steps may raise, to break off.

        Sizes are in pixels, by default the model's own; :class:`UserError` when the autoencoder
        cannot make one.
        """

        def run(batch: list[Request]) -> np.ndarray:
            def steps() -> Iterator[torch.Tensor]:
                for latents in self.trajectory(batch, sampling, height, width):
                    between()
                    yield latents

            return to_pixels(decode(self.vae, deque(steps(), maxlen=1).pop()))

        size, at_a_time = min(sampling.batch_size, len(requests)), 1
        if self.device.type == "cpu":
            small = math.prod(self.latent_size(height, width)) <= SMALL
            size, at_a_time = (LANES, torch.get_num_threads()) if small else (1, 1)
        return in_full_batches(run, requests, size, at_a_time)

    @torch.no_grad()  # Tensors of inference mode would be of no use to an FSDP training that draws.
    def trajectory(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        height: int | None = None,
        width: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yield the noise that sampling starts from, then the latents after each step.

        Scaled latents, float32 (n, c, h, w).

        Guidance is classifier-free (arXiv:2207.12598): towards the prompt, away from the negative,
        within an interval of noise levels (arXiv:2404.07724).
        """
        sampler = self.sampler(sampling)
        positive = self.text_states([request.prompt for request in requests])
        negative = self.text_states([request.negative for request in requests])
        shape = (self.unet.config.in_channels, *self.latent_size(height, width))
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        latents = self._noise(generators, shape) * sampler.start_scale
        yield latents
        for call, timestep in enumerate(sampler.timesteps):
            model_input = sampler.model_input(latents, call)
            share = timestep / sampler.train_steps
            guided = sampling.guided_from <= share <= sampling.guided_to
            scale = sampling.guidance if guided else 1.0
            with autocast(self.device, sampling.compute):
                output = self._guided(model_input, timestep, positive, negative, scale)
            latents = sampler.step(output, call, latents)
            if fresh := sampler.noise_scale(call):
                latents = latents + fresh * self._noise(generators, shape)
            yield latents

    def sampler(self, sampling: Sampling) -> Sampler:
        """A fresh sampler on the model's noise schedule; UserError if it cannot follow that."""
        name, steps = sampling.sampler, sampling.steps
        return make_sampler(name, self.schedule, steps, sampling.implementation)

    @torch.no_grad()
    def text_states(self, texts: Sequence[str]) -> torch.Tensor:
        """Hidden states of shape (n, tokens, width)."""
        ids = tokenize(self.tokenizer, texts).to(self.device)
        states: torch.Tensor = self.text_encoder(ids).last_hidden_state
        return states

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Latent rows and columns of a picture of this many pixels, by default the model's own."""
        scale = pixels_a_latent(self.vae)
        side = self.unet.config.sample_size * scale
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and (pixels % scale or not 1 <= pixels <= LARGEST * side):
                limit = f"a positive multiple of {scale}, at most {LARGEST * side}"
                raise UserError(f"{name} {pixels}: must be {limit}")
        return (height or side) // scale, (width or side) // scale

    def _guided(
        self,
        latents: torch.Tensor,
        timestep: float,
        positive: torch.Tensor,
        negative: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """The network's output, guided where ``scale`` is above 1; one call for both texts."""
        at = torch.tensor([timestep], device=self.device)
        if scale <= 1:
            return denoise(self.unet, latents, at, positive).float()
        states = torch.cat([negative, positive])
        both = denoise(self.unet, torch.cat([latents, latents]), at, states).float()
        away, towards = both.chunk(2)
        return away + scale * (towards - away)

    def _noise(self, generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> torch.Tensor:
        drawn = [torch.randn(shape, generator=generator) for generator in generators]
        return torch.stack(drawn).to(self.device)
