"""Which hosts a download may ask: public ones, and what an allow-list opens."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from ldm.ingest.reasons import RefusedError

Resolve = Callable[..., Sequence[tuple[Any, ...]]]
"""As :func:`socket.getaddrinfo`."""

GLOBAL_UNICAST = ip_network("2000::/3")
WRAPPED = tuple(
    IPv6Network(one) for one in ("2001::/32", "2002::/16", "2001:db8::/32", "2001:10::/28")
)
"""Within global unicast, but an IPv4 address in disguise (Teredo, 6to4) or nobody's."""
NUMERIC_HOST = re.compile(r"(0x[0-9a-f]*|\d+)(\.(0x[0-9a-f]*|\d+))*\.?", re.IGNORECASE)
PLAIN_IPV4 = re.compile(r"(0|[1-9]\d{0,2})(\.(0|[1-9]\d{0,2})){3}")


def resolved(
    host: str, port: int, allowed: Sequence[str], resolve: Resolve = socket.getaddrinfo
) -> list[str]:
    """The addresses to connect to, all of them public or in ``allowed`` (networks as CIDR).

    One closed address refuses the host: a name may answer with another the next time. Raises
    :class:`RefusedError`, and :class:`OSError` when the name is not known.
    """
    if NUMERIC_HOST.fullmatch(host) and not PLAIN_IPV4.fullmatch(host):
        raise RefusedError("closed address", f"{host} is an address in disguise")
    found = resolve(host, port, type=socket.SOCK_STREAM)
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
    if isinstance(ip, IPv6Address):
        # Mapped and translated IPv4 (::ffff:0:0/96, 64:ff9b::/96) lie outside.
        return ip in GLOBAL_UNICAST and ip.is_global and not any(ip in one for one in WRAPPED)
    return _is_public(ip)


def _is_public(ip: IPv4Address) -> bool:
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)
