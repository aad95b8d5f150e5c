"""Telling pictures from reconstructions, so that a decoder learns to draw what looks real."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

MOST = 1e4
"""Where the decoder gets next to no gradient from the discriminator, the weight stops here."""


class PatchDiscriminator(nn.Sequential):
    """A verdict for each of many overlapping patches (pix2pix, arXiv:1611.07004, section 6.1.2).

    Pictures (n, 3, h, w) in [-1, 1] to logits (n, 1, h', w'), above 0 for real ones. Every width
    but the last halves the sides; a patch is 34 pixels wide with three widths, 70 with four.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for number, (before, width) in enumerate(pairwise(widths), 2):
            stride = 1 if number == len(widths) else 2
            layers += [
                nn.Conv2d(before, width, 4, stride, 1, bias=False),
                # Of the batch, always: what it is trained for is over when the training is.
                nn.BatchNorm2d(width, track_running_stats=False),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """What the discriminator minimises, by its logits: the hinge loss, halved as in VQGAN.

    (Geometric GAN, arXiv:1705.02894.)
    """
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def decoder_loss(fake: torch.Tensor) -> torch.Tensor:
    """What the decoder minimises of the discriminator's logits for reconstructions."""
    return -fake.mean()


def adaptive_weight(
    reconstruction: torch.Tensor, adversarial: torch.Tensor, last: torch.Tensor
) -> torch.Tensor:
    """Weight that makes both losses pull alike on the decoder's last layer (scalar, no gradient).

    The ratio of the norms of their gradients there (VQGAN, arXiv:2012.09841, eq. 7).
    """
    (wanted,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (found,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    return (wanted.norm() / (found.norm() + 1e-6)).clamp(max=MOST)
