"""A cache of the hub as Stable Diffusion 1.4 and CLIP ViT-L/14 leave it, with random weights.

Files, names of weights, shapes and settings are those of the two repositories, old names included;
of the safety checker there is the description alone, so that whatever loads it fails.
``python -m tests.hub CACHE SIZE`` writes one, in a process that gives its memory back.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.params import load_params

VOCABULARY, TOKENS, PATCH, SEEN = 49408, 77, 14, 224
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Of the autoencoder's attention, by today's."""


@dataclass(frozen=True)
class Size:
    """Side in pixels; channels of each level; width, layers and heads of CLIP's towers."""

    side: int
    unet: tuple[int, int, int, int]
    vae: tuple[int, int, int, int]
    text: tuple[int, int, int]
    vision: tuple[int, int, int]


SIZES = {
    "sd14": Size(
        512, (320, 640, 1280, 1280), (128, 256, 512, 512), (768, 12, 12), (1024, 24, 16)
    ),
    "small": Size(128, (32, 32, 64, 64), (32, 32, 32, 32), (32, 2, 2), (64, 2, 2)),
}  # fmt: skip


def write_hub(cache: Path, size: Size) -> None:
    """Both repositories, at the revisions that the preset names."""
    torch.manual_seed(0)
    named = load_params("sd14", []).pretrained
    _write_pipeline(_snapshot(cache, named.pipeline, named.revision), size)
    _write_clip(_snapshot(cache, named.clip, named.clip_revision), size)


def snapshot(cache: Path, name: str, revision: str | None) -> Path:
    """Where a repository's files are."""
    assert revision is not None
    return cache / f"models--{name.replace('/', '--')}" / "snapshots" / revision


def _snapshot(cache: Path, name: str, revision: str | None) -> Path:
    folder = snapshot(cache, name, revision)
    folder.mkdir(parents=True)
    return folder


def _write_pipeline(folder: Path, size: Size) -> None:
    parts = {
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    # Of one so old and smaller, diffusers takes it that its size is a mistake, and says 512 pixels.
    old = {"_diffusers_version": "0.2.2" if size.side == 512 else "0.9.0"}
    _json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline", **old, **parts})
    for part in parts:
        (folder / part).mkdir()
    _json(folder / "feature_extractor" / "preprocessor_config.json", PREPROCESSOR)
    checker = {"model_type": "clip", "architectures": ["StableDiffusionSafetyChecker"]}
    _json(folder / "safety_checker" / "config.json", checker)
    scheduler = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.7.0.dev0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    _json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_tokenizer(folder / "tokenizer")
    _write_text_encoder(folder / "text_encoder", size)
    _write_unet(folder / "unet", size, old)
    _write_vae(folder / "vae", size, old)


def _write_unet(folder: Path, size: Size, old: dict[str, str]) -> None:
    down, up = ["CrossAttnDownBlock2D"] * 3, ["CrossAttnUpBlock2D"] * 3
    config = {
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": list(size.unet),
        "center_input_sample": False,
        "cross_attention_dim": size.text[0],
        "down_block_types": [*down, "DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": size.side // 8,
        "up_block_types": ["UpBlock2D", *up],
    }
    _json(folder / "config.json", {"_class_name": "UNet2DConditionModel", **old, **config})
    unet = UNet2DConditionModel.from_config(config)
    _save(unet.state_dict(), folder / "diffusion_pytorch_model.safetensors")


def _write_vae(folder: Path, size: Size, old: dict[str, str]) -> None:
    config = {
        "act_fn": "silu",
        "block_out_channels": list(size.vae),
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": size.side,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    _json(folder / "config.json", {"_class_name": "AutoencoderKL", **old, **config})
    weights = {
        in_repository(name): tensor
        for name, tensor in AutoencoderKL.from_config(config).state_dict().items()
    }
    _save(weights, folder / "diffusion_pytorch_model.safetensors")


def in_repository(name: str) -> str:
    """An autoencoder's weight by its name of 2022."""
    for new, old in OLD_NAMES.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def _write_text_encoder(folder: Path, size: Size) -> None:
    config = _text_config(size) | {"architectures": ["CLIPTextModel"]}
    _json(folder / "config.json", config)
    tower = CLIPTextModel(CLIPTextConfig(**config)).state_dict()
    weights = {f"text_model.{name}": tensor for name, tensor in tower.items()}
    _save(weights | _positions("text_model", TOKENS), folder / "model.safetensors")


def _write_clip(folder: Path, size: Size) -> None:
    text = _text_config(size)
    config = {
        "architectures": ["CLIPModel"],
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": size.text[0],
        "text_config": text,
        "vision_config": {
            **_tower(size.vision),
            "image_size": SEEN,
            "model_type": "clip_vision_model",
            "patch_size": PATCH,
            "projection_dim": size.text[0],
        },
    }
    _json(folder / "config.json", config)
    weights = CLIPModel(CLIPConfig(**config)).state_dict()
    weights |= _positions("text_model", TOKENS)
    weights |= _positions("vision_model", (SEEN // PATCH) ** 2 + 1)
    _save(weights, folder / "model.safetensors")
    _json(folder / "preprocessor_config.json", PREPROCESSOR)
    _write_tokenizer(folder)
    # This repository has the newer form as well.
    CLIPTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))


def _text_config(size: Size) -> dict[str, Any]:
    return {
        **_tower(size.text),
        "bos_token_id": 0,
        "eos_token_id": 2,
        "max_position_embeddings": TOKENS,
        "model_type": "clip_text_model",
        "pad_token_id": 1,
        "projection_dim": size.text[0],
        "vocab_size": VOCABULARY,
    }


def _tower(shape: tuple[int, int, int]) -> dict[str, Any]:
    width, layers, heads = shape
    return {
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-05,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
    }


def _positions(tower: str, count: int) -> dict[str, torch.Tensor]:
    """Numbers that older releases of transformers kept among the weights."""
    return {f"{tower}.embeddings.position_ids": torch.arange(count)[None]}


def _write_tokenizer(folder: Path) -> None:
    """CLIP's files and size; its merges are pairs of bytes in alphabetical order."""
    alphabet = sorted(ByteLevel.alphabet())
    symbols = [*alphabet, *(byte + WORD_END for byte in alphabet)]
    room = VOCABULARY - len(symbols) - 2
    merges = [pair for pair, _ in zip(_pairs(alphabet), range(room), strict=False)]
    tokens = [*symbols, *map("".join, merges), START, END]
    assert len(set(tokens)) == VOCABULARY
    _json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {"bos_token": START, "eos_token": END, "unk_token": END}
    full = {name: {"content": token, **plain} for name, token in special.items()}
    _json(folder / "special_tokens_map.json", {**full, "pad_token": END})
    config = {
        **{name: {"__type": "AddedToken", **token} for name, token in full.items()},
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": TOKENS,
        "name_or_path": "openai/clip-vit-large-patch14",
        "pad_token": END,
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
    }
    _json(folder / "tokenizer_config.json", config)


def _pairs(alphabet: list[str]) -> Iterator[tuple[str, str]]:
    return ((first, second) for first in alphabet for second in alphabet)


def _save(weights: dict[str, torch.Tensor], path: Path) -> None:
    save_file(weights, path, {"format": "pt"})


def _json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


PREPROCESSOR = {
    "crop_size": SEEN,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": SEEN,
}


if __name__ == "__main__":
    write_hub(Path(sys.argv[1]), SIZES[sys.argv[2]])
