"""Parsing of the client address of a logged request: with ports, brackets, quotes, or as a chain of proxies."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final

from tidegate.errors import BadRequest, SettingsError
from tidegate.ip_addresses import canonical_ip

DEFAULT_TRUSTED: Final = ("127.0.0.0/8", "::1/128")
"""Default of `server.trusted_proxies`."""
_MAX_CACHED: Final = 65_536
_MAX_CHAIN: Final = 4096


class Clients:
    """Parses the client field of a log into the address that counts, as a live check does.

    `192.0.2.1`, `192.0.2.1:443`, `[2001:db8::1]:443` and a chain such as `192.0.2.1, 10.0.0.2` are one client each: of a chain
    the last address that is not a trusted proxy's. A cached client costs one dictionary look-up.

    Args:
        trusted: networks of the proxies that wrote into the chains, in CIDR form.

    Raises:
        SettingsError: if a network is invalid.
    """

    def __init__(self, trusted: Iterable[str] = DEFAULT_TRUSTED) -> None:
        self._trusted = []
        for network in trusted:
            try:
                self._trusted.append(ipaddress.ip_network(network.strip(), strict=False))
            except ValueError:
                raise SettingsError(
                    f"--trusted-proxies {network!r} is not a valid address or network; expected for example 10.0.0.0/8"
                ) from None
        self.untrusted_chains = 0
        """Number of chains whose last address is not a trusted proxy's, and therefore the one that counts."""
        self._cache: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        """The canonical address of the client; empty if the text, or the part of the chain that counts, is not an address."""
        address = self._cache.get(text)
        if address is None:
            address = self._parse(text)
            if len(text) <= 256:
                if len(self._cache) >= _MAX_CACHED:
                    self._cache.clear()
                self._cache[text] = address
        if "," in text and address and address == address_of(text.rpartition(",")[2]):
            self.untrusted_chains += 1
        return address

    def _parse(self, text: str) -> str:
        hops = [address_of(hop) for hop in text[:_MAX_CHAIN].split(",")]
        for hop in reversed(hops):
            if not hop or not self._trusts(hop):
                return hop
        return hops[0]

    def _trusts(self, address: str) -> bool:
        parsed = ipaddress.ip_address(address)
        return any(parsed in network for network in self._trusted)


def address_of(text: str) -> str:
    """The canonical address in a text with an optional port, brackets, quotes or zone; empty if there is none."""
    text = text.strip(" \t\"'")
    if text.startswith("["):
        text, _, port = text[1:].partition("]")
        if port and not (port[0] == ":" and port[1:].isdigit()):
            return ""
    elif text.count(":") == 1:
        text, _, port = text.partition(":")
        if not port.isdigit():
            return ""
    try:
        return canonical_ip(text.partition("%")[0])
    except BadRequest:
        return ""
