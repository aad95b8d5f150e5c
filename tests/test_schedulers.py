"""Every sampler against diffusers' scheduler of the same settings, step by step, in float64."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)

from ldm.diffusion import FLOW, Levels, alphas_cumprod
from ldm.errors import UserError
from ldm.schedulers import FLOW_SAMPLERS, SAMPLERS, Sampler, make_sampler

REFERENCES: dict[str, Any] = {
    "dpm++": DPMSolverMultistepScheduler,
    "dpm++sde": partial(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"),
    "euler": EulerDiscreteScheduler,
    "lms": LMSDiscreteScheduler,
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "pndm": PNDMScheduler,
}
NOISE = {"ddpm": "generator", "dpm++sde": "variance_noise"}
"""How diffusers' scheduler is told which fresh noise to add."""
STEPS = (1, 4, 10, 20, 50)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOWING = {"num_train_timesteps": 1000, "prediction_type": FLOW}
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
    *(
        (name, {**COSINE, "timestep_spacing": spacing, "lambda_min_clipped": -5.1})
        for name in ("dpm++", "dpm++sde")
        for spacing in ("trailing", "linspace")
    ),
]


def reference_of(name: str, schedule: dict[str, Any]) -> Any:
    """diffusers' scheduler, on tables in float64: its own are rounded to float32."""
    extra = {"clip_sample": False} if name in ("ddim", "ddpm") else {}
    scheduler = REFERENCES[name](**schedule, **extra)
    scheduler.alphas_cumprod = abar = alphas_cumprod(scheduler.config)
    if name.startswith("dpm++"):
        scheduler.lambda_t = 0.5 * torch.log(abar / (1 - abar))
    if name in ("ddim", "pndm"):
        ends_at_one = scheduler.config.set_alpha_to_one
        scheduler.final_alpha_cumprod = torch.ones(()).double() if ends_at_one else abar[0]
    return scheduler


def walk_together(
    ours: Sampler, theirs: Any, *, scaled: bool = True, noise: str | None = None
) -> None:
    """Both take every step from the same latents, outputs and fresh noise."""
    assert ours.timesteps == pytest.approx(theirs.timesteps.tolist(), abs=1e-4)
    generator = torch.Generator().manual_seed(ours.steps)

    def draw() -> torch.Tensor:
        return torch.randn(2, 4, 4, 4, generator=generator, dtype=torch.float64)

    latents = draw() * ours.start_scale
    for call, timestep in enumerate(theirs.timesteps):
        if scaled:
            given = theirs.scale_model_input(latents, timestep)
            torch.testing.assert_close(ours.model_input(latents, call), given, rtol=1e-5, atol=1e-5)
        output, seed = draw(), 1000 * ours.steps + call
        fresh = torch.randn(
            output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        given = {"generator": torch.Generator().manual_seed(seed), "variance_noise": fresh}
        options = {noise: given[noise]} if noise else {}
        mine = ours.step(output, call, latents) + ours.noise_scale(call) * fresh
        expected = theirs.step(output, timestep, latents, return_dict=False, **options)[0]
        scale = float(expected.abs().max())
        torch.testing.assert_close(mine, expected.double(), rtol=1e-5, atol=1e-5 * max(scale, 1))
        # Rounding to float32 inside diffusers does not add up this way.
        latents = expected.double()


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
        assert ours.start_scale == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
        walk_together(ours, theirs, noise=NOISE.get(name))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["euler", "dpm++", "dpm++sde"])
def test_flows_equal_diffusers(name: str, shift: float) -> None:
    """Euler's method, and DPM-Solver++ on a flow."""
    for steps in STEPS:
        if name == "euler":
            theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
        else:
            theirs = REFERENCES[name](prediction_type=FLOW, use_flow_sigmas=True, flow_shift=shift)
        theirs.set_timesteps(steps)
        ours = make_sampler(name, {**FLOWING, "flow_shift": shift}, steps)
        walk_together(ours, theirs, scaled=name != "euler", noise=NOISE.get(name))


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
        latents = sampler.step(output, call, latents) + sampler.noise_scale(call) * draw()
    # Those that stop at the first timestep keep its noise, three percent.
    assert float((latents - original).abs().max()) < 0.2


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", FLOW_SAMPLERS)
def test_a_perfect_network_leads_to_the_picture_along_a_flow(name: str, shift: float) -> None:
    """Wherever the network is called, what it is told is what it was told of that in training."""
    schedule = {**FLOWING, "flow_shift": shift}
    sampler, levels = make_sampler(name, schedule, 20), Levels.of(schedule)
    generator = torch.Generator().manual_seed(0)
    original, latents = torch.randn(2, 3, 4, 4, 4, generator=generator, dtype=torch.float64)
    for call, timestep in enumerate(sampler.timesteps):
        nearest = int((levels.told - timestep).abs().argmin())
        spread = float(levels.spread[nearest])
        latents = sampler.step((latents - original) / spread, call, latents)
        latents = latents + sampler.noise_scale(call) * torch.randn_like(latents)
    assert float((latents - original).abs().max()) < 0.02


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - FLOW_SAMPLERS.keys()))
def test_samplers_of_other_processes_refuse_a_flow(name: str) -> None:
    with pytest.raises(UserError, match=f"sampler {name}: .*take one of dpm.*, euler, ddim"):
        make_sampler(name, FLOWING, 10)


def test_a_schedule_of_others_is_followed_by_diffusers() -> None:
    schedule = {"num_train_timesteps": 1000, **SD, "use_karras_sigmas": True}
    assert len(make_sampler("euler", schedule, 10, "diffusers").timesteps) == 10


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [7, 30, 61, 103, 223, 240, 445])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_any_number_of_steps_stays_on_the_schedule(name: str, steps: int, spacing: str) -> None:
    schedule = {"num_train_timesteps": 1000, "timestep_spacing": spacing, **COSINE}
    timesteps = make_sampler(name, schedule, steps).timesteps
    assert abs(len(timesteps) - steps) <= 2
    assert min(timesteps) >= 0 and max(timesteps) <= 999
    assert timesteps == sorted(timesteps, reverse=True)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_schedule_that_ends_in_noise_alone_stays_finite(name: str) -> None:
    schedule = {
        "num_train_timesteps": 1000,
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        **SD,
    }
    sampler = make_sampler(name, schedule, 10)
    latents = torch.randn(1, 4, 4, 4, dtype=torch.float64) * sampler.start_scale
    for call in range(len(sampler.timesteps)):
        output = 0.1 * sampler.model_input(latents, call)
        latents = sampler.step(output, call, latents)
        latents = latents + sampler.noise_scale(call) * torch.randn_like(latents)
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"beta_schedule": "sigmoid"},
            "sigmoid is not known here; give",
        ),
        ({"timestep_spacing": "even"}, "timestep_spacing 'even' is not known"),
        ({"prediction_type": "sample"}, "prediction_type 'sample' is not known"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas is set"),
    ],
)
def test_what_ours_cannot_follow_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        make_sampler("euler", {"num_train_timesteps": 1000, **SD, **change}, 10)


@pytest.mark.parametrize("name", SAMPLERS)
def test_more_steps_than_the_schedule_has_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="too many for a schedule of 1000"):
        make_sampler(name, {"num_train_timesteps": 1000, **SD}, 1001)


def test_too_few_steps_for_runge_kutta() -> None:
    with pytest.raises(UserError, match="take 4 or more"):
        SAMPLERS["pndm"]({"num_train_timesteps": 1000, **SD}, 3)
