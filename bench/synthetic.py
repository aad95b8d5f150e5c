"""Data by number that cost little to make: pictures, captions, artifacts, and an origin."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.artifacts import writing
from ldm.latents import ABOUT, IDS, MOMENTS, STATES, TEXTS, text_key, to_npy
from ldm.shards import writing_shard

SHARD = 1000
"""Samples a shard."""
WORDS = ["red", "round", "old", "tiny", "bright", "broken", "wooden", "wet", "quiet", "warm"]


def picture(number: int, side: int, kind: str = "PNG") -> bytes:
    """Large coloured shapes, other ones for each number: a square of ``side`` pixels, encoded."""
    random = np.random.default_rng(number)
    cells = Image.fromarray(random.integers(0, 256, (5, 5, 3), np.uint8))
    buffer = io.BytesIO()
    cells.resize((side, side), Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def caption(number: int) -> str:
    """Another one for each number."""
    digits = [int(digit) for digit in str(number)]
    return f"a {' '.join(WORDS[digit] for digit in digits)} thing {number}"


def write_images(folder: Path, count: int, side: int) -> None:
    """An images artifact of so many training pictures."""
    config = {"image_format": "png"}
    counts = {"train": count, "validation": 0}
    with writing(folder, "images", config=config, inputs={}, counts=counts) as fresh:
        for start in range(0, count, SHARD):
            with writing_shard(fresh / f"train-{start // SHARD:05d}.tar") as write:
                for number in range(start, min(start + SHARD, count)):
                    about = json.dumps({"caption": caption(number)}).encode()
                    write(f"{number:08d}", {"png": picture(number, side), "json": about})


def write_latents(
    folder: Path, count: int, moments: tuple[int, int, int], states: tuple[int, int], kind: str
) -> None:
    """A latents artifact of so many training samples of random numbers, each with a text.

    Shapes are (2 x channels, height, width) and (tokens, width); ``kind`` is their dtype.
    """
    config = {"scaling_factor": 0.18215, "shift_factor": 0.0}
    random = np.random.default_rng(0)
    own = to_npy(random.standard_normal(moments).astype(kind))
    text = to_npy(random.standard_normal(states).astype(kind))
    ids = to_npy(np.zeros(states[0], np.int64))
    with writing(folder, "latents", config=config, inputs={}) as fresh:
        for start in range(0, count, SHARD):
            numbers = range(start, min(start + SHARD, count))
            with writing_shard(fresh / f"train-{start // SHARD:05d}.tar") as write:
                for number in numbers:
                    key = text_key(caption(number))
                    about = json.dumps({"caption": caption(number), "text": key}).encode()
                    write(f"{number:08d}", {MOMENTS: own, ABOUT: about})
            with writing_shard(fresh / f"{TEXTS}-{start // SHARD:05d}.tar") as write:
                for number in numbers:
                    write(text_key(caption(number)), {STATES: text, IDS: ids})
        with writing_shard(fresh / f"{TEXTS}-99999.tar") as write:
            write(text_key(""), {STATES: text, IDS: ids})


@contextmanager
def origin(side: int) -> Iterator[str]:
    """Yield the URL below which a process of its own serves JPEG pictures by number."""
    command = [sys.executable, "-m", "bench.synthetic", str(side)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        server.terminate()


def _serve(side: int) -> None:
    content = lru_cache(maxsize=10_000)(picture)

    class Pictures(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = content(int(self.path.removeprefix("/")), side, "JPEG")
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

        def handle_error(self, *_: object) -> None:
            """A client that hung up."""

    with Server(("127.0.0.1", 0), Pictures) as server:
        print(server.server_port, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
