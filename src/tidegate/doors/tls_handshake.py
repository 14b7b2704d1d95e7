"""TLS handshakes of accepted connections: bounded in number and time, and no `Connection` before they are complete.

`asyncio` reports a connection of a TLS server only after its handshake, so connections that never complete one could not be
counted. Here a connection is accepted without TLS, counted, and then upgraded.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Final, cast

from tidegate.doors.http_connection import Connection

if TYPE_CHECKING:
    from tidegate.doors.http_server import HttpServer

SHUTDOWN_TIMEOUT_S: Final = 2.0
"""How long a connection that the server closes waits for the client to confirm that."""


class TlsHandshake(asyncio.Protocol):
    """The handshake of one connection, which a `Connection` replaces when it is complete.

    Args:
        server: that accepted it.
        context: certificate and requirements.
        timeout_s: how long it may take, s.
    """

    __slots__ = ("_aborted", "_context", "_early", "_eof", "_server", "_task", "_timeout_s", "_transport")

    def __init__(self, server: HttpServer, context: ssl.SSLContext, timeout_s: float) -> None:
        self._server = server
        self._context = context
        self._timeout_s = timeout_s
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._early: list[bytes] = []
        self._eof = self._aborted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accepted, without TLS."""
        self._transport = cast("asyncio.Transport", transport)
        self._server.begin_handshake(self)
        if not self._aborted:
            self._task = asyncio.get_running_loop().create_task(self._run(self._transport))

    def data_received(self, data: bytes) -> None:
        """What the client sent right behind the handshake, in the same turn of the event loop."""
        self._early.append(data)

    def eof_received(self) -> bool:
        """The client closed its side right behind the handshake."""
        self._eof = True
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Gone, before it was handed over."""
        self._aborted = True
        self._server.end_handshake(self)

    def abort(self) -> None:
        """End the connection at once."""
        self._aborted = True
        if self._transport is not None:
            self._transport.abort()
        if self._task is not None:
            self._task.cancel()

    async def _run(self, transport: asyncio.Transport) -> None:
        try:
            secured = await asyncio.get_running_loop().start_tls(
                transport,
                self,
                self._context,
                server_side=True,
                ssl_handshake_timeout=self._timeout_s,
                ssl_shutdown_timeout=SHUTDOWN_TIMEOUT_S,
            )
        except OSError as error:  # of TLS, of the socket, or the time-out
            transport.abort()
            self._server.end_handshake(self, error)
            return
        finally:
            self._task = None
        # A connection that was lost during the handshake gives a transport, or none, instead of an error.
        if self._aborted or secured is None or secured.is_closing() or transport.is_closing():
            transport.abort()
            self._server.end_handshake(self)
            return
        self._server.end_handshake(self)
        connection = Connection(self._server)
        secured.set_protocol(connection)
        connection.connection_made(secured)
        for data in self._early:
            connection.data_received(data)
        if self._eof:
            connection.eof_received()
