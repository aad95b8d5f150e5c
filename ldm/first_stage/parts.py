"""What the first stage starts from, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionModel

from ldm.artifacts import digest_json
from ldm.config import FirstStage
from ldm.first_stage.layout import LayoutReader
from ldm.first_stage.perceptual import load_tower
from ldm.models import digest_weights, load_text_encoder, load_vae, locate
from ldm.pipeline import forget_origin


@dataclass(frozen=True)
class Parts:
    """What comes of it.

    ``clip``: where that is trained; ``reader`` reads its text encoder's states, where layout was
    learned.
    """

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    clip: CLIPModel | None = None
    reader: LayoutReader | None = None


@dataclass(frozen=True)
class Given:
    """What is there already: a VAE to start from, text parts, a tower that compares pictures."""

    vae: AutoencoderKL | None
    text: tuple[CLIPTokenizer, CLIPTextModel] | None
    tower: CLIPVisionModel | None

    @classmethod
    def by(cls, config: FirstStage, device: torch.device) -> Given:
        """Load what the settings name."""
        vae, text, tower = config.vae, config.text_encoder, None
        if vae.perceptual:
            tower = load_tower(vae.perceptual, vae.perceptual_revision).to(device)
        return cls(
            None if vae.init == "random" else load_vae(locate(vae.init)),
            load_text_encoder(locate(text)) if text else None,
            tower,
        )

    def digests(self) -> dict[str, str]:
        """Of the weights that decide what is trained, and of those that go along."""
        modules = {
            "start": self.vae,
            "text_encoder": self.text and self.text[1],
            "perceptual": self.tower,
        }
        found = {name: digest_weights(one) for name, one in modules.items() if one is not None}
        return found | ({"tokenizer": digest_json(self.text[0].get_vocab())} if self.text else {})


def text_encoder_of(clip: CLIPModel) -> CLIPTextModel:
    """A copy of CLIP's text tower."""
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    return text_encoder.eval()


def save(parts: Parts, given: Given, folder: Path) -> None:
    """Write them as ``from_pretrained`` reads them."""
    # Half precision halves the folder and moves the PSNR by less than 0.01 dB. But what others were
    # trained beside stays what it was.
    vae = parts.vae if given.vae else parts.vae.half()
    text_encoder = parts.text_encoder if given.text else parts.text_encoder.half()
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    parts.tokenizer.save_pretrained(folder / "tokenizer")
    if parts.clip is not None:
        parts.clip.half().save_pretrained(folder / "clip")
        parts.tokenizer.save_pretrained(folder / "clip")
    forget_origin(folder)
