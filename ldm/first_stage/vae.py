"""Training the autoencoder: pixels to few latents and back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPVisionModel

from ldm.config import VaeTraining
from ldm.first_stage.discriminator import PatchDiscriminator
from ldm.first_stage.loop import Loop, Losses, Run, Trained
from ldm.first_stage.vae_loss import VaeLoss
from ldm.images import to_model, to_pixels

Batches = Callable[[np.ndarray], np.ndarray]
"""Sample numbers to uint8 pictures (n, height, width, 3)."""


def build_vae(config: VaeTraining, image_size: int) -> AutoencoderKL:
    """An untrained AutoencoderKL: halves each side once for every width but the first."""
    depth = len(config.widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=tuple(config.widths),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        sample_size=image_size,
        mid_block_add_attention=config.mid_attention,
    )


def train_vae(
    config: VaeTraining,
    pictures: Batches,
    count: int,
    image_size: int,
    device: torch.device,
    run: Run,
    tower: CLIPVisionModel | None = None,
    shown: np.ndarray | None = None,
) -> AutoencoderKL:
    """Train on :class:`VaeLoss`, with the features of ``tower`` where there is one.

    Now and then a sheet shows the pictures ``shown``, uint8 (n, h, w, 3), reconstructed.
    The scaling factor that gives latents unit variance is measured on 2,048 pictures at the end and
    stored in the model's configuration.
    """
    torch.manual_seed(config.seed)
    vae = build_vae(config, image_size).to(device).train()
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
    )
    trained = {"vae": Trained(vae, optimizer)}
    discriminator = None
    if config.adversarial_from is not None:
        discriminator = _discriminator(config).to(device).train()
        # Betas as in latent diffusion's autoencoders.
        adam = torch.optim.Adam(
            discriminator.parameters(), lr=config.discriminator_learning_rate, betas=(0.5, 0.9)
        )
        trained["discriminator"] = Trained(discriminator, adam)
    loop = Loop("vae", config, run, trained)
    loss = VaeLoss(config, vae, tower, discriminator)

    def losses(step: int) -> Losses:
        chosen = loop.rng.integers(count, size=config.batch_size)
        return loss.of(to_model(pictures(chosen)).to(device), step)

    def sheet() -> np.ndarray:
        assert shown is not None
        vae.eval()
        decoded = reconstruct(vae, shown, device)
        vae.train()
        return compared(shown, decoded)

    loop.train(losses, None if shown is None else sheet)
    vae.eval()
    sample = pictures(loop.rng.integers(count, size=min(count, 2048)))
    vae.register_to_config(scaling_factor=round(1 / latent_std(vae, sample, device), 4))
    return vae


def _discriminator(config: VaeTraining) -> PatchDiscriminator:
    """Untrained; what else is drawn stays as it would be without one."""
    with torch.random.fork_rng(devices=[]):
        return PatchDiscriminator(config.discriminator_widths)


@torch.no_grad()
def latent_std(vae: AutoencoderKL, pixels: np.ndarray, device: torch.device) -> float:
    """Standard deviation of posterior samples over pictures, positions and channels."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for start in range(0, len(pixels), 64):
        posterior = vae.encode(to_model(pixels[start : start + 64]).to(device)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        samples.append((posterior.mean + posterior.std * noise).float().cpu())
    return float(torch.cat(samples).std())


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pixels: np.ndarray, device: torch.device) -> np.ndarray:
    """Encode to the posterior's mode and decode: uint8 (n, h, w, 3) to the same."""
    batches = [
        to_pixels(vae.decode(vae.encode(to_model(batch).to(device)).latent_dist.mode()).sample)
        for batch in np.split(pixels, range(64, len(pixels), 64))
    ]
    return np.concatenate(batches)


def compared(pictures: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """A row of pictures (n, h, w, 3) above one of what became of them: (2 h, n w, 3)."""
    return np.concatenate([np.concatenate(list(row), axis=1) for row in (pictures, decoded)])
