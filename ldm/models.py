"""Pretrained parts by name, all through ``from_pretrained``.

A name is ``tiny`` (embedded in this package), a local folder or a hub id (``ORGANISATION/NAME``).
A pipeline's may also be an MLflow URI (``models:/NAME@ALIAS``) or a hub id with ``@REVISION``, and
where a UNet is asked for, a training's checkpoint. A pipeline folder is in Stable Diffusion layout:
``vae``, ``text_encoder``, ``tokenizer``, ``unet``, ``scheduler``.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from ldm.artifacts import digest_json
from ldm.config import Pretrained
from ldm.errors import UserError

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
        from ldm.tracking.registered import fetch_model

        return Source(str(fetch_model(name)), name=name)
    if revision is None and not Path(name).exists():
        location, _, pinned = name.partition("@")
        return Source(location, pinned or None, name)
    return Source(name, revision, name)


def locate_clip(name: str, revision: str | None = None) -> Source:
    """Resolve the name of a CLIP with both towers: ``tiny``, a folder or a hub id."""
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
    return _frozen(load_part(AutoencoderKL, source, "vae", torch_dtype=torch.float32))


def load_text_encoder(source: Source) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The frozen text tower, float32, in eval mode, and its tokenizer."""
    # First: a hub that does not answer is asked in vain for each of a part's files, half a minute
    # each, of which this has one and a tokenizer many.
    text_encoder = load_part(CLIPTextModel, source, "text_encoder", dtype=torch.float32)
    return load_part(CLIPTokenizer, source, "tokenizer"), _frozen(text_encoder)


@dataclass(frozen=True)
class Encoders:
    """What comes with a UNet: the autoencoder, and the text tower with its tokenizer.

    A training leaves them as they are, but for the text tower where that is trained too.
    """

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel


def load_encoders(source: Source) -> Encoders:
    """The frozen parts of a pipeline, float32, in eval mode."""
    return Encoders(load_vae(source), *load_text_encoder(source))


def digests(encoders: Encoders) -> dict[str, str]:
    """What latents depend on, by part: of float32 weights, whatever they are computed in.

    Of the VAE that is all but its decoder.
    """
    return {
        "vae": digest_weights(encoders.vae, but=("decoder.", "post_quant_conv.")),
        "text_encoder": digest_weights(encoders.text_encoder),
        "tokenizer": digest_json(encoders.tokenizer.get_vocab()),
    }


def load_clip(source: Source) -> tuple[CLIPTokenizer, CLIPModel]:
    """CLIP with both towers, float32, in eval mode, and its tokenizer."""
    tokenizer = load_part(CLIPTokenizer, source, None)
    return tokenizer, _frozen(load_part(CLIPModel, source, None, dtype=torch.float32))


def digest_weights(module: torch.nn.Module, but: tuple[str, ...] = ()) -> str:
    """sha256 over every tensor's name, shape, dtype and bytes, in order of name.

    Those whose name begins as one of ``but`` are left out.
    """
    total = hashlib.sha256()
    tensors = ((name, one) for name, one in module.state_dict().items() if not name.startswith(but))
    for name, tensor in sorted(tensors):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def load_part(kind: Any, source: Source, part: str | None, **options: Any) -> Any:
    """``from_pretrained`` of a class on a part's folder; UserError when there is no such part."""
    if part is not None:
        options["subfolder"] = part
    with explained(source, part):
        return kind.from_pretrained(source.location, revision=source.revision, **options)


@contextmanager
def explained(source: Source, part: str | None) -> Iterator[None]:
    """UserError where a part cannot be loaded."""
    where = source.name or source.location
    try:
        with warnings.catch_warnings():
            # An argument that the hub's client has dropped and diffusers still gives.
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")
            yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{where}: cannot load {part or 'it'} ({reason}); give `tiny`, a folder in Stable "
            "Diffusion layout, or a hub id that this machine can reach"
        ) from error


def _frozen(module: Any) -> Any:
    return module.eval().requires_grad_(False)
