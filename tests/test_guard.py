"""The guarded fetch against hostile origins on loopback.

Nothing here leaves the machine: 127.0.0.1 is on the allow-list; 127.0.0.2 and ::1 stand for every
closed address. Addresses elsewhere are tried on the check alone, or with a trapped connect.
"""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from ldm.ingest import addresses, guard
from ldm.ingest.addresses import Resolve, is_open, resolved
from ldm.ingest.guard import Guard
from ldm.ingest.optout import opted_out
from ldm.ingest.reasons import RefusedError

LOOPBACK = ("127.0.0.1/32",)
RULES = Guard("ldm", LOOPBACK, timeout_s=1.0, max_bytes=100_000, retries=0)
PICTURE = bytes(range(256)) * 20


def drip(handler: BaseHTTPRequestHandler, piece: bytes) -> None:
    """A little every now and then, until the other side has had enough."""
    try:
        while True:
            handler.wfile.write(piece)
            time.sleep(0.05)
    except OSError:
        pass


def flood(handler: BaseHTTPRequestHandler) -> None:
    try:
        while True:
            handler.wfile.write(bytes(1 << 16))
    except OSError:
        pass


class Hostile(BaseHTTPRequestHandler):
    """Each path is a trick; ``/to?URL`` redirects, to the bytes that its %XX stand for."""

    protocol_version = "HTTP/1.1"
    asked: list[str]

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.close_connection = True
        path, _, rest = self.path.partition("?")
        if path == "/to":
            self.head(302, Location=unquote_to_bytes(rest).decode("latin-1"))
        elif path == "/loop":
            self.head(302, Location="/loop")
        elif path == "/endless-redirect":
            self.head(302, Location="/picture")
            flood(self)
        elif path == "/endless":
            self.head(200)
            flood(self)
        elif path == "/large":
            self.head(200, Content_Length=str(10**12))
            flood(self)
        elif path == "/drip":
            self.head(200)
            drip(self, b"x")
        elif path == "/drip-headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-A: ")
            drip(self, b"y")
        elif path == "/continue":
            drip(self, b"HTTP/1.1 100 Continue\r\n\r\n")
        elif path == "/many-headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 500 + b"\r\n")
        elif path == "/cut":
            self.head(200, Content_Length=str(len(PICTURE) + 1))
            self.wfile.write(PICTURE)
        elif path == "/cut-chunk":
            self.head(200, Transfer_Encoding="chunked")
            self.wfile.write(b"100\r\n" + bytes(10))
        elif path == "/chunks":
            self.head(200, Transfer_Encoding="chunked")
            self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(PICTURE), PICTURE))
        elif path == "/garbage":
            self.wfile.write(b"\x00\xff" * 100 + b"\r\n")
        elif path == "/mute":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif path == "/missing":
            self.head(404)
        elif path == "/moody":
            if self.server.asked.count(self.path) % 2:  # type: ignore[attr-defined]
                self.head(503)
            else:
                self.picture()
        elif path == "/robots":
            self.picture(X_Robots_Tag="googlebot: noindex, LDM: noimageai")
        else:
            self.picture()

    def picture(self, **headers: str) -> None:
        self.head(200, Content_Length=str(len(PICTURE)), **headers)
        self.wfile.write(PICTURE)

    def head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


class Origin(ThreadingHTTPServer):
    """Keeps what was asked of it."""

    daemon_threads = True

    def __init__(self, host: str) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, 0), Hostile)
        self.asked: list[str] = []
        self.connections = 0

    def get_request(self) -> Any:
        found = super().get_request()
        self.connections += 1
        return found

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


def serving(host: str) -> Iterator[Origin]:
    origin = Origin(host)
    threading.Thread(target=origin.serve_forever, daemon=True).start()
    yield origin
    origin.shutdown()
    origin.server_close()


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    yield from serving("127.0.0.1")


@pytest.fixture(scope="module")
def closed() -> Iterator[Origin]:
    """One that may not be asked."""
    yield from serving("127.0.0.2")


def reason(url: str, rules: Guard = RULES) -> str:
    with pytest.raises(RefusedError) as caught:
        rules.download(url)
    return caught.value.reason


def at(origin: Origin, path: str, host: str = "127.0.0.1") -> str:
    return f"http://{host}:{origin.server_port}{path}"


@pytest.mark.parametrize(
    "path", ["/picture", "/chunks", "/图 1.png?尺=1", "/to?/picture", "/endless-redirect"]
)
def test_a_picture_comes_whole(origin: Origin, path: str) -> None:
    assert RULES.download(at(origin, path)) == PICTURE


DISGUISES = (
    ("127.0.0.2", "closed address"),
    ("2130706434", "closed address"),
    ("0x7f000002", "closed address"),
    ("0x7f.0.0.2", "closed address"),
    ("0177.0.0.2", "closed address"),
    ("127.2", "closed address"),
    ("[::ffff:127.0.0.2]", "closed address"),
    ("[::1]", "closed address"),
    ("localhost.localdomain.invalid..", "bad url"),
)


@pytest.mark.parametrize(("host", "expected"), DISGUISES)
@pytest.mark.parametrize("redirected", [False, True])
def test_closed_addresses_are_not_asked(
    origin: Origin, closed: Origin, host: str, expected: str, redirected: bool
) -> None:
    url = at(closed, "/picture", host)
    assert reason(at(origin, f"/to?{url}") if redirected else url) == expected
    assert closed.connections == 0


def test_the_allow_list_opens(closed: Origin) -> None:
    rules = Guard("ldm", ("127.0.0.0/8",), 1.0, 100_000, 0)
    before = closed.connections
    assert rules.download(at(closed, "/picture", "127.0.0.2")) == PICTURE
    closed.connections = before


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("file:///etc/passwd", "bad url"),
        ("ftp://127.0.0.1/a.png", "bad url"),
        ("data:image/png;base64,AAAA", "bad url"),
        ("gopher://127.0.0.1/", "bad url"),
        ("http://user:word@127.0.0.1/", "bad url"),
        ("https:///picture", "bad url"),
        ("http://[", "bad url"),
        ("http://[HOST]/a", "bad url"),
        ("//[::1/a", "bad url"),
        ("http://a..图/", "bad url"),
        ("http://☃/", "bad url"),
    ],
)
def test_redirects_stay_on_the_web(origin: Origin, target: str, expected: str) -> None:
    assert reason(at(origin, f"/to?{target}")) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/loop", "too many redirects"),
        ("/endless", "too many bytes"),
        ("/large", "too many bytes"),
        ("/drip", "timeout"),
        ("/drip-headers", "timeout"),
        ("/continue", "timeout"),
        ("/many-headers", "connection lost"),
        ("/cut", "connection lost"),
        ("/cut-chunk", "connection lost"),
        ("/garbage", "connection lost"),
        ("/mute", "connection lost"),
        ("/missing", "http 404"),
        ("/robots", "not allowed by its site"),
    ],
)
def test_tricks_end_soon_with_a_reason(origin: Origin, path: str, expected: str) -> None:
    start = time.monotonic()
    assert reason(at(origin, path)) == expected
    assert time.monotonic() - start < 3


def test_only_what_may_pass_is_tried_again(origin: Origin) -> None:
    patient = Guard("ldm", LOOPBACK, 1.0, 100_000, retries=2)
    assert patient.download(at(origin, "/moody")) == PICTURE
    before = len(origin.asked)
    assert reason(at(origin, "/missing"), patient) == "http 404"
    assert len(origin.asked) == before + 1


def test_nobody_there() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert reason(f"http://127.0.0.1:{bound.getsockname()[1]}/a.png") == "unreachable"


def self_signed(folder: Path) -> Path:
    """A certificate for 127.0.0.1 that nobody vouches for, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    form = (PrivateFormat.PKCS8, NoEncryption())
    path = folder / "certificate.pem"
    path.write_bytes(
        key.private_bytes(Encoding.PEM, *form) + certificate.public_bytes(Encoding.PEM)
    )
    return path


def test_https_wants_a_certificate_that_is_trusted(tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(self_signed(tmp_path))
    with contextmanager(serving)("127.0.0.1") as origin:
        origin.socket = context.wrap_socket(origin.socket, server_side=True)
        assert reason(at(origin, "/picture").replace("http:", "https:")) == "bad certificate"


def hang_up(listener: socket.socket) -> None:
    """Read what the other side begins with, and end."""
    connection, _ = listener.accept()
    with connection:
        connection.recv(1 << 16)


def test_a_handshake_that_ends_early_is_a_lost_connection(origin: Origin) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=hang_up, args=(listener,), daemon=True).start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/a.png"
        assert reason(url) == "connection lost"
    assert reason(at(origin, "/picture").replace("http:", "https:")) == "connection lost"


@pytest.mark.parametrize(
    ("target", "asked"),
    [
        ("/图.png?尺=1", "/%E5%9B%BE.png?%E5%B0%BA=1"),  # The server sends UTF-8 as it is.
        ("/caf%E9.png", "/caf%E9.png"),  # Latin-1, of which only the bytes are known.
        ("/%2525.png", "/%25.png"),
    ],
)
def test_a_redirect_is_followed_in_the_bytes_it_is_sent_in(
    origin: Origin, target: str, asked: str
) -> None:
    assert RULES.download(at(origin, f"/to?{target}")) == PICTURE
    assert origin.asked[-1] == asked


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.16.0.1",
        "192.0.0.1", "192.0.0.9", "192.0.0.10", "192.0.0.170", "192.0.2.1", "192.31.196.1",
        "192.52.193.1", "192.88.99.1", "192.168.1.1", "192.175.48.1", "198.18.0.1",
        "198.19.255.255", "198.51.100.1", "203.0.113.9", "224.0.0.1", "239.255.255.255",
        "240.0.0.1", "255.255.255.255", "::", "::1", "::7f00:1", "::ffff:93.184.216.34",
        "::ffff:10.0.0.1", "64:ff9b::0a00:0001", "64:ff9b::5db8:d822", "64:ff9b:1::1", "100::1",
        "100:0:0:1::1", "2001::1", "2001:1::1", "2001:2::1", "2001:3::1", "2001:4:112::1",
        "2001:10::1", "2001:20::1", "2001:30::1", "2001:1ff:ffff::1", "2001:db8::1",
        "2002:0a00:0001::1", "2620:4f:8000::1", "3fff::1", "3fff:fff:ffff::1", "5f00::1",
        "fc00::1", "fd12::1", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1",
        # Where clouds tell machines their secrets.
        "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254",
    ],
)  # fmt: skip
def test_closed(address: str) -> None:
    assert not is_open(address, ())


@pytest.mark.parametrize(
    "address",
    [
        "93.184.216.34", "8.8.8.8", "168.63.129.17", "191.255.255.255", "192.0.1.1", "192.88.98.1",
        "2001:200::1", "2606:2800:220:1::1", "2620:4f:7fff::1", "3ffe:ffff::1",
    ],
)  # fmt: skip
def test_open(address: str) -> None:
    assert is_open(address, ())


def names(*found: str) -> Callable[..., list[tuple[Any, ...]]]:
    """A resolver that knows one answer."""

    def resolve(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in found]

    return resolve


def test_one_closed_address_of_a_name_refuses_it() -> None:
    with pytest.raises(RefusedError) as caught:
        resolved("a.example", 80, (), 1, names("93.184.216.34", "10.0.0.1"))
    assert caught.value.reason == "closed address"
    assert resolved("a.example", 80, (), 1, names("93.184.216.34", "93.184.216.34")) == [
        "93.184.216.34"
    ]


def resolving(monkeypatch: pytest.MonkeyPatch, resolve: Resolve) -> None:
    """Let the guard look names up with this."""
    monkeypatch.setattr(
        guard, "resolved", lambda *given: addresses.resolved(*given, resolve=resolve)
    )


def test_a_lookup_counts_towards_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def slow(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        ended.wait(4)
        return names("127.0.0.1")(host, port)

    resolving(monkeypatch, slow)
    start = time.monotonic()
    assert reason("http://slow.example/a.png", Guard("ldm", LOOPBACK, 0.3, 1000, 0)) == "timeout"
    assert time.monotonic() - start < 2
    ended.set()


@pytest.mark.parametrize(
    ("error", "expected"),
    [(socket.gaierror(-2, "not known"), "unreachable"), (UnicodeError("no name"), "bad url")],
)
def test_a_lookup_that_fails_says_so(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    def fail(*_: Any, **__: Any) -> list[tuple[Any, ...]]:
        raise error

    resolving(monkeypatch, fail)
    assert reason("http://nobody.example/a.png") == expected


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_address_costs_no_thread(host: str) -> None:
    asked: list[threading.Thread] = []

    def resolve(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        asked.append(threading.current_thread())
        return names(host)(host, port)

    assert resolved(host, 80, ("127.0.0.1/32", "::1/128"), 1, resolve) == [host]
    assert asked == [threading.current_thread()]


def test_a_host_is_asked_for_by_the_name_that_browsers_give_it(
    origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def resolve(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        asked.append(host)
        return names("127.0.0.1")(host, port)

    resolving(monkeypatch, resolve)
    assert RULES.download(at(origin, f"/to?{at(origin, '/picture', 'straße.example')}")) == PICTURE
    assert asked == ["127.0.0.1", "xn--strae-oqa.example"]


def test_the_address_that_was_checked_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that answers with another address the next time gains nothing."""
    answers = iter([["93.184.216.34"], ["127.0.0.1"]])
    asked: list[str] = []

    def resolve(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        asked.append(host)
        return names(*next(answers))(host, port)

    def trap(found: list[str], port: int, deadline: guard.Deadline) -> socket.socket:
        raise ConnectionRefusedError(f"trapped {found}")

    resolving(monkeypatch, resolve)
    monkeypatch.setattr(guard, "_connected", trap)
    with pytest.raises(RefusedError, match=r"trapped \['93.184.216.34'\]"):
        RULES.download("http://rebinding.example/a.png")
    assert asked == ["rebinding.example"]


@pytest.mark.parametrize(
    ("values", "denial"),
    [
        ([], None),
        (["all"], None),
        (["noai"], "noai"),
        (["NoImageAI"], "noimageai"),
        (["nofollow, noindex"], "noindex"),
        (["none"], "none"),
        (["nofollow"], None),
        (["googlebot: noai"], None),
        (["*: noai"], "noai"),
        (["ldm: noai"], "noai"),
        (["LDM: nofollow, noai"], "noai"),
        (["googlebot: noai, noindex"], None),
        (["googlebot: noai, ldm: noindex"], "noindex"),
        (["ldm: nofollow", "noimageindex"], "noimageindex"),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], "noai"),
        (["max-snippet: 20, noindex"], "noindex"),
        (["googlebot: max-snippet: 20, noindex"], None),
        ([""], None),
        ([":::,,:"], None),
    ],
)
def test_opt_outs(values: list[str], denial: str | None) -> None:
    assert opted_out(values, "ldm") == denial
