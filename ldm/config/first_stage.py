"""Settings of the first stage."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ldm.config.section import Count, Precision, Section, Seed, expect_multiples

Rate = Annotated[float, Field(gt=0)]


class PartTraining(Section):
    """What the trainings of all parts have."""

    seed: Seed = 0
    steps: Annotated[int, Field(ge=0)]
    warmup_steps: Count
    batch_size: Count
    learning_rate: Rate
    """At its peak, after the warm-up; half a cosine leads from there to 0."""
    compute: Precision = "auto"


class VaeTraining(PartTraining):
    """The autoencoder of ``ldm first-stage``."""

    init: str = "random"
    """Where it starts: ``random``, of the shape that ``widths`` to ``mid_attention`` say, or the
    VAE of a pipeline: ``tiny``, a folder, a hub id (``NAME@REVISION``), ``models:/ldm@champion``.
    That keeps its scaling factor, and asks for a ``learning_rate`` of 1e-5, say, and a
    ``kl_weight`` of 1e-6: the defaults are for random weights."""
    trains: Literal["all", "decoder"] = "all"
    """``decoder``, of a VAE that is there already: its latents stay what they are, and so does all
    that was encoded by it and trained on that."""
    widths: Annotated[tuple[Count, ...], Field(min_length=1)] = (16, 32, 64, 96)
    layers_per_block: Count = 1
    latent_channels: Count = 4
    norm_groups: Count = 8
    mid_attention: bool = False
    steps: Count = 6000
    warmup_steps: Count = 200
    batch_size: Count = 16
    learning_rate: Rate = 1.5e-3
    reconstruction: Literal["mse", "l1"] = "mse"
    """Mean squared or absolute error over pixels in [-1, 1]."""
    kl_weight: Annotated[float, Field(ge=0)] = 1e-3
    perceptual: str | None = None
    """A CLIP whose image tower also compares pictures and reconstructions: ``tiny``, a folder or a
    hub id such as openai/clip-vit-base-patch32; null: none does."""
    perceptual_revision: str | None = None
    perceptual_weight: Rate = 0.1
    adversarial_from: Annotated[int, Field(ge=0)] | None = None
    """The step from which on a discriminator learns to tell reconstructions from pictures, and the
    decoder to deceive it, for sharper details; null: none. Late, when reconstructions are good."""
    adversarial_weight: Rate = 0.5
    """1 pulls on the decoder's last layer as hard as the reconstruction does."""
    discriminator_widths: Annotated[tuple[Count, ...], Field(min_length=2)] = (64, 128, 256)
    """It judges patches of 34 pixels; with a fourth width of 70."""
    discriminator_learning_rate: Rate = 2e-4

    @model_validator(mode="after")
    def _has_latents(self) -> Self:
        if self.trains == "decoder" and self.init == "random":
            raise ValueError(
                "trains decoder wants an encoder that is there already: name a pipeline in init"
            )
        return self

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        expect_multiples(self.widths, norm_groups=self.norm_groups)
        return self

    @model_validator(mode="after")
    def _has_one_shape(self) -> Self:
        shape = ("widths", "layers_per_block", "latent_channels", "norm_groups", "mid_attention")
        defaults = type(self).model_fields
        given = [name for name in shape if getattr(self, name) != defaults[name].default]
        if self.init != "random" and given:
            raise ValueError(
                f"{given[0]}: is for init random; with init {self.init} the VAE has its own; leave "
                "it out, or set init to random"
            )
        return self

    @model_validator(mode="after")
    def _adversary_plays(self) -> Self:
        if self.adversarial_from is not None and self.adversarial_from >= self.steps:
            raise ValueError(
                f"adversarial_from {self.adversarial_from} is past the last of {self.steps} steps: "
                "lower it, or set it to null"
            )
        return self


class ClipTraining(PartTraining):
    """The CLIP of ``ldm first-stage``; both towers share width, layers and heads."""

    width: Count = 128
    layers: Count = 3
    heads: Count = 4
    patch_size: Count = 8
    max_tokens: Annotated[int, Field(ge=3)] = 40
    """Of a caption, with the two that begin and end it."""
    vocabulary: Count = 4096
    """Upper bound on the tokens of spaced scripts; every ideograph of the captions is added."""
    rearranged: Annotated[int, Field(ge=0)] = 3
    """Captions of the same words that say something else, which a picture has to tell from its own
    in training; at most as many a caption."""
    steps: Count = 3000
    warmup_steps: Count = 100
    batch_size: Count = 128
    learning_rate: Rate = 1e-3

    @model_validator(mode="after")
    def _whole_heads(self) -> Self:
        expect_multiples((self.width,), heads=self.heads)
        return self


class LayoutTraining(PartTraining):
    """What the text encoder of ``ldm first-stage`` learns after CLIP: what stands where."""

    heads: Count = 8
    steps: Annotated[int, Field(ge=0)] = 3500
    """0 leaves the text encoder as CLIP's."""
    warmup_steps: Count = 200
    batch_size: Count = 128
    learning_rate: Rate = 1e-3


class FirstStage(Section):
    """VAE and CLIP for a domain that the pretrained ones do not fit."""

    vae: VaeTraining = VaeTraining()
    clip: ClipTraining = ClipTraining()
    layout: LayoutTraining = LayoutTraining()
    text_encoder: str | None = None
    """A pipeline, named as in ``vae.init``, whose tokenizer and text encoder go along as they are,
    so that only the VAE is trained; null: they are trained, by ``clip`` and ``layout``."""
    log_every: Count = 50
    checkpoint_every: Count = 200
    """Steps, of each part."""
    validate_every: Count = 1000
    """Steps of the VAE between measurements on all held-out pictures. The checkpoint with the
    lowest error stays, beside the newest."""
    max_skipped: Count = 10
    """Steps in a row that may be skipped because their loss or gradient is not finite; one more
    ends the training."""
    sheet_every: Count | None = 1000
    """Steps of the VAE between sheets of held-out pictures above their reconstructions,
    ``reconstructions-NNNNNNNN.png`` in ``vae`` of the run's folder; null: none."""
    track: bool = True
    """Show the training in MLflow as it goes."""

    @model_validator(mode="after")
    def _whole_heads(self) -> Self:
        if self.layout.steps:
            expect_multiples((self.clip.width,), **{"layout.heads": self.layout.heads})
        return self

    @model_validator(mode="after")
    def _one_text_encoder(self) -> Self:
        for name, default in (("clip", ClipTraining()), ("layout", LayoutTraining())):
            if self.text_encoder and getattr(self, name) != default:
                raise ValueError(
                    f"{name}: is not trained where text_encoder names one; leave out either"
                )
        return self
