"""Listeners of the data plane that anyone on another machine may call: reported at start and by `tidegate doctor`."""

from __future__ import annotations

import ipaddress

from tidegate.listen_address import is_unix, parse_address
from tidegate.server.addresses import missing_for_grpc
from tidegate.settings import Settings


def open_listeners(settings: Settings) -> list[str]:
    """Listeners that other machines may reach, if callers need neither a token nor a certificate.

    Returns:
        One sentence for each, with the remedy.
    """
    if settings.callers_auth.mode != "open":
        return []
    tls = settings.tls
    addresses = {"http": settings.server.http, "grpc": "" if missing_for_grpc() else settings.server.grpc}
    return [
        f'server.{name} = {address!r} accepts any caller from other machines: set callers_auth.mode = "token" or "mtls" '
        "(see docs/security.md), or listen on 127.0.0.1"
        for name, address in addresses.items()
        # With tls.client_ca, every client of a listener with TLS needs a certificate already.
        if address and not _is_local(parse_address(address, f"server.{name}")[0]) and not (tls.client_ca and name in tls.doors)
    ]


def _is_local(host: str) -> bool:
    if is_unix(host) or host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
