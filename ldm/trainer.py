"""The training loop: the same optimizer steps, however often it is stopped in between."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ldm import checkpoint, fsdp
from ldm.cache import LatentCache
from ldm.config import Train
from ldm.data import Batch, TrainingBatches, one_ahead, validation_batches
from ldm.denoiser import Denoiser, trained
from ldm.draws import DROPOUT, counter_based
from ldm.ema import Ema
from ldm.errors import UserError
from ldm.live import Live
from ldm.objective import Objective
from ldm.optimizers import make_optimizer
from ldm.progress import progress
from ldm.run_log import LOG, RunLog
from ldm.sample_sheet import SampleSheet
from ldm.saver import Saver
from ldm.schedule import rate_factor
from ldm.termination import Termination, ignore

BANDS = 4
"""Equal parts of the timesteps, from the least noisy, that validation is told apart by."""


class Trainer:
    """What a run changes, and its way from the newest checkpoint to the last step.

    What of ``denoiser`` wants gradients is trained in place; ``ema`` holds the averages. A run
    without a checkpoint starts from the newest one of ``earlier``, another run, if that is given.
    The main process draws ``sheet`` now and then and tells ``live`` of all figures, where they are
    given. ``sharded`` spreads all that over the processes (see :mod:`ldm.fsdp`).
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
        self._skipped_in_a_row = 0

    def run(self, termination: Termination) -> bool:
        """Train to the last step; False if a signal stopped it before.

        Either way the last step taken is on disk. UserError after ``max_skipped`` steps in a row
        whose loss or gradient is not finite.
        """
        config, main = self.config, self.accelerator.is_main_process
        first = self._resume()
        takes_part = main or self.sharded  # In what needs whole weights.
        log = RunLog(self.folder / LOG, first, writes=main, live=self.live)
        micro_batches = self.micro_batches(first)
        steps = range(first, config.steps)
        size, unit = config.batch_size, "samples"
        bar = progress((), "train", config.steps * size, unit, done=first * size, shown=main)
        with bar, Saver(self.folder, config.keep_checkpoints) as saver:
            for step in steps:
                rate = self._set_rates(step)
                loss, norm, stopping = self.step(step, micro_batches, termination, log)
                done = step + 1
                if done % config.log_every == 0 and math.isfinite(loss + norm):
                    log.write({"step": done, "loss": loss, "lr": rate, "gradient_norm": norm})
                    shown = f"loss {loss:.3f}, lr {rate:.1e}, gradient {norm:.2f}"
                    bar.set_postfix_str(shown, refresh=False)
                last = done == config.steps
                val_loss = None
                if last or done % config.validate_every == 0:
                    validated = self._validate()
                    log.write({"step": done, **validated})
                    val_loss = validated["val_loss"]
                if takes_part and (last or stopping or done % config.checkpoint_every == 0):
                    self._save(saver, done, val_loss, last=last or stopping)
                if takes_part and self.sheet and done % (config.sample_every or done + 1) == 0:
                    self._draw(done)
                bar.update(size)
                if stopping and not last:
                    return False
        return True

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
        self, step: int, micro_batches: Iterator[Batch], termination: Termination, log: RunLog
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
        norm = accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        asked = torch.tensor(float(termination.signal is not None), device=norm.device)
        seen = torch.stack((torch.stack(losses).mean(), asked))
        loss, stopping = accelerator.reduce(seen, "mean").tolist()
        finite = bool(torch.isfinite(norm))
        # A scaler finds its scale by overflowing, and skips such steps itself.
        if finite or accelerator.scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if finite:
            self.ema.update(step + 1)
            self._skipped_in_a_row = 0
        elif accelerator.scaler is None or not math.isfinite(loss):
            self._note_skipped(step, losses, log)
        return round(loss, 6), round(float(norm), 4), stopping > 0

    def _seed_dropout(self, micro_batch: int) -> None:
        """What a network draws by itself is a function of the position too."""
        place = (micro_batch, self.accelerator.process_index)
        rng = counter_based(self.config.seed, DROPOUT, *place)
        torch.manual_seed(int(rng.integers(2**63)))

    def _note_skipped(self, step: int, losses: list[torch.Tensor], log: RunLog) -> None:
        """Log which samples' losses are not finite, or all of the step's if each one is."""
        keys = self.batches.keys(step)
        bad = ~torch.isfinite(self.accelerator.gather(torch.stack(losses)).flatten())
        suspects = [key for key, is_bad in zip(keys, bad.tolist(), strict=True) if is_bad] or keys
        log.write({"step": step + 1, "skipped": suspects})
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > self.config.max_skipped:
            raise UserError(
                f"step {step + 1}: no finite loss or gradient for {self._skipped_in_a_row} steps "
                f"in a row; {self.folder / LOG} names the samples; lower train.learning_rate, or "
                "compute in float32 (train.mixed_precision: no)"
            )

    @torch.no_grad()
    def _validate(self) -> dict[str, Any]:
        """Mean loss of the averaged weights over the validation split, the same draws every time.

        In all, and by band of timesteps. The processes share each batch.
        """
        accelerator = self.accelerator
        self.ema.swap()
        self.denoiser.eval()
        seen = []
        for own, count in validation_batches(
            self.held_out,
            seed=self.config.seed,
            batch_size=self.batches.batch_size,
            timesteps=len(self.objective.levels),
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
        ):
            batch = own.to(accelerator.device)
            with accelerator.autocast():
                each = self.objective.loss(self.denoiser, batch)
            whole = accelerator.gather((each, batch.timesteps))
            seen.append([part[:count].cpu() for part in whole])
        self.denoiser.train()
        self.ema.swap()
        loss, timesteps = map(torch.cat, zip(*seen, strict=True))
        if not torch.isfinite(loss).all():
            raise UserError(
                f"{self.folder}: the averaged weights' validation loss is not finite; train again "
                "with a lower train.learning_rate, or in float32 (train.mixed_precision: no)"
            )
        bands = by_band(loss, timesteps, len(self.objective.levels))
        return {"val_loss": round(float(loss.mean()), 6), "val_loss_bands": bands}

    def _draw(self, step: int) -> None:
        """A sheet of samples by the averaged weights."""
        assert self.sheet is not None
        self.ema.swap()
        self.denoiser.eval()
        main = self.accelerator.is_main_process
        sheet = self.sheet.draw(self.folder, step, writes=main)
        self.denoiser.train()
        self.ema.swap()
        if self.live:
            self.live.picture(sheet)

    def micro_batches(self, first: int) -> Iterator[Batch]:
        """From optimizer step ``first`` on. Not prepared: each process reads only its share.

        They are made ahead of their step: by ``workers`` processes, or else by a thread.
        """
        config = self.config
        numbers = range(first * config.accumulation, config.steps * config.accumulation)
        loader = DataLoader(
            self.batches,
            sampler=numbers,
            batch_size=None,
            num_workers=config.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=ignore,
        )
        return iter(loader) if config.workers else one_ahead(iter(loader))

    def _save(self, saver: Saver, step: int, val_loss: float | None, *, last: bool) -> None:
        state = self._checkpoint(step, val_loss)
        if self.accelerator.is_main_process:
            saver.save(state, last=last)

    def _checkpoint(self, step: int, val_loss: float | None) -> checkpoint.Checkpoint:
        optimizer = checkpoint.optimizer_tensors(self.optimizer, self.accelerator.scaler)
        weights = trained(self.denoiser)
        state = checkpoint.Checkpoint(
            *(step, weights, self.ema.average, optimizer, val_loss), averaged=self.ema.upto
        )
        return fsdp.gathered(state) if self.sharded else state

    def _resume(self) -> int:
        """Load the run's newest whole checkpoint, if there is one; the number of steps done."""
        found = checkpoint.newest(self.folder)
        if found is None and self.earlier is not None:
            found = checkpoint.newest(self.earlier)
        if found is None:
            return 0
        if found.step >= self.config.steps > 0 and not checkpoint.folders(self.folder):
            raise UserError(
                f"{self.earlier}: has taken {found.step} steps; raise train.steps above that"
            )
        try:
            if self.sharded:
                found = fsdp.scattered(found, self.denoiser, self.optimizer)
            self.denoiser.restore(found.weights)
            checkpoint.restore_optimizer(self.optimizer, found.optimizer, self.accelerator.scaler)
        except (RuntimeError, ValueError, KeyError) as error:
            if self.earlier is None:
                raise
            raise UserError(
                f"{self.earlier}: trained other weights than this would; leave out --resume"
            ) from error
        device = self.accelerator.device
        self.ema.average = {name: tensor.to(device) for name, tensor in found.ema.items()}
        self.ema.upto = found.averaged
        return found.step


def by_band(losses: torch.Tensor, timesteps: torch.Tensor, of: int) -> list[float | None]:
    """Mean of the losses (n,) in each of ``BANDS``, by their timesteps (n,) ``of`` so many.

    None for a band that no timestep is in.
    """
    bands = timesteps * BANDS // of
    found = (losses[bands == number] for number in range(BANDS))
    return [round(float(own.mean()), 6) if len(own) else None for own in found]
