"""What a training changes: the UNet and, maybe, the text encoder."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import CLIPTextModel

from ldm.checkpoint import Tensors
from ldm.unet import Network, denoise


class Denoiser(torch.nn.Module):
    """What a training changes: the UNet and, if it is trained too, the text encoder."""

    def __init__(self, unet: Network, text_encoder: CLIPTextModel | None = None) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(
        self, latents: torch.Tensor, timesteps: torch.Tensor, texts: torch.Tensor
    ) -> torch.Tensor:
        """The UNet's output, of the latents' shape.

        ``texts``: hidden states (n, tokens, width), or token ids (n, tokens) with a text encoder.
        """
        if self.text_encoder is not None:
            texts = self.text_encoder(texts).last_hidden_state
        return denoise(self.unet, latents, timesteps, texts)

    def restore(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take over values for what is trained; KeyError where they are those of other weights."""
        if odd := trained(self).keys() ^ weights.keys():
            raise KeyError(min(odd))
        self.load_state_dict(weights, strict=False)


def trained(module: torch.nn.Module) -> Tensors:
    """The weights that a training changes, by name: those that want gradients."""
    return {name: one for name, one in module.named_parameters() if one.requires_grad}
