"""Connections to PostgreSQL on which every answer has a deadline. The one place that needs psycopg."""

from __future__ import annotations

import asyncio
import inspect
import os
import shlex
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tidegate.errors import SettingsError
from tidegate.listen_address import is_host

APPLICATION: Final = "tidegate"
_CONNECT_S: Final = 2
"""The minimum that libpq supports, s; it applies to each host of a URL."""

# The methods of psycopg that `Connection` overrides, some of them not public, and the parameters that psycopg passes.
_OVERRIDDEN: Final = {"wait": ("self", "gen"), "_try_cancel": ("self", "timeout")}

_R = TypeVar("_R")


class Connection(psycopg.AsyncConnection[Any]):
    """A connection that is shut down when an answer exceeds its deadline.

    A server that is frozen or unreachable leaves its connections open: the kernel acknowledges what is sent. Cancelling the task
    does not help, because psycopg then sends a cancel request to the server and waits for it. So the socket is shut down, which
    ends every kind of wait at once: a query, a commit, the pool's ping.
    """

    deadline_s = 2.0

    async def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        """See `psycopg.AsyncConnection.wait`."""
        late = False

        def shut_down() -> None:
            nonlocal late
            late = True
            self._shut_down()

        timer = asyncio.get_running_loop().call_later(self.deadline_s, shut_down)
        try:
            return await super().wait(gen, *args, **kwargs)
        except psycopg.OperationalError:
            if not late:
                raise
            # Otherwise the error would read as if the server had closed the connection.
            raise psycopg.OperationalError(f"no answer within {self.deadline_s:g} s") from None
        finally:
            timer.cancel()

    async def _try_cancel(self, *, timeout: float = 5.0) -> None:  # noqa: ARG002, ASYNC109 - psycopg's own
        """Shut down the connection of a cancelled query: a cancel request to a frozen server would take seconds."""
        self._shut_down()

    def __del__(self, *_: object) -> None:
        """Close a connection whose opening task was cancelled; psycopg would log a warning for it."""
        pgconn = getattr(self, "pgconn", None)
        if pgconn is not None:
            pgconn.finish()

    def __init_subclass__(cls, **options: Any) -> None:
        """Reject versions of psycopg that do not call the overridden methods: deadlines would silently have no effect."""
        super().__init_subclass__(**options)
        missing = [name for name, parameters in _OVERRIDDEN.items() if not _accepts(name, parameters)]
        if missing:
            raise SettingsError(
                f"psycopg {psycopg.__version__} has no AsyncConnection.{' and '.join(missing)} as 3.3 has it, which deadlines of "
                "queries need: pip install 'tidegate[postgres]'"
            )

    def _shut_down(self) -> None:
        try:
            # A duplicate of the descriptor: libpq closes its own.
            with socket.socket(fileno=os.dup(self.pgconn.socket)) as copy:
                copy.shutdown(socket.SHUT_RDWR)
        except (OSError, psycopg.Error):
            return  # already closed


def _accepts(name: str, parameters: tuple[str, ...]) -> bool:
    method = getattr(psycopg.AsyncConnection, name, None)
    return method is not None and set(parameters) <= set(inspect.signature(method).parameters)


def connection_factory(url: str, setting: str, *, writes: bool, timeout_s: float) -> Callable[[], Awaitable[Connection]]:
    """A function that opens connections to a URL.

    Args:
        url: as libpq reads it; its options take precedence over those set here.

    Raises:
        SettingsError: if libpq does not understand the URL.
    """
    try:
        options = conninfo_to_dict(url)
    except psycopg.ProgrammingError as error:
        # The message of libpq may contain the URL, and with it the password.
        reason = str(error).partition('"')[0].strip() or "it is not understood"
        raise SettingsError(f"{setting}: {reason}: write postgresql://user:password@host:5432/name?sslmode=…") from None
    for host in str(options.get("host") or "").split(","):
        # A path or @name is a unix socket; without a host libpq uses its default.
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


def diagnose_connection(url: str, name: str) -> str:
    """Find out why connections to PostgreSQL fail; returns the remedy. Blocks for a few seconds at most.

    libpq has no SQLSTATE for a rejected connection, only a message in the server's language. So variants are tried: whether a
    server answers, whether it accepts the connection if it need not be the primary, whether it accepts the same user for a
    database that every server has.
    """
    options: dict[str, Any] = {**conninfo_to_dict(url), "connect_timeout": _CONNECT_S, "application_name": APPLICATION}
    answer = psycopg.pq.PGconn.ping(make_conninfo("", **options).encode())
    if answer == psycopg.pq.Ping.NO_RESPONSE:
        return "no server answers there: start it, or correct the host and the port"
    if answer == psycopg.pq.Ping.REJECT:
        return "the server starts or stops now: try again in a while"
    options.pop("target_session_attrs", None)
    if (error := _connection_error(options)) is None:
        return "the server is read-only or a standby: give the primary, or every host that may become the primary"
    database = str(options.get("dbname") or options.get("user") or "")
    for other in ("postgres", "template1"):
        try:
            with psycopg.connect(**{**options, "dbname": other}, autocommit=True) as connection:
                row = connection.execute("SELECT count(*) FROM pg_database WHERE datname = %s", [database]).fetchone()
        except psycopg.Error:
            continue
        if row is not None and row[0] == 0:
            return f"database {database[:64]!r} does not exist: create it with 'createdb {shlex.quote(database[:64])}'"
        return f"its user may not connect to this database: GRANT CONNECT ON DATABASE … TO its user, on {name}"
    user = str(options.get("user") or "")
    if error.pgconn is not None and (error.pgconn.used_password or error.pgconn.needs_password):
        return f"the server has no role {user[:64]!r}, or does not accept its password: correct catalog.url, or make the role"
    return f"the server refuses the user {user[:64]!r}: make the role with 'createuser', or allow it in pg_hba.conf"


def _connection_error(options: dict[str, Any]) -> psycopg.Error | None:
    try:
        psycopg.connect(**options).close()
    except psycopg.Error as error:
        return error
    return None
