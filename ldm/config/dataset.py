"""Settings of the lists, of ingest and of encoding."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from ldm.config.section import Count, Section, Share


class Scenes(Section):
    """The embedded data set that ``ldm scenes`` writes."""

    world: Literal["retrain", "scratch", "polish"] = "retrain"
    """``retrain``: all shapes, for the demo. ``scratch``, then ``polish``: the known ones, of which
    ``tiny`` is made."""
    rows: Count = 4000
    validation_rows: Count = 256
    prompts: Count = 80
    """Evaluation prompts of each group: known, new, held out."""


class Ingest(Section):
    """Download, check and repack."""

    image_size: Count = 64
    """Side of the square centre crop, in pixels."""
    bucket_step: Annotated[int, Field(ge=8, multiple_of=8)] | None = None
    """With aspect buckets, pictures are cropped to the nearest of some sizes of about the square's
    area, up to ``max_aspect``, whose sides are multiples of so many pixels; training shows one size
    a step. 64 is usual for 512 pixels; null: squares alone."""
    image_format: Literal["png", "jpg", "webp"] = "png"
    quality: Annotated[int, Field(ge=0, le=100)] = 95
    """For jpg and webp: quality. For png it is not used; compression is always 6."""
    samples_per_shard: Count = 1000
    """At most; half as many on average: URLs decide where one ends (:mod:`ldm.ingest.cuts`)."""
    timeout_s: Count = 10
    """For a whole try: name, connection, redirects and body."""
    retries: Annotated[int, Field(ge=0)] = 1
    """Further tries after what may pass: time-outs, lost connections, http 408, 425, 429, 5xx."""
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
    """Of a picture's file, by its bytes. Of a JPEG with more pictures inside, as phones make them,
    the first is taken."""
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
    distributor: Literal["multiprocessing", "ray"] = "multiprocessing"
    """Who hands out the downloads: this process, to ``processes`` of its own, or Ray, to the
    machines of the cluster that ``RAY_ADDRESS`` names, without it to as many on this one. They all
    have to see the folder ``runs``; ``allow_addresses`` are those of each of them."""
    processes: Count = 2
    threads: Count = 16
    serve_scenes: bool = True
    """Serve the embedded scenes on loopback while downloading."""
    min_yield: Share = 0.5
    """Fail when less than this share of a list's rows is kept."""

    @model_validator(mode="after")
    def _square_bucket(self) -> Self:
        if self.bucket_step is not None and self.image_size % self.bucket_step:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of bucket_step "
                f"{self.bucket_step}: change either"
            )
        return self

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
    """In Stable Diffusion layout: vae, text_encoder, tokenizer, unet, scheduler. Also an MLflow URI
    such as ``models:/ldm@champion``, and a hub id with ``@REVISION`` instead of ``revision``."""
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
    flip: bool = False
    """Encode each training picture mirrored too; whenever a training shows it, chance says which.
    For captions that name no left and right, and pictures without text. Nearly twice the pictures
    to encode and to keep."""
    text_shards: Count = 16
    """Captions are spread over so many shards by their hash; another caption changes one of them.
    (Pictures have a shard for each of ingest's.)"""
    accelerate: str | None = None
    """Configuration for ``accelerate launch``, whose processes share the work; null: one process,
    without a launcher, on a GPU if there is one."""
