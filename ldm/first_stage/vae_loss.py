"""What training a VAE minimises."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F
from transformers import CLIPVisionModel

from ldm.config import VaeTraining
from ldm.device import autocast
from ldm.first_stage.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    decoder_loss,
    discriminator_loss,
)
from ldm.first_stage.loop import Losses
from ldm.first_stage.perceptual import feature_distance


@dataclass(frozen=True)
class VaeLoss:
    """Reconstruction plus a light pull towards N(0, 1) (latent diffusion, arXiv:2112.10752, G).

    Reconstruction is the mean squared or absolute error over pixels in [-1, 1], plus the weighted
    distance of features where there is a ``tower``. The pull is ``kl_weight`` times the
    Kullback-Leibler divergence in nats a pixel value (VAE, arXiv:1312.6114, eq. 10). From step
    ``adversarial_from`` on, the decoder also has to pass its pictures off as real ones to the
    ``discriminator``, which learns to tell them apart.
    """

    config: VaeTraining
    vae: AutoencoderKL
    tower: CLIPVisionModel | None = None
    discriminator: PatchDiscriminator | None = None

    def of(self, images: torch.Tensor, step: int) -> Losses:
        """The VAE's loss on (n, 3, h, w) in [-1, 1], then the discriminator's, if it plays yet."""
        config, device = self.config, images.device
        with autocast(device, config.compute):
            posterior = self.vae.encode(images).latent_dist
            decoded = self.vae.decode(posterior.sample()).sample.float()
        squared = F.mse_loss(decoded, images)
        error = squared if config.reconstruction == "mse" else F.l1_loss(decoded, images)
        nats = posterior.kl().float().mean() / images[0].numel()
        figures = {"psnr_db": 10 * torch.log10(4 / squared), "kl": nats}
        if self.tower is not None:
            with autocast(device, config.compute):
                distance = feature_distance(self.tower, decoded, images).mean()
            error = error + config.perceptual_weight * distance
            figures["perceptual"] = distance
        loss = error + config.kl_weight * nats
        first = config.adversarial_from
        if self.discriminator is None or first is None or step < first:
            yield loss, {"loss": loss, **figures}
            return
        with autocast(device, config.compute):
            fooled = decoder_loss(self.discriminator(decoded).float())
        weight = adaptive_weight(error, fooled, self.vae.decoder.conv_out.weight)
        figures |= {"adversarial": fooled, "adaptive_weight": weight}
        loss = loss + config.adversarial_weight * weight * fooled
        yield loss, {"loss": loss, **figures}
        with autocast(device, config.compute):
            real, fake = self.discriminator(images), self.discriminator(decoded.detach())
        told = discriminator_loss(real.float(), fake.float())
        yield told, {"discriminator": told}
