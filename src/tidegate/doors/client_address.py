"""Whose request it is when proxies are in between: what they say is believed only if they are trusted. One reading for all doors.

Addresses may have a port, brackets and a zone, as some gateways write them (`203.0.113.9:4711`, `[2001:db8::1]:443`,
`fe80::1%eth0`); empty elements of a list are skipped. What cannot be read as an address is handed on as it is: a check that
counts by ip refuses it, any other one does not need it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from tidegate.doors.request_headers import RequestHeaders, joined, single
from tidegate.errors import BadRequest, SettingsError
from tidegate.ip_addresses import PeerName, canonical_ip, ipv6_client

DEFAULT_TRUSTED: Final = ("127.0.0.0/8", "::1/128")
SOCKET: Final = "unix"
"""The entry of `trusted_proxies` that trusts peers on unix sockets, and the name that they count under."""

FORWARDING: Final = frozenset((b"x-real-ip", b"x-forwarded-for", b"forwarded"))
"""The headers that `TrustedProxies.client` reads."""

MAX_HOPS: Final = 64
"""Proxies that are followed from the right; what is left of them is not read."""

_NOT_IN_A_NAME: Final = re.compile(r"[^A-Za-z0-9._-]+", re.ASCII)
_MAX_NAME: Final = 64
# RFC 7239, section 4: `name=value` with a token or a quoted string, `;` between pairs and `,` between proxies. Unquoted brackets
# are accepted too, because some proxies write them.
_PAIR: Final = re.compile(
    r"""[ \t]*(?:([!#$%&'*+.^_`|~0-9A-Za-z-]+)=(?:"((?:[^"\\]|\\.)*)"|([^",;\s]*))[ \t]*)?([;,]|\Z)""", re.ASCII
)


class TrustedProxies:
    """The peers whose forwarding headers are believed.

    Args:
        networks: addresses, networks in CIDR form, and `unix` for peers on a unix socket.
        setting: whose value they are, for the error.

    Raises:
        SettingsError: naming the one that is not understood.
    """

    def __init__(self, networks: Iterable[str] = DEFAULT_TRUSTED, setting: str = "server.trusted_proxies") -> None:
        parsed = []
        self._trusts_sockets = False
        for network in networks:
            if network == SOCKET:
                self._trusts_sockets = True
            else:
                parsed.append(_network(network, setting))
        self._networks = tuple(parsed)
        self.trusts = lru_cache(maxsize=4096)(self._trusts)

    def _trusts(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(canonical_ip(address))
        except BadRequest:
            return self._trusts_sockets and _is_socket(address)
        return any(parsed in network for network in self._networks)

    def client(self, peer: str, headers: RequestHeaders) -> str:
        """The client's address.

        Args:
            peer: address of whoever connected; empty, `unix` or `unix:…` for a unix socket.
            headers: of the request; a trusted gateway must set or remove `X-Real-IP`, because it is read first.

        Returns:
            The peer unless it is trusted; else `X-Real-IP`, or the last address in `X-Forwarded-For`, or in `Forwarded`
            (RFC 7239), that is not a trusted proxy. Each proxy appends the peer it had, so only what is right of that was written
            by a trusted one. A peer without an address is a `PeerName`. A header's value may be no address.

        Raises:
            BadRequest: if a header that would be read cannot be, or `X-Real-IP` came more than once.
        """
        if self.trusts(peer):
            real_ip = single(headers, "x-real-ip")
            if real_ip:
                return real_ip.strip()
            for hops in (_hops(joined(headers, "x-forwarded-for")), _forwarded_hops(joined(headers, "forwarded"))):
                for hop in hops:
                    if not self.trusts(hop):
                        return hop
                if hops:
                    return hops[-1]
        return counted_peer(peer)


def peer_address(client: str) -> str:
    """The address in `address:port` or `[address]:port`.

    Args:
        client: as a server gives it.

    Returns:
        The address without port and brackets.
    """
    return client.rpartition(":")[0].strip("[]")


def address_or_none(text: str) -> str | None:
    """The canonical address in a text.

    Args:
        text: as `TrustedProxies.client` returns it.

    Returns:
        The address, or the name of a peer without one; None if it is neither.
    """
    try:
        return canonical_ip(text)
    except BadRequest:
        return None


def counted_client(text: str, peer: str) -> str:
    """What counts as one client where no gate does: an IPv4 address, the /64 of an IPv6 address, or a peer's name.

    Args:
        text: as `TrustedProxies.client` returns it.
        peer: counted where the text is no address.
    """
    address = str(address_or_none(text) or counted_peer(peer))  # a limiter does not take the subclass PeerName
    return ipv6_client(address) if ":" in address else address


def _network(text: str, setting: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        pass  # not a bare one: it may be an address with a port
    try:
        return ipaddress.ip_network(canonical_ip(text))
    except BadRequest:
        raise SettingsError(
            f"{setting} has {text[:60]!r}, which is not an address or network; expected e.g. '10.0.0.0/8', or "
            f"'{SOCKET}' for peers on a unix socket"
        ) from None


@lru_cache(maxsize=4096)
def counted_peer(peer: str) -> str:
    """The peer itself as a client: its canonical address, or a `PeerName` where it has none.

    Args:
        peer: address of whoever connected.
    """
    try:
        return canonical_ip(peer)
    except BadRequest:
        return PeerName(SOCKET if _is_socket(peer) else _NOT_IN_A_NAME.sub("_", peer)[:_MAX_NAME])


def _is_socket(peer: str) -> bool:
    return peer in ("", SOCKET) or peer.startswith("unix:")


def _hops(forwarded_for: str | None) -> list[str]:
    """The elements of `X-Forwarded-For`, the nearest first."""
    if not forwarded_for:
        return []
    nearest = forwarded_for.rsplit(",", 4 * MAX_HOPS)
    return [hop for each in reversed(nearest) if (hop := each.strip())][:MAX_HOPS]


def _forwarded_hops(forwarded: str | None) -> list[str]:
    """What `for=` says in each element of `Forwarded`, the nearest first; `unknown` where an element does not say it.

    What does not follow the grammar is one unknown hop: a quote that a client left open must not change what a proxy appended.
    """
    if not forwarded:
        return []
    hops: list[str] = []
    address, is_empty, position = "unknown", True, 0
    while position <= len(forwarded):
        match = _PAIR.match(forwarded, position)
        if match is None:
            return ["unknown"]
        name, quoted, token, end = match.groups()
        if name is not None:
            is_empty = False
            if name.lower() == "for":
                address = (token if quoted is None else re.sub(r"\\(.)", r"\1", quoted)) or "unknown"
        if end != ";":
            if not is_empty:
                hops.append(address)
            address, is_empty = "unknown", True
        position = match.end() + (not end)
    return hops[: -MAX_HOPS - 1 : -1]
