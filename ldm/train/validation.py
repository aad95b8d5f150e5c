"""The validation loss of a training: the same draws every time, in all and by noise level."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from ldm.cache import LatentCache
from ldm.denoiser import Denoiser
from ldm.termination import Termination
from ldm.train.data import one_ahead, validation_batches
from ldm.train.objective import Objective

BANDS = 4
"""Equal parts of the timesteps, from the least noisy, that the loss is told apart by."""


@torch.no_grad()
def validation_loss(
    accelerator: Accelerator,
    objective: Objective,
    denoiser: Denoiser,
    held_out: LatentCache,
    *,
    seed: int,
    batch_size: int,
    termination: Termination,
) -> dict[str, Any] | None:
    """Mean loss over the validation split, not finite where a sample's is not; None if stopped.

    The processes share each batch, and all end when one is asked to.
    """
    timesteps = len(objective.levels)
    seen = []
    batches = validation_batches(
        held_out,
        seed=seed,
        batch_size=batch_size,
        timesteps=timesteps,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    for own, count in one_ahead(batches):
        batch = own.to(accelerator.device)
        with accelerator.autocast():
            each = objective.loss(denoiser, batch)
        asked = torch.full_like(each, float(termination.signal is not None))
        *whole, asked = accelerator.gather((each, batch.timesteps, asked))
        if asked.any():
            return None
        seen.append([part[:count].cpu() for part in whole])
    losses, shown = map(torch.cat, zip(*seen, strict=True))
    bands = by_band(losses, shown, timesteps)
    return {"val_loss": float(losses.mean()), "val_loss_bands": bands}


def by_band(losses: torch.Tensor, timesteps: torch.Tensor, of: int) -> list[float | None]:
    """Mean of the losses (n,) in each of ``BANDS``, by their timesteps (n,) ``of`` so many.

    None for a band that no timestep is in.
    """
    bands = timesteps * BANDS // of
    found = (losses[bands == number] for number in range(BANDS))
    return [float(own.mean()) if len(own) else None for own in found]
