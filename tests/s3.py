"""A real S3-speaking server on loopback, moto's, that a test may watch and disturb."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import Request, urlopen

import fsspec
import pytest
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from s3fs import S3FileSystem
from werkzeug.serving import make_server


class Server:
    """``requests``: what it was asked, (method, path), without listings.

    ``disturb``: sees each request before it is answered; may answer instead, with a status.
    """

    def __init__(self) -> None:
        self.endpoint = ""
        self.requests: list[tuple[str, str]] = []
        self.disturb: Callable[[str, str], str | None] = lambda method, path: None
        self._moto = DomainDispatcherApplication(create_backend_app)

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[Any]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if method != "HEAD" and "list-type" not in environ["QUERY_STRING"]:
            self.requests.append((method, path))
        if status := self.disturb(method, path):
            start_response(status, [("Content-Length", "0")])
            return []
        return self._moto(environ, start_response)

    def reset(self) -> None:
        """Hold one bucket, ``bucket``, that is empty."""
        self._administer("reset")
        self.files().mkdir("bucket")
        self.disturb = lambda method, path: None
        self.requests.clear()

    def check_credentials(self, *, check: bool) -> None:
        """Whether to let in only those it knows, who are none; it lets in anybody otherwise."""
        self._administer("reset-auth", "0" if check else "inf")

    def _administer(self, action: str, content: str = "") -> None:
        headers = {"Content-Type": "text/plain"}
        address = f"{self.endpoint}/moto-api/{action}"
        urlopen(Request(address, content.encode(), headers, method="POST")).close()

    def files(self) -> Any:
        """The server's contents through a client of its own."""
        return fsspec.filesystem("s3", use_listings_cache=False, max_concurrency=1)

    def asked(self, method: str) -> list[str]:
        """Names of the files that were asked for so."""
        return [path.rpartition("/")[2] for asked, path in self.requests if asked == method]


ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "somebody",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": "/nonexistent",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "3",
    "NO_PROXY": "127.0.0.1",
}


@contextmanager
def serving_s3() -> Iterator[Server]:
    """Yield a server that the environment names."""
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = Server()
    with (
        make_server("127.0.0.1", 0, server, True, request_handler=MotoRequestHandler) as http,
        pytest.MonkeyPatch.context() as environment,
    ):
        threading.Thread(target=http.serve_forever, daemon=True).start()
        server.endpoint = f"http://127.0.0.1:{http.server_port}"
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL_S3": server.endpoint}.items():
            environment.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        yield server
        http.shutdown()
