"""The loop of the first stage's trainings: the same steps, however often they are stopped between.

What a step draws comes from generators, torch's own and ``Loop.rng``; a checkpoint holds their
state. What is shown of it on the way draws nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ldm.artifacts import write_whole
from ldm.checkpoint import Checkpoint, Tensors, newest
from ldm.config import PartTraining
from ldm.errors import UserError
from ldm.images import encode_png
from ldm.learning_rate import rate_factor
from ldm.optimizer_state import optimizer_tensors, restore_optimizer
from ldm.progress import progress
from ldm.run_log import LOG, RunLog
from ldm.saver import Saver
from ldm.termination import Termination, taken_over
from ldm.tracking.live import Live

SHEETS = "reconstructions"
KEPT = 2
"""Checkpoints a part; the older one is for a newest that is damaged."""

Losses = Iterator[tuple[torch.Tensor, Mapping[str, torch.Tensor]]]
"""Of a step: for each module in turn what its optimizer minimises, and figures for the log."""


@dataclass(frozen=True)
class Run:
    """Where checkpoints, logs and sheets lie, a folder a part, and how often each, in steps.

    ``live`` is told of logs and sheets.
    """

    folder: Path
    checkpoint_every: int
    log_every: int
    sheet_every: int | None = None
    live: Live | None = None


class Trained(NamedTuple):
    """A module and what changes it; its groups' learning rates are the peaks of the schedule."""

    module: torch.nn.Module
    optimizer: torch.optim.Optimizer


class Loop:
    """The way of one part's modules, by name, from the newest checkpoint to the last step.

    ``first``: steps done already; ``rng``: for what a step draws.
    """

    def __init__(
        self, part: str, config: PartTraining, run: Run, trained: Mapping[str, Trained]
    ) -> None:
        self.part, self.config, self.run, self.trained = part, config, run, trained
        self.folder = run.folder / part
        self.folder.mkdir(parents=True, exist_ok=True)
        self.modules = torch.nn.ModuleDict({name: one.module for name, one in trained.items()})
        self.rng = np.random.default_rng(config.seed)
        self.first = self._resume()

    def train(
        self, losses: Callable[[int], Losses], sheet: Callable[[], np.ndarray] | None = None
    ) -> None:
        """Take the steps that are left; ``losses(step)`` says what each minimises.

        ``sheet`` makes a picture now and then, uint8 (h, w, 3).

        What follows a ``yield`` finds the module changed; one whose loss is not yielded stays as it
        is. Raises :class:`SystemExit` after SIGTERM or Ctrl-C, with a checkpoint of the last step,
        and UserError where a gradient is not finite.
        """
        steps, termination = self.config.steps, Termination()
        tell = self.run.live.write if self.run.live else None
        log = RunLog(self.folder / LOG, self.first, writes=True, tell=tell)
        numbers = range(self.first, steps)
        bar = progress(numbers, self.part, steps, "steps", done=self.first)
        optimizers = [one.optimizer for one in self.trained.values()]
        peaks = [(group, group["lr"]) for one in optimizers for group in one.param_groups]
        with taken_over(termination.ask), Saver(self.folder, KEPT) as saver:
            for step in bar:
                factor = rate_factor(step, total=steps, warmup=self.config.warmup_steps)
                for group, peak in peaks:
                    group["lr"] = peak * factor
                figures = self._step(step, losses)
                done, stopping = step + 1, termination.signal is not None
                if done == steps or done % self.run.log_every == 0:
                    rounded = {name: round(value.item(), 6) for name, value in figures.items()}
                    rate = self.config.learning_rate * factor
                    log.write({"part": self.part, "step": done, "lr": rate, **rounded})
                    norm = rounded["gradient_norm"]
                    shown = [f"{name} {value:.3g}" for name, value in rounded.items()][:2]
                    shown += [f"lr {rate:.1e}", f"gradient {norm:.2f}"]
                    bar.set_postfix_str(", ".join(shown), refresh=False)
                last = done == steps or stopping
                if last or done % self.run.checkpoint_every == 0:
                    saver.save(self._checkpoint(done), last=last)
                if sheet and done % (self.run.sheet_every or done + 1) == 0:
                    self._show(sheet(), done)
                if stopping:
                    break
        if termination.signal is not None:
            raise SystemExit(termination.exit_code)

    def _show(self, sheet: np.ndarray, step: int) -> None:
        path = self.folder / f"{SHEETS}-{step:08d}.png"
        write_whole(path, encode_png(sheet))
        if self.run.live:
            self.run.live.picture(path, SHEETS)

    def _step(self, step: int, losses: Callable[[int], Losses]) -> dict[str, torch.Tensor]:
        """Change the modules in turn; the figures of all, with gradient norms before clipping.

        The part's own is ``gradient_norm``; another module's has the module's name before it.
        """
        figures: dict[str, torch.Tensor] = {}
        modules = self.trained.items()
        for (name, one), (loss, seen) in zip(modules, losses(step), strict=False):
            # Before, not behind: another module's loss may have left gradients here.
            one.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(one.module.parameters(), 1.0)
            if not norm.isfinite():
                raise UserError(
                    f"{self.part}: the gradient of step {step + 1} is not finite; lower "
                    f"first_stage.{self.part}.learning_rate, or compute in float32; "
                    f"{self.folder} keeps the last checkpoint"
                )
            one.optimizer.step()
            mark = "" if name == self.part else f"{name}_"
            figures |= {**seen, f"{mark}gradient_norm": norm}
        return figures

    def _checkpoint(self, step: int) -> Checkpoint:
        optimizer = {
            f"{name}.{key}": tensor
            for name, one in self.trained.items()
            for key, tensor in optimizer_tensors(one.optimizer).items()
        }
        weights, random = self.modules.state_dict(), random_state(self.rng)
        return Checkpoint(step, weights, {}, optimizer, random=random)

    def _resume(self) -> int:
        """Load the newest whole checkpoint, if there is one; the number of steps done."""
        found = newest(self.folder)
        if found is None:
            return 0
        self.modules.load_state_dict(found.weights)
        for name, one in self.trained.items():
            start = f"{name}."
            own = {
                key.removeprefix(start): tensor
                for key, tensor in found.optimizer.items()
                if key.startswith(start)
            }
            restore_optimizer(one.optimizer, own)
        set_random_state(self.rng, found.random)
        return found.step


def random_state(rng: np.random.Generator) -> Tensors:
    """The state of ``rng`` and of torch's own generators: uint8 tensors by name."""
    state = json.dumps(rng.bit_generator.state).encode()
    found = {
        "numpy": torch.frombuffer(bytearray(state), dtype=torch.uint8),
        "cpu": torch.get_rng_state(),
    }
    return found | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(rng: np.random.Generator, state: Tensors) -> None:
    """Put back what :func:`random_state` took."""
    rng.bit_generator.state = json.loads(state["numpy"].numpy().tobytes())
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
