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
"""The least that libpq counts in; each host of a URL has as much."""

# What `Connection` overrides of psycopg, some of it not public, and the parameters that psycopg passes.
_OVERRIDDEN: Final = {"wait": ("self", "gen"), "_try_cancel": ("self", "timeout")}

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

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a psycopg that would not call what is overridden here: a deadline would silently be none."""
        super().__init_subclass__(**options)
        missing = [name for name, parameters in _OVERRIDDEN.items() if not _takes(name, parameters)]
        if missing:
            raise SettingsError(
                f"psycopg {psycopg.__version__} has no AsyncConnection.{' and '.join(missing)} as 3.3 has it, which deadlines of "
                "queries need: pip install 'tidegate[postgres]'"
            )

    def _cut(self) -> None:
        try:
            # A copy of the descriptor: libpq closes its own when it sees the end.
            with socket.socket(fileno=os.dup(self.pgconn.socket)) as copy:
                copy.shutdown(socket.SHUT_RDWR)
        except (OSError, psycopg.Error):
            return  # it is closed already, which is what was wanted


def _takes(name: str, parameters: tuple[str, ...]) -> bool:
    method = getattr(psycopg.AsyncConnection, name, None)
    return method is not None and set(parameters) <= set(inspect.signature(method).parameters)


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


def why_unreachable(url: str, name: str) -> str:
    """Find out why no connection to a PostgreSQL can be made; blocks for some seconds at most.

    A connection that the server refuses has no SQLSTATE in libpq, only a text in the server's language. So what can be done
    instead is tried: whether a server answers, whether it takes the connection when it need not be the primary, whether it takes
    the same user for the database that every server has.

    Args:
        url: as libpq reads it.
        name: of the database as messages may show it.

    Returns:
        The remedy.
    """
    options: dict[str, Any] = {**conninfo_to_dict(url), "connect_timeout": _CONNECT_S, "application_name": APPLICATION}
    answer = psycopg.pq.PGconn.ping(make_conninfo("", **options).encode())
    if answer == psycopg.pq.Ping.NO_RESPONSE:
        return "no server answers there: start it, or correct the host and the port"
    if answer == psycopg.pq.Ping.REJECT:
        return "the server starts or stops now: try again in a while"
    options.pop("target_session_attrs", None)
    if (refused := _refusal(options)) is None:
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
    if refused.pgconn is not None and (refused.pgconn.used_password or refused.pgconn.needs_password):
        return f"the server has no role {user[:64]!r}, or does not accept its password: correct catalog.url, or make the role"
    return f"the server refuses the user {user[:64]!r}: make the role with 'createuser', or allow it in pg_hba.conf"


def _refusal(options: dict[str, Any]) -> psycopg.Error | None:
    try:
        psycopg.connect(**options).close()
    except psycopg.Error as error:
        return error
    return None
