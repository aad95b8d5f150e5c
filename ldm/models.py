"""Pretrained parts by name, all through ``from_pretrained``.

A name is ``tiny`` (embedded in this package), a local folder, a training's checkpoint, an MLflow
URI (``models:/NAME@ALIAS``) or a hub id. A pipeline folder is in Stable Diffusion layout: ``vae``,
``text_encoder``, ``tokenizer``, ``unet``, ``scheduler``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from ldm import checkpoint
from ldm.config import Pretrained
from ldm.errors import UserError
from ldm.unet import Network, from_scratch

TINY = "tiny"


@dataclass(frozen=True)
class Source:
    """Where parts come from: a folder or hub id, and the revision of a hub id."""

    location: str
    revision: str | None = None
    name: str = ""


def locate(name: str, revision: str | None = None) -> Source:
    """Resolve a pipeline's name; a registered model is fetched to a local folder."""
    if name == TINY:
        return Source(str(tiny_folder()), name=name)
    if name.startswith("models:/"):
        from ldm.tracking import fetch_model

        return Source(str(fetch_model(name)), name=name)
    return Source(name, revision, name)


def locate_clip(name: str, revision: str | None = None) -> Source:
    """Resolve the name of a CLIP with both towers."""
    return (
        Source(str(tiny_folder() / "clip"), name=name)
        if name == TINY
        else Source(name, revision, name)
    )


def starting_model(init: str, pretrained: Pretrained) -> Source | None:
    """Where a training's UNet starts (see :class:`~ldm.config.Train`); none: random weights."""
    if init == "random":
        return None
    if init == "pretrained":
        return locate(pretrained.pipeline, pretrained.revision)
    return locate(init)


def tiny_folder() -> Path:
    """The embedded pipeline."""
    return Path(str(resources.files("ldm") / "pretrained" / "tiny"))


def load_vae(source: Source) -> AutoencoderKL:
    """The frozen autoencoder, float32, in eval mode."""
    return _frozen(_load(AutoencoderKL, source, "vae", torch_dtype=torch.float32))


def load_text_encoder(source: Source) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The frozen text tower, float32, in eval mode, and its tokenizer."""
    tokenizer = _load(CLIPTokenizer, source, "tokenizer")
    return tokenizer, _frozen(_load(CLIPTextModel, source, "text_encoder", dtype=torch.float32))


@dataclass(frozen=True)
class Encoders:
    """What a training leaves as it is: the autoencoder, and the text tower with its tokenizer."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel


def load_encoders(source: Source) -> Encoders:
    """The frozen parts of a pipeline, float32, in eval mode."""
    return Encoders(load_vae(source), *load_text_encoder(source))


def load_unet(source: Source, network: str = "ldm") -> Network:
    """The UNet, float32, run by our code or by ``diffusers``'."""
    unet = _load(UNet2DConditionModel, source, "unet", torch_dtype=torch.float32)
    return unet if network == "diffusers" else from_scratch(unet)


def load_model(source: Source, network: str = "ldm") -> tuple[Encoders, Network, dict[str, Any]]:
    """Frozen parts, UNet and scheduler configuration of a pipeline or of a training's checkpoint.

    A checkpoint (``runs/ID/step-NNNNNNNN``) gives its averaged weights.
    """
    folder = Path(source.location)
    if not (folder / checkpoint.STATE).is_file():
        return load_encoders(source), load_unet(source, network), load_scheduler_config(source)
    model, weights = checkpoint.averaged(folder)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(model.unet)
    unet.load_state_dict(weights, assign=True)
    encoders = load_encoders(locate(model.pipeline, model.revision))
    return encoders, unet if network == "diffusers" else from_scratch(unet), model.schedule


def load_scheduler_config(source: Source) -> dict[str, Any]:
    """The scheduler's configuration: betas, prediction type, spacing."""
    config = dict(_load(DDPMScheduler, source, "scheduler").config)
    # The spacing that a folder leaves open is each sampler's own default, not DDPM's.
    if "timestep_spacing" in config.pop("_use_default_values", []):
        del config["timestep_spacing"]
    return config


def load_clip(source: Source) -> tuple[CLIPTokenizer, CLIPModel]:
    """CLIP with both towers, float32, in eval mode, and its tokenizer."""
    tokenizer = _load(CLIPTokenizer, source, None)
    return tokenizer, _frozen(_load(CLIPModel, source, None, dtype=torch.float32))


def digest_weights(module: torch.nn.Module) -> str:
    """sha256 over every tensor's name, shape, dtype and bytes, in order of name."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _load(kind: Any, source: Source, part: str | None, **options: Any) -> Any:
    where = source.name or source.location
    if part is not None:
        options["subfolder"] = part
    try:
        return kind.from_pretrained(source.location, revision=source.revision, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{where}: cannot load {part or 'it'} ({reason}); give `tiny`, a folder in Stable "
            "Diffusion layout, or a hub id that this machine can reach"
        ) from error


def _frozen(module: Any) -> Any:
    return module.eval().requires_grad_(False)
