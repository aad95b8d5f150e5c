"""The reverse process in batches: prompts to pictures, each under its own seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from ldm.config import Sampling
from ldm.device import device_of
from ldm.errors import UserError
from ldm.images import to_pixels
from ldm.models import Source, load_scheduler_config, load_text_encoder, load_unet, load_vae
from ldm.text import tokenize

SAMPLERS = {
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "lms": LMSDiscreteScheduler,
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
}


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
    unet: UNet2DConditionModel
    schedule: dict[str, Any]
    device: torch.device
    compute: torch.dtype

    @classmethod
    def load(cls, source: Source, compute: str = "float32") -> Painter:
        """Load every part of a pipeline folder or hub id; ``compute`` is the UNet's precision."""
        device = device_of()
        tokenizer, text_encoder = load_text_encoder(source)
        return cls(
            load_vae(source).to(device),
            tokenizer,
            text_encoder.to(device),
            load_unet(source).to(device).eval().requires_grad_(False),
            load_scheduler_config(source),
            device,
            getattr(torch, compute),
        )

    def draw(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        height: int | None = None,
        width: int | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield one uint8 (height, width, 3) picture a request, in order.

        A picture depends on its own request and settings alone: noise comes from one CPU generator
        a request, so batches may be cut anywhere. Sizes are in pixels, by default the model's own;
        :class:`UserError` when the autoencoder cannot make one.
        """
        for start in range(0, len(requests), sampling.batch_size):
            batch = requests[start : start + sampling.batch_size]
            yield from to_pixels(self.decode(self.latents(batch, sampling, height, width)))

    @torch.inference_mode()
    def latents(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        height: int | None = None,
        width: int | None = None,
    ) -> torch.Tensor:
        """Scaled latents of shape (n, c, h, w), denoised in ``sampling.steps`` steps.

        Guidance is classifier-free (arXiv:2207.12598): towards the prompt, away from the negative.
        """
        scheduler = make_scheduler(sampling.sampler, self.schedule)
        scheduler.set_timesteps(sampling.steps, device=self.device)
        states = self.text_states([request.prompt for request in requests])
        guided = sampling.guidance > 1
        if guided:
            away = self.text_states([request.negative for request in requests])
            states = torch.cat([away, states])
        latents = self._noise(requests, height, width) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            model_input = scheduler.scale_model_input(latents, timestep)
            if guided:
                model_input = torch.cat([model_input, model_input])
            with self._precision():
                output = self.unet(model_input, timestep, states, return_dict=False)[0].float()
            if guided:
                negative, positive = output.chunk(2)
                output = negative + sampling.guidance * (positive - negative)
            latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
        return latents

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents to pictures in about [-1, 1]: float (n, 3, 8 h, 8 w)."""
        shift = self.vae.config.shift_factor or 0.0
        return self.vae.decode(latents / self.vae.config.scaling_factor + shift).sample

    @torch.inference_mode()
    def text_states(self, texts: Sequence[str]) -> torch.Tensor:
        """Hidden states of shape (n, tokens, width); equal texts are encoded once."""
        distinct = list(dict.fromkeys(texts))
        ids = tokenize(self.tokenizer, distinct).to(self.device)
        states = self.text_encoder(ids).last_hidden_state
        return states[[distinct.index(text) for text in texts]]

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Latent rows and columns of a picture of this many pixels, by default the model's own."""
        pixels_a_latent = 2 ** (len(self.vae.config.block_out_channels) - 1)
        side = self.unet.config.sample_size * pixels_a_latent
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and (pixels < 1 or pixels % pixels_a_latent):
                raise UserError(
                    f"{name} {pixels}: must be a positive multiple of {pixels_a_latent}"
                )
        return (height or side) // pixels_a_latent, (width or side) // pixels_a_latent

    def _noise(
        self, requests: Sequence[Request], height: int | None, width: int | None
    ) -> torch.Tensor:
        shape = (self.unet.config.in_channels, *self.latent_size(height, width))
        drawn = [
            torch.randn(shape, generator=torch.Generator().manual_seed(request.seed))
            for request in requests
        ]
        return torch.stack(drawn).to(self.device)

    def _precision(self) -> AbstractContextManager[Any]:
        lower = self.compute != torch.float32
        return torch.autocast(self.device.type, self.compute if lower else None, enabled=lower)


def make_scheduler(sampler: str, schedule: dict[str, Any]) -> Any:
    """A diffusers sampler on the model's noise schedule, fresh for one batch."""
    extra: dict[str, Any] = {}
    if sampler == "dpm++":
        extra = {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}
        if schedule["beta_schedule"] == "squaredcos_cap_v2":
            # Below this the cosine schedule is numerically pure noise (DPM-Solver++, appendix).
            extra["lambda_min_clipped"] = -5.1
    if sampler == "pndm":
        extra = {"skip_prk_steps": True}
    return SAMPLERS[sampler].from_config({**schedule, **extra})
