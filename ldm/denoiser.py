"""The trained part of a model: the network, its noise schedule, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

from ldm import checkpoint
from ldm.config import Lora
from ldm.diffusion import FLOW
from ldm.errors import UserError
from ldm.lora import Adapters, Base
from ldm.models import (
    Encoders,
    Source,
    digest_weights,
    explained,
    load_encoders,
    load_part,
    locate,
)
from ldm.unet import Network, denoise, run_by

FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"
UNKNOWN_TO_FLOWS = (
    *("use_dynamic_shifting", "shift_terminal", "invert_sigmas", "stochastic_sampling"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "thresholding"),
)
"""Options of diffusers' flow schedulers that ours does not have."""


class Denoiser(torch.nn.Module):
    """What a training changes: the UNet and, if it is trained too, the text encoder."""

    def __init__(self, unet: Network, text_encoder: CLIPTextModel | None = None) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(
        self, latents: torch.Tensor, timesteps: torch.Tensor, texts: torch.Tensor
    ) -> torch.Tensor:
        """The UNet's output, of the latents' shape.

        ``texts``: hidden states (n, tokens, width), or token ids (n, tokens) with a text encoder.
        """
        if self.text_encoder is not None:
            texts = self.text_encoder(texts).last_hidden_state
        return denoise(self.unet, latents, timesteps, texts)

    def restore(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take over values for what is trained; KeyError where they are those of other weights."""
        if odd := trained(self).keys() ^ weights.keys():
            raise KeyError(min(odd))
        self.load_state_dict(weights, strict=False)


def trained(module: torch.nn.Module) -> checkpoint.Tensors:
    """The weights that a training changes, by name: those that want gradients."""
    return {name: one for name, one in module.named_parameters() if one.requires_grad}


def load_unet(source: Source, network: str = "ldm") -> Network:
    """The UNet, float32, run by our code or by ``diffusers``'."""
    unet = load_part(UNet2DConditionModel, source, "unet", torch_dtype=torch.float32)
    return run_by(network, unet)


def load_model(source: Source, network: str = "ldm") -> tuple[Encoders, Network, dict[str, Any]]:
    """Encoders, UNet and scheduler configuration of a pipeline or of a training's checkpoint.

    A checkpoint (``runs/ID/step-NNNNNNNN``) gives its averaged weights.
    """
    folder = Path(source.location)
    if not (folder / checkpoint.STATE).is_file():
        return load_encoders(source), load_unet(source, network), load_scheduler_config(source)
    model, weights = checkpoint.averaged(folder)
    encoders = load_encoders(locate(model.pipeline, model.revision))
    if model.lora is not None:
        return encoders, _adapted(Base(**model.lora), weights, network), model.schedule
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(model.unet)
    trains_text = any(name.startswith("text_encoder.") for name in weights)
    text_encoder = encoders.text_encoder if trains_text else None
    Denoiser(unet, text_encoder).load_state_dict(weights, assign=True)
    return encoders, run_by(network, unet), model.schedule


def _adapted(base: Base, weights: checkpoint.Tensors, network: str) -> Network:
    """The network that adapters were trained beside, with ``weights``, theirs, merged into it."""
    unet = load_unet(locate(base.name, base.revision), network)
    if digest_weights(unet) != base.digest:
        raise UserError(
            f"{base.name}: has another UNet than the one that the checkpoint's adapters were "
            "trained beside; put that one back, or train again"
        )
    adapters = Adapters(unet, Lora.model_validate(base.lora))
    Denoiser(unet).restore(weights)
    return adapters.merge()


def load_scheduler_config(source: Source) -> dict[str, Any]:
    """The scheduler's configuration: betas, prediction type, spacing; of a flow, its shift."""
    with explained(source, "scheduler"):
        written = DDPMScheduler.load_config(
            source.location, subfolder="scheduler", revision=source.revision
        )
    if _is_flow(written):
        return _flow_schedule(written, source.name or source.location)
    config = dict(DDPMScheduler.from_config(written).config)
    # The spacing that a folder leaves open is each sampler's own default, not DDPM's.
    if "timestep_spacing" in config.pop("_use_default_values", []):
        del config["timestep_spacing"]
    return config


def _is_flow(written: Mapping[str, Any]) -> bool:
    """Whether a scheduler's folder is that of a flow: by its class, or by what it predicts."""
    return written.get("_class_name") == FLOW_CLASS or written.get("prediction_type") == FLOW


def _flow_schedule(written: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What all the classes of diffusers that can follow a flow say of it, in one form."""
    for option in UNKNOWN_TO_FLOWS:
        if written.get(option):
            raise UserError(f"{where}: scheduler: {option} is set, which is not known here")
    shift = "shift" if written.get("_class_name") == FLOW_CLASS else "flow_shift"
    return {
        "num_train_timesteps": written.get("num_train_timesteps", 1000),
        "prediction_type": FLOW,
        "flow_shift": written.get(shift, 1.0),
    }
