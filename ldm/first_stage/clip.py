"""Training CLIP: captions and pictures into one space."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from ldm.clip_score import embed_pictures, embed_texts
from ldm.config import ClipTraining
from ldm.device import autocast
from ldm.first_stage.loop import Loop, Losses, Run, Trained
from ldm.first_stage.rearranged import Rearranger, told_apart
from ldm.first_stage.vae import Batches
from ldm.text import tokenize


def build_clip(config: ClipTraining, tokenizer: CLIPTokenizer, image_size: int) -> CLIPModel:
    """An untrained CLIP of two equal towers."""
    tower = {
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "projection_dim": config.width,
    }
    text = CLIPTextConfig(
        **tower,
        vocab_size=len(tokenizer),
        max_position_embeddings=config.max_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(**tower, image_size=image_size, patch_size=config.patch_size)
    clip = CLIPModel(
        CLIPConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=config.width
        )
    )
    # Tokens that no training caption holds keep their first value; at CLIP's own 0.02 they would
    # drown beside trained ones, and a later word built from them would hardly be told apart.
    torch.nn.init.normal_(clip.text_model.embeddings.token_embedding.weight, std=0.2)
    return clip


def train_clip(
    config: ClipTraining,
    tokenizer: CLIPTokenizer,
    pictures: Batches,
    captions: Sequence[str],
    image_size: int,
    device: torch.device,
    run: Run,
) -> CLIPModel:
    """Train with the symmetric contrastive loss (CLIP, arXiv:2103.00020, figure 3).

    Pictures also choose against rearranged captions (arXiv:2210.01936, section 4).
    """
    torch.manual_seed(config.seed)
    clip = build_clip(config, tokenizer, image_size).to(device).train()
    optimizer = torch.optim.AdamW(
        _parameter_groups(clip), lr=config.learning_rate, betas=(0.9, 0.98)
    )
    tokens = tokenize(tokenizer, captions)
    rearranged = Rearranger(tokens)
    loop = Loop("clip", config, run, {"clip": Trained(clip, optimizer)})

    def losses(_: int) -> Losses:
        chosen = loop.choose(len(captions))
        with autocast(device, config.compute):
            seen = embed_pictures(clip, pictures(chosen), device)
            wrong = rearranged.some_of_each(tokens[chosen], config.rearranged, loop.rng)
            texts = torch.cat([tokens[chosen], wrong])
            said = embed_texts(clip, texts, device)
        logits = clip.logit_scale.exp().clamp(max=100) * seen.float() @ said.float().T
        own = torch.arange(len(chosen), device=device)
        of_texts = F.cross_entropy(logits[:, : len(chosen)].T, own)
        loss = (F.cross_entropy(logits, own) + of_texts) / 2
        yield loss, {"loss": loss}

    loop.train(losses)
    return clip.eval()


def _parameter_groups(clip: CLIPModel) -> list[dict[str, object]]:
    """Matrices decay; gains, biases and embeddings (see :func:`build_clip`) do not."""
    decayed = [p for name, p in clip.named_parameters() if p.ndim > 1 and "embedding" not in name]
    names = {id(p) for p in decayed}
    kept = [p for p in clip.parameters() if id(p) not in names]
    return [{"params": decayed, "weight_decay": 0.05}, {"params": kept, "weight_decay": 0.0}]


@torch.no_grad()
def retrieval(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    pixels: np.ndarray,
    captions: Sequence[str],
    device: torch.device,
) -> float:
    """Share of pictures whose own caption scores highest among all given ones."""
    seen = embed_pictures(clip, pixels, device)
    said = embed_texts(clip, tokenize(tokenizer, captions), device)
    best = (seen @ said.T).argmax(dim=1).cpu()
    return float((best == torch.arange(len(best))).float().mean())


@torch.no_grad()
def order_accuracy(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    pixels: np.ndarray,
    captions: Sequence[str],
    device: torch.device,
) -> float | None:
    """Share of pictures whose own caption scores above all its rearrangements.

    Of those whose caption has any, None where none has. Chance is one in two to four.
    """

    def scores(number: int, said: torch.Tensor) -> torch.Tensor:
        seen = embed_pictures(clip, pixels[number][None], device)
        return (embed_texts(clip, said, device) @ seen.T)[:, 0]

    return told_apart(tokenize(tokenizer, captions), scores)
