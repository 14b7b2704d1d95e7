"""What the listeners are given for TLS."""

from __future__ import annotations

import ssl
from collections.abc import Callable

import msgspec


class ServerTls(msgspec.Struct, frozen=True):
    """TLS of an HTTP listener.

    Args:
        context: returns what the next handshake uses.
        client_names: names of which the client's certificate needs one, in canonical form; empty for any.
    """

    context: Callable[[], ssl.SSLContext]
    client_names: frozenset[str] = frozenset()


class TlsFiles(msgspec.Struct, frozen=True):
    """What the files of `[tls]` hold; equal if their content is.

    Args:
        cert: the certificate and its chain, PEM.
        key: the private key, PEM.
        client_ca: authorities of client certificates, PEM; empty if clients need no certificate.
    """

    cert: bytes
    key: bytes
    client_ca: bytes
