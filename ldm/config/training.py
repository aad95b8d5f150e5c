"""Settings of the training."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from ldm.config.section import Count, Section, Share


class UnetShape(Section):
    """A UNet to start from random weights; field names are ours, meanings diffusers'."""

    widths: tuple[Count, ...] = (96, 192)
    layers_per_block: Count = 1
    head_width: Count = 32
    norm_groups: Count = 16


class NoiseSchedule(Section):
    """The forward process of a UNet that starts from random weights."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    prediction: Literal["epsilon", "v_prediction"] = "v_prediction"
    train_timesteps: Count = 1000


class Train(Section):
    """The UNet on cached latents."""

    init: str = "pretrained"
    """``pretrained`` (the pipeline's UNet), ``random``, or a model: a folder or an MLflow URI such
    as ``models:/ldm@champion``."""
    unet: UnetShape = UnetShape()
    """With ``init: random``."""
    noise: NoiseSchedule = NoiseSchedule()
    """With ``init: random``; otherwise the starting model's own scheduler rules."""
    steps: Count = 1800
    batch_size: Count = 64
    """Samples an optimizer step, over all processes and accumulation steps."""
    accumulation: Count = 1
    learning_rate: Annotated[float, Field(gt=0)] = 4e-4
    text_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Train the text encoder too, at this rate; null leaves it as it is. For a text encoder that
    has not learned enough of a small domain's captions to tell a UNet what goes where."""
    warmup_steps: Annotated[int, Field(ge=0)] = 30
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    min_snr_gamma: Annotated[float, Field(gt=0)] | None = 5.0
    """The squared error of ``x_0`` weighs as much as the signal-to-noise ratio, at most this. With
    null every timestep's error of what the network predicts weighs 1, and there is no floor."""
    snr_floor: Annotated[float, Field(ge=0)] = 0.5
    """... and at least this. The noisiest timesteps decide a small picture's layout; 0 leaves them
    almost no weight, which is plain min-SNR."""
    timestep_shift: Annotated[float, Field(gt=0)] = 1.0
    """Above 1 shows more noisy timesteps and fewer others. Which of two things stands where is
    decided where next to nothing of the picture is visible, on few timesteps of an even draw."""
    caption_dropout: Share = 0.1
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """``auto``: bf16 where the hardware computes it, else none."""
    seed: int = 0
    workers: Annotated[int, Field(ge=0)] = 0
    log_every: Count = 20
    validate_every: Count = 200
    checkpoint_every: Count = 200
    sample_every: Count | None = None
    """Steps between sheets of samples, ``samples-NNNNNNNN.png`` in the run's folder; null: none."""
    sample_prompts: tuple[str, ...] = ()
    """What a sheet shows, always under the same seeds; by default the first of the validation
    captions."""
    track: bool = True
    """Show the training in MLflow as it goes."""
    keep_checkpoints: Count = 2
    """The newest ones; the best by validation loss stays too."""
    max_skipped: Count = 10
    """Steps in a row that may be skipped because their loss or gradient is not finite."""
    accelerate: str = "infra/accelerate/cpu.yaml"
    """Configuration for ``accelerate launch``."""

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _unquoted_no(cls, value: object) -> object:
        """YAML reads a bare ``no`` as false."""
        return "no" if value is False else value

    @model_validator(mode="after")
    def _whole_batches(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulation "
                f"{self.accumulation}: change either"
            )
        return self

    @model_validator(mode="after")
    def _ordered_bounds(self) -> Self:
        if self.min_snr_gamma is not None and self.snr_floor > self.min_snr_gamma:
            raise ValueError(
                f"snr_floor {self.snr_floor} is above min_snr_gamma {self.min_snr_gamma}: "
                "lower it, or set it to 0"
            )
        return self
