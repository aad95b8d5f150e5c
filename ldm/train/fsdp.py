"""A training spread over processes: of each weight, average and moment every process holds a part.

Fully sharded data parallelism (arXiv:2304.11277) by ``torch.distributed.fsdp.fully_shard``. An
accelerate configuration asks for it, and accelerate starts the processes. It does not do the rest:
it spreads nothing on a CPU, and in bfloat16 rounds a flow's timesteps too. Here the numbers are
those of a training that is not spread, but for the order of sums.
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm.checkpoint import PARTS, Checkpoint, Tensors
from ldm.config import Train
from ldm.denoiser import Denoiser
from ldm.errors import UserError

LAYERS = ("resnets", "attentions", "downsamplers", "upsamplers", "layers")
"""Lists in a UNet, ours or diffusers', and in CLIP's text encoder: their members are put together
and freed one at a time."""


def take_over() -> bool:
    """Take FSDP out of accelerate's hands, which no longer hears of it; whether it was asked for.

    A second call says False.
    """
    return os.environ.pop("ACCELERATE_USE_FSDP", "false") == "true"


def check(config: Train) -> None:
    """UserError for what cannot be spread, or what the accelerate configuration asks in vain."""

    def told(name: str) -> bool:
        return os.environ.get(name, "false").lower() == "true"

    # 8-bit moments are cut into blocks of whole tensors; Prodigy's step size is one of all weights.
    refused = (
        (config.optimizer != "adamw", f"train.optimizer {config.optimizer}", "adamw"),
        (config.lora is not None, "train.lora", "null"),
        (config.mixed_precision == "fp16", "train.mixed_precision fp16", "bf16 or no"),
        (config.compile, "train.compile", "false"),
        (told("FSDP_OFFLOAD_PARAMS"), f"{config.accelerate}: fsdp_offload_params", "false"),
        (
            told("FSDP_ACTIVATION_CHECKPOINTING"),
            f"{config.accelerate}: fsdp_activation_checkpointing",
            "false and train.gradient_checkpointing to true",
        ),
    )
    for wanted, name, instead in refused:
        if wanted:
            raise UserError(
                f"{name}: cannot be had with weights spread over processes (FSDP); set it to "
                f"{instead}, or leave the weights whole (infra/accelerate/ddp.yaml)"
            )


def spread(denoiser: Denoiser, device: torch.device) -> Denoiser:
    """Leave of a denoiser this process's part, in place; every process must have the same one.

    Its networks may be called each by itself, by all processes at once.
    """
    from torch.distributed.fsdp import fully_shard  # Slow to load.

    if device.type == "cpu":
        torch.set_num_threads(1)  # Samples are drawn by as many at a time, in no fixed order.
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for network in denoiser.children():
        layers = [
            module
            for name, module in network.named_modules()
            if name.rpartition(".")[0].rpartition(".")[2] in LAYERS
        ]
        for module in (*layers, network):
            # Else a network would go on with what validation put together, the averaged weights.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return denoiser


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose parts the processes have, which must all call this; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(state: Checkpoint) -> Checkpoint:
    """The same of whole tensors on the CPU, in the first process; in the others, of none.

    All processes must call this.
    """
    first = dist.get_rank() == 0
    parts: dict[str, Tensors] = {part: {} for part in PARTS}
    for part, found in parts.items():
        for name, tensor in getattr(state, part).items():
            together = whole(tensor.detach())
            if first:
                found[name] = together.cpu()
    return state.with_tensors(parts)


def scattered(
    state: Checkpoint, denoiser: Denoiser, optimizer: torch.optim.Optimizer
) -> Checkpoint:
    """This process's part of what :func:`gathered` put together, or of another training's state."""
    weights = dict(denoiser.named_parameters())
    trained = [one for group in optimizer.param_groups for one in group["params"]]
    owners = {str(number): one for number, one in enumerate(trained)}
    return replace(
        state,
        weights={name: _part(one, weights.get(name)) for name, one in state.weights.items()},
        ema={name: _part(one, weights.get(name)) for name, one in state.ema.items()},
        optimizer={
            name: _part(one, owners.get(name.rpartition(".")[0]))
            for name, one in state.optimizer.items()
        },
    )


def _part(tensor: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
    """Cut as a parameter is; what has another shape, such as a count of steps, stays whole."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    # Each process reads the same file, and need not be sent its part.
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
