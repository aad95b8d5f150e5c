"""Whether latents are still those of the pictures and the settings that there are now."""

from __future__ import annotations

from pathlib import Path

from ldm.artifacts import Manifest, manifest_of
from ldm.config import Encode
from ldm.errors import UserError
from ldm.image_shards import SPLITS, ImageReader
from ldm.latents import SampleReader

DECIDING = ("compute", "storage", "flip")
"""Settings that decide which arrays the cache has, and what one is."""


def expect_current(latents: Path, images: Path | None, config: Encode) -> None:
    """Raise :class:`UserError`, which says what differs, where latents have been left behind.

    That is by another ``compute``, ``storage`` or ``flip`` in the settings, or by other pictures,
    where these are at hand; encoders are not compared. What is no artifact is left to the stage
    that opens it.
    """
    made = manifest_of(latents)
    if made is None:
        return
    for name in DECIDING:
        was, now = {"flip": False, **made.config}.get(name), getattr(config, name)
        if was != now:
            raise UserError(
                f"{latents}: was encoded with encode.{name} {was}, which is {now} now; run `ldm "
                f"encode` again, or set encode.{name} to {was}"
            )
    pictures = None if images is None else manifest_of(images)
    if pictures is not None and made.inputs.get("images") != pictures.digest:
        raise UserError(
            f"{latents}: is stale, {images} has changed since ({_difference(made, pictures)}); run "
            "`ldm encode` again"
        )


def _difference(latents: Manifest, images: Manifest) -> str:
    """In how many samples the pictures are others than those that were encoded."""
    if not all((made.path / name).is_file() for made in (latents, images) for name in made.files):
        return "its shards are others"  # Of what lies in a bucket no more is at hand.
    new = gone = reworded = 0
    for split in SPLITS:
        encoded = SampleReader(latents, split)
        pictures = ImageReader(images, split)
        before, now = set(encoded), set(pictures)
        new, gone = new + len(now - before), gone + len(before - now)
        reworded += sum(encoded.caption(key) != pictures.caption(key) for key in now & before)
    counts = {"samples new": new, "gone": gone, "with another caption": reworded}
    found = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return found or "the same samples with other pixels, or cut into other shards"
