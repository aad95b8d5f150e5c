"""The forward process, what the network predicts, and how errors are weighted.

Notation as in DDPM (arXiv:2006.11239): ``x_0`` is a picture's latents, ``x_t`` the same with noise,
``x_t = signal_t x_0 + spread_t noise``. Timesteps are whole numbers in [0, T), 0 the least noisy.
Tables over timesteps are float64 tensors of shape (T,); latents are float (n, c, h, w).

``schedule`` is a diffusers scheduler configuration: ``num_train_timesteps``, ``beta_schedule``,
``beta_start``, ``beta_end``, ``prediction_type``, ``rescale_betas_zero_snr``. One of flow matching
has ``flow_shift`` instead of betas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ldm.errors import UserError

FLOW = "flow_prediction"
PREDICTIONS = ("epsilon", "v_prediction", FLOW)
POWERS = {"linear": 1.0, "scaled_linear": 0.5}
COSINE = "squaredcos_cap_v2"


def betas(schedule: Mapping[str, Any]) -> torch.Tensor:
    """Variance of the noise that each single step adds: (T,), in (0, 1].

    ``linear``: DDPM, section 4; ``scaled_linear``: latent diffusion (arXiv:2112.10752), linear in
    the square root; ``squaredcos_cap_v2``: improved DDPM (arXiv:2102.09672, eq. 17), capped.
    UserError for others.
    """
    steps, kind = int(schedule["num_train_timesteps"]), schedule["beta_schedule"]
    if schedule.get("trained_betas") is not None:
        kind = "trained_betas"
    if kind == COSINE:
        found = _cosine_betas(steps)
    elif kind not in POWERS:
        known = ", ".join((*POWERS, COSINE))
        raise UserError(f"scheduler: {kind} is not known here; give a model with one of {known}")
    else:
        power = POWERS[kind]
        low, high = schedule["beta_start"] ** power, schedule["beta_end"] ** power
        found = torch.linspace(low, high, steps, dtype=torch.float64) ** (1 / power)
    return zero_terminal_snr(found) if schedule.get("rescale_betas_zero_snr") else found


def _cosine_betas(steps: int) -> torch.Tensor:
    def level(share: float) -> float:
        return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

    found = [min(1 - level((t + 1) / steps) / level(t / steps), 0.999) for t in range(steps)]
    return torch.tensor(found, dtype=torch.float64)


def zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Betas stretched so that the last level is noise alone (arXiv:2305.08891, algorithm 1)."""
    signal = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = signal[0], signal[-1]
    abar = ((signal - last) * first / (first - last)) ** 2
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])


def alphas_cumprod(schedule: Mapping[str, Any]) -> torch.Tensor:
    """``abar_t``, the share of variance that is still signal: (T,), falling (DDPM, eq. 4)."""
    return torch.cumprod(1 - betas(schedule), dim=0)


@dataclass(frozen=True)
class Levels:
    """The forward process in closed form: what each timestep keeps and adds, (T,) each.

    ``told``: the number that the network gets for each timestep, int64 or float32 (T,).
    """

    signal: torch.Tensor
    spread: torch.Tensor
    told: torch.Tensor

    @classmethod
    def of(cls, schedule: Mapping[str, Any]) -> Levels:
        """``sqrt(abar)`` and ``sqrt(1 - abar)``; under flow prediction a straight line.

        Flow matching (arXiv:2210.02747; as rectified flow in arXiv:2209.03003): the spread rises
        evenly from ``1 / T`` to 1, or as :func:`shifted` does, and the signal is the rest. The
        network is told ``T`` times the spread, as diffusers' samplers tell it.
        """
        steps = int(schedule["num_train_timesteps"])
        if schedule.get("prediction_type") == FLOW:
            even = torch.arange(1, steps + 1, dtype=torch.float64) / steps
            spread = shifted(even, float(schedule.get("flow_shift", 1.0)))
            return cls(1 - spread, spread, (steps * spread).float())
        abar = alphas_cumprod(schedule)
        return cls(abar.sqrt(), (1 - abar).sqrt(), torch.arange(steps))

    def to(self, device: torch.device) -> Levels:
        """The same tables on a device."""
        return Levels(self.signal.to(device), self.spread.to(device), self.told.to(device))

    def __len__(self) -> int:
        return len(self.signal)

    @property
    def snr(self) -> torch.Tensor:
        """Signal-to-noise ratio of each timestep, in units of variance: (T,)."""
        return (self.signal / self.spread) ** 2

    def at(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Signal and spread of n timesteps, (n, 1, 1, 1) of the dtype and device of ``like``."""
        tables = (self.signal.to(like.device), self.spread.to(like.device))
        signal, spread = (table[timesteps].view(-1, 1, 1, 1).to(like.dtype) for table in tables)
        return signal, spread


def shifted(spread: torch.Tensor, shift: float) -> torch.Tensor:
    """Spreads of a flow, all but 0 and 1 raised by a ``shift`` above 1 (arXiv:2403.03206, eq. 23).

    The more pixels a picture has, the more noise it takes to hide as much of it.
    """
    return shift * spread / (1 + (shift - 1) * spread)


def add_noise(
    levels: Levels, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """``x_t`` from ``x_0`` in closed form (DDPM, eq. 4)."""
    signal, spread = levels.at(timesteps, latents)
    return signal * latents + spread * noise


def add_noise_once(
    betas: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, timestep: int
) -> torch.Tensor:
    """``x_t`` from ``x_(t-1)``: one step of the chain (DDPM, eq. 2)."""
    beta = float(betas[timestep])
    return math.sqrt(1 - beta) * latents + math.sqrt(beta) * noise


def target(
    prediction: str,
    levels: Levels,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """What the network should output, of the latents' shape.

    ``epsilon``: the noise (DDPM, eq. 14). ``v_prediction``: ``signal noise - spread x_0``
    (arXiv:2202.00512, section 4). ``flow_prediction``: the line's slope, ``noise - x_0``
    (arXiv:2209.03003, eq. 1).
    """
    if prediction == "epsilon":
        return noise
    if prediction == FLOW:
        return noise - latents
    assert prediction == "v_prediction", prediction
    signal, spread = levels.at(timesteps, latents)
    return signal * noise - spread * latents


def predicted_original(
    prediction: str, abar: float, latents: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    """``x_0`` as a network's output on ``latents`` of level ``abar`` implies it."""
    signal, spread = abar**0.5, (1 - abar) ** 0.5
    if prediction == "epsilon":
        return (latents - spread * output) / signal
    assert prediction == "v_prediction", prediction
    return signal * latents - spread * output


def predicted_noise(
    prediction: str, abar: float, latents: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    """The noise as a network's output on ``latents`` of level ``abar`` implies it."""
    if prediction == "epsilon":
        return output
    assert prediction == "v_prediction", prediction
    return abar**0.5 * output + (1 - abar) ** 0.5 * latents


def snr_weights(
    prediction: str, levels: Levels, gamma: float | None, floor: float = 0.0
) -> torch.Tensor:
    """Loss weight of each timestep: (T,), all ones when ``gamma`` is None.

    Min-SNR (arXiv:2303.09556, section 3.4) wants ``min(snr, gamma)`` on the squared error of
    ``x_0``; a ``floor`` below it keeps the noisiest timesteps, which decide the layout of a small
    picture, from counting for nothing (truncated SNR, arXiv:2202.00512, section 4). An error of
    epsilon is one of ``x_0`` times ``spread / signal``; an error of v, and of the flow's slope, is
    one times ``spread``.
    """
    if gamma is None:
        return torch.ones_like(levels.signal)
    on_original = levels.snr.clamp(min=floor, max=gamma)
    if prediction == "epsilon":
        return on_original / levels.snr
    return on_original * levels.spread**2
