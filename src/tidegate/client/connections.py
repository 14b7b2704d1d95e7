"""Sending one request with one deadline for all of it, blocking and on asyncio, through httpcore's connection pools.

httpcore passes its timeouts to the network backend unchanged. The backends are Tidegate's own (`network`), and the values passed
are deadlines on the monotonic clock, not durations: so a sum of short waits cannot exceed the deadline.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from time import monotonic
from typing import Any

import httpcore

from tidegate.client.network import AsyncDeadlineBackend, DeadlineBackend
from tidegate.client.steps import HttpRequest, Reply, TransportFailure


class Connections:
    """Blocking connection pool; thread-safe.

    Args:
        max_connections: maximum number of open connections.
        keepalive_s: how long an idle connection is kept, s.
        tls: for https; None for the certificate authorities of the system.
    """

    def __init__(self, max_connections: int, keepalive_s: float, tls: ssl.SSLContext | None) -> None:
        self._options = _options(max_connections, keepalive_s, tls)
        self._max_connections = max_connections
        self._pid = 0
        self._pool: httpcore.ConnectionPool | None = None
        self._pool = self._new_pool()

    def send(self, request: HttpRequest) -> Reply | TransportFailure:
        """Send a request and return the response, or the reason why there is none."""
        pool = self._pool
        if pool is None:
            raise _closed()
        if self._pid != os.getpid():
            # This process was forked from the pool's: on a shared socket each process would read responses of the other.
            pool = self._pool = self._new_pool()
        try:
            response = pool.request(
                request.method,
                _url(request),
                headers=request.headers,
                content=request.body or None,
                extensions=_timeouts(request),
            )
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as error:
            return _transport_failure(error, self._max_connections)
        return Reply(response.status, response.headers, response.content)

    def close(self) -> None:
        """Close all connections."""
        pool, self._pool = self._pool, None
        if pool is not None and self._pid == os.getpid():
            pool.close()

    def _new_pool(self) -> httpcore.ConnectionPool:
        self._pid = os.getpid()
        return httpcore.ConnectionPool(network_backend=DeadlineBackend(), **self._options)


class AsyncConnections:
    """Connection pool for asyncio, within one event loop. Takes the arguments of `Connections`."""

    def __init__(self, max_connections: int, keepalive_s: float, tls: ssl.SSLContext | None) -> None:
        self._max_connections = max_connections
        self._pool: httpcore.AsyncConnectionPool | None = httpcore.AsyncConnectionPool(
            network_backend=AsyncDeadlineBackend(), **_options(max_connections, keepalive_s, tls)
        )

    async def send(self, request: HttpRequest) -> Reply | TransportFailure:
        """As `Connections.send`."""
        if self._pool is None:
            raise _closed()
        try:
            # One timer for everything: the wait for a connection, and all parts of the response.
            async with asyncio.timeout(request.deadline - monotonic()):
                response = await self._pool.request(
                    request.method,
                    _url(request),
                    headers=request.headers,
                    content=request.body or None,
                    extensions=_timeouts(request),
                )
        except TimeoutError:
            return _transport_failure(httpcore.ReadTimeout(), self._max_connections)
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as error:
            return _transport_failure(error, self._max_connections)
        return Reply(response.status, response.headers, response.content)

    async def close(self) -> None:
        """Close all connections."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.aclose()


def _options(max_connections: int, keepalive_s: float, tls: ssl.SSLContext | None) -> dict[str, Any]:
    return {
        "max_connections": max_connections,
        "max_keepalive_connections": max_connections,
        "keepalive_expiry": keepalive_s,
        "ssl_context": tls,
    }


def _url(request: HttpRequest) -> httpcore.URL:
    server = request.server
    scheme = b"https" if server.tls else b"http"
    return httpcore.URL(scheme=scheme, host=(server.unix_path or server.host).encode(), port=server.port, target=request.target)


def _timeouts(request: HttpRequest) -> dict[str, Any]:
    deadline = request.deadline
    # The only timeout that httpcore applies itself. A little earlier, to tell a full pool from a server that does not respond.
    pool = max((deadline - monotonic()) * 0.95, 0.001)
    return {"timeout": {"connect": request.connect_deadline, "read": deadline, "write": deadline, "pool": pool}}


def _closed() -> RuntimeError:
    return RuntimeError("this client is closed; create a new one")


def _transport_failure(error: Exception, max_connections: int) -> TransportFailure:
    """The failure, from the error's type and the messages of our own backends: messages of httpcore may contain header values."""
    match error:
        case httpcore.PoolTimeout():
            return TransportFailure(
                f"was not contacted: all {max_connections} connections were in use", sent=False, counts_for_breaker=False
            )
        case httpcore.ConnectTimeout():
            return TransportFailure("did not accept a connection in time", sent=False)
        case httpcore.ConnectError():
            return TransportFailure(f"did not accept a connection: {error}", sent=False)
        case httpcore.TimeoutException():
            return TransportFailure("did not respond in time", sent=True)
        case httpcore.NetworkError():
            return TransportFailure("closed the connection without a response", sent=True)
        case _:
            return TransportFailure("closed the connection without a response, or does not speak HTTP", sent=True)
