"""One multiplexed connection to one Redis server that keeps itself connected.

While the server cannot be reached, commands fail at once. The pauses between attempts grow, with jitter, until a connection has
lasted for `STABLE_AFTER_S`. How commands and replies are matched, and what becomes of late replies, is in `pipeline`.

One event loop; any number of its tasks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

import hiredis

from tidegate.background import SUPERVISOR, stop
from tidegate.counters.redis.pipeline import ConnectionOptions, Pipeline, new_reader, reply_whenever
from tidegate.counters.redis.resp import encode_command
from tidegate.counters.redis.url import Endpoint
from tidegate.errors import StoreUnavailable
from tidegate.jitter import JITTER

logger = logging.getLogger(__name__)

STABLE_AFTER_S: Final = 5.0
"""After a connection that lasted for so long, s, the backoff begins again."""
_CONNECT_S: Final = 1.0
_MIN_BACKOFF_S: Final = 0.05
_MAX_BACKOFF_S: Final = 2.0


class Connection(Pipeline):
    """Keeps itself connected until it is closed.

    Args:
        locate: gives the server's address, before each attempt; may raise `StoreUnavailable`.
        must_be_master: fail on a server whose role is not master.
        in_cluster: whether the server must be a cluster node; else it must not be one.
        subscribe: a channel to subscribe to.
        on_push: called with each push of the server.
        on_change: called when the connection came up or went down.
    """

    def __init__(
        self,
        locate: Callable[[], Awaitable[Endpoint]],
        options: ConnectionOptions,
        *,
        must_be_master: bool = False,
        in_cluster: bool = False,
        subscribe: str | None = None,
        on_push: Callable[[list[Any]], None] | None = None,
        on_change: Callable[[Connection], None] | None = None,
    ) -> None:
        super().__init__(options)
        self.loads: dict[str, float] = {}
        """When each script was last loaded here, monotonic s."""
        self.loaded: set[str] = set()
        """Scripts that this connection has loaded before they were used."""
        self.refuses_load = False
        """Whether the server refuses SCRIPT LOAD: by an ACL, or because the command was renamed."""
        self.session = 0
        """Number of times that it was connected."""
        self._locate = locate
        self._must_be_master = must_be_master
        self._in_cluster = in_cluster
        self._subscribe = subscribe
        self._on_push = on_push
        self._on_change = on_change
        self._subscribing: asyncio.Future[None] | None = None
        self._failed_attempts = 0
        self._disconnected = asyncio.Event()
        self._connected = asyncio.Event()
        self._reconnecting = SUPERVISOR.start("redis_connection", self._keep_connected)
        self._reconnecting.add_done_callback(self._ended)

    def __repr__(self) -> str:
        return f"<Connection {self.endpoint} {'up' if self.up else 'down'}, {len(self._pending)} in flight>"

    async def wait_up(self, timeout_s: float) -> bool:
        """Wait until it is connected.

        Returns:
            Whether it is.
        """
        if not self.up:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._connected.wait(), timeout_s)
        return self.up

    def drop(self, why: str) -> None:
        """Drop the present connection; a new one is made.

        Args:
            why: for the errors of pending commands, and the log.
        """
        self._note_failure(why)
        if self._transport is not None:
            self._transport.abort()
        self._down()

    async def close(self) -> None:
        """Close it for good."""
        await stop(self._reconnecting)
        self.drop("closed")

    def _ended(self, _: asyncio.Task[None]) -> None:
        """Its loop ends, with all tasks cancelled and without a call of `close`: the socket must not stay open."""
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        # uvloop's transports have its interface but do not derive from asyncio.Transport.
        self._transport = cast("asyncio.Transport", transport)

    def _pushed(self, push: list[Any]) -> None:
        if self._subscribing is not None and push[0] == b"subscribe" and not self._subscribing.done():
            self._subscribing.set_result(None)
        if self._on_push is not None:
            self._on_push(push)

    def _unexpected_reply(self, reply: Any) -> None:
        # A subscription is confirmed by a push and refused by an error reply without a command.
        if self._subscribing is None or not isinstance(reply, hiredis.ReplyError):
            raise hiredis.ProtocolError("a reply without a command")
        if not self._subscribing.done():
            self._subscribing.set_exception(
                StoreUnavailable(
                    f"Redis at {self.endpoint} refused SUBSCRIBE {self._subscribe}: {reply}; grant the user +subscribe and "
                    f"&{self._subscribe}",
                    reason="refused",
                )
            )

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        if self.up or self._pending:
            self._note_failure(str(exc) if exc else "the server closed the connection")
        self._down()

    # Connecting and reconnecting.

    def _down(self) -> None:
        was_up = self.up
        self.up = False
        self._connected.clear()
        self.loads.clear()
        self.loaded.clear()
        self.refuses_load = False
        self._abandon(() if self._subscribing is None else (self._subscribing,))
        self._disconnected.set()
        if was_up and self._on_change is not None:
            self._on_change(self)

    async def _keep_connected(self) -> None:
        if self._transport is not None:
            self.drop("restarted")  # left by a run that failed
            # Its connection_lost comes in a later iteration of the loop and must not be mistaken for that of the next connection.
            await asyncio.sleep(_MIN_BACKOFF_S)
        while True:
            self._disconnected.clear()
            quiet = logging.DEBUG if self._failed_attempts else logging.WARNING
            try:
                async with asyncio.timeout(max(_CONNECT_S, 4 * self._options.timeout_s)):
                    await self._connect()
            except (OSError, StoreUnavailable, TimeoutError, UnicodeError) as error:
                # UnicodeError: from a host name, given by a node or a sentinel, that the resolver does not accept.
                why = getattr(error, "message", None) or str(error) or "no answer in time"
                logger.log(quiet, "connection to Redis at %s failed: %s", self.endpoint, why, extra=self._log_fields)
                self.drop(why)
            except Exception as error:
                # The supervisor restarts this task; a half-open connection must not go on calling this protocol.
                self.drop(f"unhandled exception while connecting: {type(error).__name__}")
                raise
            else:
                if self._failed_attempts:
                    logger.log(logging.INFO, "reconnected to Redis at %s", self.endpoint, extra=self._log_fields)
                up_since = self._loop.time()
                await self._disconnected.wait()
                if self._loop.time() - up_since >= STABLE_AFTER_S:
                    self._failed_attempts, quiet = 0, logging.WARNING
                logger.log(quiet, "connection to Redis at %s lost: %s", self.endpoint, self.down_reason, extra=self._log_fields)
            # Jittered, so that many instances do not reconnect at once. Only a connection that lasted resets the backoff: a
            # server that accepts, answers HELLO and closes would else be retried in a tight loop.
            pause_s = min(_MIN_BACKOFF_S * 2**self._failed_attempts, _MAX_BACKOFF_S)
            self._failed_attempts = min(self._failed_attempts + 1, 10)
            await asyncio.sleep(pause_s * JITTER.uniform(0.5, 1.0))

    @property
    def _log_fields(self) -> dict[str, dict[str, str]]:
        """Fields of log lines about this connection."""
        return {"ecs": {"server.address": str(self.endpoint)}}

    async def _connect(self) -> None:
        options = self._options
        self.endpoint = endpoint = await self._locate()
        self._reader = new_reader()
        if endpoint.path:
            await self._loop.create_unix_connection(lambda: self, endpoint.path)
        else:
            await self._loop.create_connection(lambda: self, endpoint.host, endpoint.port, ssl=options.tls)
        hello = ["HELLO", "3"]
        if options.credentials.password or options.credentials.username:
            hello += ["AUTH", options.credentials.username or "default", options.credentials.password]
        hello += ["SETNAME", options.name]
        sent = [self._enqueue(encode_command(*hello))]
        if options.db:
            sent.append(self._enqueue(encode_command("SELECT", str(options.db))))
        if self._must_be_master:
            sent.append(self._enqueue(encode_command("ROLE")))
        replies = [await reply_whenever(future) for future in sent]
        for reply in replies:
            if isinstance(reply, hiredis.ReplyError):
                raise StoreUnavailable(f"Redis at {endpoint} refused the connection: {reply}", reason="refused")
        clustered = isinstance(replies[0], dict) and replies[0].get(b"mode") == b"cluster"
        if clustered is not self._in_cluster:
            remedy = (
                "is a cluster node: use redis+cluster://"
                if clustered
                else "is not a cluster node: use redis:// in place of redis+cluster://"
            )
            raise StoreUnavailable(f"Redis at {endpoint} {remedy} in counters.url", reason="refused")
        if self._must_be_master:
            role = replies[-1][0] if isinstance(replies[-1], list) and replies[-1] else None
            if role != b"master":
                named = role.decode(errors="replace") if isinstance(role, bytes) else f"server whose role is {role!r:.40}"
                raise StoreUnavailable(f"Redis at {endpoint} is a {named}, not the master", reason="not_master")
        if self._subscribe is not None and self._transport is not None:
            # Its confirmation is a push, not a reply: it is not enqueued as a command.
            self._subscribing = self._loop.create_future()
            self._transport.write(encode_command("SUBSCRIBE", self._subscribe))
            try:
                await self._subscribing
            finally:
                self._subscribing = None
        if self._transport is None:
            raise StoreUnavailable(f"Redis at {endpoint} closed the connection", reason="disconnected")
        self.up = True
        self.session += 1
        self._connected.set()
        if self._on_change is not None:
            self._on_change(self)
