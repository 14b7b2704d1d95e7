"""Addresses to listen at, and the HTTP servers behind them: ours for the data plane, Granian for the control plane."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
from typing import Any, Final

from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.server.embed import Server as GranianServer

from tidegate.doors.http_server import HttpServer
from tidegate.errors import SettingsError
from tidegate.settings import join_address

logger = logging.getLogger(__name__)

_HEADER_TIMEOUT_S: Final = 10.0
_START_TIMEOUT_S: Final = 15.0
_LOOK_S: Final = 0.005
_OTHER_FILES: Final = 512
"""So many files and sockets are kept for what is not a connection of the data plane: databases, Redis, logs, the other doors."""
_MAX_HEADER_BYTES: Final = 64 * 1024
"""Beyond it the server itself answers 431, without the error form; up to it the data plane does, in its form."""


class Listener:
    """The data plane at one address: `HttpServer` on a socket of its own.

    Args:
        app: the app.
        host: address to listen at.
        port: 1 to 65535.
        header_timeout_s: how long a request's headers may take, s.
        idle_timeout_s: how long a connection may wait for its next request, s.
        max_connections: most open at a time; fewer where the process may not open so many files.
    """

    def __init__(
        self,
        app: Any,
        host: str,
        port: int,
        header_timeout_s: float = _HEADER_TIMEOUT_S,
        idle_timeout_s: float = 75.0,
        max_connections: int = 10_000,
    ) -> None:
        self.server = HttpServer(app, header_timeout_s, idle_timeout_s, max_connections=_affordable(max_connections))
        self._address = (host, port)

    async def start(self) -> None:
        """Listen; returns when connections are accepted.

        Raises:
            SettingsError: if the address cannot be listened at.
        """
        await self.server.start(_listening_socket(*self._address))

    async def stop(self, timeout_s: float) -> None:
        """Accept no more connections, and wait for the requests in flight.

        Args:
            timeout_s: how long to wait.
        """
        await self.server.stop(timeout_s)


class AsgiListener:
    """An ASGI app without lifespan at one address, on Granian: the control plane.

    Args:
        app: the app.
        host: address to listen at.
        port: 1 to 65535.
        header_timeout_s: how long a request's headers may take, s.
    """

    def __init__(self, app: Any, host: str, port: int, header_timeout_s: float = _HEADER_TIMEOUT_S) -> None:
        self._server = GranianServer(
            app,
            address=host,
            port=port,
            interface=Interfaces.ASGINL,
            http=HTTPModes.http1,
            http1_settings=HTTP1Settings(header_read_timeout=round(header_timeout_s * 1000), max_buffer_size=_MAX_HEADER_BYTES),
            websockets=False,
            backlog=1024,
            log_enabled=False,
        )
        self._serving: asyncio.Task[None] | None = None
        self._address = (host, port)

    async def start(self) -> None:
        """Listen; returns when connections are taken.

        Raises:
            SettingsError: if none is within `_START_TIMEOUT_S`.
        """
        self._serving = asyncio.create_task(self._server.serve())
        # The server binds in a thread of its own and says nothing when it has: what a client would find out is tried.
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _START_TIMEOUT_S
        while True:
            await asyncio.sleep(_LOOK_S)
            if self._serving.done():
                self._serving.result()
            try:
                _, writer = await asyncio.open_connection(*self._address)
            except OSError as error:
                if loop.time() > deadline:
                    raise SettingsError(f"nothing can connect to {join_address(*self._address)}: {error}") from None
            else:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
                return

    async def stop(self, timeout_s: float) -> None:
        """Take no more connections, and wait for the requests in flight.

        Args:
            timeout_s: how long to wait.
        """
        if self._serving is None or self._serving.done():
            return
        self._server.stop()  # type: ignore[no-untyped-call]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._serving, timeout_s)


def _affordable(connections: int) -> int:
    """Raise the limit of open files to what so many connections need, as far as the process may; gives how many that allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        except (OSError, ValueError):
            soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    affordable = max(min(connections, soft - _OTHER_FILES), 1)
    if affordable < connections:
        logger.warning(
            "server.max_connections = %d is above what this process may open: %d connections are accepted; "
            "raise the limit of open files (ulimit -n, LimitNOFILE=) or lower the setting",
            connections,
            affordable,
        )
    return affordable


def _listening_socket(host: str, port: int) -> socket.socket:
    """A bound socket; workers, and an instance that replaces another one, share the port (SO_REUSEPORT)."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listening.setblocking(False)
            listening.bind(address)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        raise SettingsError(f"cannot listen at {join_address(host, port)}: {error.strerror or error}") from None
    return listening
