"""Which hosts a download may ask: public ones, and what an allow-list opens."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any

from ldm.ingest.reasons import RefusedError

Found = Sequence[tuple[Any, ...]]
Resolve = Callable[..., Found]
"""As :func:`socket.getaddrinfo`."""

GLOBAL_UNICAST = ip_network("2000::/3")
CLOSED = tuple(
    ip_network(one)
    for one in (
        "168.63.129.16/32",  # Azure's metadata
        "192.0.0.0/24",  # protocols' own, and the metadata of Oracle's cloud
        "192.31.196.0/24",  # AS112, answered by whoever is near
        "192.52.193.0/24",  # multicast relays, likewise
        "192.88.99.0/24",  # 6to4 relays, likewise
        "192.175.48.0/24",  # AS112
        "2001::/23",  # protocols' own: Teredo, multicast relays, AS112, identifiers of hosts
        "2002::/16",  # 6to4, which wraps any IPv4 address
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)
"""No site is here, whatever ``is_global`` says, which knows more or less of it from one Python 3.11
to the next: IANA's special-purpose registries, and a cloud's service at a public address."""
NUMERIC_HOST = re.compile(r"(0x[0-9a-f]*|\d+)(\.(0x[0-9a-f]*|\d+))*\.?", re.IGNORECASE)
PLAIN_IPV4 = re.compile(r"(0|[1-9]\d{0,2})(\.(0|[1-9]\d{0,2})){3}")


def resolved(
    host: str,
    port: int,
    allowed: Sequence[str],
    timeout_s: float,
    resolve: Resolve = socket.getaddrinfo,
) -> list[str]:
    """The addresses to connect to, all of them public or in ``allowed`` (networks as CIDR).

    One closed address refuses the host: a name may answer with another the next time. Raises
    :class:`RefusedError`, :class:`TimeoutError`, another :class:`OSError` when the name is not
    known, and :class:`ValueError` when no name can be so.
    """
    if NUMERIC_HOST.fullmatch(host) and not PLAIN_IPV4.fullmatch(host):
        raise RefusedError("closed address", f"{host} is an address in disguise")
    ask = partial(resolve, host, port, type=socket.SOCK_STREAM)
    found = ask() if _is_address(host) else _in_time(ask, timeout_s)
    addresses = list(dict.fromkeys(str(place[0]) for *_, place in found))
    for address in addresses:
        if not is_open(address, allowed):
            raise RefusedError("closed address", f"{host} is at {address}, which is not public")
    return addresses


def is_open(address: str, allowed: Sequence[str]) -> bool:
    """Whether an address is public, or in one of the allowed networks."""
    ip = ip_address(address)
    if any(ip in ip_network(network) for network in allowed):
        return True
    if isinstance(ip, IPv6Address) and ip not in GLOBAL_UNICAST:
        return False  # Mapped and translated IPv4 (::ffff:0:0/96, 64:ff9b::/96) among others.
    special = ip.is_multicast or ip.is_reserved or any(ip in network for network in CLOSED)
    return ip.is_global and not special


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _in_time(ask: Callable[[], Found], timeout_s: float) -> Found:
    """What ``ask`` returns or raises, or :class:`TimeoutError` after so many seconds.

    A lookup cannot be broken off: it ends in a thread of its own, for which nobody waits.
    """
    answer: Future[Found] = Future()

    def look() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=look, daemon=True).start()
    return answer.result(timeout_s)
