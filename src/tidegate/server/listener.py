"""HTTP listeners: `HttpServer` on a socket of its own, for the data plane and for the control plane."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tidegate.doors.http_server import HttpServer
from tidegate.doors.tls import ServerTls
from tidegate.errors import SettingsError
from tidegate.listen_address import UNIX_PREFIX, is_unix, join_address, listener_url

logger = logging.getLogger(__name__)

_HEADER_TIMEOUT_S: Final = 10.0
_OTHER_FILES: Final = 512
"""Files and sockets reserved for other uses than data plane connections: databases, Redis, logs, other listeners."""


class Listener:
    """`HttpServer` at one address.

    Args:
        host: address to listen on, or `unix:/path`.
        port: 1 to 65535; 0 for a unix socket.
        header_timeout_s: how long a request's headers may take, s.
        idle_timeout_s: how long a connection may wait for its next request, s.
        max_connections: most open at a time; fewer where the process may not open so many files.
        tls: certificate, and names that clients need; None without TLS. It is not used on a unix socket.
        unix_mode: permissions of a unix socket.
        inherited: descriptors of unix sockets that the supervisor bound, by address.
    """

    def __init__(
        self,
        app: Any,
        host: str,
        port: int,
        header_timeout_s: float = _HEADER_TIMEOUT_S,
        idle_timeout_s: float = 75.0,
        max_connections: int = 10_000,
        tls: ServerTls | None = None,
        unix_mode: int = 0o660,
        inherited: Mapping[str, int] | None = None,
    ) -> None:
        self.uses_tls = tls is not None and not is_unix(host)
        self.server = HttpServer(
            app,
            header_timeout_s,
            idle_timeout_s,
            max_connections=_affordable(max_connections),
            tls=tls if self.uses_tls else None,
        )
        self._address = (host, port)
        self._unix_mode = unix_mode
        self._inherited = inherited or {}
        self._unix: UnixSocket | None = None

    @property
    def url(self) -> str:
        """Where it listens: `http://host:port`, `https://host:port` or `unix:/path`."""
        return listener_url(join_address(*self._address), self.uses_tls)

    async def start(self) -> None:
        """Listen; returns when connections are accepted.

        Raises:
            SettingsError: if it cannot listen on the address.
        """
        host, port = self._address
        if not is_unix(host):
            await self.server.start(_listening_socket(host, port))
        elif host in self._inherited:
            await self.server.start(socket.socket(fileno=os.dup(self._inherited[host])))
        else:
            self._unix = UnixSocket(host, self._unix_mode)
            await self.server.start(self._unix.listening)

    async def stop_accepting(self) -> None:
        """Accept no more connections; those that are open are served as before."""
        await self.server.stop_accepting()

    async def stop(self, timeout_s: float) -> None:
        """Accept no more connections, and wait for the requests in flight.

        Args:
            timeout_s: how long to wait.
        """
        if self._unix is not None:
            self._unix.remove()
            self._unix = None
        await self.server.stop(timeout_s)


class UnixSocket:
    """A bound unix socket.

    Raises:
        SettingsError: if it cannot be bound.
    """

    def __init__(self, address: str, mode: int) -> None:
        self._path = Path(address.removeprefix(UNIX_PREFIX))
        require_free_path(address)
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The permissions are there from the first moment on.
        mask = os.umask(0o777 & ~mode)
        try:
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()  # of a process that was killed: nobody listens there
            self.listening.bind(os.fspath(self._path))
            self.listening.setblocking(False)
            self._identity = _identity(self._path)
        except OSError as error:
            self.listening.close()
            raise SettingsError(f"cannot listen on {address}: {error.strerror or error}") from None
        finally:
            os.umask(mask)

    def remove(self) -> None:
        """Remove the file, unless another process has replaced it."""
        with contextlib.suppress(OSError):
            if _identity(self._path) == self._identity:
                self._path.unlink()


def require_free_path(address: str) -> None:
    """Check that a unix socket can be bound: nothing is there, or the socket of a process that no longer runs.

    Raises:
        SettingsError: naming the address and the remedy.
    """
    path = Path(address.removeprefix(UNIX_PREFIX))
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise SettingsError(f"cannot listen on {address}: the directory {path.parent} does not exist; create it") from None
        return
    except OSError as error:
        raise SettingsError(f"cannot listen on {address}: {error.strerror or error}") from None
    if not stat.S_ISSOCK(mode):
        raise SettingsError(f"cannot listen on {address}: the file that is there is not a socket; remove it or set another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(os.fspath(path))
    if code not in (errno.ECONNREFUSED, errno.ENOENT):
        reason = "a process listens there" if code in (0, errno.EAGAIN) else os.strerror(code)
        raise SettingsError(f"cannot listen on {address}: {reason}; stop it or set another path")


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino, status.st_mtime_ns  # the number of a removed file is used again


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
