"""Connections to Redis over blocking sockets: they answer before `send` returns.

Threads may share one: each call takes a socket from a pool. After a fork the child opens sockets of its own.

A reply that does not come in time closes its socket: no caller waits for it any more, and whether the command was run is unknown.
A command on a pooled socket that the server had closed meanwhile is sent once more on a new one: at worst it is charged twice.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any, Final, TypeVar, cast

import hiredis

from tidegate.counters.redis.pipeline import ConnectionOptions, new_reader
from tidegate.counters.redis.resp import encode_command
from tidegate.counters.redis.url import Endpoint
from tidegate.errors import StoreUnavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")

MASTER_CHECK_S: Final = 5.0
"""How old the sentinels' answer may be, s: an old master that is cut off would count for as long."""
_MIN_CONNECT_S: Final = 0.25
_CHUNK: Final = 65_536
_INCOMPLETE: Final = new_reader().gets()
_ASKING: Final = encode_command("ASKING")
_OPEN_BEFORE: Final = threading.local()


def run_blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing.

    Args:
        coroutine: of a store whose transport blocks.

    Returns:
        Its result.

    Raises:
        RuntimeError: if it waits for something after all.
    """
    try:
        coroutine.send(None)
    except StopIteration as finished:
        return cast("T", finished.value)
    coroutine.close()
    raise RuntimeError("a coroutine of a blocking store waited for an event loop")


class Answered:
    """The outcome of a command, with what the store uses of a future."""

    __slots__ = ("_error", "_reply")

    def __init__(self, reply: Any, error: StoreUnavailable | None = None) -> None:
        self._reply = reply
        self._error = error

    def done(self) -> bool:
        """Always: the call has returned."""
        return True

    def result(self) -> Any:
        """The reply; raises the error where there is none."""
        if self._error is not None:
            raise self._error
        return self._reply

    def add_done_callback(self, _: object) -> None:
        """Callbacks are for outcomes that are not read; here nothing is pending."""

    def __await__(self) -> Generator[None, None, Any]:
        return self.result()
        yield  # makes this a generator, which is what `await` needs


class _Socket:
    """One connection: send some commands, read as many replies."""

    __slots__ = ("_reader", "checked_at", "endpoint", "opened_ns", "sock")

    def __init__(self, sock: socket.socket, endpoint: Endpoint) -> None:
        self.sock = sock
        self.endpoint = endpoint
        self.opened_ns = time.monotonic_ns()
        self.checked_at = time.monotonic()
        self._reader = new_reader()

    def exchange(self, data: bytes, replies: int, timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        self.sock.sendall(data)
        read: list[Any] = []
        while True:
            received = self.sock.recv(_CHUNK)
            if not received:
                raise ConnectionResetError("the server closed the connection")
            self._reader.feed(received)
            while (reply := self._reader.gets()) is not _INCOMPLETE:
                read.append(reply)
            if len(read) == replies:
                return read
            if len(read) > replies:
                raise hiredis.ProtocolError("a reply without a command")
            if time.monotonic() >= deadline:
                raise TimeoutError

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.close()

    # A limiter that nobody closes, as at the end of a script, leaves no warning about its sockets.
    __del__ = close


class BlockingConnection:
    """The sockets to one server.

    Args:
        locate: gives the server's address, before each connection.
        options: as of `Connection`.
        must_be_master: fail on a server whose role is not master.
        in_cluster: whether the server must be a cluster node; else it must not be one.
        on_failure: called when the server cannot be reached or does not answer.
    """

    def __init__(
        self,
        locate: Callable[[], Endpoint],
        options: ConnectionOptions,
        *,
        must_be_master: bool = False,
        in_cluster: bool = False,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        self.endpoint = Endpoint()
        self.loads: dict[str, float] = {}
        self.refuses_load = False
        self._locate = locate
        self._options = options
        self._must_be_master = must_be_master
        self._in_cluster = in_cluster
        self._on_failure = on_failure
        self._idle: list[_Socket] = []
        self._process = os.getpid()
        self._asking = threading.local()

    async def wait_up(self, timeout_s: float) -> bool:  # noqa: ARG002 - `send` connects
        """Sockets are opened by `send`."""
        return True

    def send(self, command: bytes) -> Answered:
        """Send a command and read its reply.

        Args:
            command: one command in RESP. ASKING is kept and sent with this thread's next command: on the same socket.

        Returns:
            The outcome; an error of the server comes as a `hiredis.ReplyError`.
        """
        if command == _ASKING:
            self._asking.next = True
            return Answered(b"OK")
        replies = 1
        if getattr(self._asking, "next", False):
            self._asking.next = False
            command, replies = _ASKING + command, 2
        try:
            return Answered(self._exchange(command, replies)[-1])
        except StoreUnavailable as error:
            return Answered(None, error)

    def drop(self, why: str) -> None:
        """Close all idle sockets.

        Args:
            why: for the log.
        """
        logger.debug("connections to Redis at %s closed: %s", self.endpoint, why)
        idle, self._idle = self._idle, []
        for each in idle:
            each.close()
        self.loads.clear()
        self.refuses_load = False

    def _exchange_as_before(self, data: bytes, replies: int, before_ns: int) -> list[Any]:
        """Send once, over a socket that was open at some moment."""
        others = []
        while (used := self._take_idle()) is not None and used.opened_ns >= before_ns:
            others.append(used)
        self._idle += others
        if used is None:
            raise StoreUnavailable(f"no connection to Redis at {self.endpoint} is old enough", reason="disconnected")
        try:
            return self._with(used, data, replies)
        except TimeoutError:
            raise self._timed_out() from None
        except (OSError, hiredis.ProtocolError) as error:
            self.drop(str(error))
            raise self._unreachable(str(error)) from None

    def _exchange(self, data: bytes, replies: int) -> list[Any]:
        before_ns = getattr(_OPEN_BEFORE, "ns", None)
        if before_ns is not None:
            return self._exchange_as_before(data, replies, before_ns)
        pooled = self._take_idle()
        if pooled is not None:
            try:
                return self._with(pooled, data, replies)
            except TimeoutError:
                raise self._timed_out() from None
            except (OSError, hiredis.ProtocolError) as error:
                # The server closed it while it was idle, as most often: the others will be closed too.
                self.drop(str(error))
        try:
            return self._with(self._connect(), data, replies)
        except TimeoutError:
            raise self._timed_out() from None
        except (OSError, UnicodeError, hiredis.ProtocolError) as error:
            raise self._unreachable(str(error)) from None

    def _with(self, used: _Socket, data: bytes, replies: int) -> list[Any]:
        try:
            read = used.exchange(data, replies, self._options.timeout_s)
        except BaseException:
            # Also when a signal interrupts it: its reply would be read by the next command.
            used.close()
            raise
        self._idle.append(used)
        return read

    def _take_idle(self) -> _Socket | None:
        if self._process != os.getpid():
            # A fork shares the parent's sockets: closing our copies does not end the parent's connections.
            self._process = os.getpid()
            self.drop("forked")
            self._asking = threading.local()
        try:
            idle = self._idle.pop()
        except IndexError:
            return None
        if self._must_be_master and time.monotonic() - idle.checked_at > MASTER_CHECK_S:
            if self._locate() != idle.endpoint:
                idle.close()
                self.drop("the sentinels name another master")
                return None
            idle.checked_at = time.monotonic()
        return idle

    def _connect(self) -> _Socket:
        self.endpoint = endpoint = self._locate()
        options = self._options
        connect_s = max(_MIN_CONNECT_S, 4 * options.timeout_s)
        sock = connect_socket(endpoint, connect_s)
        try:
            if options.tls is not None and not endpoint.path:
                sock = options.tls.wrap_socket(sock, server_hostname=endpoint.host)
            made = _Socket(sock, endpoint)
            self._greet(made, connect_s)
            sock.settimeout(options.timeout_s)
        except BaseException:
            sock.close()
            raise
        return made

    def _greet(self, made: _Socket, connect_s: float) -> None:
        options = self._options
        hello = ["HELLO", "3"]
        if options.credentials.password or options.credentials.username:
            hello += ["AUTH", options.credentials.username or "default", options.credentials.password]
        commands = [encode_command(*hello, "SETNAME", options.name)]
        if options.db:
            commands.append(encode_command("SELECT", str(options.db)))
        if self._must_be_master:
            commands.append(encode_command("ROLE"))
        replies = made.exchange(b"".join(commands), len(commands), connect_s)
        for reply in replies:
            if isinstance(reply, hiredis.ReplyError):
                raise StoreUnavailable(f"Redis at {made.endpoint} refused the connection: {reply}", reason="refused")
        clustered = isinstance(replies[0], dict) and replies[0].get(b"mode") == b"cluster"
        if clustered is not self._in_cluster:
            remedy = "is a cluster node: use redis+cluster://" if clustered else "is not a cluster node: use redis://"
            raise StoreUnavailable(f"Redis at {made.endpoint} {remedy} in counters.url", reason="refused")
        if self._must_be_master and (not isinstance(replies[-1], list) or replies[-1][:1] != [b"master"]):
            raise StoreUnavailable(f"Redis at {made.endpoint} is not the master", reason="not_master")

    def _timed_out(self) -> StoreUnavailable:
        self._failed()
        return StoreUnavailable(
            f"Redis at {self.endpoint} did not answer within {self._options.timeout_s * 1000:g} ms",
            reason="timeout",
            shard=str(self.endpoint),
        )

    def _unreachable(self, why: str) -> StoreUnavailable:
        self._failed()
        return StoreUnavailable(
            f"Redis at {self.endpoint} cannot be reached: {why or 'no answer in time'}",
            reason="disconnected",
            shard=str(self.endpoint),
        )

    def _failed(self) -> None:
        if self._on_failure is not None:
            self._on_failure()


@contextlib.contextmanager
def sockets_open_before(moment_ns: int) -> Iterator[None]:
    """Have this thread send each command once, and over sockets only that were open at some moment: to servers that have not been
    restarted since. Others fail.

    Args:
        moment_ns: the moment, monotonic.
    """
    _OPEN_BEFORE.ns = moment_ns
    try:
        yield
    finally:
        _OPEN_BEFORE.ns = None


def connect_socket(endpoint: Endpoint, timeout_s: float) -> socket.socket:
    """A blocking socket to a server.

    Args:
        endpoint: its address.
        timeout_s: of the connection, and of each later operation.

    Returns:
        The socket, connected.

    Raises:
        OSError: if there is no connection in time.
    """
    if endpoint.path:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(endpoint.path)
        except BaseException:
            sock.close()
            raise
        return sock
    sock = socket.create_connection((endpoint.host, endpoint.port), timeout_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
