"""Teaching the text encoder to say what stands where.

Contrast alone teaches a text encoder which things a caption names, and little of how they stand
(arXiv:2210.01936). A UNet's loss asks for it only on the noisiest timesteps, where the layout is
still open: too few to learn a composition of words from. So the text encoder learns it by itself:
every position of the latents reads the states once, as a UNet's cross-attention does, and predicts
its own latents. The best prediction is the mean over all pictures that fit the caption, which
depends on every word that places something. The reader is thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from ldm.autoencoder import encode
from ldm.config import LayoutTraining
from ldm.device import autocast
from ldm.first_stage.loop import Loop, Losses, Run, Trained
from ldm.first_stage.rearranged import told_apart
from ldm.first_stage.vae import MOST, Batches, at_once
from ldm.images import to_model
from ldm.nn.attention import Attention
from ldm.progress import progress
from ldm.text import lengths, tokenize

POOL = 16
"""Batches that are cut from one draw, ordered by length: short captions need no padding."""


class LayoutReader(nn.Module):
    """Text states (n, tokens, width) to the latents that each position expects: (n, c, h, w)."""

    def __init__(self, width: int, heads: int, latents: torch.Size) -> None:
        super().__init__()
        self.latents = latents
        self.positions = nn.Parameter(torch.randn(latents[1:].numel(), width) / 2)
        self.read = Attention(width, width, heads)
        self.predict = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(),
            nn.Linear(2 * width, latents[0]),
        )  # fmt: skip

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """See the class."""
        positions = self.positions.expand(len(states), -1, -1)
        predicted = self.predict(positions + self.read(positions, states))
        return predicted.transpose(1, 2).unflatten(-1, self.latents[1:])


def train_layout(
    config: LayoutTraining,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    latents: torch.Tensor,
    captions: Sequence[str],
    device: torch.device,
    run: Run,
) -> LayoutReader:
    """Train ``text_encoder`` in place on scaled latents (n, c, h, w); returns the reader."""
    torch.manual_seed(config.seed)
    width, heads = text_encoder.config.hidden_size, config.heads
    reader = LayoutReader(width, heads, latents.shape[1:]).to(device).train()
    text_encoder = text_encoder.to(device).requires_grad_(True).train()
    both = torch.nn.ModuleDict({"text_encoder": text_encoder, "reader": reader})
    optimizer = torch.optim.AdamW(both.parameters(), lr=config.learning_rate, betas=(0.9, 0.98))
    loop = Loop("layout", config, run, {"layout": Trained(both, optimizer)})
    tokens = tokenize(tokenizer, captions)
    batches = _batches_by_length(lengths(tokens), config.batch_size, config.seed)
    # Cheap to draw: those of the steps done already are drawn again, and dropped.
    left = islice(batches, loop.first, None)

    def losses(_: int) -> Losses:
        chosen = next(left)
        loop.chosen = chosen.numpy()
        with autocast(device, config.compute):
            found = errors(text_encoder, reader, tokens[chosen], latents[chosen], device)
        loss = found.mean()
        yield loss, {"loss": loss}

    loop.train(losses)
    text_encoder.eval().requires_grad_(False)
    return reader.eval().requires_grad_(False)


def errors(
    text_encoder: CLIPTextModel,
    reader: LayoutReader,
    tokens: torch.Tensor,
    latents: torch.Tensor,
    device: torch.device,
) -> torch.Tensor:
    """Mean squared error of what captions (n, tokens) say about latents (n, c, h, w): (n,)."""
    # Attention is causal: padding behind the end changes nothing before it.
    longest = int(lengths(tokens).max())
    states = text_encoder(tokens[:, :longest].to(device)).last_hidden_state
    return (reader(states).float() - latents.to(device)).square().mean(dim=(1, 2, 3))


@torch.no_grad()
def layout_accuracy(
    text_encoder: CLIPTextModel,
    reader: LayoutReader,
    tokenizer: CLIPTokenizer,
    latents: torch.Tensor,
    captions: Sequence[str],
    device: torch.device,
) -> float | None:
    """Share of pictures that their caption predicts better than all its rearrangements do.

    Of those whose caption has any, None where none has. Chance is one in two to four.
    """

    def scores(number: int, said: torch.Tensor) -> torch.Tensor:
        same = latents[number].expand(len(said), *latents.shape[1:])
        return -errors(text_encoder, reader, said, same, device)

    return told_apart(tokenize(tokenizer, captions), scores)


def latents_of(vae: AutoencoderKL, pictures: Batches, count: int) -> torch.Tensor:
    """Posterior means of pictures 0 to ``count``, of about unit variance: float32 (n, c, h, w)."""
    found = []
    starts = range(0, count, MOST)
    for start in progress(starts, "layout latents", len(starts), "batches"):
        pixels = pictures(np.arange(start, min(start + MOST, count)))
        found += [encode(vae, to_model(batch)).float().cpu() for batch in at_once(pixels)]
    return torch.cat(found)


def _batches_by_length(of: torch.Tensor, size: int, seed: int) -> Iterator[torch.Tensor]:
    rng = np.random.default_rng(seed)
    while True:
        pool = torch.from_numpy(rng.choice(len(of), min(POOL * size, len(of)), replace=False))
        ordered = pool[of[pool].argsort(stable=True)].split(size)
        yield from (ordered[number] for number in rng.permutation(len(ordered)))
