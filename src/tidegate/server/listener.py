"""HTTP listeners: `HttpServer` on a socket of its own, for the data plane and for the control plane."""

from __future__ import annotations

import logging
import resource
import socket
from typing import Any, Final

from tidegate.doors.http_server import HttpServer
from tidegate.errors import SettingsError
from tidegate.listen_address import join_address

logger = logging.getLogger(__name__)

_HEADER_TIMEOUT_S: Final = 10.0
_OTHER_FILES: Final = 512
"""Files and sockets reserved for other uses than data plane connections: databases, Redis, logs, other listeners."""


class Listener:
    """`HttpServer` at one address.

    Args:
        app: the app.
        host: address to listen on.
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
            SettingsError: if it cannot listen on the address.
        """
        await self.server.start(_listening_socket(*self._address))

    async def stop(self, timeout_s: float) -> None:
        """Accept no more connections, and wait for the requests in flight.

        Args:
            timeout_s: how long to wait.
        """
        await self.server.stop(timeout_s)


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
            "server.max_connections = %d exceeds the limit of open files of this process, accepting %d connections; "
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
        raise SettingsError(f"cannot listen on {join_address(host, port)}: {error.strerror or error}") from None
    return listening
