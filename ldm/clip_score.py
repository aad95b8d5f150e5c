"""CLIP's judgement: how well a picture and a text go together."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPModel

from ldm.images import to_model
from ldm.text import lengths

# CLIP's own normalisation (arXiv:2103.00020; the released models' preprocessor_config.json).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def embed_pictures(clip: CLIPModel, pixels: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 (n, height, width, 3) to unit vectors (n, projection)."""
    seen = to_clip(to_model(pixels).to(device), clip.config.vision_config.image_size)
    pooled = clip.vision_model(pixel_values=seen).pooler_output
    return F.normalize(clip.visual_projection(pooled), dim=-1)


def to_clip(images: torch.Tensor, side: int) -> torch.Tensor:
    """Float (n, 3, height, width) in [-1, 1] to what an image tower reads: (n, 3, side, side)."""
    images = (images + 1) / 2
    if images.shape[-2:] != (side, side):
        images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) for value in (MEAN, STD))
    return (images - mean) / std


def embed_texts(clip: CLIPModel, ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    """int64 ids (n, tokens) to unit vectors (n, projection)."""
    # Attention is causal and the pooled state is that of the end: padding behind it only costs.
    longest = int(lengths(ids).max())
    pooled = clip.text_model(input_ids=ids[:, :longest].to(device)).pooler_output
    return F.normalize(clip.text_projection(pooled), dim=-1)


@torch.no_grad()
def clip_scores(
    clip: CLIPModel, pixels: np.ndarray, ids: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """100 x cosine similarity of each picture and its text, at least 0: float32 (n,), 0 to 100.

    CLIPScore (arXiv:2104.08718, eq. 1) with w = 100, as is common for diffusion models.
    """
    seen = torch.cat(
        [
            embed_pictures(clip, part, device)
            for part in np.split(pixels, range(64, len(pixels), 64))
        ]
    )
    said = torch.cat([embed_texts(clip, part, device) for part in ids.split(64)])
    return (100 * (seen * said).sum(dim=-1)).clamp(min=0).float().cpu()
