"""Sending one question with a deadline for the whole of it, blocking and on asyncio, through httpcore's pools of connections.

httpcore hands what stands as a timeout through to the network backend unread. The backends are ours (`network`), and what we let
it hand through is the moment, on the monotonic clock, at which the time is over: so no sum of short waits can exceed it.
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
    """Blocking; any number of threads may send at once.

    Args:
        most: connections at once.
        keepalive_s: how long an unused one is kept, s.
        tls: for https; None for what the system trusts.
    """

    def __init__(self, most: int, keepalive_s: float, tls: ssl.SSLContext | None) -> None:
        self._options = _options(most, keepalive_s, tls)
        self._most = most
        self._pid = 0
        self._pool: httpcore.ConnectionPool | None = None
        self._pool = self._new_pool()

    def send(self, question: HttpRequest) -> Reply | TransportFailure:
        """Send and wait.

        Args:
            question: see there.

        Returns:
            What was answered, or why nothing was.
        """
        pool = self._pool
        if pool is None:
            raise _closed()
        if self._pid != os.getpid():
            # A worker forked from the process that made the client: of a shared socket each would read the other's answers.
            pool = self._pool = self._new_pool()
        try:
            response = pool.request(
                question.method,
                _url(question),
                headers=question.headers,
                content=question.body or None,
                extensions=_timeouts(question),
            )
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as error:
            return _no_reply(error, self._most)
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
    """On asyncio, one event loop. Takes the arguments of `Connections`."""

    def __init__(self, most: int, keepalive_s: float, tls: ssl.SSLContext | None) -> None:
        self._most = most
        self._pool: httpcore.AsyncConnectionPool | None = httpcore.AsyncConnectionPool(
            network_backend=AsyncDeadlineBackend(), **_options(most, keepalive_s, tls)
        )

    async def send(self, question: HttpRequest) -> Reply | TransportFailure:
        """As `Connections.send`."""
        if self._pool is None:
            raise _closed()
        try:
            # One timer for the whole of it: the wait for a connection, and every part of the answer.
            async with asyncio.timeout(question.answer_by - monotonic()):
                response = await self._pool.request(
                    question.method,
                    _url(question),
                    headers=question.headers,
                    content=question.body or None,
                    extensions=_timeouts(question),
                )
        except TimeoutError:
            return _no_reply(httpcore.ReadTimeout(), self._most)
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as error:
            return _no_reply(error, self._most)
        return Reply(response.status, response.headers, response.content)

    async def close(self) -> None:
        """Close all connections."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.aclose()


def _options(most: int, keepalive_s: float, tls: ssl.SSLContext | None) -> dict[str, Any]:
    return {"max_connections": most, "max_keepalive_connections": most, "keepalive_expiry": keepalive_s, "ssl_context": tls}


def _url(question: HttpRequest) -> httpcore.URL:
    server = question.server
    scheme = b"https" if server.tls else b"http"
    return httpcore.URL(scheme=scheme, host=server.host.encode("ascii"), port=server.port, target=question.target)


def _timeouts(question: HttpRequest) -> dict[str, Any]:
    by = question.answer_by
    # The only one that httpcore itself waits for. A little earlier, so that a full pool is told from a server that is silent.
    pool = max((by - monotonic()) * 0.95, 0.001)
    return {"timeout": {"connect": question.connect_by, "read": by, "write": by, "pool": pool}}


def _closed() -> RuntimeError:
    return RuntimeError("this client is closed: make a new one")


def _no_reply(error: Exception, most: int) -> TransportFailure:
    """The reason, of the error's type and of what our own backends said: other texts may have a header's value in them."""
    match error:
        case httpcore.PoolTimeout():
            return TransportFailure(f"was not asked: all {most} connections were in use", sent=False, its_fault=False)
        case httpcore.ConnectTimeout():
            return TransportFailure("took no connection in time", sent=False)
        case httpcore.ConnectError():
            return TransportFailure(f"took no connection: {error}", sent=False)
        case httpcore.TimeoutException():
            return TransportFailure("did not answer in time", sent=True)
        case httpcore.NetworkError():
            return TransportFailure("broke the connection without an answer", sent=True)
        case _:
            return TransportFailure("closed the connection without an answer, or does not speak HTTP", sent=True)
