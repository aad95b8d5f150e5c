"""The forward process against diffusers' own, and its closed-form identities."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from ldm.diffusion import add_noise, alphas_cumprod, min_snr_weights, snr, target

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def schedule(kind: str) -> dict[str, object]:
    return {
        "num_train_timesteps": 1000,
        "beta_schedule": kind,
        "beta_start": 0.00085,
        "beta_end": 0.012,
    }


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(6, 4, 8, 8, generator=generator)
    noise = torch.randn(6, 4, 8, 8, generator=generator)
    return latents, noise, torch.tensor([0, 1, 250, 500, 998, 999])


@pytest.mark.parametrize("kind", SCHEDULES)
def test_levels_equal_diffusers(kind: str) -> None:
    reference = DDPMScheduler(**schedule(kind)).alphas_cumprod
    torch.testing.assert_close(
        alphas_cumprod(schedule(kind)).float(), reference, rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("kind", SCHEDULES)
def test_noising_and_velocity_equal_diffusers(kind: str) -> None:
    reference = DDPMScheduler(**schedule(kind), prediction_type="v_prediction")
    latents, noise, timesteps = batch()
    abar = alphas_cumprod(schedule(kind))
    torch.testing.assert_close(
        add_noise(abar, latents, noise, timesteps),
        reference.add_noise(latents, noise, timesteps),
        rtol=1e-4,
        atol=1e-4,
    )
    torch.testing.assert_close(
        target("v_prediction", abar, latents, noise, timesteps),
        reference.get_velocity(latents, noise, timesteps),
        rtol=1e-4,
        atol=1e-4,
    )


def test_velocity_and_noisy_latents_give_the_picture_back() -> None:
    latents, noise, timesteps = batch()
    abar = alphas_cumprod(schedule("scaled_linear"))
    noisy = add_noise(abar, latents, noise, timesteps)
    velocity = target("v_prediction", abar, latents, noise, timesteps)
    level = abar[timesteps].view(-1, 1, 1, 1).float()
    torch.testing.assert_close(
        level.sqrt() * noisy - (1 - level).sqrt() * velocity, latents, rtol=1e-4, atol=1e-4
    )


def test_epsilon_target_is_the_noise() -> None:
    latents, noise, timesteps = batch()
    abar = alphas_cumprod(schedule("linear"))
    assert target("epsilon", abar, latents, noise, timesteps) is noise


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_agree_on_the_clean_picture(prediction: str) -> None:
    """Both weights, carried over to the error of x_0, are min(snr, gamma)."""
    abar = alphas_cumprod(schedule("scaled_linear"))
    weights = min_snr_weights(prediction, abar, gamma=5.0)
    to_clean = snr(abar) if prediction == "epsilon" else snr(abar) + 1
    torch.testing.assert_close(weights * to_clean, snr(abar).clamp(max=5.0))


def test_no_gamma_weighs_all_alike() -> None:
    abar = alphas_cumprod(schedule("linear"))
    assert torch.equal(min_snr_weights("epsilon", abar, None), torch.ones_like(abar))
