"""The training loop: the same optimizer steps, however often it is stopped in between."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from accelerate import Accelerator

from ldm.cache import LatentCache
from ldm.config import Train
from ldm.denoiser import Denoiser, trained
from ldm.errors import UserError
from ldm.learning_rate import rate_factor
from ldm.milestones import Every, Milestones, Save
from ldm.progress import progress
from ldm.run_log import LOG, RunLog
from ldm.saver import Saver
from ldm.termination import StoppedError, Termination
from ldm.tracking.live import Live
from ldm.train import fsdp
from ldm.train.data import Batch, TrainingBatches, made_ahead
from ldm.train.ema import Ema
from ldm.train.objective import Objective
from ldm.train.optimizers import make_optimizer
from ldm.train.sample_sheet import SampleSheet, sheet_name
from ldm.train.skipped import SkippedSteps
from ldm.train.state import TrainingState
from ldm.train.validation import validation_loss

LONG_S = 2.0
"""After a step that took longer one looks between micro-batches for a signal that asks to stop."""


class Trainer:
    """What a run changes, and its way from the newest checkpoint to the last step.

    What of ``denoiser`` wants gradients is trained in place; ``ema`` holds the averages. A run
    without a checkpoint starts from the newest one of ``earlier``, another run, if that is given.
    The main process draws ``sheet`` now and then and tells ``live`` of all figures, where they are
    given. ``sharded`` spreads all that over the processes (see :mod:`ldm.train.fsdp`).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: Train,
        objective: Objective,
        cache: LatentCache,
        held_out: LatentCache,
        denoiser: Denoiser,
        run: Path,
        *,
        earlier: Path | None = None,
        sheet: SampleSheet | None = None,
        live: Live | None = None,
        sharded: bool = False,
    ) -> None:
        self.accelerator, self.config = accelerator, config
        self._is_main = accelerator.is_main_process
        self.objective = objective.to(accelerator.device)
        self.held_out, self.folder, self.earlier = held_out, run, earlier
        self.sheet, self.live, self.sharded = sheet, live, sharded
        self.denoiser = denoiser.train()
        if sharded:
            self.prepared: torch.nn.Module = fsdp.spread(denoiser, accelerator.device)
            self.optimizer = accelerator.prepare(make_optimizer(config, denoiser))
        else:
            denoiser.to(accelerator.device)
            self.prepared, self.optimizer = accelerator.prepare(
                denoiser, make_optimizer(config, denoiser)
            )
        self.parameters = list(self.prepared.parameters())
        self._takes_long, self._began = True, monotonic()
        self.ema = Ema(trained(denoiser), config.ema_decay, config.steps)
        self.state = TrainingState(accelerator, denoiser, self.optimizer, self.ema, sharded)
        self.batches = TrainingBatches(
            cache,
            seed=config.seed,
            batch_size=config.batch_size // config.accumulation,
            accumulation=config.accumulation,
            timesteps=len(objective.levels),
            timestep_shift=config.timestep_shift,
            offset_noise=config.offset_noise,
            caption_dropout=config.caption_dropout,
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
        )

    def run(self, termination: Termination) -> bool:
        """Train to the last step; False if a signal stopped it before.

        Either way the last step taken is on disk. UserError after more than ``max_skipped`` steps
        in a row whose loss or gradient is not finite.
        """
        config, main = self.config, self._is_main
        first, own = self.state.resume(self.folder, self.earlier, config.steps)
        tell = self.live.write if self.live else None
        log = RunLog(self.folder / LOG, first, writes=main, tell=tell)
        skipped = SkippedSteps(self.accelerator, log, first, config.max_skipped)
        size, unit = config.batch_size, "samples"
        bar = progress((), "train", config.steps * size, unit, done=first * size, shown=main)
        with (
            bar,
            Saver(self.folder, config.keep_checkpoints) as saver,
            closing(self.micro_batches(first)) as micro_batches,
        ):
            milestones = self._milestones(log, saver, termination)
            stopping = own and milestones.catch_up(first)
            for step in range(first, config.steps):
                if stopping:
                    return False
                rate = self._set_rates(step)
                try:
                    loss, norm, stopping = self.step(step, micro_batches, termination, skipped)
                except StoppedError:
                    if step > first:
                        milestones.conclude(step, stopping=True)
                    return False
                done = step + 1
                if milestones.logs(done) and math.isfinite(loss + norm):
                    log.write({"step": done, "loss": loss, "lr": rate, "gradient_norm": norm})
                    shown = f"loss {loss:.3f}, lr {rate:.1e}, gradient {norm:.2f}"
                    bar.set_postfix_str(shown, refresh=False)
                stopping = milestones.conclude(done, stopping=stopping)
                bar.update(size)
        return not stopping

    def _milestones(self, log: RunLog, saver: Saver, termination: Termination) -> Milestones:
        """What is due after the steps of a run."""
        config, save = self.config, partial(self._save, saver, log)
        validate = partial(self._validate, save, termination)
        draw = partial(self._draw, termination)
        every = Every(
            log=config.log_every,
            save=config.checkpoint_every,
            validate=config.validate_every,
            draw=config.sample_every,
        )
        return Milestones(config.steps, every, log, validate, save, draw, self._drawn)

    def _set_rates(self, step: int) -> float:
        """Set the learning rates of a step; the UNet's."""
        config = self.config
        factor = rate_factor(
            step, total=config.steps, warmup=config.warmup_steps, decay=config.schedule
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        return factor * config.learning_rate

    def step(
        self,
        step: int,
        micro_batches: Iterator[Batch],
        termination: Termination,
        skipped: SkippedSteps,
    ) -> tuple[float, float, bool]:
        """One optimizer step: mean loss, gradient norm before clipping, whether to stop.

        A step whose loss or gradient is not finite changes no weights. All processes see the same
        figures, and so decide alike. StoppedError, with nothing changed, if one was asked to stop
        amid a step that takes long.
        """
        accelerator = self.accelerator
        # A process that left while others compute would leave them waiting.
        breaking = nullcontext if accelerator.num_processes > 1 else termination.breaking
        losses = []
        for part in range(self.config.accumulation):
            if part and self._takes_long and self._on_any_process(termination.signal is not None):
                raise StoppedError
            with breaking():
                batch = next(micro_batches).to(accelerator.device)
            torch.manual_seed(self.batches.own_seed(step * self.config.accumulation + part))
            with accelerator.accumulate(self.prepared), accelerator.autocast():
                each = self.objective.loss(self.prepared, batch)
                accelerator.backward(each.mean())
            losses.append(each.detach())
        gradient = accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        each_loss, asked = torch.stack(losses), termination.signal is not None
        loss, norm, stopping = self._figures(each_loss, gradient, asked)
        finite, scaler = math.isfinite(loss + norm), accelerator.scaler
        # A scaler finds its scale by overflowing, and skips such steps itself.
        if finite or (scaler is not None and not math.isfinite(norm)):
            self.optimizer.step()
        elif scaler is not None:
            scaler.update()  # Else it would take the next gradient for a second one of this step.
        self.optimizer.zero_grad(set_to_none=True)
        # After a skipped step, too: the average of every few steps may be due.
        self.ema.update(step + 1)
        if finite:
            skipped.taken()
        else:
            skipped.skipped(step + 1, loss, each_loss, partial(self.batches.keys, step))
        return loss, norm, stopping

    def _figures(
        self, losses: torch.Tensor, norm: torch.Tensor, asked: bool
    ) -> tuple[float, float, bool]:
        """Mean loss over the processes, gradient norm, whether one of them was asked to stop.

        The step's one wait for the device: what a GPU is told after it, it has in its queue when
        the next step begins. From here to here is how long a step takes.
        """
        whole = fsdp.whole(norm)
        # Filled on the device: a copy to it would be a second wait.
        said = [losses.new_full((), one) for one in (float(asked), monotonic() - self._began)]
        everywhere = self.accelerator.reduce(torch.stack((losses.mean(), *said)), "mean")
        loss, stopping, took, found = torch.cat((everywhere, whole.reshape(1))).tolist()
        self._takes_long, self._began = took > LONG_S, monotonic()
        return loss, found, stopping > 0

    def _validate(self, save: Save, termination: Termination, step: int) -> dict[str, Any] | None:
        """The averaged weights' loss, None if a signal came meanwhile.

        UserError, with the step on disk, if it is not finite.
        """
        with self._averaged():
            found = validation_loss(
                *(self.accelerator, self.objective, self.denoiser, self.held_out),
                seed=self.config.seed,
                batch_size=self.batches.batch_size,
                termination=termination,
            )
        if found and not math.isfinite(found["val_loss"]):
            save(step, None, last=True)
            raise UserError(
                f"{self.folder}: the validation loss is not finite, of the averaged weights or "
                "of a validation sample; train again with a lower train.learning_rate, or in "
                "float32 (train.mixed_precision: no), or look at the latents"
            )
        return found

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones.

        Not compiled: the shapes of validation and sheets would each take minutes, and a network
        that saw one of them first would be compiled for any shape, to slower steps and other bits.
        """
        eager = torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()
        self.ema.swap()
        self.denoiser.eval()
        with eager:
            yield
        self.denoiser.train()
        self.ema.swap()

    def _draw(self, termination: Termination, step: int) -> bool:
        """A sheet of samples by the averaged weights; True if one of the processes is to stop.

        That breaks the sheet off, where it was one of those that draw.
        """

        def between() -> None:
            asked = termination.signal is not None
            if self._on_any_process(asked) if self.sharded else asked:
                raise StoppedError

        if self.sheet:
            with self._averaged(), suppress(StoppedError):
                sheet = self.sheet.draw(self.folder, step, between, writes=self._is_main)
                if self.live:
                    self.live.picture(sheet)
        return self._on_any_process(termination.signal is not None)

    def _drawn(self, step: int) -> bool:
        """Whether the main process has a sheet of the step; all have to ask."""
        missing = self._is_main and not (self.folder / sheet_name(step)).is_file()
        return not self._on_any_process(missing)

    def _on_any_process(self, flag: bool) -> bool:
        """Whether one of the processes says so; all have to ask."""
        said = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(said, "sum") > 0)

    def micro_batches(self, first: int) -> Generator[Batch]:
        """From optimizer step ``first`` on. Not prepared: each process reads only its share."""
        per_step = self.config.accumulation
        numbers = range(first * per_step, self.config.steps * per_step)
        pinned = self.accelerator.device.type == "cuda"
        workers, patience_s = self.config.workers, self.config.patience_s
        return made_ahead(self.batches, numbers, workers, pinned=pinned, patience_s=patience_s)

    def _save(
        self, saver: Saver, log: RunLog, step: int, val_loss: float | None, *, last: bool
    ) -> None:
        # Where weights are spread, all put them together.
        if not self._is_main and not self.sharded:
            return
        log.sync()
        state = self.state.checkpoint(step, val_loss)
        if self._is_main:
            saver.save(state, last=last)
