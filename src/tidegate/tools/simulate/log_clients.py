"""The client of a logged request: addresses with ports, chains of proxies, whatever surrounds them."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final

from tidegate.decision import canonical_ip
from tidegate.errors import BadRequest, SettingsError

DEFAULT_TRUSTED: Final = ("127.0.0.0/8", "::1/128")
"""As `server.trusted_proxies` has it."""
_REMEMBERED: Final = 65_536
_MAX_CHAIN: Final = 4096


class Clients:
    """What a log has in the place of a client → the address that counts, as the live door would find it.

    `192.0.2.1`, `192.0.2.1:443`, `[2001:db8::1]:443` and a chain such as `192.0.2.1, 10.0.0.2` are one client each: of a chain
    the last address that is not a trusted proxy's. Costs one look-up in a dictionary for a client seen before.

    Args:
        trusted: networks of the proxies that wrote into the chains, in CIDR form.

    Raises:
        SettingsError: naming the network that is not valid.
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
        """How many chains were asked about whose last address is no trusted proxy's, and so the one that counts."""
        self._known: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        """The client.

        Args:
            text: as logged.

        Returns:
            Its address, canonical; empty where the text is no address, or the chain has something else in the place that counts.
        """
        found = self._known.get(text)
        if found is None:
            found = self._work_out(text)
            if len(text) <= 256:
                if len(self._known) >= _REMEMBERED:
                    self._known.clear()
                self._known[text] = found
        if "," in text and found and found == address_of(text.rpartition(",")[2]):
            self.untrusted_chains += 1
        return found

    def _work_out(self, text: str) -> str:
        hops = [address_of(hop) for hop in text[:_MAX_CHAIN].split(",")]
        for hop in reversed(hops):
            if not hop or not self._trusts(hop):
                return hop
        return hops[0]

    def _trusts(self, address: str) -> bool:
        parsed = ipaddress.ip_address(address)
        return any(parsed in network for network in self._trusted)


def address_of(text: str) -> str:
    """The address in a text that may have a port, brackets, quotes or a zone beside it.

    Args:
        text: one address.

    Returns:
        The address, canonical; empty where there is none.
    """
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
