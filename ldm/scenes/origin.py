"""The loopback HTTP origin behind the embedded lists: scenes are drawn as they are asked for.

It runs as a process of its own, so that drawing does not slow the download down, and ends with the
process that started it, however that ends.
"""

from __future__ import annotations

import http.client
import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EADDRINUSE
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from ldm.errors import UserError
from ldm.scenes.lists import ORIGIN, WORLDS, scene_of
from ldm.scenes.render import draw

HOST, PORT = "127.0.0.1", urlsplit(ORIGIN).port or 80
PROBE = "/origin"
TOKEN = b"ldm scenes origin 1\n"
"""What ``PROBE`` answers; the number changes with what the paths mean."""

SCENE = re.compile(r"/([a-z]+)/([a-z]+)/(\d{6,})\.(png|missing\.jpg|html\.jpg|truncated\.jpg)")
PAGE = b"<!DOCTYPE html>\n<html><body><h1>This picture has moved</h1></body></html>\n"


@contextmanager
def serving_scenes() -> Iterator[None]:
    """Serve the scenes at :data:`ORIGIN` while the block runs.

    Another of our origins on the port is shared. Raises :class:`UserError` when anything else
    has the port.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "ldm.scenes.origin", str(PORT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    ) as child:
        try:
            assert child.stdout is not None
            state = child.stdout.readline()
            if not state:
                raise RuntimeError(f"the scenes' origin ended at its start ({child.wait()})")
            if not _ours_answers():
                raise UserError(
                    f"{HOST}:{PORT}: another program has the port where the embedded scenes are "
                    f"served; stop that program (`ss -ltnp 'sport = :{PORT}'` names it)"
                )
            yield
        finally:
            child.kill()


def _ours_answers() -> bool:
    """Whether what listens on the port is an origin of ours; no proxy is asked."""
    connection = http.client.HTTPConnection(HOST, PORT, timeout=10)
    try:
        connection.request("GET", PROBE)
        return connection.getresponse().read(len(TOKEN) + 1) == TOKEN
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    disable_nagle_algorithm = True
    wbufsize = -1
    """Buffered: head and body leave in one packet."""

    def do_GET(self) -> None:
        if self.path == PROBE:
            return self._answer(200, "text/plain", TOKEN)
        wanted = SCENE.fullmatch(self.path)
        if wanted is None or wanted[1] not in WORLDS or wanted[4] == "missing.jpg":
            return self._answer(404, "text/plain", b"no such picture\n")
        if wanted[4] == "html.jpg":
            return self._answer(200, "text/html", PAGE)
        picture = _picture(wanted[1], wanted[2], int(wanted[3]), wanted[4])
        self._answer(200, "image/png" if wanted[4] == "png" else "image/jpeg", picture)

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def _picture(world: str, split: str, row: int, kind: str) -> bytes:
    """A row's scene as PNG, or the first half of it as JPEG."""
    image = Image.fromarray(draw(scene_of(world, split, row)[1]))
    buffer = io.BytesIO()
    if kind == "png":
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


class _Server(ThreadingHTTPServer):
    request_queue_size = 256
    allow_reuse_port = True
    """Origins of the same user share the port, so none loses its rows when another ends."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _end_with_parent() -> None:
    """Standard input is a pipe that the parent holds; the kernel closes it when the parent dies."""
    while os.read(0, 1):
        pass
    os._exit(0)


def main(port: int) -> None:
    """Serve until standard input ends; the first line printed is ``ready`` or ``taken``."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        server = _Server((HOST, port), _Handler)
    except OSError as error:
        if error.errno != EADDRINUSE:
            raise
        print("taken", flush=True)
        return
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]))
