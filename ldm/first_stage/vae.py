"""Training the autoencoder: pixels to few latents and back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL

from ldm.config import VaeTraining
from ldm.device import autocast
from ldm.images import psnr, to_model, to_pixels
from ldm.progress import progress
from ldm.schedule import cosine_with_warmup

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
    config: VaeTraining, pictures: Batches, count: int, image_size: int, device: torch.device
) -> AutoencoderKL:
    """Train on reconstruction plus a light pull towards N(0, 1).

    The loss is the mean squared error over pixels in [-1, 1] plus ``kl_weight`` times the
    Kullback-Leibler divergence in nats a pixel value (VAE, arXiv:1312.6114, eq. 10; latent
    diffusion, arXiv:2112.10752, section G). The scaling factor that gives latents unit variance
    is measured on 2,048 pictures at the end and stored in the model's configuration.
    """
    torch.manual_seed(config.seed)
    vae = build_vae(config, image_size).to(device).train()
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
    )
    rng = np.random.default_rng(config.seed)
    bar = progress(range(config.steps), "vae", config.steps, "steps")
    for step in bar:
        factor = cosine_with_warmup(step, total=config.steps, warmup=config.warmup_steps)
        optimizer.param_groups[0]["lr"] = config.learning_rate * factor
        images = to_model(pictures(rng.integers(count, size=config.batch_size))).to(device)
        with autocast(device, config.compute):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        error = torch.nn.functional.mse_loss(decoded, images)
        nats = posterior.kl().float().mean() / images[0].numel()
        (error + config.kl_weight * nats).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            bar.set_postfix_str(f"{10 * np.log10(4 / error.item()):.1f} dB", refresh=False)
    vae.eval()
    sample = pictures(rng.integers(count, size=min(count, 2048)))
    vae.register_to_config(scaling_factor=round(1 / latent_std(vae, sample, device), 4))
    return vae


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


def reconstruction_psnr(vae: AutoencoderKL, pixels: np.ndarray, device: torch.device) -> float:
    """Mean PSNR in dB over pictures."""
    return float(psnr(pixels, reconstruct(vae, pixels, device)).mean())
