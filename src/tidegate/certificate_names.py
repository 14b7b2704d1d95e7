"""The names in certificates: what identifies a peer with mutual TLS."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Any, Final

MAX_NAMES: Final = 100
"""Names that are read from one certificate; those that follow are ignored."""

_DNS_NAME: Final = re.compile(r"[A-Za-z0-9_*](?:[A-Za-z0-9._*-]{0,251}[A-Za-z0-9])?", re.ASCII)
_URI: Final = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*://|urn:)[!-~]{1,2000}", re.ASCII)


def certificate_names(alternative_names: Iterable[tuple[str, Any]]) -> tuple[str, ...]:
    """The subject alternative names (RFC 5280, 4.2.1.6) of a certificate that can be compared with names in the settings.

    The common name is never read (RFC 9525, 2). A name in the wrong field is ignored, so that a DNS name cannot pass for a URI
    or an address.

    Args:
        alternative_names: kind and value, as in `ssl.SSLSocket.getpeercert()["subjectAltName"]`.

    Returns:
        DNS names in lower case, URIs as they are, IP addresses in canonical form; in the order of the certificate, each once.
    """
    names: dict[str, None] = {}
    for kind, value in list(alternative_names)[:MAX_NAMES]:
        name = _name(kind, value) if isinstance(value, str) else None
        if name is not None:
            names[name] = None
    return tuple(names)


def canonical_name(text: str) -> str | None:
    """A name in the settings, in the form of `certificate_names`.

    Args:
        text: a DNS name, a URI or an IP address.

    Returns:
        The name; None if no certificate can have it.
    """
    for kind in ("IP Address", "URI", "DNS"):
        name = _name(kind, text)
        if name is not None:
            return name
    return None


def _name(kind: str, value: str) -> str | None:
    if kind == "DNS":
        return value.lower() if _DNS_NAME.fullmatch(value) and _address(value) is None else None
    if kind == "URI":
        return value if _URI.fullmatch(value) else None
    return _address(value) if kind == "IP Address" else None


def _address(value: str) -> str | None:
    try:
        return str(ipaddress.ip_address(value.strip()))
    except ValueError:
        return None
