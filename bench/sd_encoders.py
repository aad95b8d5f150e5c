"""The encoders of Stable Diffusion 1, with random weights."""

from __future__ import annotations

from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel

TOKENS, WIDTH = 77, 768


def sd_encoders(*, small: bool = False) -> tuple[AutoencoderKL, CLIPTextModel]:
    """Its VAE, 84 M parameters, or a toy with its ways in and out, and its text encoder, 123 M."""
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32) if small else (128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    text = CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=12,
        num_attention_heads=12, vocab_size=49408, eos_token_id=49407,
    )  # fmt: skip
    return vae, CLIPTextModel(text)
