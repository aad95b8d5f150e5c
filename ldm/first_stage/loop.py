"""The loop of the first stage's trainings: the same steps, however often they are stopped between.

What a step draws comes from generators, torch's own and ``Loop.rng``; a checkpoint holds their
state. What is shown of it on the way draws nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ldm.artifacts import write_whole
from ldm.checkpoint import Checkpoint, Tensors
from ldm.config import PartTraining
from ldm.errors import UserError
from ldm.images import encode_png
from ldm.learning_rate import rate_factor
from ldm.milestones import Every, Milestones
from ldm.optimizer_state import optimizer_tensors, restore_optimizer
from ldm.progress import progress
from ldm.run_log import LOG, Entry, RunLog
from ldm.runs import newest_of, restoring
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

    A part without a checkpoint starts from the newest of ``earlier``, another run, if that is
    given. More than ``max_skipped`` steps in a row without a finite loss and gradient end a
    training; the log calls their samples by ``keys``. ``live`` is told of logs and sheets.
    """

    folder: Path
    checkpoint_every: int
    log_every: int
    validate_every: int | None = None
    sheet_every: int | None = None
    max_skipped: int = 10
    earlier: Path | None = None
    keys: Sequence[str] | None = None
    live: Live | None = None


@dataclass(frozen=True)
class HeldOut:
    """What is looked at on the way: a ``sheet``, uint8 (h, w, 3), and an error.

    ``error`` returns a validation loss and figures for the log, or None if it was asked to stop.
    """

    sheet: Callable[[], np.ndarray]
    error: Callable[[Termination], tuple[float, Mapping[str, float]] | None]


class Trained(NamedTuple):
    """A module and what changes it; its groups' learning rates are the peaks of the schedule."""

    module: torch.nn.Module
    optimizer: torch.optim.Optimizer


class Loop:
    """The way of one part's modules, by name, from the newest checkpoint to the last step.

    ``first``: steps done already; ``rng``: for what a step draws; ``chosen``: the numbers of the
    samples that the step learns from, for who takes it to say.
    """

    def __init__(
        self, part: str, config: PartTraining, run: Run, trained: Mapping[str, Trained]
    ) -> None:
        self.part, self.config, self.run, self.trained = part, config, run, trained
        self.folder = run.folder / part
        self.folder.mkdir(parents=True, exist_ok=True)
        self.modules = torch.nn.ModuleDict({name: one.module for name, one in trained.items()})
        self.rng = np.random.default_rng(config.seed)
        self.chosen = np.empty(0, np.int64)
        self.first = self._resume()

    def choose(self, samples: int) -> np.ndarray:
        """The numbers of a batch of so many samples, drawn anew."""
        self.chosen = self.rng.integers(samples, size=self.config.batch_size)
        return self.chosen

    def train(self, losses: Callable[[int], Losses], held_out: HeldOut | None = None) -> None:
        """Take the steps that are left; ``losses(step)`` says what each minimises.

        What follows a ``yield`` finds the module changed; one whose loss is not yielded stays as it
        is, and so does one whose loss or gradient is not finite.

        Raises :class:`SystemExit` after SIGTERM or Ctrl-C, with a checkpoint of the last step, and
        UserError after too many steps in a row that were not finite.
        """
        steps, termination = self.config.steps, Termination()
        tell = self.run.live.write if self.run.live else None
        log = RunLog(self.folder / LOG, self.first, writes=True, tell=tell)
        skipped = log.skipped_up_to(self.first)
        numbers = range(self.first, steps)
        bar = progress(numbers, self.part, steps, "steps", done=self.first)
        optimizers = [one.optimizer for one in self.trained.values()]
        peaks = [(group, group["lr"]) for one in optimizers for group in one.param_groups]
        with taken_over(termination.ask), Saver(self.folder, KEPT) as saver:
            milestones = self._milestones(held_out, log, saver, termination)
            stopping = self.first > 0 and milestones.catch_up(self.first)
            for step in bar:
                if stopping:
                    break
                factor = rate_factor(step, total=steps, warmup=self.config.warmup_steps)
                for group, peak in peaks:
                    group["lr"] = peak * factor
                figures, unchanged = self._step(step, losses)
                done = step + 1
                if unchanged:
                    log.write(self._skipped(done, unchanged))
                    skipped += 1
                    self._expect_fewer(skipped, unchanged)
                else:
                    skipped = 0
                    if milestones.logs(done):
                        rate = self.config.learning_rate * factor
                        bar.set_postfix_str(self._write(log, done, rate, figures), refresh=False)
                asked = termination.signal is not None
                stopping = milestones.conclude(done, stopping=asked)
        if termination.signal is not None:
            raise SystemExit(termination.exit_code)

    def _milestones(
        self, held_out: HeldOut | None, log: RunLog, saver: Saver, termination: Termination
    ) -> Milestones:
        """What is due after the steps; without ``held_out``, nothing but checkpoints."""

        def validate(_: int) -> Entry | None:
            assert held_out
            found = held_out.error(termination)
            return found and {"part": self.part, "val_loss": found[0], **found[1]}

        def save(step: int, val_loss: float | None, *, last: bool) -> None:
            log.sync()
            saver.save(self._checkpoint(step, val_loss), last=last)

        def draw(step: int) -> bool:
            assert held_out
            self._show(held_out.sheet(), step)
            return termination.signal is not None

        def drawn(step: int) -> bool:
            return self._sheet(step).is_file()

        run, looks = self.run, held_out is not None
        every = Every(
            log=run.log_every,
            save=run.checkpoint_every,
            validate=run.validate_every if looks else None,
            draw=run.sheet_every if looks else None,
        )
        return Milestones(self.config.steps, every, log, validate, save, draw, drawn)

    def _write(
        self, log: RunLog, step: int, rate: float, figures: Mapping[str, torch.Tensor]
    ) -> str:
        """Log the figures of a step; some of them for the bar."""
        values = {name: value.item() for name, value in figures.items()}
        log.write({"part": self.part, "step": step, "lr": rate, **values})
        shown = [f"{name} {value:.3g}" for name, value in values.items()][:2]
        shown += [f"lr {rate:.1e}", f"gradient {values['gradient_norm']:.2f}"]
        return ", ".join(shown)

    def _sheet(self, step: int) -> Path:
        return self.folder / f"{SHEETS}-{step:08d}.png"

    def _show(self, sheet: np.ndarray, step: int) -> None:
        path = self._sheet(step)
        write_whole(path, encode_png(sheet))
        if self.run.live:
            self.run.live.picture(path, SHEETS)

    def _step(
        self, step: int, losses: Callable[[int], Losses]
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Change the modules in turn; the figures of all, and the modules left as they were.

        Figures have gradient norms before clipping. The part's own is ``gradient_norm``; another
        module's has the module's name before it.
        """
        figures: dict[str, torch.Tensor] = {}
        unchanged = []
        modules = self.trained.items()
        for (name, one), (loss, seen) in zip(modules, losses(step), strict=False):
            # Before, not behind: another module's loss may have left gradients here.
            one.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(one.module.parameters(), 1.0)
            if norm.isfinite() & loss.isfinite():
                one.optimizer.step()
            else:
                unchanged.append(name)
            mark = "" if name == self.part else f"{name}_"
            figures |= {**seen, f"{mark}gradient_norm": norm}
        return figures, unchanged

    def _skipped(self, step: int, modules: list[str]) -> Entry:
        """The line of a step that left ``modules`` as they were; each sample may be why."""
        keys, numbers = self.run.keys, self.chosen.tolist()
        samples = [keys[number] for number in numbers] if keys else numbers
        return {"part": self.part, "step": step, "skipped": modules, "samples": samples}

    def _expect_fewer(self, skipped: int, modules: list[str]) -> None:
        if skipped > self.run.max_skipped:
            rates = [f"{'' if name == self.part else f'{name}_'}learning_rate" for name in modules]
            raise UserError(
                f"{self.part}: no finite loss or gradient for {skipped} steps in a row; "
                f"{self.folder / LOG} names the samples; lower "
                f"first_stage.{self.part}.{' and '.join(rates)}, or compute in float32"
            )

    def _checkpoint(self, step: int, val_loss: float | None) -> Checkpoint:
        optimizer = {
            f"{name}.{key}": tensor
            for name, one in self.trained.items()
            for key, tensor in optimizer_tensors(one.optimizer).items()
        }
        weights, random = self.modules.state_dict(), random_state(self.rng)
        return Checkpoint(step, weights, {}, optimizer, val_loss, random)

    def _resume(self) -> int:
        """Load the newest whole checkpoint, if there is one; the number of steps done.

        UserError for another run's of another network, or of more steps than this is to take.
        """
        earlier = self.run.earlier and self.run.earlier / self.part
        found, other = newest_of(self.folder, earlier)
        if found is None:
            return 0
        if other is not None and found.step > self.config.steps:
            raise UserError(
                f"{other}: has taken {found.step} steps; raise first_stage.{self.part}.steps to "
                "that, or above"
            )
        with restoring(other):
            self._restore(found)
        return found.step

    def _restore(self, found: Checkpoint) -> None:
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
