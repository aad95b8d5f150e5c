"""Every setting, typed: one frozen model a stage. Unknown keys and wrong types are refused."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["auto", "float32", "bfloat16"]
"""``auto``: bfloat16 where the hardware computes it, else float32."""


class Section(BaseModel):
    """Frozen, and no key it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, for manifests."""
        return self.model_dump(mode="json")


class Scenes(Section):
    """The embedded data set that ``ldm scenes`` writes."""

    world: Literal["retrain", "scratch"] = "retrain"
    """``retrain``: all shapes, for the demo. ``scratch``: the known ones, for making ``tiny``."""
    rows: Count = 4000
    validation_rows: Count = 256
    prompts: Count = 80
    """Evaluation prompts of each group: known, new, held out."""


class Ingest(Section):
    """Download, check and repack."""

    image_size: Count = 64
    """Side of the square centre crop, in pixels."""
    image_format: Literal["png", "jpg", "webp"] = "png"
    quality: Annotated[int, Field(ge=0, le=100)] = 95
    """For jpg and webp: quality. For png it is not used; compression is always 6."""
    samples_per_shard: Count = 1000
    timeout_s: Count = 10
    """For a whole try: name, connection, redirects and body."""
    retries: Annotated[int, Field(ge=0)] = 1
    """Further tries after what may pass: time-outs, lost connections, http 429 and 5xx."""
    allow_addresses: tuple[str, ...] = ("127.0.0.1/32",)
    """Networks (CIDR) that may be asked although not public; the embedded scenes' is one."""
    user_agent: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = "ldm"
    """The name that sites know us by; ``X-Robots-Tag`` directives to it, or to all, are obeyed."""
    max_bytes: Count = 33_554_432
    """Of a picture's file."""
    formats: tuple[Literal["jpeg", "png", "webp", "gif", "bmp", "tiff", "avif"], ...] = (
        "jpeg",
        "png",
        "webp",
        "gif",
    )
    """Of a picture's file, by its bytes."""
    max_pixels: Count = 64_000_000
    """Of a picture; larger ones are not decoded (64 megapixels are 192 MB)."""
    min_side: Count = 64
    """Of a picture, in pixels: smaller ones would be blown up."""
    max_aspect: Annotated[float, Field(ge=1)] = 4.0
    """Longer over shorter side: a centre crop of a narrower one shows next to nothing of it."""
    background: str = "white"
    """What shows through clear pictures: a name, or #rrggbb."""
    animations: Literal["first", "skip"] = "first"
    """Their first frame, or none."""
    max_caption: Count = 1000
    """Characters; longer captions are cut."""
    max_punsafe: Share | None = None
    """Of the optional column ``punsafe``, how likely a picture is not fit for all eyes; null: any.
    With this or another limit on a column, rows that leave it empty are skipped too."""
    max_pwatermark: Share | None = None
    """Of the optional column ``pwatermark``, how likely a picture has a watermark."""
    min_aesthetic: float | None = None
    """Of the optional column ``aesthetic``, a mark."""
    licenses: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """What the optional column ``license`` may say, in capitals or not; null: anything."""
    near_duplicates: Annotated[int, Field(ge=0, le=16)] | None = None
    """Of pictures whose perceptual hashes differ in at most so many of 64 bits, the first stays;
    null keeps them all. Photographs that were scaled or saved anew differ in 0 to 4. The hash sees
    large shapes in grey, no colours and nothing small, so that simple drawings look much alike to
    it. It stands in a sample's ``json`` as ``phash``."""
    blocked: str | None = None
    """A file of hashes in hexadecimal, one a line, # before comments: pictures that must not become
    samples, by the sha256 of what was downloaded or of the sample, or by a perceptual hash (within
    ``near_duplicates``). In the folder ``data``, a change of it makes DVC run the stage again."""
    processes: Count = 2
    threads: Count = 16
    serve_scenes: bool = True
    """Serve the embedded scenes on loopback while downloading."""
    min_yield: Share = 0.5
    """Fail when less than this share of a list's rows is kept."""

    @field_validator("background")
    @classmethod
    def _colour(cls, value: str) -> str:
        from PIL import ImageColor

        ImageColor.getrgb(value)  # Says itself what is wrong.
        return value

    @field_validator("allow_addresses")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            ip_network(one)  # Says itself what is wrong.
        return value


class Pretrained(Section):
    """The frozen parts and where training starts.

    A name is ``tiny`` (embedded), a local folder or a hub id.
    """

    pipeline: str = "tiny"
    """Folder or id in Stable Diffusion layout: vae, text_encoder, tokenizer, unet, scheduler."""
    revision: str | None = None
    network: Literal["ldm", "diffusers"] = "ldm"
    """Whose code runs the UNet; the weights are the same."""
    clip: str = "tiny"
    """CLIP with both towers, for the CLIP score."""
    clip_revision: str | None = None


class Encode(Section):
    """Pixels to posterior moments, captions to hidden states."""

    batch_size: Count = 64
    """Of each thread, on a CPU. Another size gives other last bits: all is encoded again."""
    compute: Literal["float32", "bfloat16"] = "float32"
    storage: Literal["float32", "float16"] = "float32"
    samples_per_shard: Count = 5000


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


class Sampling(Section):
    """How pictures are drawn."""

    sampler: Literal["dpm++", "euler", "lms", "ddim", "ddpm", "pndm"] = "dpm++"
    implementation: Literal["ldm", "diffusers"] = "ldm"
    """Whose code takes the steps; the pictures are the same."""
    steps: Count = 20
    guidance: Annotated[float, Field(ge=1)] = 2.0
    """Classifier-free guidance scale; 1 switches guidance off."""
    guided_from: Share = 0.0
    guided_to: Share = 1.0
    """Guidance is computed at timesteps within these shares of the schedule alone; outside, a step
    costs half."""
    compute: Precision = "float32"
    """Precision of the UNet."""
    batch_size: Count = 40
    seed: int = 0

    @model_validator(mode="after")
    def _own_noise(self) -> Self:
        if self.sampler == "ddpm" and self.implementation == "diffusers":
            raise ValueError("sampler ddpm: diffusers' draws its own noise; set implementation ldm")
        return self


class EvaluationSampling(Sampling):
    """How evaluation draws: hundreds of pictures, whose share that is right bfloat16 keeps."""

    compute: Precision = "auto"
    """Precision of the UNet."""


class Evaluate(Section):
    """Batch sampling over the evaluation prompts."""

    sampling: EvaluationSampling = EvaluationSampling()


class Gate(Section):
    """When a challenger becomes champion."""

    wins_on: tuple[str, ...] = ("adherence_new", "adherence_heldout")
    """The mean of these metrics must rise by ``min_gain`` at least."""
    min_gain: float = 0.0
    holds: tuple[str, ...] = ("adherence",)
    """None of these may fall by more than ``max_loss``."""
    max_loss: Annotated[float, Field(ge=0)] = 0.03


class Registry(Section):
    """MLflow."""

    tracking_uri: str = "sqlite:///mlflow.db"
    experiment: str = "ldm"
    model: str = "ldm"
    gate: Gate = Gate()


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


class Params(Section):
    """All of ``params.yaml``."""

    scenes: Scenes = Scenes()
    ingest: Ingest = Ingest()
    pretrained: Pretrained = Pretrained()
    first_stage: FirstStage = FirstStage()
    encode: Encode = Encode()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    generate: Sampling = Sampling()
    registry: Registry = Registry()
