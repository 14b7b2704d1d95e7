"""Whose request it is, when proxies stand between: what is said by them is believed only if they are trusted."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from tidegate.errors import SettingsError

DEFAULT_TRUSTED: Final = ("127.0.0.0/8", "::1/128")


class TrustedProxies:
    """The networks whose forwarding headers are believed.

    Args:
        networks: addresses or networks in CIDR form.
        setting: whose value they are, for the error.

    Raises:
        SettingsError: naming the one that is not understood.
    """

    def __init__(self, networks: Iterable[str] = DEFAULT_TRUSTED, setting: str = "server.trusted_proxies") -> None:
        parsed = []
        for network in networks:
            try:
                parsed.append(ipaddress.ip_network(network, strict=False))
            except ValueError:
                raise SettingsError(f"{setting} has {network!r}, which is no address or network: write '10.0.0.0/8'") from None
        self._networks = tuple(parsed)
        self.trusts = lru_cache(maxsize=4096)(self._trusts)

    def _trusts(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        mapped = getattr(parsed, "ipv4_mapped", None)
        return any((mapped or parsed) in network for network in self._networks)

    def client(self, peer: str, real_ip: str | None, forwarded_for: str | None) -> str:
        """The client's address.

        Args:
            peer: address of whoever connected.
            real_ip: the `X-Real-IP` header; a trusted gateway must set or strip it.
            forwarded_for: the `X-Forwarded-For` headers, joined with commas.

        Returns:
            The peer unless it is trusted; else `X-Real-IP`, or the last address in `X-Forwarded-For` that is not a trusted proxy
            (each proxy appends whom it heard it from, so only what stands right of that was written by a trusted one).
        """
        if not self.trusts(peer):
            return peer
        if real_ip:
            return real_ip.strip()
        if forwarded_for:
            hops = [hop.strip() for hop in forwarded_for.split(",")]
            for hop in reversed(hops):
                if not self.trusts(hop):
                    return hop
            return hops[0]
        return peer


def peer_address(client: str) -> str:
    """The address in `address:port` or `[address]:port`.

    Args:
        client: as a server gives it.

    Returns:
        The address without port and brackets.
    """
    return client.rpartition(":")[0].strip("[]")
