"""The forward process, what the network predicts, and how errors are weighted.

Notation as in DDPM (arXiv:2006.11239): ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise``.
Timesteps are integers in [0, T); ``abar`` is a float64 tensor of shape (T,).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch


def alphas_cumprod(schedule: Mapping[str, Any]) -> torch.Tensor:
    """``abar`` of a diffusers scheduler configuration: float64, shape (T,), falling in (0, 1).

    ``linear``: DDPM; ``scaled_linear``: latent diffusion (arXiv:2112.10752);
    ``squaredcos_cap_v2``: improved DDPM (arXiv:2102.09672, eq. 17) with betas up to 0.999.
    """
    steps = int(schedule["num_train_timesteps"])
    kind = schedule["beta_schedule"]
    if kind == "squaredcos_cap_v2":
        betas = _cosine_betas(steps)
    else:
        power = {"linear": 1.0, "scaled_linear": 0.5}[kind]
        low, high = schedule["beta_start"] ** power, schedule["beta_end"] ** power
        betas = torch.linspace(low, high, steps, dtype=torch.float64) ** (1 / power)
    return torch.cumprod(1 - betas, dim=0)


def _cosine_betas(steps: int) -> torch.Tensor:
    def level(share: float) -> float:
        return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - level((t + 1) / steps) / level(t / steps), 0.999) for t in range(steps)]
    return torch.tensor(betas, dtype=torch.float64)


def add_noise(
    abar: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """``x_t`` in closed form (DDPM, eq. 4): float (n, c, h, w) of the latents' dtype."""
    signal, spread = _coefficients(abar, latents, timesteps)
    return signal * latents + spread * noise


def target(
    prediction: str,
    abar: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """What the network should output, of the latents' shape.

    ``epsilon``: the noise (DDPM). ``v_prediction``: ``sqrt(abar) noise - sqrt(1 - abar) x_0``
    (progressive distillation, arXiv:2202.00512, section 4).
    """
    if prediction == "epsilon":
        return noise
    assert prediction == "v_prediction", prediction
    signal, spread = _coefficients(abar, latents, timesteps)
    return signal * noise - spread * latents


def predicted_original(
    prediction: str, abar: float, latents: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    """``x_0`` as a network's output at level ``abar`` implies it: of the latents' shape."""
    signal, spread = abar**0.5, (1 - abar) ** 0.5
    if prediction == "epsilon":
        return (latents - spread * output) / signal
    assert prediction == "v_prediction", prediction
    return signal * latents - spread * output


def predicted_noise(
    prediction: str, abar: float, latents: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    """The noise as a network's output at level ``abar`` implies it: of the latents' shape."""
    if prediction == "epsilon":
        return output
    assert prediction == "v_prediction", prediction
    return abar**0.5 * output + (1 - abar) ** 0.5 * latents


def snr(abar: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio ``abar / (1 - abar)`` of each timestep: shape (T,)."""
    return abar / (1 - abar)


def min_snr_weights(prediction: str, abar: torch.Tensor, gamma: float | None) -> torch.Tensor:
    """Loss weight of each timestep, shape (T,); all ones when ``gamma`` is None.

    Min-SNR (arXiv:2303.09556, section 3.4): ``min(snr, gamma)`` on the error of ``x_0``, which is
    ``/ snr`` on that of epsilon and ``/ (snr + 1)`` on that of v.
    """
    if gamma is None:
        return torch.ones_like(abar)
    ratio = snr(abar)
    on_clean = ratio.clamp(max=gamma)
    return on_clean / (ratio if prediction == "epsilon" else ratio + 1)


def _coefficients(
    abar: torch.Tensor, latents: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    level = abar.to(latents.device)[timesteps].view(-1, 1, 1, 1)
    return level.sqrt().to(latents.dtype), (1 - level).sqrt().to(latents.dtype)
