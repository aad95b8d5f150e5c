"""Steps that changed no weights, because their loss or gradient was not finite."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator

from ldm.errors import UserError
from ldm.run_log import RunLog


class SkippedSteps:
    """Logs them with their samples, and ends a training that takes more than ``most`` in a row.

    ``log`` tells of those before step ``first``. The same on all processes.
    """

    def __init__(self, accelerator: Accelerator, log: RunLog, first: int, most: int) -> None:
        self.accelerator, self.log, self.most = accelerator, log, most
        self.in_a_row = log.skipped_up_to(first)

    def taken(self) -> None:
        """A step was taken."""
        self.in_a_row = 0

    def skipped(
        self, step: int, loss: float, losses: torch.Tensor, keys: Callable[[], list[str]]
    ) -> None:
        """Step number ``step`` was not: ``loss`` the mean of all processes' ``losses``.

        These are of this process's samples, (micro-batches, n); ``keys`` names all samples, by
        process. UserError for one too many.

        The scaler of fp16 finds its scale by overflowing: no fault of samples, and not counted
        among those in a row, until the scale is below 1.
        """
        scaler = self.accelerator.scaler
        if scaler is not None and math.isfinite(loss) and (scale := scaler.get_scale()) >= 1:
            self.log.write({"step": step, "loss_scale": scale})
            return
        bad = ~torch.isfinite(self.accelerator.gather(losses).flatten())
        names = keys()
        suspects = [key for key, is_bad in zip(names, bad.tolist(), strict=True) if is_bad]
        self.log.write({"step": step, "skipped": suspects or names})
        self.in_a_row += 1
        if self.in_a_row > self.most:
            raise UserError(
                f"step {step}: no finite loss or gradient for {self.in_a_row} steps in a row; "
                f"{self.log.path} names the samples; lower train.learning_rate, or compute in "
                "float32 (train.mixed_precision: no)"
            )
