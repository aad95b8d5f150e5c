"""The training loop: the same optimizer steps, however often it is stopped in between."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ldm.cache import LatentCache
from ldm.config import Train
from ldm.denoiser import Denoiser, trained
from ldm.errors import UserError
from ldm.learning_rate import rate_factor
from ldm.progress import progress
from ldm.run_log import LOG, RunLog
from ldm.saver import Saver
from ldm.termination import StoppedError, Termination
from ldm.tracking.live import Live
from ldm.train import fsdp
from ldm.train.data import Batch, TrainingBatches, made_ahead
from ldm.train.draws import DROPOUT, counter_based
from ldm.train.ema import Ema
from ldm.train.objective import Objective
from ldm.train.optimizers import make_optimizer
from ldm.train.sample_sheet import SampleSheet, sheet_name
from ldm.train.skipped import SkippedSteps
from ldm.train.state import TrainingState
from ldm.train.validation import validation_loss


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
            stopping = own and self._go_on_after(first, log, saver, termination)
            for step in range(first, config.steps):
                if stopping:
                    return False
                rate = self._set_rates(step)
                loss, norm, stopping = self.step(step, micro_batches, termination, skipped)
                done = step + 1
                if done % config.log_every == 0 and math.isfinite(loss + norm):
                    log.write({"step": done, "loss": loss, "lr": rate, "gradient_norm": norm})
                    shown = f"loss {loss:.3f}, lr {rate:.1e}, gradient {norm:.2f}"
                    bar.set_postfix_str(shown, refresh=False)
                if stopping:
                    self._save(saver, done, None, log, last=True)
                else:
                    stopping = self._conclude(done, log, saver, termination)
                bar.update(size)
        return not stopping

    def _conclude(self, step: int, log: RunLog, saver: Saver, termination: Termination) -> bool:
        """What is due after a step: validation, checkpoint, sheet; True if it was asked to stop.

        Then the step is on disk, and what was broken off is left to the next start.
        """
        val_loss, validated = None, None
        if self._validates_at(step):
            validated = self._validate(termination)
            if validated is None:
                self._save(saver, step, None, log, last=True)
                return True
            val_loss = validated["val_loss"]
            if not math.isfinite(val_loss):
                self._save(saver, step, None, log, last=True)
                raise UserError(
                    f"{self.folder}: the validation loss is not finite, of the averaged weights or "
                    "of a validation sample; train again with a lower train.learning_rate, or in "
                    "float32 (train.mixed_precision: no), or look at the latents"
                )
        due = val_loss is not None or step % self.config.checkpoint_every == 0
        if due:
            self._save(saver, step, val_loss, log, last=step == self.config.steps)
        if validated:
            # Behind the checkpoint, which so has its loss wherever the log has this line.
            log.write({"step": step, **validated})
        stopping = self._draws_at(step) and self._draw(step, termination)
        if stopping and not due:
            self._save(saver, step, None, log, last=True)
        return stopping

    def _go_on_after(self, step: int, log: RunLog, saver: Saver, termination: Termination) -> bool:
        """Conclude the step of the checkpoint that was resumed from, if a stop left that undone."""
        validated = any(one["step"] == step and "val_loss" in one for one in log.kept)
        if self._validates_at(step) and not validated:
            return self._conclude(step, log, saver, termination)
        drawn = (self.folder / sheet_name(step)).is_file()
        missing = self._draws_at(step) and self._on_any_process(self._is_main and not drawn)
        return missing and self._draw(step, termination)

    def _validates_at(self, step: int) -> bool:
        return step == self.config.steps or step % self.config.validate_every == 0

    def _draws_at(self, step: int) -> bool:
        return step % (self.config.sample_every or step + 1) == 0

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

        A step whose gradient is not finite changes nothing. All processes see the same figures, and
        so decide alike.
        """
        accelerator = self.accelerator
        losses = []
        for part in range(self.config.accumulation):
            batch = next(micro_batches).to(accelerator.device)
            self._seed_dropout(step * self.config.accumulation + part)
            with accelerator.accumulate(self.prepared), accelerator.autocast():
                each = self.objective.loss(self.prepared, batch)
                accelerator.backward(each.mean())
            losses.append(each.detach())
        gradient = accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        asked = termination.signal is not None
        each_loss = torch.stack(losses)
        loss, norm, stopping = self._figures(each_loss, gradient, asked)
        # A scaler is told of each gradient, and of nothing else.
        finite = math.isfinite(norm) and (accelerator.scaler is not None or math.isfinite(loss))
        # A scaler finds its scale by overflowing, and skips such steps itself.
        if finite or accelerator.scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if finite:
            self.ema.update(step + 1)
            skipped.taken()
        else:
            skipped.skipped(step + 1, loss, each_loss, partial(self.batches.keys, step))
        return round(loss, 6), round(norm, 4), stopping

    def _figures(
        self, losses: torch.Tensor, norm: torch.Tensor, asked: bool
    ) -> tuple[float, float, bool]:
        """Mean loss over the processes, gradient norm, whether one of them was asked to stop.

        The step's one wait for the device: what a GPU is told after it, it has in its queue when
        the next step begins.
        """
        whole = fsdp.whole(norm)
        seen = torch.stack((losses.mean(), whole.new_full((), float(asked))))
        everywhere = self.accelerator.reduce(seen, "mean")
        loss, stopping, found = torch.cat((everywhere, whole.reshape(1))).tolist()
        return loss, found, stopping > 0

    def _seed_dropout(self, micro_batch: int) -> None:
        """What a network draws by itself is a function of the position too."""
        place = (micro_batch, self.accelerator.process_index)
        rng = counter_based(self.config.seed, DROPOUT, *place)
        torch.manual_seed(int(rng.integers(2**63)))

    def _validate(self, termination: Termination) -> dict[str, Any] | None:
        """The averaged weights' loss, None if a signal came meanwhile."""
        with self._averaged():
            found = validation_loss(
                *(self.accelerator, self.objective, self.denoiser, self.held_out),
                seed=self.config.seed,
                batch_size=self.batches.batch_size,
                termination=termination,
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

    def _draw(self, step: int, termination: Termination) -> bool:
        """A sheet of samples by the averaged weights; True if one of the processes is to stop.

        Where one draws alone, that breaks it off.
        """
        if self.sheet:
            between = (lambda: None) if self.sharded else termination.check
            with self._averaged(), suppress(StoppedError):
                sheet = self.sheet.draw(self.folder, step, between, writes=self._is_main)
                if self.live:
                    self.live.picture(sheet)
        return self._on_any_process(termination.signal is not None)

    def _on_any_process(self, flag: bool) -> bool:
        """Whether one of the processes says so; all have to ask."""
        said = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(said, "sum") > 0)

    def micro_batches(self, first: int) -> Generator[Batch]:
        """From optimizer step ``first`` on. Not prepared: each process reads only its share."""
        per_step = self.config.accumulation
        numbers = range(first * per_step, self.config.steps * per_step)
        pinned = self.accelerator.device.type == "cuda"
        return made_ahead(self.batches, numbers, self.config.workers, pinned=pinned)

    def _save(
        self, saver: Saver, step: int, val_loss: float | None, log: RunLog, *, last: bool
    ) -> None:
        # Where weights are spread, all put them together.
        if not self._is_main and not self.sharded:
            return
        log.sync()
        state = self.state.checkpoint(step, val_loss)
        if self._is_main:
            saver.save(state, last=last)
