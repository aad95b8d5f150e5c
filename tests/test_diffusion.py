"""The forward process against diffusers' own, and what its forms have in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from ldm.diffusion import (
    FLOW,
    Levels,
    add_noise,
    add_noise_once,
    alphas_cumprod,
    betas,
    predicted_noise,
    predicted_original,
    snr_weights,
    target,
)

KINDS = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", FLOW)


def schedule(kind: str, **changes: Any) -> dict[str, Any]:
    return {
        "num_train_timesteps": 1000,
        "beta_schedule": kind,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        **changes,
    }


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 6, 4, 8, 8, generator=generator, dtype=torch.float64)
    return latents, noise, torch.tensor([0, 1, 250, 500, 998, 999])


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_schedules_equal_diffusers(kind: str, rescaled: bool) -> None:
    settings = schedule(kind, rescale_betas_zero_snr=rescaled)
    reference = DDPMScheduler(**settings)
    # Its float32 quotients of near-zero levels, the last ones, are good to three digits.
    torch.testing.assert_close(betas(settings).float(), reference.betas, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(
        alphas_cumprod(settings), reference.alphas_cumprod.double(), rtol=0, atol=1e-6
    )


def test_zero_terminal_snr_is_zero() -> None:
    levels = Levels.of(schedule("scaled_linear", rescale_betas_zero_snr=True))
    assert float(levels.signal[-1]) == 0
    plain = Levels.of(schedule("scaled_linear"))
    assert float(levels.signal[0]) == pytest.approx(float(plain.signal[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_noising_and_velocity_equal_diffusers(kind: str) -> None:
    settings = schedule(kind)
    reference = DDPMScheduler(**settings)
    reference.alphas_cumprod = alphas_cumprod(settings)
    latents, noise, timesteps = batch()
    levels = Levels.of(settings)
    torch.testing.assert_close(
        add_noise(levels, latents, noise, timesteps),
        reference.add_noise(latents, noise, timesteps),
        rtol=1e-6,
        atol=1e-6,
    )
    torch.testing.assert_close(
        target("v_prediction", levels, latents, noise, timesteps),
        reference.get_velocity(latents, noise, timesteps),
        rtol=1e-6,
        atol=1e-6,
    )
    snr = compute_snr(reference, timesteps)  # computed in float32
    torch.testing.assert_close(levels.snr[timesteps].float(), snr, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_flow_is_a_straight_line_as_diffusers_has_it(shift: float) -> None:
    latents, noise, timesteps = batch()
    reference = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    levels = Levels.of({"num_train_timesteps": 1000, "prediction_type": FLOW, "flow_shift": shift})
    told = levels.told[timesteps]
    torch.testing.assert_close(told, reference.timesteps[999 - timesteps], rtol=1e-6, atol=0)
    expected = reference.scale_noise(latents, reference.timesteps[999 - timesteps], noise)
    noisy = add_noise(levels, latents, noise, timesteps)
    torch.testing.assert_close(noisy, expected, rtol=1e-6, atol=1e-6)
    slope = target(FLOW, levels, latents, noise, timesteps)
    spread = levels.spread[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy - spread * slope, latents)


def test_of_other_processes_the_network_is_told_the_timestep() -> None:
    assert torch.equal(Levels.of(schedule("linear")).told, torch.arange(1000))


@pytest.mark.parametrize("kind", KINDS)
def test_the_chain_and_the_closed_form_agree(kind: str) -> None:
    """Mean and variance of ``x_t``, followed step by step, and drawn."""
    settings = schedule(kind, num_train_timesteps=100, beta_end=0.12)
    variances, levels = betas(settings), Levels.of(settings)
    generator = torch.Generator().manual_seed(0)
    original = torch.full((4000, 1, 1, 4), 1.5, dtype=torch.float64)
    walked, mean, variance = original, 1.0, 0.0
    for timestep in range(100):
        noise = torch.randn(original.shape, generator=generator, dtype=torch.float64)
        walked = add_noise_once(variances, walked, noise, timestep)
        mean *= (1 - float(variances[timestep])) ** 0.5
        variance = (1 - float(variances[timestep])) * variance + float(variances[timestep])
        assert mean == pytest.approx(float(levels.signal[timestep]), rel=1e-9)
        assert variance == pytest.approx(float(levels.spread[timestep]) ** 2, rel=1e-9)
        # Five standard errors of 16,000 draws.
        error = 5 * variance**0.5 / 16000**0.5
        assert float(walked.mean()) == pytest.approx(1.5 * mean, abs=error)
        assert float(walked.var()) == pytest.approx(variance, rel=5 * (2 / 16000) ** 0.5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_right_output_gives_picture_and_noise_back(prediction: str) -> None:
    settings = schedule("scaled_linear")
    levels, abar = Levels.of(settings), alphas_cumprod(settings)
    latents, noise, timesteps = batch()
    noisy = add_noise(levels, latents, noise, timesteps)
    output = target(prediction, levels, latents, noise, timesteps)
    for number, timestep in enumerate(timesteps):
        level = float(abar[timestep])
        given = (prediction, level, noisy[number], output[number])
        torch.testing.assert_close(predicted_original(*given), latents[number])
        torch.testing.assert_close(predicted_noise(*given), noise[number])


@pytest.mark.parametrize("floor", [0.0, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_snr_weights_mean_the_same_for_the_picture(prediction: str, floor: float) -> None:
    """The weighted error of an output is the SNR, kept in bounds, times that of the picture."""
    levels = Levels.of(schedule("scaled_linear", prediction_type=prediction))
    weights = snr_weights(prediction, levels, gamma=5.0, floor=floor)
    inner = slice(0, 999)  # A flow's last level is noise alone: nothing to learn of the picture.
    of_picture = levels.spread if prediction != "epsilon" else levels.spread / levels.signal
    wanted = levels.snr.clamp(min=floor, max=5.0)
    torch.testing.assert_close((weights / of_picture**2)[inner], wanted[inner])
    assert float(weights.min()) >= 0


def test_no_gamma_weighs_all_alike() -> None:
    levels = Levels.of(schedule("linear"))
    assert torch.equal(snr_weights("epsilon", levels, None), torch.ones(1000).double())


def test_epsilon_target_is_the_noise() -> None:
    latents, noise, timesteps = batch()
    levels = Levels.of(schedule("linear"))
    assert target("epsilon", levels, latents, noise, timesteps) is noise
