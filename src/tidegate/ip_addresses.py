"""Client addresses: one spelling for each, and what counts as one client of an IPv6 network."""

from __future__ import annotations

import ipaddress
import re
import socket
from functools import lru_cache
from typing import Final

from tidegate.errors import BadRequest, clip

IPV6_PREFIX: Final = 64
"""Bits of an IPv6 address that make one client: a subscriber is handed a /64 (RFC 6177), and could vary the rest at will."""
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
"""RFC 6052."""
_LOCAL_NAT64: Final = ipaddress.IPv6Network("64:ff9b:1::/48")
"""RFC 8215."""
_SIIT: Final = ipaddress.IPv6Network("::ffff:0:0:0/96")
"""IPv4-translated addresses, RFC 2765."""
_COMPATIBLE: Final = ipaddress.IPv6Network("::/96")
"""IPv4-compatible addresses, RFC 4291."""

_MAX_ADDRESS: Final = 96
# `[2001:db8::1%eth0]:443`, `192.0.2.1:443`, `fe80::1%eth0`
_DECORATED: Final = re.compile(
    r"\[([0-9A-Fa-f:.]+)(?:%[^\]\s%]{1,32})?\](?::[0-9]{1,5})?|([0-9.]+):[0-9]{1,5}|([0-9A-Fa-f]*:[0-9A-Fa-f:.]*)%[^\]\s%]{1,32}",
    re.ASCII,
)


class PeerName(str):
    """The name of a peer that has no address, such as a unix socket; it takes an address's place in a check."""

    __slots__ = ()


def canonical_ip(ip: object) -> str:
    """Spell an address in its one canonical way; an IPv4 address mapped into IPv6 becomes IPv4.

    Args:
        ip: IPv4 in four decimal parts, or IPv6; a port, brackets and a zone are dropped. A `PeerName` stays as it is.

    Returns:
        The canonical text. Costs 0.3 µs for IPv4.

    Raises:
        BadRequest: if it is no address.
    """
    if type(ip) is str and len(ip) <= _MAX_ADDRESS:
        if (address := _bare_address(ip)) is not None:
            return address
        match = _DECORATED.fullmatch(ip)
        if match is not None and (address := _bare_address(match[match.lastindex or 0])) is not None:
            return address
    elif type(ip) is PeerName:
        return ip
    raise BadRequest(f"ip {clip(ip)} is not an IPv4 or IPv6 address", field="ip")


def _bare_address(text: str) -> str | None:
    try:
        if ":" not in text:
            socket.inet_pton(socket.AF_INET, text)
            return text
        packed = socket.inet_pton(socket.AF_INET6, text)
    except (OSError, ValueError):
        return None
    if packed.startswith(b"\0" * 10 + b"\xff\xff"):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(socket.AF_INET6, packed)


def client_of(ip: object) -> str:
    """What counts as one client of an address, however it is written: itself, or see `ipv6_client`.

    Args:
        ip: IPv4 or IPv6 address.

    Raises:
        BadRequest: if it is no address.
    """
    canonical = canonical_ip(ip)
    return ipv6_client(canonical) if ":" in canonical else canonical


@lru_cache(maxsize=65_536)
def ipv6_client(ip: str) -> str:
    """What counts as one client of an IPv6 address: its /64, or the IPv4 address that a translator or a tunnel put into it.

    A NAT64 gives all its IPv4 clients addresses in one /64, and a Teredo server does so too; a 6to4 client has 65,536 of them.

    Args:
        ip: the address, canonical.

    Returns:
        The network, or the address where that is one client.

    Raises:
        ValueError: if it is no IPv6 address.
    """
    address = ipaddress.IPv6Address(ip)
    embedded = embedded_ipv4(address)
    if embedded is not None:
        return str(embedded)
    if address in _LOCAL_NAT64:
        # Where the IPv4 address is, depends on the translator (RFC 6052); one address is one client of it.
        return str(address)
    return str(ipaddress.IPv6Network((int(address), IPV6_PREFIX), strict=False))


def embedded_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address of the client behind an IPv6 address; None where there is none."""
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    # ::/96 but neither :: nor ::1, which are the host's own.
    if address in _NAT64 or address in _SIIT or (address in _COMPATIBLE and int(address) > 1):
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped
