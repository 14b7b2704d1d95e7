"""The names in the certificate of a connection's peer."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any

from tidegate.certificate_names import certificate_names


def peer_names(transport: Any) -> tuple[str, ...]:
    """The names of the peer of a connection.

    Args:
        transport: of the connection, after the TLS handshake.

    Returns:
        As `certificate_names`; empty without TLS, or if the peer has no certificate that was verified.
    """
    tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
    if tls is None:
        return ()
    # Empty for a certificate that was not verified: names are never read from such a one.
    certificate: Mapping[str, Any] | None = tls.getpeercert()
    return certificate_names(certificate.get("subjectAltName", ())) if certificate else ()
