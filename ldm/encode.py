"""Pre-encoding: pictures to posterior moments, captions to hidden states, once.

The cache holds the posterior's mean and log-variance unscaled, so that each epoch can draw its own
sample; text states are stored once a distinct caption, the empty one (for dropout) among them.
What an earlier run made of the same item with the same encoder is taken over; the output is, byte
for byte, what it would be without.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import CLIPTokenizer

from ldm.artifacts import Manifest, opening, writing
from ldm.config import Encode, Pretrained
from ldm.device import device_of
from ldm.encoded import Encoded
from ldm.encoders import Encoder, picture_encoder, text_encoder
from ldm.errors import UserError
from ldm.latents import ABOUT, IDS, MOMENTS, STATES, TEXTS, text_key, to_npy
from ldm.locks import held
from ldm.models import digests, load_encoders, locate
from ldm.progress import progress, say
from ldm.shards import ShardReader, ShardWriter
from ldm.text import tokenize

SPLITS = ("train", "validation")
ENCODED, LOCK = "encoded", "lock"


def encode(config: Encode, pretrained: Pretrained, images: Path, out: Path, runs: Path) -> None:
    """Encode the images artifact into a latents artifact (see :mod:`ldm.latents`).

    ``runs/encoded`` keeps what was encoded, for the next run, or for this one if it is killed.
    UserError while another process encodes into ``out``, or with these ``runs``.
    """
    pictures = opening(images, "images", "ingest")
    store = runs / ENCODED
    with (
        held(out.with_name(f".{out.name}.lock"), f"{out}: another process encodes it; wait for it"),
        held(store / LOCK, f"{runs}: another `ldm encode` uses it; wait, or give another --runs"),
    ):
        _encode(config, pretrained, pictures, out, Encoded(store))


def _encode(
    config: Encode, pretrained: Pretrained, images: Manifest, out: Path, known: Encoded
) -> None:
    encoders = load_encoders(locate(pretrained.pipeline, pretrained.revision))
    settings = {
        "compute": config.compute,
        "storage": config.storage,
        "scaling_factor": encoders.vae.config.scaling_factor,
        "shift_factor": encoders.vae.config.shift_factor or 0.0,
    }
    if "bucket_step" in images.config:
        settings["image_size"] = images.config["image_size"]
    inputs = {"images": images.digest, **digests(encoders)}
    device = device_of()
    of_picture = picture_encoder(encoders.vae, config, device)
    of_text = text_encoder(encoders.text_encoder, config, device)
    extension = images.config["image_format"]
    counts: dict[str, int] = {}
    with writing(out, "latents", config=settings, inputs=inputs, counts=counts) as fresh:
        captions = {""}
        for split in SPLITS:
            reader = ShardReader(images.path, split, frozenset({extension, "json"}))
            counts[split] = len(reader)
            with ShardWriter(fresh, split, config.samples_per_shard) as shards:
                captions |= _encode_pictures(of_picture, known, reader, extension, shards)
        counts["texts"], new_pictures = len(captions), known.added
        with ShardWriter(fresh, TEXTS, config.samples_per_shard) as shards:
            _encode_texts(of_text, known, encoders.tokenizer, sorted(captions), shards)
    known.forget_unused()
    say(
        f"encode: {counts['train']} training and {counts['validation']} validation pictures "
        f"({new_pictures} encoded, the rest reused), {counts['texts']} distinct captions "
        f"({known.added - new_pictures} encoded, the rest reused) -> {out}"
    )


def _encode_pictures(
    encoder: Encoder, known: Encoded, reader: ShardReader, extension: str, shards: ShardWriter
) -> set[str]:
    """Write a split's samples; their captions."""
    bar = progress(reader, f"encode {shards.prefix}", len(reader), "pictures")
    pictures = ((f"{shards.prefix} sample {key}", reader.read(key, extension)) for key in bar)
    fingerprints = _encode_unknown(encoder, known, pictures)
    captions = set()
    for key, fingerprint in zip(reader, fingerprints, strict=True):
        caption = json.loads(reader.read(key, "json"))["caption"]
        captions.add(caption)
        about = json.dumps({"caption": caption, "text": text_key(caption)}, ensure_ascii=False)
        members = {MOMENTS: to_npy(known.read(fingerprint)), ABOUT: about.encode()}
        shards.write(key, members)
    return captions


def _encode_texts(
    encoder: Encoder,
    known: Encoded,
    tokenizer: CLIPTokenizer,
    captions: Sequence[str],
    shards: ShardWriter,
) -> None:
    bar = progress(captions, "encode captions", len(captions), "captions")
    texts = ((f"caption {caption!r}", ids.tobytes()) for caption, ids in _tokenized(tokenizer, bar))
    fingerprints = iter(_encode_unknown(encoder, known, texts))
    for caption, ids in _tokenized(tokenizer, captions):
        members = {STATES: to_npy(known.read(next(fingerprints))), IDS: to_npy(ids)}
        shards.write(text_key(caption), members)


def _tokenized(
    tokenizer: CLIPTokenizer, captions: Iterable[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Each caption with its int64 token ids (tokens,), a few at a time."""
    captions = iter(captions)
    while some := list(islice(captions, 256)):
        yield from zip(some, tokenize(tokenizer, some).numpy(), strict=True)


def _encode_unknown(
    encoder: Encoder, known: Encoded, items: Iterable[tuple[str, bytes]]
) -> list[str]:
    """See to it that the results of all (name, item) are known; their fingerprints, in order."""
    fingerprints: list[str] = []
    waiting: dict[str, str] = {}

    def unknown() -> Iterator[bytes]:
        for name, item in items:
            fingerprint = encoder.fingerprint(item)
            fingerprints.append(fingerprint)
            if fingerprint not in known and fingerprint not in waiting:
                waiting[fingerprint] = name
                yield item

    for values in encoder.results(unknown()):
        fingerprint = next(iter(waiting))
        name = waiting.pop(fingerprint)
        if not np.isfinite(values).all():
            raise UserError(f"{name}: what it is encoded to is not finite")
        known.add(fingerprint, values)
    known.flush()
    return fingerprints
