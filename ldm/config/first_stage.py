"""Settings of the first stage."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ldm.config.section import Count, Precision, Section


class VaeTraining(Section):
    """The autoencoder of ``ldm first-stage``."""

    widths: tuple[Count, ...] = (16, 32, 64, 96)
    layers_per_block: Count = 1
    latent_channels: Count = 4
    norm_groups: Count = 8
    mid_attention: bool = False
    seed: int = 0
    steps: Count = 6000
    warmup_steps: Count = 200
    batch_size: Count = 16
    learning_rate: Annotated[float, Field(gt=0)] = 1.5e-3
    kl_weight: Annotated[float, Field(ge=0)] = 1e-3
    compute: Precision = "auto"


class ClipTraining(Section):
    """The CLIP of ``ldm first-stage``; both towers share width, layers and heads."""

    width: Count = 128
    layers: Count = 3
    heads: Count = 4
    patch_size: Count = 8
    max_tokens: Count = 40
    vocabulary: Count = 4096
    """Upper bound on the tokens of spaced scripts; every ideograph of the captions is added."""
    rearranged: Annotated[int, Field(ge=0)] = 3
    """Captions of the same words that say something else, which a picture has to tell from its own
    in training; at most as many a caption."""
    seed: int = 0
    steps: Count = 3000
    warmup_steps: Count = 100
    batch_size: Count = 128
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    compute: Precision = "auto"


class LayoutTraining(Section):
    """What the text encoder of ``ldm first-stage`` learns after CLIP: what stands where."""

    heads: Count = 8
    seed: int = 0
    steps: Annotated[int, Field(ge=0)] = 3500
    """0 leaves the text encoder as CLIP's."""
    warmup_steps: Count = 200
    batch_size: Count = 128
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    compute: Precision = "auto"


class FirstStage(Section):
    """VAE and CLIP from random weights, for a domain that the pretrained ones do not fit."""

    vae: VaeTraining = VaeTraining()
    clip: ClipTraining = ClipTraining()
    layout: LayoutTraining = LayoutTraining()
