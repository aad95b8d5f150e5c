"""Small encodings, in this process or in others."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from subprocess import PIPE, Popen

from ldm.artifacts import MANIFEST, digest_tree, writing
from ldm.config import Encode, Pretrained
from ldm.encode.stage import encode
from ldm.images import encode_png
from ldm.scenes.lists import scene_of
from ldm.scenes.render import draw
from ldm.shards import writing_shard

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"batch_size": 4, "text_shards": 3}

Rows = Mapping[str, tuple[bytes, str]]
"""Picture and caption by key."""


def picture(row: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """Of this height and width at most."""
    return encode_png(draw(scene_of("retrain", "train", row)[1])[: size[0], : size[1]])


def in_shards(rows: Rows, size: int) -> dict[str, Rows]:
    """Training rows cut into shards."""
    keys = list(rows)
    groups = (keys[start : start + size] for start in range(0, len(keys), size))
    return {
        f"train-{number:05d}.tar": {key: rows[key] for key in group}
        for number, group in enumerate(groups)
    }


def write_images(folder: Path, shards: Mapping[str, Rows]) -> Path:
    """An images artifact of these shards by name, and one to validate on."""
    shards = {**shards, "validation-00000.tar": {"00000000": (picture(99), "a")}}
    with writing(folder, "images", config={"image_format": "png"}, inputs={}) as fresh:
        for name, rows in shards.items():
            with writing_shard(fresh / name) as write:
                for key, (content, caption) in rows.items():
                    about = json.dumps({"caption": caption}).encode()
                    write(key, {"png": content, "json": about})
    return folder


class Project:
    """A folder with images, a pipeline, and what runs leave."""

    def __init__(self, folder: Path, pipeline: Path) -> None:
        self.images, self.pipeline = folder / "images", pipeline
        self.out, self.runs = folder / "latents", folder / "runs"
        self.settings: dict[str, object] = {**SETTINGS}

    def encode(self) -> None:
        """As DVC does it: the earlier output is gone."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.encode_into(self.out, self.runs)

    def encode_into(self, out: Path, runs: Path) -> None:
        config, pretrained = Encode(**self.settings), Pretrained(pipeline=str(self.pipeline))
        encode(config, pretrained, self.images, out, runs)

    def assert_as_if_clean(self) -> None:
        clean = self.out.parent / "clean"
        self.encode_into(clean / "latents", clean / "runs")
        assert digest_tree(self.out) == digest_tree(clean / "latents")
        assert (self.out / MANIFEST).read_text() == (clean / "latents" / MANIFEST).read_text()

    def launch(self, **settings: object) -> Popen[str]:
        """``ldm encode`` in a process group of its own; what it says can be read."""
        command = [sys.executable, "-m", "ldm.cli", "encode", "--params", str(ROOT / "params.yaml")]
        for name in ("images", "out", "runs"):
            command += [f"--{name}", str(getattr(self, name))]
        command += ["--set", f"pretrained.pipeline={self.pipeline}"]
        for key, value in {**self.settings, **settings}.items():
            command += ["--set", f"encode.{key}={value}"]
        return Popen(command, cwd=ROOT, text=True, stdout=PIPE, stderr=PIPE, start_new_session=True)

    def stored(self) -> int:
        """Pieces of what was encoded."""
        return len(list(self.runs.glob("encoded/*.safetensors")))


def encoded_in(said: str) -> tuple[int, int]:
    """How many pictures and captions were encoded, as the stage's last line says."""
    pictures, captions = re.findall(r"\((\d+) encoded", said.splitlines()[-1])
    return int(pictures), int(captions)
