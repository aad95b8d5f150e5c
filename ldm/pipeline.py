"""A whole model: encoders, UNet and noise schedule; loaded, and saved as diffusers opens it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from ldm import checkpoint
from ldm.artifacts import write_json
from ldm.config import Lora
from ldm.denoiser import Denoiser
from ldm.errors import UserError
from ldm.lora import Adapters, Base
from ldm.models import Encoders, Source, digest_weights, load_encoders, load_part, locate
from ldm.noise_schedule import leave_open, load_schedule, scheduler_of
from ldm.unet import Network, as_diffusers, run_by


def load_unet(source: Source, network: str = "ldm") -> Network:
    """The UNet, float32, run by our code or by ``diffusers``'."""
    unet = load_part(UNet2DConditionModel, source, "unet", torch_dtype=torch.float32)
    return run_by(network, unet)


def load_model(source: Source, network: str = "ldm") -> tuple[Encoders, Network, dict[str, Any]]:
    """Encoders, UNet and scheduler configuration of a pipeline or of a training's checkpoint.

    A checkpoint (``runs/ID/step-NNNNNNNN``) gives its averaged weights.
    """
    folder = Path(source.location)
    if (folder / checkpoint.MODEL).is_file():
        raise UserError(f"{folder}: is the run of a training; name one of its step-NNNNNNNN")
    # By its place too: one that is damaged, or was removed, is no folder in another layout.
    placed = folder.name.startswith("step-") and (folder.parent / checkpoint.MODEL).is_file()
    if not placed and not (folder / checkpoint.STATE).is_file():
        return load_encoders(source), load_unet(source, network), load_schedule(source)
    encoders, unet, schedule, adapters = load_trained(folder, network)
    if adapters:
        adapters.merge()
    return encoders, unet, schedule


def load_trained(
    folder: Path, network: str = "ldm"
) -> tuple[Encoders, Network, dict[str, Any], Adapters | None]:
    """The same of a checkpoint, with its adapters beside their networks, if it holds such."""
    model, weights = checkpoint.averaged(folder)
    encoders = load_encoders(locate(model.pipeline, model.revision))
    trains_text = any(name.startswith("text_encoder.") for name in weights)
    text_encoder = encoders.text_encoder if trains_text else None
    if model.lora is not None:
        base = Base(**model.lora)
        unet = load_unet(locate(base.name, base.revision), network)
        _check_base(base, model.pipeline, unet, encoders.text_encoder)
        denoiser = Denoiser(unet, text_encoder)
        adapters = Adapters(denoiser, Lora.model_validate(base.lora))
        denoiser.restore(weights)
        return encoders, unet, model.schedule, adapters
    with torch.device("meta"):
        whole = UNet2DConditionModel.from_config(model.unet)
    Denoiser(whole, text_encoder).load_state_dict(weights, assign=True)
    return encoders, run_by(network, whole), model.schedule, None


def _check_base(base: Base, pipeline: str, unet: Network, text_encoder: CLIPTextModel) -> None:
    """Adapters say nothing beside other weights than those that they were trained beside."""
    known = (
        (base.name, "UNet", unet, base.digest),
        (pipeline, "text encoder", text_encoder, base.text_digest),
    )
    for name, what, network, digest in known:
        if digest is not None and digest_weights(network) != digest:
            raise UserError(
                f"{name}: has another {what} than the one that the checkpoint's adapters were "
                "trained beside; put that one back, or train again"
            )


def save_pipeline(
    folder: Path, encoders: Encoders, unet: Network, schedule: dict[str, Any]
) -> None:
    """Write the UNet with the encoders it was trained for and its own noise schedule."""
    pipeline = StableDiffusionPipeline(
        vae=encoders.vae,
        text_encoder=encoders.text_encoder,
        tokenizer=encoders.tokenizer,
        unet=as_diffusers(unet.to(torch.float32)),
        scheduler=scheduler_of(schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    forget_origin(folder)
    leave_open(folder, schedule)


def forget_origin(folder: Path) -> None:
    """Drop the paths that the libraries note in configurations: same model, same bytes."""
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            write_json(path, content)
