"""Connections to PostgreSQL on which every answer has a deadline. The one place that needs psycopg."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict

from tidegate.errors import SettingsError
from tidegate.settings import is_host

APPLICATION: Final = "tidegate"
_CONNECT_S: Final = 2
"""The least that libpq counts in; each host of a URL has as much."""

_R = TypeVar("_R")


class Connection(psycopg.AsyncConnection[Any]):
    """A connection that is cut when the server owes an answer for too long.

    A server that is frozen, or cut off without a word, leaves its connections open: the kernel acknowledges what is sent. Giving
    up from outside does not help, for psycopg then asks the server to cancel and waits for that. So the socket is shut down,
    which whoever waits sees at once, in whatever it was doing: a query, a commit, the pool's ping.
    """

    deadline_s = 2.0

    async def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        """See `psycopg.AsyncConnection.wait`."""
        late = False

        def cut() -> None:
            nonlocal late
            late = True
            self._cut()

        overdue = asyncio.get_running_loop().call_later(self.deadline_s, cut)
        try:
            return await super().wait(gen, *args, **kwargs)
        except psycopg.OperationalError:
            if not late:
                raise
            # Else it would read as if the server had closed the connection.
            raise psycopg.OperationalError(f"no answer within {self.deadline_s:g} s") from None
        finally:
            overdue.cancel()

    async def _try_cancel(self, *, timeout: float = 5.0) -> None:  # noqa: ARG002, ASYNC109 - psycopg's own
        """Whoever gives up a query gives up its connection: asking a frozen server to cancel it would take seconds."""
        self._cut()

    def __del__(self, *_: object) -> None:
        """One whose maker was cancelled is closed by nobody else; psycopg would warn of it, and we know."""
        pgconn = getattr(self, "pgconn", None)
        if pgconn is not None:
            pgconn.finish()

    def _cut(self) -> None:
        try:
            # A copy of the descriptor: libpq closes its own when it sees the end.
            with socket.socket(fileno=os.dup(self.pgconn.socket)) as copy:
                copy.shutdown(socket.SHUT_RDWR)
        except (OSError, psycopg.Error):
            return  # it is closed already, which is what was wanted


def connecting(url: str, setting: str, *, writes: bool, timeout_s: float) -> Callable[[], Awaitable[Connection]]:
    """What makes connections to a URL.

    Args:
        url: as libpq reads it; its own options win over what is set here.
        setting: whose value the URL is, for messages.
        writes: whether it must be a database that takes writes.
        timeout_s: how long one answer may take, s.

    Returns:
        A function that makes one.

    Raises:
        SettingsError: if libpq does not understand the URL.
    """
    try:
        options = conninfo_to_dict(url)
    except psycopg.ProgrammingError as error:
        # What libpq says may repeat the URL, and with it the password.
        reason = str(error).partition('"')[0].strip() or "it is not understood"
        raise SettingsError(f"{setting}: {reason}: write postgresql://user:password@host:5432/name?sslmode=…") from None
    for host in str(options.get("host") or "").split(","):
        # A path or @name is a unix socket, and no host is libpq's default.
        if host and host[0] not in "/@" and not is_host(host):
            raise SettingsError(f"{setting}: {host[:60]!r} is not a valid host: write postgresql://user:password@host:5432/name")
    options.setdefault("connect_timeout", _CONNECT_S)
    options.setdefault("application_name", APPLICATION)
    if writes:
        options.setdefault("target_session_attrs", "read-write")

    class Deadlined(Connection):
        deadline_s = timeout_s

    async def connect() -> Connection:
        return await Deadlined.connect("", **options)  # type: ignore[arg-type]

    return connect
