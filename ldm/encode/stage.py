"""Pre-encoding: pictures to posterior moments, captions to hidden states, once.

The cache holds the posterior's mean and log-variance unscaled, so that each epoch can draw its own
sample; text states are stored once a distinct caption, the empty one (for dropout) among them.
With ``encode.flip`` the mirror images of training pictures are pictures of their own here.
What an earlier run made of the same item with the same encoder is taken over; the output is, byte
for byte, what it would be without, and whatever number of processes share the work.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ldm.artifacts import Manifest, manifest_of, opening, writing
from ldm.config import Encode, Pretrained
from ldm.device import device_of
from ldm.encode.encoded import Encoded, mended
from ldm.encode.encoders import Encoder, picture_encoder, text_encoder
from ldm.encode.latent_shards import Captions, PictureShard, Shard, TextShard
from ldm.encode.sharing import Sharing
from ldm.errors import UserError
from ldm.image_shards import SPLITS, ImageReader, split_of
from ldm.latents import arrays_of
from ldm.locks import held
from ldm.memory import keep_large_memory
from ldm.models import Encoders, digests, load_encoders, locate
from ldm.progress import progress, say
from ldm.request import EncodeRequest, serve

PICTURES, TEXTS = "pictures", "texts"
ENCODED, LOCK, CAPTIONS = "encoded", "lock", "captions"


@dataclass(frozen=True)
class Job:
    """What the main process tells the others."""

    images: str
    shards: list[str]
    """Names of the shards of pictures."""
    pictures: int
    """To encode of all of them."""
    out: str
    """The folder to write to, with one for captions."""


def encode(
    config: Encode,
    pretrained: Pretrained,
    images: Path,
    out: Path,
    runs: Path,
    sharing: Sharing | None = None,
) -> None:
    """Encode the images artifact into a latents artifact (see :mod:`ldm.latents`).

    ``runs/encoded`` keeps what was encoded, for the next run, or for this one if it is killed.
    Processes that are ``sharing`` the work all call this. UserError while another encoding goes
    into ``out``, or uses these ``runs``.
    """
    sharing, store = sharing or Sharing.alone(), runs / ENCODED
    if not sharing.is_main:
        job = Job(**json.loads(sharing.hear("job")))
        encoders = load_encoders(locate(pretrained.pipeline, pretrained.revision))
        Part(config, encoders, Encoded(store, sharing.rank), sharing).do(job)
        return
    pictures = opening(images, "images", "ingest")
    refusal = f"{runs}: another `ldm encode` uses it; wait, or give another --runs"
    with held(store / LOCK, refusal):
        encoders = load_encoders(locate(pretrained.pipeline, pretrained.revision))
        _lead(Part(config, encoders, Encoded(mended(store)), sharing), pictures, out)


def _lead(part: Part, images: Manifest, out: Path) -> None:
    """The main process's own: say what there is to do, and make an artifact of what all did."""
    config, vae, sharing = part.config, part.encoders.vae.config, part.sharing
    settings = {
        "compute": config.compute,
        "storage": config.storage,
        "scaling_factor": vae.scaling_factor,
        "shift_factor": vae.shift_factor or 0.0,
    }
    if "bucket_step" in images.config:
        settings["image_size"] = images.config["image_size"]
    if config.flip:
        settings["flip"] = True
    inputs = {"images": images.digest, **part.made_of}
    arrays = {split: len(arrays_of(split, flip=config.flip)) for split in SPLITS}
    pictures = sum(count * arrays[split] for split, count in images.counts.items())
    shards = sorted(name for name in images.files if name.endswith(".tar"))
    counts: dict[str, int] = {}
    with writing(out, "latents", config=settings, inputs=inputs, counts=counts) as fresh:
        captions = fresh / CAPTIONS
        captions.mkdir()
        job = Job(str(images.path), shards, pictures, str(fresh))
        sharing.tell("job", json.dumps(asdict(job)))
        part.do(job)
        shutil.rmtree(captions)
        counts |= {name: sharing.count(name) for name in (*SPLITS, TEXTS)}
    part.known.forget_unused()
    new_pictures, new_texts = (sharing.count(f"new {what}") for what in (PICTURES, TEXTS))
    say(
        f"encode: {counts['train']} training{', each mirrored too,' if config.flip else ''} and "
        f"{counts['validation']} validation pictures ({new_pictures} encoded, the rest reused), "
        f"{counts[TEXTS]} distinct captions ({new_texts} encoded, the rest reused) -> {out}"
    )


class Part:
    """One process's part of the work; ``made_of``: digests of its encoders, by part."""

    def __init__(
        self, config: Encode, encoders: Encoders, known: Encoded, sharing: Sharing
    ) -> None:
        self.config, self.encoders, self.known, self.sharing = config, encoders, known, sharing
        device = sharing.device(device_of())
        keep_large_memory(device)
        made_of = self.made_of = digests(encoders)  # Before they are in another precision.
        vae, clip = encoders.vae, encoders.text_encoder
        self._of_picture = picture_encoder(vae, made_of["vae"], config, device)
        self._of_text = text_encoder(clip, made_of["text_encoder"], config, device)

    def do(self, job: Job) -> None:
        """Write the shards that no other process writes; all are there when this returns."""
        captions = Captions(Path(job.out) / CAPTIONS, self.config.text_shards, self.sharing.rank)
        if self.sharing.is_main:
            captions.add([""])
        self._write(PICTURES, self._of_picture, self._picture_shards(job, captions), job.pictures)
        self._write(TEXTS, self._of_text, self._text_shards(job, captions), None)

    def _picture_shards(self, job: Job, captions: Captions) -> Iterator[Shard]:
        images = manifest_of(Path(job.images))
        assert images is not None  # The main process opened it.
        for name in self.sharing.each(PICTURES, job.shards):
            reader, split = ImageReader(images, name), split_of(name)
            self.sharing.add(split, len(reader))
            arrays = arrays_of(split, flip=self.config.flip)
            yield PictureShard(reader, Path(job.out) / name, captions, arrays)

    def _text_shards(self, job: Job, captions: Captions) -> Iterator[Shard]:
        for number in self.sharing.each(TEXTS, range(captions.shards)):
            own = captions.of(number)
            self.sharing.add(TEXTS, len(own))
            path = Path(job.out) / f"{TEXTS}-{number:05d}.tar"
            yield TextShard(own, self.encoders.tokenizer, path)

    def _write(
        self, what: str, encoder: Encoder, shards: Iterable[Shard], total: int | None
    ) -> None:
        """Encode and write the shards of one kind; return when all processes did."""
        sharing, known, before = self.sharing, self.known, self.known.added
        bar = progress((), f"encode {what}", total, what, shown=sharing.is_main)

        def advance(items: int = 1) -> None:
            bar.update(sharing.add(f"{what} read", items) - bar.n)

        with bar:
            write_shards(shards, encoder, known, advance)
            known.leave_used()
            sharing.add(f"new {what}", known.added - before)
            sharing.meet(f"end of {what}")
            advance(0)


def write_shards(
    shards: Iterable[Shard], encoder: Encoder, known: Encoded, advance: Callable[[], None]
) -> None:
    """Write each shard as soon as all its items' results are known; ``advance`` at every item.

    What is not known is encoded in batches that reach from one shard into the next. Raises
    :class:`UserError` when a result is not finite.
    """
    waiting: dict[str, str] = {}  # Names of the items that are being encoded, in order.
    read: deque[tuple[Shard, list[str], str]] = deque()  # With the last of those to wait for.

    def unknown() -> Iterator[bytes]:
        last = ""
        for shard in shards:
            fingerprints = []
            for name, item in shard.items():
                fingerprint = encoder.fingerprint(item)
                fingerprints.append(fingerprint)
                advance()
                if fingerprint not in known and fingerprint not in waiting:
                    waiting[fingerprint] = name
                    last = fingerprint
                    yield item
            read.append((shard, fingerprints, last))
            write_known()

    def write_known() -> None:
        while read and read[0][2] not in waiting:
            shard, fingerprints, _ = read.popleft()
            shard.write(fingerprints, known.read)

    for values in encoder.results(unknown()):
        fingerprint = next(iter(waiting))
        name = waiting.pop(fingerprint)
        if not np.isfinite(values).all():
            raise UserError(
                f"{name}: what it is encoded to is not finite; set encode.compute and "
                "encode.storage to float32, or give another pretrained.pipeline"
            )
        known.add(fingerprint, values)
        write_known()


def main() -> None:
    """What a process of the stage does; it was started by :mod:`ldm.launch`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The launcher gets it too, and ends us.
    serve("encode", EncodeRequest, _asked)


def _asked(asked: EncodeRequest) -> None:
    paths = asked.images, asked.out, asked.runs
    encode(asked.encode, asked.pretrained, *paths, Sharing.launched())
