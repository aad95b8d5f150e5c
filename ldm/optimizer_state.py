"""An optimizer's state as flat tensors, and back: what a checkpoint holds of it."""

from __future__ import annotations

from typing import Any

import torch

from ldm.checkpoint import Tensors

IN_GROUPS = ("d", "d_max", "d_numerator", "k")
"""What an optimizer keeps of a group of parameters rather than of each: Prodigy's step size."""


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
) -> Tensors:
    """An optimizer's state as flat tensors, and that of the scaler of its gradients.

    ``NUMBER.exp_avg`` and so on of each parameter; ``group.NUMBER.d`` and so on of each group; the
    scaler's as ``scaler.scale`` and so on. Plain numbers become int64 or float64 tensors without a
    dimension, which hold them exactly.
    """
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    found: dict[str, Any] = {
        f"{number}.{name}": value
        for number, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
    }
    for number, group in enumerate(optimizer.param_groups):
        found |= {f"group.{number}.{name}": group[name] for name in IN_GROUPS if name in group}
    if scaler is not None:
        found |= {f"scaler.{name}": value for name, value in scaler.state_dict().items()}
    return {name: _as_tensor(value) for name, value in found.items()}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Tensors,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Put back what :func:`optimizer_tensors` took; a scaler that it did not see starts afresh."""
    state: dict[int, dict[str, Any]] = {}
    groups = optimizer.state_dict()["param_groups"]
    of_scaler = {}
    for key, tensor in tensors.items():
        owner, _, name = key.rpartition(".")
        if owner == "scaler":
            of_scaler[name] = tensor.item()
        elif owner.startswith("group."):
            groups[int(owner.removeprefix("group."))][name] = tensor.item()
        else:
            state.setdefault(int(owner), {})[name] = _as_saved(tensor)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    if scaler is not None and of_scaler:
        scaler.load_state_dict(of_scaler)


def _as_tensor(value: torch.Tensor | float) -> torch.Tensor:
    exact = torch.float64 if isinstance(value, float) else None
    return torch.as_tensor(value, dtype=exact)


def _as_saved(tensor: torch.Tensor) -> torch.Tensor | int:
    """Steps that were plain whole numbers become that again."""
    return int(tensor) if tensor.dtype == torch.int64 and tensor.dim() == 0 else tensor
