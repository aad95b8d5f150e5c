"""One guarded download: what may be asked, for how long, how much, and how often."""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import string
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from ldm.ingest.addresses import resolved
from ldm.ingest.optout import opted_out
from ldm.ingest.reasons import RefusedError, may_pass
from ldm.ingest.rows import ascii_url

REDIRECTS = (301, 302, 303, 307, 308)
MOST_REDIRECTS = 5
CHUNK = 1 << 16


@dataclass(frozen=True)
class Guard:
    """The rules of a list's downloads."""

    agent: str
    """Our name in ``User-Agent`` and for opt-outs."""
    allowed: tuple[str, ...]
    """Networks (CIDR) that may be asked although they are not public."""
    timeout_s: float
    """For a whole try: name, connection, redirects, body."""
    max_bytes: int
    retries: int

    def download(self, url: str) -> bytes:
        """The body behind a URL. Raises :class:`RefusedError` with the reason of the last try."""
        for _ in range(self.retries):
            try:
                return self._try(url)
            except RefusedError as refusal:
                if not may_pass(refusal.reason):
                    raise
        return self._try(url)

    def _try(self, url: str) -> bytes:
        deadline = Deadline(self.timeout_s)
        try:
            for _ in range(MOST_REDIRECTS + 1):
                with self._answer(url, deadline) as answer:
                    place = answer.headers.get("Location")
                    if answer.status not in REDIRECTS or place is None:
                        return self._body(answer)
                    url = _led_to(url, place)
        except TimeoutError as error:
            raise RefusedError("timeout", f"not done after {self.timeout_s:g} s") from error
        except ssl.SSLCertVerificationError as error:
            raise RefusedError("bad certificate", str(error)) from error
        except ssl.SSLError as error:
            raise RefusedError("connection lost", str(error)) from error
        except (socket.gaierror, ConnectionRefusedError) as error:
            raise RefusedError("unreachable", str(error)) from error
        except http.client.IncompleteRead as error:
            raise RefusedError("connection lost", "it ends within the body") from error
        except (ConnectionError, http.client.HTTPException) as error:
            raise RefusedError("connection lost", str(error) or type(error).__name__) from error
        except OSError as error:
            raise RefusedError("unreachable", str(error)) from error
        raise RefusedError("too many redirects", f"more than {MOST_REDIRECTS}")

    @contextmanager
    def _answer(self, url: str, deadline: Deadline) -> Iterator[http.client.HTTPResponse]:
        """Ask one host once. The address that was checked is the one that is connected to."""
        plain = ascii_url(url)
        if plain is None:
            raise RefusedError("bad url", f"leads to {url[:200]!r}")
        parts = urlsplit(plain)
        host = parts.hostname or ""
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        try:
            addresses = resolved(host, port, self.allowed, deadline.left())
        except ValueError as error:  # UnicodeError among them: labels that no name can have.
            raise RefusedError("bad url", f"no such host name: {host[:100]!r}") from error
        connection = http.client.HTTPConnection(host, port)
        connection.sock = _connected(addresses, port, deadline)
        try:
            if parts.scheme == "https":
                connection.sock = _encrypted(connection.sock, host, deadline)
            place = parts.path or "/"
            place = f"{place}?{parts.query}" if parts.query else place
            connection.request("GET", place, headers=self._headers(parts.netloc))
            with connection.getresponse() as answer:
                yield answer
        finally:
            connection.close()

    def _headers(self, host: str) -> dict[str, str]:
        return {
            "Host": host,
            "User-Agent": f"Mozilla/5.0 (compatible; {self.agent})",
            "Accept": "image/*",
            "Connection": "close",
        }

    def _body(self, answer: http.client.HTTPResponse) -> bytes:
        if answer.status != 200:
            raise RefusedError(f"http {answer.status}", answer.reason[:200])
        if denial := opted_out(answer.headers.get_all("X-Robots-Tag", []), self.agent):
            raise RefusedError("not allowed by its site", f"X-Robots-Tag: {denial}")
        body = io.BytesIO()
        while chunk := answer.read1(CHUNK):
            body.write(chunk)
            if body.tell() > self.max_bytes:
                raise RefusedError("too many bytes", f"more than {self.max_bytes}")
        if answer.length:
            detail = f"{answer.length} bytes of the body are missing"
            raise RefusedError("connection lost", detail)
        return body.getvalue()


def _led_to(url: str, place: str) -> str:
    """Where a redirect leads. Raises :class:`RefusedError` when ``place`` is no URL."""
    place = _as_sent(place)
    try:
        return urljoin(url, place)
    except ValueError as error:
        raise RefusedError("bad url", f"leads to {place[:200]!r}") from error


def _as_sent(value: str) -> str:
    """A header's value, which http.client reads as Latin-1, as UTF-8; other bytes as %XX."""
    content = value.encode("latin-1")
    try:
        return content.decode()
    except UnicodeDecodeError:
        return quote(content, safe=string.printable)


class Deadline:
    """A moment in the future."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until then; :class:`TimeoutError` when it is past."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class _Timed(socket.socket):
    """A socket whose reads end at a deadline, however slowly the bytes drip."""

    deadline: Deadline

    def recv_into(self, *arguments: Any) -> int:
        self.settimeout(self.deadline.left())
        return super().recv_into(*arguments)


class _TimedTLS(ssl.SSLSocket):
    """The same, encrypted."""

    deadline: Deadline | None = None

    def recv_into(self, *arguments: Any, **options: Any) -> int:
        if self.deadline:
            self.settimeout(self.deadline.left())
        return super().recv_into(*arguments, **options)


def _connected(addresses: list[str], port: int, deadline: Deadline) -> socket.socket:
    """Connected to the first address that answers."""
    failure: OSError = OSError("has no address")
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        found = _Timed(family, socket.SOCK_STREAM)
        found.deadline = deadline
        try:
            found.settimeout(deadline.left())
            found.connect((address, port))
            return found
        except OSError as error:
            found.close()
            failure = error
    raise failure


def _encrypted(plain: socket.socket, host: str, deadline: Deadline) -> socket.socket:
    plain.settimeout(deadline.left())
    found = _tls().wrap_socket(plain, server_hostname=host)
    assert isinstance(found, _TimedTLS)
    found.deadline = deadline
    return found


@cache
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.sslsocket_class = _TimedTLS
    return context
