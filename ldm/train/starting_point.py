"""Where a training starts, and whether that fits the latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldm.autoencoder import pixels_a_latent
from ldm.cache import LatentCache
from ldm.config import NoiseSchedule, Pretrained, Train
from ldm.errors import UserError
from ldm.models import Encoders, Source, digest_weights, digests, load_text_encoder, starting_model
from ldm.noise_schedule import fresh_schedule, load_schedule
from ldm.pipeline import load_unet
from ldm.runs import RUN
from ldm.unet import Network, random_unet, run_by, shape_of


def starting_point(
    config: Train, pretrained: Pretrained, cache: LatentCache, encoders: Encoders
) -> tuple[Network, dict[str, Any]]:
    """The UNet to start from and the scheduler configuration it goes with.

    ``encoders`` are the pipeline's; UserError where the latents, or the UNet, are of others.
    """
    _check_encoders(cache, encoders, pretrained.pipeline)
    source = starting_model(config.init, pretrained)
    if source is not None:
        if config.init != "pretrained":
            _expect_whole(config.init)
            _check_reads_the_same(cache, config.init, load_text_encoder(source)[1])
        started = load_unet(source, pretrained.network)
        _check_shape(started, source, _channels(cache), encoders)
        return started, fresh_schedule(config.noise) if config.noise else load_schedule(source)
    unet = random_unet(
        config.unet,
        latent_channels=_channels(cache),
        latent_size=_side(cache, encoders),
        text_width=encoders.text_encoder.config.hidden_size,
        seed=config.seed,
    )
    return run_by(pretrained.network, unet), fresh_schedule(config.noise or NoiseSchedule())


def _channels(cache: LatentCache) -> int:
    """Of latents: the cache has the mean and the variance of each."""
    return int(cache.shapes[0, 0]) // 2


def _check_shape(unet: Network, source: Source, channels: int, encoders: Encoders) -> None:
    """Those for inpainting, depth or upscaling take more than latents, and would fail in a step."""
    shape, width = shape_of(unet), encoders.text_encoder.config.hidden_size
    fits = {"in_channels": channels, "out_channels": channels, "cross_attention_dim": width}
    for name, wanted in fits.items():
        if shape[name] != wanted:
            raise UserError(
                f"{source.name or source.location}: its UNet has {name} {shape[name]}, and "
                f"the latents and the text encoder ask for {wanted}; start from a plain "
                "text-to-image model with the same autoencoder and text encoder"
            )


def _side(cache: LatentCache, encoders: Encoders) -> int:
    """In latents, of what the model draws unasked: the samples', or with buckets the square's."""
    nominal: int | None = cache.manifest.config.get("image_size")
    if nominal is None:
        return int(cache.shapes[0, -1])
    return nominal // pixels_a_latent(encoders.vae)


def _check_encoders(cache: LatentCache, encoders: Encoders, pipeline: str) -> None:
    """Latents of another autoencoder would train without an error, towards nothing."""
    remedy = "run `ldm encode` again, or `dvc repro --force --single-item encode`"
    for part, digest in digests(encoders).items():
        if cache.manifest.inputs.get(part) != digest:
            raise UserError(
                f"{cache.manifest.path}: was encoded with another {part} than that of "
                f"{pipeline}; {remedy}"
            )
    for name in ("scaling_factor", "shift_factor"):
        cached, own = getattr(cache, name), encoders.vae.config[name] or 0.0
        if cached != own:
            raise UserError(
                f"{cache.manifest.path}: has {name} {cached:g}, the vae of {pipeline} has {own:g}; "
                f"{remedy}"
            )


def _expect_whole(init: str) -> None:
    """A checkpoint is no whole model: it lacks what its training left as it was."""
    if any((folder / RUN).is_file() for folder in (Path(init), Path(init).parent)):
        raise UserError(
            f"train.init {init}: is of a training's run; `ldm export {init}` makes a model of it, "
            "whose folder can be named"
        )


def _check_reads_the_same(cache: LatentCache, init: str, text_encoder: torch.nn.Module) -> None:
    """A UNet that was trained with a text encoder of its own cannot read another's states."""
    if cache.manifest.inputs["text_encoder"] != digest_weights(text_encoder):
        raise UserError(
            f"train.init {init}: has another text encoder than {cache.manifest.path} was encoded "
            "with; name it in pretrained.pipeline too, and encode again"
        )
