"""Training the autoencoder: pixels to few latents and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPVisionModel

from ldm.autoencoder import AT_ONCE, pixels_a_latent
from ldm.config import VaeTraining
from ldm.errors import UserError
from ldm.first_stage.discriminator import PatchDiscriminator
from ldm.first_stage.loop import HeldOut, Loop, Losses, Run, Trained
from ldm.first_stage.vae_loss import VaeLoss
from ldm.images import psnr, to_model, to_pixels
from ldm.termination import Termination

Batches = Callable[[np.ndarray], np.ndarray]
"""Sample numbers to uint8 pictures (n, height, width, 3)."""
SHOWN = 8
"""Held-out pictures whose reconstructions are shown."""
MOST = 64
"""Pictures that are reconstructed at a time; fewer, where they are large."""


class Pictures(Protocol):
    """Some pictures by their numbers."""

    def __len__(self) -> int: ...

    def pictures(self, numbers: np.ndarray) -> np.ndarray:
        """uint8 (n, height, width, 3)."""


def side_of(pictures: Pictures) -> int:
    """In pixels; they are squares of one size."""
    return int(pictures.pictures(np.arange(1)).shape[1])


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
    training: Pictures,
    held_out: Pictures,
    device: torch.device,
    run: Run,
    *,
    start: AutoencoderKL | None = None,
    tower: CLIPVisionModel | None = None,
) -> AutoencoderKL:
    """Train ``start``, or one from random weights, on :class:`VaeLoss`.

    With the features of ``tower`` where there is one. Now and then all of ``held_out`` is
    reconstructed and measured, and a sheet shows some of it. The scaling factor that gives latents
    unit variance is measured on 2,048 pictures at the end and stored in the model's configuration;
    ``start`` keeps its own.
    """
    torch.manual_seed(config.seed)
    vae = _to_train(config, start, training).to(device).train()
    parameters = [one for one in vae.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
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
        pixels = to_model(training.pictures(loop.choose(len(training))))
        return loss.of(pixels.to(device), step)

    def sheet() -> np.ndarray:
        with evaluating(vae):
            return sheet_of(vae, held_out, device)

    def error(termination: Termination) -> tuple[float, dict[str, float]] | None:
        with evaluating(vae):
            return held_out_error(vae, held_out, device, termination)

    loop.train(losses, HeldOut(sheet, error))
    vae.eval().requires_grad_(False)
    if start is None:
        sample = training.pictures(loop.rng.integers(len(training), size=min(len(training), 2048)))
        vae.register_to_config(scaling_factor=round(1 / latent_std(vae, sample, device), 4))
    return vae


def _to_train(
    config: VaeTraining, start: AutoencoderKL | None, pictures: Pictures
) -> AutoencoderKL:
    """The VAE with gradients for what is trained of it."""
    side = side_of(pictures)
    vae = (start or build_vae(config, side)).requires_grad_(True)
    if side % (each := pixels_a_latent(vae)):
        raise UserError(
            f"first_stage.vae: wants sides that are multiples of {each}, and the pictures' are "
            f"{side}; set ingest.image_size to such a multiple"
        )
    if config.trains == "decoder":
        for part in (vae.encoder, vae.quant_conv):
            if part is not None:
                part.requires_grad_(False)
    return vae


@contextmanager
def evaluating(vae: AutoencoderKL) -> Iterator[None]:
    """Its layers as they are when it is used."""
    vae.eval()
    yield
    vae.train()


def _discriminator(config: VaeTraining) -> PatchDiscriminator:
    """Untrained; what else is drawn stays as it would be without one."""
    with torch.random.fork_rng(devices=[]):
        return PatchDiscriminator(config.discriminator_widths)


@torch.no_grad()
def latent_std(vae: AutoencoderKL, pixels: np.ndarray, device: torch.device) -> float:
    """Standard deviation of posterior samples over pictures, positions and channels."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for batch in at_once(pixels):
        posterior = vae.encode(to_model(batch).to(device)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        samples.append((posterior.mean + posterior.std * noise).float().cpu())
    return float(torch.cat(samples).std())


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pixels: np.ndarray, device: torch.device) -> np.ndarray:
    """Encode to the posterior's mode and decode: uint8 (n, h, w, 3) to the same."""
    batches = [
        to_pixels(vae.decode(vae.encode(to_model(batch).to(device)).latent_dist.mode()).sample)
        for batch in at_once(pixels)
    ]
    return np.concatenate(batches)


def held_out_error(
    vae: AutoencoderKL, pictures: Pictures, device: torch.device, termination: Termination
) -> tuple[float, dict[str, float]] | None:
    """Mean squared error of reconstructions, over pixels in [-1, 1], and their mean PSNR in dB.

    None if it was asked to stop meanwhile.
    """
    found = []
    for numbers in np.split(np.arange(len(pictures)), range(MOST, len(pictures), MOST)):
        if termination.signal is not None:
            return None
        pixels = pictures.pictures(numbers)
        found.append(psnr(pixels, reconstruct(vae, pixels, device)))
    each = np.concatenate(found)
    # A PSNR is of values that reach over 2 here.
    error = float((4 * 10 ** (-each / 10)).mean())
    return error, {"val_psnr_db": round(float(each.mean()), 2)}


def at_once(pixels: np.ndarray) -> list[np.ndarray]:
    """Pictures (n, h, w, 3) in batches that fit into memory."""
    size = max(1, min(MOST, AT_ONCE // (pixels.shape[1] * pixels.shape[2])))
    return np.split(pixels, range(size, len(pixels), size))


def sheet_of(vae: AutoencoderKL, pictures: Pictures, device: torch.device) -> np.ndarray:
    """The first of them above what the VAE makes of them: (2 h, n w, 3)."""
    shown = pictures.pictures(np.arange(min(SHOWN, len(pictures))))
    return compared(shown, reconstruct(vae, shown, device))


def compared(pictures: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """A row of pictures (n, h, w, 3) above one of what became of them: (2 h, n w, 3)."""
    return np.concatenate([np.concatenate(list(row), axis=1) for row in (pictures, decoded)])
