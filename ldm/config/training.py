"""Settings of the training."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from ldm.config.section import Count, Section, Seed, Share, expect_multiples

PRODIGY_LEAST = 0.01
"""A ``learning_rate`` below is meant for another optimizer than Prodigy."""
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


class UnetShape(Section):
    """A UNet to start from random weights; field names are ours, meanings diffusers'."""

    widths: Annotated[tuple[Count, ...], Field(min_length=1)] = (96, 192)
    layers_per_block: Count = 1
    head_width: Count = 32
    norm_groups: Count = 16

    @model_validator(mode="after")
    def _whole_heads_and_groups(self) -> Self:
        expect_multiples(self.widths, head_width=self.head_width, norm_groups=self.norm_groups)
        return self


class NoiseSchedule(Section):
    """The forward process that a UNet is to undo."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    """How the variance of the noise grows; ``scaled_linear`` is Stable Diffusion's."""
    prediction: Literal["epsilon", "v_prediction", "flow_prediction"] = "v_prediction"
    """What the UNet predicts: the noise, the velocity (arXiv:2202.00512), or the slope of the line
    from picture to noise (flow matching, arXiv:2209.03003), which has no betas."""
    zero_terminal_snr: bool = False
    """Stretch the betas until the last timestep is noise alone (arXiv:2305.08891), so that training
    sees what sampling starts from. For ``v_prediction``."""
    train_timesteps: Count = 1000

    @model_validator(mode="after")
    def _predictable(self) -> Self:
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "zero_terminal_snr: epsilon tells nothing of the picture where all is noise; set "
                "prediction to v_prediction"
            )
        if self.zero_terminal_snr and self.prediction == "flow_prediction":
            raise ValueError(
                "zero_terminal_snr: a flow ends in noise alone by itself; leave it out"
            )
        default = type(self).model_fields["beta_schedule"].default
        if self.prediction == "flow_prediction" and self.beta_schedule != default:
            raise ValueError("beta_schedule: flow_prediction has no betas; leave it out")
        return self


class Lora(Section):
    """Low-rank adapters beside layers of the UNet, trained instead of it (arXiv:2106.09685).

    With ``text_learning_rate`` beside layers of the text encoder too.
    """

    rank: Count = 16
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """What an adapter adds counts ``alpha / rank`` times."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("to_q", "to_k", "to_v", "to_out.0")
    """Linear layers and convolutions, by the end of diffusers' names; by default the attention's.
    ``ff.net.0.proj``, ``ff.net.2``, ``proj_in``, ``proj_out``, ``conv1`` and ``conv2`` are more."""
    text_targets: Annotated[tuple[str, ...], Field(min_length=1)] = TEXT_ATTENTION
    """The same of the text encoder; ``fc1`` and ``fc2`` are more."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that a step leaves out; each process draws its own."""


class Train(Section):
    """The UNet on cached latents."""

    init: str = "pretrained"
    """``pretrained`` (the pipeline's UNet), ``random``, or a model: a folder, a hub id, maybe with
    ``@REVISION``, or an MLflow URI such as ``models:/ldm@champion``."""
    unet: UnetShape = UnetShape()
    """With ``init: random`` alone."""
    noise: NoiseSchedule | None = None
    """null: the starting model's own; with ``init: random`` the one above, as it comes. Another
    start may be taught another one: Stable Diffusion 1, which predicts epsilon, ``{prediction:
    v_prediction, beta_schedule: scaled_linear, zero_terminal_snr: true}``, say."""
    lora: Lora | None = None
    """Train adapters and leave the networks' own weights as they are; null trains all weights."""
    steps: Count = 2200
    batch_size: Count = 64
    """Samples an optimizer step, over all processes and accumulation steps."""
    accumulation: Count = 1
    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"
    """AdamW; the same with its state in 8 bits, a quarter of the memory (arXiv:2110.02861), by the
    extra ``bitsandbytes``; or Prodigy (arXiv:2306.06101), which finds the size of its steps itself
    and wants ``learning_rate: 1``."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Of the learning rate after its warm-up: down to 0 at the last step, or not at all."""
    learning_rate: Annotated[float, Field(gt=0)] = 4e-4
    """At the end of the warm-up; with Prodigy a factor on the rate that it finds."""
    text_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Train the text encoder too, or with ``lora`` adapters in it, at this rate; null leaves it as
    it is. For a text encoder that has not learned enough of a small domain's captions to tell a
    UNet what goes where."""
    warmup_steps: Annotated[int, Field(ge=0)] = 30
    """Of the optimizer."""
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
    offset_noise: Annotated[float, Field(ge=0)] = 0.0
    """Add so many times a normal number, one for each channel of a sample, to its noise: a model
    learns to change the mean of a picture, and so to draw dark and bright ones (Guttenberg,
    Diffusion with Offset Noise, 2023, with 0.1). Validation goes without."""
    caption_dropout: Share = 0.1
    gradient_checkpointing: bool = False
    """Compute the UNet's blocks once more on the way back instead of keeping what is inside them
    (arXiv:1604.06174): less memory, a third more time, the same gradients."""
    compile: bool = False
    """``torch.compile`` the UNet: minutes at the start, then faster steps. A CPU wants a C++
    compiler for it."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """``auto``: bf16 where the hardware computes it, else none. fp16, for GPUs, scales the loss."""
    deterministic: bool = False
    """The same bits again on a GPU too, and the exact resume that a CPU has anyway, for some of its
    speed."""
    seed: Seed = 0
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that load batches. On a CPU they take the memory of the weights and their average
    once more, as these were when they started; 0: the training loads them itself."""
    log_every: Count = 20
    validate_every: Count = 200
    checkpoint_every: Count = 200
    sample_every: Count | None = 600
    """Steps between sheets of samples, ``samples-NNNNNNNN.png`` in the run's folder, drawn as
    ``evaluate.sampling`` says; null: none."""
    sample_prompts: tuple[str, ...] = ()
    """What a sheet shows, always under the same seeds; by default the first of the validation
    captions."""
    track: bool = True
    """Show the training in MLflow as it goes."""
    keep_checkpoints: Count = 2
    """The newest ones; the best by validation loss stays too."""
    max_skipped: Count = 10
    """Steps in a row that may be skipped because their loss or gradient is not finite; one more
    ends the training."""
    accelerate: str = "auto"
    """Configuration for ``accelerate launch``: a file, or ``auto``, which is
    ``infra/accelerate/gpu.yaml`` (one GPU) where there is a GPU, else ``cpu.yaml`` beside it."""
    patience_s: Count = 1800
    """How long processes wait for one that stands still, and a stop for one that still writes its
    checkpoint; then the training ends, and the same command goes on from its newest checkpoint."""

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

    @model_validator(mode="after")
    def _what_starts_at_random(self) -> Self:
        if self.init != "random" and self.unet != UnetShape():
            raise ValueError(
                f"unet: is for init random; with init {self.init} the starting model has its own; "
                "leave it out, or set init to random"
            )
        return self

    @model_validator(mode="after")
    def _what_adapters_adapt(self) -> Self:
        if self.lora and self.init == "random":
            raise ValueError(
                "lora: adapts a trained UNet, of which init random has none; set init to another "
                "start, or lora to null"
            )
        if self.lora and self.noise is not None:
            raise ValueError(
                "lora: goes with models of the start's own noise schedule; set noise to null, or "
                "lora to null"
            )
        if self.lora and self.lora.text_targets != TEXT_ATTENTION and not self.text_learning_rate:
            raise ValueError(
                "lora.text_targets: the text encoder is not trained; set text_learning_rate, or "
                "leave them out"
            )
        return self

    @model_validator(mode="after")
    def _prodigy_has_one_rate(self) -> Self:
        if self.optimizer != "prodigy":
            return self
        if self.learning_rate < PRODIGY_LEAST:
            raise ValueError(
                f"learning_rate {self.learning_rate}: prodigy finds the step size itself and takes "
                "a factor on it; set learning_rate to 1"
            )
        if self.text_learning_rate not in (None, self.learning_rate):
            raise ValueError(
                f"text_learning_rate {self.text_learning_rate}: prodigy has one rate for all; set "
                f"it to learning_rate, {self.learning_rate}, or to null"
            )
        return self
