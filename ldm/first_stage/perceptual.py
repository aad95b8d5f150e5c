"""How alike two pictures are to a network that has learned to see."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers import CLIPVisionModel

from ldm.clip_score import to_clip
from ldm.errors import UserError
from ldm.models import load_part, locate_clip


def load_tower(name: str, revision: str | None) -> CLIPVisionModel:
    """The image tower of a CLIP by name (``tiny``, folder, hub id), float32, frozen."""
    tower, about = load_part(
        *(CLIPVisionModel, locate_clip(name, revision), None),
        dtype=torch.float32,
        output_loading_info=True,
    )
    if about["missing_keys"]:
        raise UserError(
            f"{name}: has no image tower of CLIP's; name a CLIP in first_stage.vae.perceptual"
        )
    return tower.eval().requires_grad_(False)


def feature_distance(
    tower: CLIPVisionModel, pictures: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Distance of float pictures (n, 3, h, w) in [-1, 1] in a tower's hidden states: (n,), 0 to 4.

    Mean over layers and positions of the squared distance of states of unit length (LPIPS,
    arXiv:1801.03924, eq. 1, with equal weights), on CLIP's states in place of VGG's.
    """
    with torch.no_grad():
        wanted = _states(tower, targets)
    return (_states(tower, pictures) - wanted).square().sum(dim=-1).mean(dim=(0, 2))


def _states(tower: CLIPVisionModel, pictures: torch.Tensor) -> torch.Tensor:
    """Unit vectors (layers, n, positions, width)."""
    seen = to_clip(pictures, tower.config.image_size)
    _, *layers = tower(pixel_values=seen, output_hidden_states=True).hidden_states
    return F.normalize(torch.stack(layers).float(), dim=-1)
