"""A CLIP tokenizer learned from captions: byte-level BPE, so any text has tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import CLIPTokenizer

from ldm.config import ClipTraining

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


IDEOGRAPHS = re.compile("[\u2e80-\U0003ffff]")
"""Scripts without spaces: Han characters, kana, their full-width punctuation."""

Merge = tuple[str, str]


def train_tokenizer(config: ClipTraining, captions: list[str]) -> CLIPTokenizer:
    """Learn the words of spaced scripts as BPE merges, and every ideograph as one token.

    An unspaced run is one word to CLIP's tokenizer; plain BPE would merge across its words, and an
    unseen combination of known words would be spelled in unseen tokens.
    """
    merges = dict.fromkeys((*_word_merges(config, captions), *_ideograph_merges(captions)))
    return CLIPTokenizer(
        vocab=_vocabulary(merges), merges=list(merges), model_max_length=config.max_tokens
    )


def _word_merges(config: ClipTraining, captions: list[str]) -> list[Merge]:
    # An empty CLIPTokenizer brings CLIP's own normaliser and pre-tokeniser.
    blank = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(BPE(end_of_word_suffix=WORD_END))
    learner.normalizer, learner.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        min_frequency=2,
        # Of pairs as frequent as each other, the trainer merges that of the lower numbers first. It
        # would number bytes that end a word as it comes upon them, in no fixed order.
        special_tokens=_symbols(),
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    learner.train_from_iterator((IDEOGRAPHS.sub(" ", caption) for caption in captions), trainer)
    return [(first, second) for first, second in json.loads(learner.to_str())["model"]["merges"]]


def _ideograph_merges(captions: list[str]) -> Iterator[Merge]:
    """Join each character's UTF-8 bytes from the left, inside a word and at its end."""
    found = sorted({character for caption in captions for character in IDEOGRAPHS.findall(caption)})
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character in found:
        ((symbols, _),) = spell.pre_tokenize_str(character)
        for end in range(1, len(symbols)):
            yield symbols[:end], symbols[end]
        yield symbols[:-1], symbols[-1] + WORD_END


def _symbols() -> list[str]:
    """Bytes, and bytes that end a word, in CLIP's order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*alphabet, *(byte + WORD_END for byte in alphabet)]


def _vocabulary(merges: Iterable[Merge]) -> dict[str, int]:
    """CLIP's order: symbols, merges by rank, start, end."""
    tokens = [*_symbols(), *(first + second for first, second in merges), START, END]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}
