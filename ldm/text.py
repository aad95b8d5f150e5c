"""Captions to token ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase


def tokenize(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> torch.Tensor:
    """int64 ids (n, tokens): start, the caption's tokens, end, padding; cut to the limit."""
    batch = tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    return batch["input_ids"]


def lengths(ids: torch.Tensor) -> torch.Tensor:
    """Tokens of each caption (n, tokens), start and end among them: int64 (n,)."""
    return (ids == ids[:, -1:]).int().argmax(dim=1) + 1


def cut_off(tokenizer: PreTrainedTokenizerBase, caption: str) -> str:
    """The end of a caption that is past the tokenizer's limit, or an empty string."""
    ids = tokenizer(caption, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids[tokenizer.model_max_length - 2 :])) if ids else ""
