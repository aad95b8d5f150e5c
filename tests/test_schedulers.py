"""Every sampler against diffusers' scheduler of the same settings, step by step, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)

from ldm.diffusion import alphas_cumprod
from ldm.errors import UserError
from ldm.schedulers import SAMPLERS

REFERENCES: dict[str, Any] = {
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "lms": LMSDiscreteScheduler,
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "pndm": PNDMScheduler,
}
STEPS = (1, 4, 10, 20, 50)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, SD) for name in REFERENCES),
    *((name, {**SD, "timestep_spacing": "trailing"}) for name in REFERENCES),
    *((name, {**SD, "timestep_spacing": "linspace"}) for name in REFERENCES),
    *((name, {**SD, "timestep_spacing": "leading", "steps_offset": 1}) for name in REFERENCES),
    ("ddim", {**SD, "set_alpha_to_one": False}),
    ("pndm", {**SD, "skip_prk_steps": True}),
    ("pndm", {**SD, "skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": True}),
    ("pndm", {**SD, "skip_prk_steps": True, "timestep_spacing": "trailing"}),
    ("dpm++", {**SD, "final_sigmas_type": "sigma_min"}),
    ("dpm++", {**COSINE, "timestep_spacing": "trailing", "lambda_min_clipped": -5.1}),
    ("dpm++", {**COSINE, "timestep_spacing": "linspace", "lambda_min_clipped": -5.1}),
]


def reference_of(name: str, schedule: dict[str, Any]) -> Any:
    """diffusers' scheduler, on tables in float64: its own are rounded to float32."""
    extra = {"clip_sample": False} if name in ("ddim", "ddpm") else {}
    scheduler = REFERENCES[name](**schedule, **extra)
    scheduler.alphas_cumprod = abar = alphas_cumprod(scheduler.config)
    if name == "dpm++":
        scheduler.lambda_t = 0.5 * torch.log(abar / (1 - abar))
    if name in ("ddim", "pndm"):
        ends_at_one = scheduler.config.set_alpha_to_one
        scheduler.final_alpha_cumprod = torch.ones(()).double() if ends_at_one else abar[0]
    return scheduler


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("name", "settings"), CASES, ids=lambda value: str(value))
def test_it_equals_diffusers(name: str, settings: dict[str, Any], prediction: str) -> None:
    for steps in STEPS:
        if name == "pndm" and not settings.get("skip_prk_steps") and steps < 4:
            continue
        schedule = {"num_train_timesteps": 1000, "prediction_type": prediction, **settings}
        theirs = reference_of(name, schedule)
        theirs.set_timesteps(steps)
        ours = SAMPLERS[name](dict(theirs.config), steps)
        assert ours.timesteps == pytest.approx(theirs.timesteps.tolist(), abs=1e-4)
        assert ours.start_scale == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
        generator = torch.Generator().manual_seed(steps)

        def draw() -> torch.Tensor:
            return torch.randn(2, 4, 4, 4, generator=generator, dtype=torch.float64)  # noqa: B023

        mine = expected = draw() * ours.start_scale
        for call, timestep in enumerate(theirs.timesteps):
            torch.testing.assert_close(
                ours.model_input(mine, call),
                theirs.scale_model_input(expected, timestep),
                rtol=1e-5,
                atol=1e-5,
            )
            output, seed = draw(), 1000 * steps + call
            noise = torch.randn(
                output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
            )
            options = {"generator": torch.Generator().manual_seed(seed)} if name == "ddpm" else {}
            mine = ours.step(output, call, mine, noise)
            expected = theirs.step(output, timestep, expected, return_dict=False, **options)[0]
            scale = float(expected.abs().max())
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5 * max(scale, 1))
            # Rounding to float32 inside diffusers does not add up this way.
            mine = expected = expected.double()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_perfect_network_leads_to_the_picture(name: str, prediction: str) -> None:
    """With outputs that know the original, every sampler ends at it."""
    schedule = {
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "timestep_spacing": "trailing",
        **SD,
    }
    sampler = SAMPLERS[name](schedule, 20)
    abar = alphas_cumprod(schedule)
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        return torch.randn(3, 4, 4, 4, generator=generator, dtype=torch.float64)

    original, latents = draw(), draw() * sampler.start_scale
    for call, timestep in enumerate(sampler.timesteps):
        level = float(abar[int(timestep)])
        signal, spread = math.sqrt(level), math.sqrt(1 - level)
        noisy = sampler.model_input(latents, call)
        noise = (noisy - signal * original) / spread
        output = noise if prediction == "epsilon" else signal * noise - spread * original
        latents = sampler.step(output, call, latents, draw())
    # Those that stop at the first timestep keep its noise, three percent.
    assert float((latents - original).abs().max()) < 0.2


def test_too_few_steps_for_runge_kutta() -> None:
    with pytest.raises(UserError, match="take 4 or more"):
        SAMPLERS["pndm"]({"num_train_timesteps": 1000, **SD}, 3)
