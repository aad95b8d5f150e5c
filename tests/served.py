"""Pictures like photographs, a server of them, and what a stage made of a list of them."""

from __future__ import annotations

import csv
import io
import threading
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image


def photograph(seed: int, side: int = 256) -> Image.Image:
    """Coarse and fine random shapes, as a photograph has them."""
    random = np.random.default_rng(seed)
    layers = [
        np.asarray(
            Image.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8)).resize(
                (side, side), Image.Resampling.BICUBIC
            ),
            np.float64,
        )
        for cells in (5, 9, 40)
    ]
    return Image.fromarray(np.average(layers, 0, (5, 3, 1)).astype(np.uint8))


def stored(image: Image.Image, form: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@contextmanager
def serving(
    files: Mapping[str, bytes | int],
    denied: Container[str] = (),
    asked: list[str] | None = None,
    delay_s: float = 0,
) -> Iterator[str]:
    """Yield the URL of a server on loopback; paths are names, ``denied`` are not for training.

    A number instead of a file is the status of an answer without one; names that are not there are
    not found. What was ``asked`` for is noted there.
    """

    class Files(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/")
            if asked is not None:
                asked.append(name)
            time.sleep(delay_s)
            body = files.get(name, 404)
            if isinstance(body, int):
                self.send_error(body)
                return
            self.send_response(200)
            if name in denied:
                self.send_header("X-Robots-Tag", "noai")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()  # A test that fails would leave it busy with a closed socket.


def write_list(path: Path, columns: str, rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns.split(","), *rows])


def left_out(images: Path) -> dict[tuple[str, int], tuple[str, str]]:
    """List and row to reason and detail."""
    with (images / "skipped.csv").open(newline="") as file:
        return {
            (line["split"], int(line["row"])): (line["reason"], line["detail"])
            for line in csv.DictReader(file)
        }
