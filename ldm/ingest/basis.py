"""What decides a download's result beside its URL, as digests: another one, and it is asked again.

A picture is asked for again when its bytes would be others, or settings might refuse it. A refusal
is asked again after any change of the code that refuses too: it costs less than the picture that a
mended rule lets in, while pictures that are gone from the web by now would be lost.
"""

from __future__ import annotations

from typing import NamedTuple

from ldm import code
from ldm.artifacts import digest_json
from ldm.config import Ingest
from ldm.ingest.fetch import guard_of, making

MAKING = ("ingest/buckets", "ingest/pictures", "ingest/resizer")
REFUSING = (
    *("ingest/addresses", "ingest/downloader", "ingest/guard", "ingest/optout"),
    *("ingest/reasons", "ingest/rows"),
)
LIBRARIES = ("albumentations", "img2dataset", "numpy", "opencv-python-headless", "pillow")


class Basis(NamedTuple):
    """Digests of what decides a picture, and a refusal."""

    picture: str
    refusal: str


def basis_of(config: Ingest) -> Basis:
    """The digests under these settings and this code."""
    guard = guard_of(config)
    decides = {
        "settings": {
            **making(config),
            **{name: getattr(guard, name) for name in ("agent", "allowed", "max_bytes")},
        },
        "code": code.digests(*MAKING),
        "libraries": code.versions(*LIBRARIES),
    }
    refuses = {**decides, "refusing": code.digests(*REFUSING)}
    return Basis(digest_json(decides), digest_json(refuses))
