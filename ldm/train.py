"""Training the UNet on cached latents, on any number of processes, resumable from one integer.

``ldm train`` runs this module under ``accelerate launch``. Killed and started again with the same
settings and inputs, it goes on from the newest whole checkpoint of its run.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch.utils.data import DataLoader

from ldm import checkpoint
from ldm.artifacts import digest_json, write_whole, writing
from ldm.config import Pretrained, Train
from ldm.data import LatentCache, TrainingBatches, validation_batches
from ldm.denoiser import Denoiser
from ldm.device import has_bfloat16, tune
from ldm.ema import Ema
from ldm.errors import UserError
from ldm.latents import IDS, STATES
from ldm.models import digest_weights, load_encoders, locate
from ldm.objective import Objective
from ldm.pipeline_folder import save_pipeline
from ldm.progress import progress, say
from ldm.run_log import RunLog
from ldm.schedule import cosine_with_warmup
from ldm.starting_point import starting_point
from ldm.unet import shape_of

LOG = "log.jsonl"


def train(config: Train, pretrained: Pretrained, latents: Path, out: Path, runs: Path) -> None:
    """Train and write a pipeline folder with the averaged weights to ``out``.

    Checkpoints and ``log.jsonl`` go to a folder of ``runs`` named by a digest of the settings, the
    latents and the starting weights.
    """
    config = _settled(config)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.accumulation
    )
    tune(accelerator.device)
    _check_batch(config, accelerator.num_processes)
    texts = STATES if config.text_learning_rate is None else IDS
    cache, held_out = (LatentCache(latents, split, texts) for split in ("train", "validation"))
    encoders = load_encoders(locate(pretrained.pipeline, pretrained.revision))
    unet, schedule = starting_point(config, pretrained, cache, encoders)
    inputs = {"latents": cache.manifest.digest, "start": digest_weights(unet)}
    settings = settings_of_result(config)
    run = runs / digest_json({"config": settings, "inputs": inputs})[:12]
    about = checkpoint.Model(
        shape_of(unet), schedule, pretrained.pipeline, revision=pretrained.revision
    )
    if accelerator.is_main_process:
        checkpoint.describe(run, about)
    objective = Objective.of(schedule, config.min_snr_gamma, config.snr_floor)
    trained_text = encoders.text_encoder if config.text_learning_rate else None
    denoiser = Denoiser(unet, trained_text)
    ema = _optimize(accelerator, config, objective, cache, held_out, denoiser, run)
    if accelerator.is_main_process:
        ema.swap(denoiser)
        counts = {"steps": config.steps, "samples": config.steps * config.batch_size}
        log = (run / LOG).read_bytes()
        with writing(out, "model", config=settings, inputs=inputs, counts=counts) as fresh:
            save_pipeline(fresh, encoders, unet, schedule)
            write_whole(fresh / LOG, log)
        last = [json.loads(line) for line in log.splitlines() if b"val_loss" in line][-1]
        say(f"train: {config.steps} steps, val_loss {last['val_loss']:.4f} -> {out}")
    accelerator.wait_for_everyone()


def _settled(config: Train) -> Train:
    """The same settings with the precision that this machine gives ``auto``."""
    if config.mixed_precision != "auto":
        return config
    lower = has_bfloat16(PartialState().device)
    return config.model_copy(update={"mixed_precision": "bf16" if lower else "no"})


def settings_of_result(config: Train) -> dict[str, Any]:
    """The settings that decide the result; where and how often to save do not."""
    how = {"workers", "log_every", "checkpoint_every", "keep_checkpoints", "accelerate"}
    return {key: value for key, value in config.as_dict().items() if key not in how}


def _check_batch(config: Train, processes: int) -> None:
    if config.batch_size % (processes * config.accumulation):
        raise UserError(
            f"train.batch_size: {config.batch_size} cannot be shared by {processes} processes with "
            f"accumulation {config.accumulation}; make it a multiple of their product"
        )


def _optimize(
    accelerator: Accelerator,
    config: Train,
    objective: Objective,
    cache: LatentCache,
    held_out: LatentCache,
    denoiser: Denoiser,
    run: Path,
) -> Ema:
    denoiser = denoiser.to(accelerator.device).requires_grad_(True).train()
    optimizer = _optimizer(config, denoiser)
    prepared, optimizer = accelerator.prepare(denoiser, optimizer)
    ema = Ema(denoiser, config.ema_decay)
    first = _resume(run, denoiser, ema, optimizer)
    log = RunLog(run / LOG, first, writes=accelerator.is_main_process)
    batches = _loader(accelerator, config, cache, len(objective.levels), first)
    steps = range(first, config.steps)
    bar = progress(steps, "train", config.steps, "steps", done=first)
    bar.disable = not accelerator.is_main_process
    for step in bar:
        factor = cosine_with_warmup(step, total=config.steps, warmup=config.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        loss = _step(accelerator, config, objective, prepared, optimizer, batches)
        ema.update(denoiser)
        done = step + 1
        if done % config.log_every == 0:
            rate = factor * config.learning_rate
            log.write({"step": done, "loss": round(float(loss), 6), "lr": rate})
            bar.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
        if done % config.validate_every == 0 or done == config.steps:
            log.write(
                {
                    "step": done,
                    "val_loss": round(
                        _validate(accelerator, config, objective, held_out, denoiser, ema), 6
                    ),
                }
            )
        if (
            done % config.checkpoint_every == 0 or done == config.steps
        ) and accelerator.is_main_process:
            state = checkpoint.Checkpoint(
                done, denoiser.state_dict(), ema.average, checkpoint.optimizer_tensors(optimizer)
            )
            checkpoint.save(run, state, config.keep_checkpoints)
    return ema


def _optimizer(config: Train, denoiser: Denoiser) -> torch.optim.Optimizer:
    """AdamW, each part at its own rate: ``peak`` in its group."""
    groups: list[dict[str, Any]] = [
        {"params": list(denoiser.unet.parameters()), "peak": config.learning_rate}
    ]
    if denoiser.text_encoder is not None:
        parameters = list(denoiser.text_encoder.parameters())
        groups.append({"params": parameters, "peak": config.text_learning_rate})
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )


def _step(
    accelerator: Accelerator,
    config: Train,
    objective: Objective,
    denoiser: torch.nn.Module,
    optimizer: Any,
    batches: Any,
) -> torch.Tensor:
    """One optimizer step over ``accumulation`` micro-batches; the mean loss."""
    total = torch.zeros((), device=accelerator.device)
    for _ in range(config.accumulation):
        batch = next(batches).to(accelerator.device)
        with accelerator.accumulate(denoiser), accelerator.autocast():
            loss = objective.loss(denoiser, batch).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(denoiser.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        total += loss.detach() / config.accumulation
    return accelerator.reduce(total, "mean")


def _loader(
    accelerator: Accelerator, config: Train, cache: LatentCache, timesteps: int, first: int
) -> Any:
    """Micro-batches from ``first`` on. Not prepared: each process already reads only its share."""
    batches = TrainingBatches(
        cache,
        seed=config.seed,
        batch_size=config.batch_size // config.accumulation,
        timesteps=timesteps,
        timestep_shift=config.timestep_shift,
        caption_dropout=config.caption_dropout,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    micro_batches = range(first * config.accumulation, config.steps * config.accumulation)
    return iter(
        DataLoader(batches, sampler=micro_batches, batch_size=None, num_workers=config.workers)
    )


@torch.no_grad()
def _validate(
    accelerator: Accelerator,
    config: Train,
    objective: Objective,
    held_out: LatentCache,
    denoiser: Denoiser,
    ema: Ema,
) -> float:
    """Mean loss of the averaged weights over the validation split, the same draws every time."""
    ema.swap(denoiser)
    denoiser.eval()
    losses = []
    for batch in validation_batches(
        held_out, seed=config.seed, batch_size=config.batch_size, timesteps=len(objective.levels)
    ):
        with accelerator.autocast():
            losses.append(objective.loss(denoiser, batch.to(accelerator.device)).cpu())
    denoiser.train()
    ema.swap(denoiser)
    return float(torch.cat(losses).mean())


def _resume(run: Path, denoiser: Denoiser, ema: Ema, optimizer: Any) -> int:
    """Load the run's newest whole checkpoint, if there is one; the number of steps done."""
    found = checkpoint.newest(run)
    if found is None:
        return 0
    denoiser.load_state_dict(found.weights)
    device = next(denoiser.parameters()).device
    ema.average = {name: tensor.to(device) for name, tensor in found.ema.items()}
    ema.updates = found.step
    checkpoint.restore_optimizer(optimizer, found.optimizer)
    return found.step


def main() -> None:
    """Entry of ``accelerate launch -m ldm.train``: one JSON argument, written by the launcher."""
    request = json.loads(os.environ["LDM_TRAIN"])
    train(
        Train.model_validate(request["train"]),
        Pretrained.model_validate(request["pretrained"]),
        Path(request["latents"]),
        Path(request["out"]),
        Path(request["runs"]),
    )


if __name__ == "__main__":
    main()
