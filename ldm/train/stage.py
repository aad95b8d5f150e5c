"""The stage ``train``: from cached latents and a starting point to a pipeline folder.

``ldm train`` runs this module under ``accelerate launch``. Killed and started again with the same
settings and inputs, it goes on from the newest whole checkpoint of its run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator

from ldm import checkpoint, code
from ldm.artifacts import digest_json, opening, write_whole, writing
from ldm.cache import LatentCache
from ldm.config import EvaluationSampling, Pretrained, Registry, Sampling, Train
from ldm.denoiser import Denoiser
from ldm.device import device_of, only_deterministic, plain_attention
from ldm.latents import IDS, STATES
from ldm.locks import held
from ldm.lora import FOLDER, Adapters, Base
from ldm.memory import keep_memory
from ldm.models import Encoders, Source, digest_weights, load_encoders, locate
from ldm.pipeline import load_model, save_pipeline
from ldm.progress import say
from ldm.request import TrainRequest, serve
from ldm.run_log import LOG, last_val_loss
from ldm.runs import RUN, Identity, continued, describe, folder_of, unfinished
from ldm.termination import Termination, taken_over
from ldm.tracking.live import Live
from ldm.tracking.liveness import LOCK
from ldm.train import fsdp
from ldm.train.compilation import compile_steps
from ldm.train.objective import Objective
from ldm.train.order import by_shape
from ldm.train.sample_sheet import SampleSheet, expect_drawable
from ldm.train.settings import accelerator_for, check_batch, settings_of_result, settled_training
from ldm.train.starting_point import starting_point
from ldm.train.trainer import Trainer
from ldm.unet import Network, shape_of

DECIDING = (
    *("cache", "denoiser", "device", "diffusion", "latents", "learning_rate", "lora", "unet"),
    *("train/compilation", "train/data", "train/draws", "train/ema", "train/fsdp"),
    *("train/objective", "train/optimizers", "train/order", "train/skipped", "train/state"),
    *("train/trainer", "train/validation"),
)
"""Modules of ``ldm``, besides those in ``nn``, that decide what a step does."""


def train(
    config: Train,
    pretrained: Pretrained,
    latents: Path,
    out: Path,
    runs: Path,
    *,
    resume: Path | None = None,
    changed: bool = False,
    registry: Registry | None = None,
    sampling: Sampling | None = None,
) -> None:
    """Train and write a pipeline folder with the averaged weights to ``out``.

    Checkpoints and ``log.jsonl`` go to a folder of ``runs`` named by a digest of the settings, the
    latents, the starting weights and the code that decides the result: a finished run of other code
    is not gone on with. With ``resume`` it goes on from where that run stands; ``changed`` says
    that what differs from it is meant. With ``registry`` MLflow shows the training as it goes.
    Sheets are drawn by ``sampling``, or as evaluation draws by default.

    Raises :class:`SystemExit` after SIGTERM or Ctrl-C, with a checkpoint of the last step written.
    """
    if config.deterministic:
        only_deterministic()
    device = device_of()
    keep_memory(device)
    config = settled_training(config, device)
    if sharded := fsdp.take_over():
        fsdp.check(config)
    accelerator = accelerator_for(config, device)
    check_batch(config, accelerator.num_processes)
    texts = STATES if config.text_learning_rate is None else IDS
    # The processes of a machine read it together.
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    rank = accelerator.local_process_index
    made = opening(latents, "latents", "encode", rank=rank, processes=here)
    cache, held_out = (LatentCache(made, split, texts) for split in ("train", "validation"))
    encoders = load_encoders(locate(pretrained.pipeline, pretrained.revision))
    unet, schedule = starting_point(config, pretrained, cache, encoders)
    start, text = digest_weights(unet), cache.manifest.inputs["text_encoder"]
    inputs = {"latents": cache.manifest.digest, "start": start, "schedule": digest_json(schedule)}
    identity = _identity(config, pretrained.network, cache, inputs)
    if resume is not None:
        identity = continued(identity, resume, changed=changed)
    run = folder_of(runs, identity)
    about = checkpoint.Model(
        *(shape_of(unet), schedule, pretrained.pipeline, pretrained.revision),
        lora=asdict(Base.of(config, pretrained, start, text)) if config.lora else None,
    )
    objective = Objective.of(schedule, config.min_snr_gamma, config.snr_floor)
    denoiser, adapters = _to_train(config, unet, encoders, len(by_shape(cache.shapes)))
    sampling = sampling or EvaluationSampling()
    if config.sample_every:
        expect_drawable(sampling, schedule)
    termination = Termination()
    main = accelerator.is_main_process
    shown = Live(registry, run, identity["config"]) if main and registry else nullcontext()
    with (
        _alone(accelerator, run),
        taken_over(termination.ask),
        shown as live,
        plain_attention(device),
    ):
        if main:
            _mention_unfinished(runs, run, identity)
            describe(run, identity)
            checkpoint.describe(run, about)
        # Who draws no sheets need not hold what draws them.
        draws = (config, sampling, held_out, encoders, unet, schedule)
        sheet = SampleSheet.of(*draws) if main or sharded else None
        trainer = Trainer(
            *(accelerator, config, objective, cache, held_out, denoiser, run),
            earlier=resume,
            sheet=sheet,
            live=live,
            sharded=sharded,
        )
        if not trainer.run(termination):
            sys.exit(termination.exit_code)
        if main:
            if sharded:  # Each process has a part of the weights; the last checkpoint has all.
                last = Source(str(checkpoint.folders(run)[-1]))
                encoders, unet, schedule = load_model(last, pretrained.network)
            else:
                trainer.ema.swap()
            with _publishing(config, inputs, run, out) as fresh:
                if adapters:
                    adapters.save(fresh / FOLDER)
                    adapters.merge()
                save_pipeline(fresh, encoders, unet, schedule)
            if live:
                live.finish(opening(out, "model", "train").digest)
    accelerator.wait_for_everyone()


def _identity(config: Train, network: str, cache: LatentCache, inputs: dict[str, str]) -> Identity:
    """What decides a run's result: its settings, its inputs and the code of its steps."""
    scaling = {"scaling": digest_json([cache.scaling_factor, cache.shift_factor])}
    deciding = [network, *code.digests(*DECIDING, "nn")]
    return {"config": settings_of_result(config), "inputs": inputs | scaling, "code": deciding}


def _to_train(
    config: Train, unet: Network, encoders: Encoders, shapes: int
) -> tuple[Denoiser, Adapters | None]:
    """What is trained: the networks, with text encoder or without, or adapters in them.

    Compiled for each of so many shapes of latents by itself, where it is compiled.
    """
    text_encoder = encoders.text_encoder if config.text_learning_rate else None
    denoiser = Denoiser(unet, text_encoder).requires_grad_(True)
    adapters = Adapters(denoiser, config.lora, config.seed) if config.lora else None
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.compile:
        compile_steps(unet, device_of(), shapes)
    return denoiser, adapters


@contextmanager
def _publishing(config: Train, inputs: Mapping[str, str], run: Path, out: Path) -> Iterator[Path]:
    """A folder to write the model into, which becomes ``out`` with the run's log, and is told."""
    settings = settings_of_result(config)
    counts = {"steps": config.steps, "samples": config.steps * config.batch_size}
    with writing(out, "model", config=settings, inputs=inputs, counts=counts) as fresh:
        yield fresh
        write_whole(fresh / LOG, (run / LOG).read_bytes())
    say(f"train: {config.steps} steps, val_loss {last_val_loss(run):.4f} -> {out}")


def _mention_unfinished(runs: Path, run: Path, identity: Identity) -> None:
    """A user who changed a setting may have meant to go on from what is there."""
    if (
        not (run / RUN).is_file()
        and "from" not in identity
        and (found := unfinished(runs, identity))
    ):
        earlier, changes = found
        say(
            f"train: a new run; {earlier} stands before its end and differs "
            f"({'; '.join(changes)}); `ldm train --resume {earlier} --changed` goes on from it"
        )


@contextmanager
def _alone(accelerator: Accelerator, run: Path) -> Iterator[None]:
    """Be the run's only training. One whose parent was killed may yet write its checkpoint."""
    refusal = f"{run}: another training writes it; wait for it, or stop it"
    main = accelerator.is_main_process
    with held(run / LOCK, refusal, patience_s=60) if main else nullcontext():
        accelerator.wait_for_everyone()
        yield


def main() -> None:
    """What a process of the stage does; it was started by :mod:`ldm.launch`."""
    serve("train", TrainRequest, _asked)


def _asked(asked: TrainRequest) -> None:
    train(
        *(asked.train, asked.pretrained, asked.latents, asked.out, asked.runs),
        resume=asked.resume,
        changed=asked.changed,
        registry=asked.registry,
        sampling=asked.sampling,
    )
