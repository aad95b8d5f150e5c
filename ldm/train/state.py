"""What a training is between two steps: taken into a checkpoint, and put back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from ldm.checkpoint import Checkpoint
from ldm.denoiser import Denoiser, trained
from ldm.errors import UserError
from ldm.optimizer_state import optimizer_tensors, restore_optimizer
from ldm.runs import newest_of, restoring
from ldm.train import fsdp
from ldm.train.ema import Ema


@dataclass(frozen=True)
class TrainingState:
    """Weights, their average and the optimizer's state; ``sharded``: of each only a part is here.

    The optimizer is the prepared one.
    """

    accelerator: Accelerator
    denoiser: Denoiser
    optimizer: torch.optim.Optimizer
    ema: Ema
    sharded: bool

    def checkpoint(self, step: int, val_loss: float | None) -> Checkpoint:
        """The state after ``step`` steps; where it is sharded, all processes must call this."""
        optimizer = optimizer_tensors(self.optimizer, self.accelerator.scaler)
        weights, average = trained(self.denoiser), self.ema.average
        state = Checkpoint(step, weights, average, optimizer, val_loss, averaged=self.ema.upto)
        return fsdp.gathered(state) if self.sharded else state

    def resume(self, run: Path, earlier: Path | None, steps: int) -> tuple[int, bool]:
        """Take over the newest whole checkpoint of a run, or else of the ``earlier`` one.

        Returns the number of steps done, 0 if there is none, and whether this run did them.
        UserError where the processes find different ones, or the earlier run's does not fit or
        has taken ``steps`` already.
        """
        found, other = newest_of(run, earlier)
        self._expect_all_at(0 if found is None else found.step, run)
        if found is None:
            return 0, False
        if other is not None and found.step >= steps:
            raise UserError(f"{other}: has taken {found.step} steps; raise train.steps above that")
        with restoring(other):
            self._restore(found)
        return found.step, other is None

    def _restore(self, found: Checkpoint) -> None:
        if self.sharded:
            found = fsdp.scattered(found, self.denoiser, self.optimizer)
        self.denoiser.restore(found.weights)
        restore_optimizer(self.optimizer, found.optimizer, self.accelerator.scaler)
        device = self.accelerator.device
        self.ema.average = {name: tensor.to(device) for name, tensor in found.ema.items()}
        self.ema.upto = found.averaged

    def _expect_all_at(self, step: int, run: Path) -> None:
        """Else the processes would go on with different weights, and wait for each other."""
        own = torch.tensor([step], device=self.accelerator.device)
        found = sorted(set(self.accelerator.gather(own).tolist()))
        if len(found) > 1:
            raise UserError(
                f"{run}: the processes find checkpoints of different steps there "
                f"({', '.join(map(str, found))}); let all of them see one folder --runs"
            )
