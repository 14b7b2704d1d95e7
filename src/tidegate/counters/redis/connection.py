"""One multiplexed connection to one Redis server.

Everything asked within one turn of the event loop goes out in one write; replies are matched in the order of the questions. A
question that is not answered within the timeout fails with `LateAnswer`; whoever asked can still have the reply when it comes. At
most `max_in_flight` questions are unanswered at once, those given up included: a server that stopped reading cannot make the
process grow. A server that owes answers and is silent for `STALL_S` is disconnected: it hangs, or what it says no longer fits
what it is asked. One that goes on answering is slow, not gone: it is disconnected only when it is `MAX_LATE` times as late. While
it cannot be reached, questions fail at once; the pauses between attempts grow until a connection has lasted for `STEADY_S`.

One event loop; any number of its tasks.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import secrets
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

import hiredis
import msgspec

from tidegate.background import SUPERVISOR, stop
from tidegate.counters import LateAnswer
from tidegate.counters.redis.resp import encode_command
from tidegate.counters.redis.url import Credentials, Endpoint
from tidegate.errors import StoreUnavailable

logger = logging.getLogger(__name__)

REPAIR_S: Final = 0.3
"""How long a lost connection may take to come back before calls that miss it count as failures of their own, s."""
STALL_S: Final = 1.0
MAX_LATE: Final = 2
"""How many times `STALL_S` an answer may be late while others come."""
STEADY_S: Final = 5.0
"""A connection that lasted so long was useful: the next loss is retried at once."""
_TICK_S: Final = 0.001
_LATE_S: Final = 0.010
_CONNECT_S: Final = 1.0
_MARK_EVERY_S: Final = 0.1
"""While answers are late, so often it is checked that they are those of our questions."""
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 2.0
_EVENTS: Final = itertools.count(1)
_Push: Final = hiredis.PushNotification
_NOTHING: Final = object()
"""What the parser gives while a reply is incomplete. Its own default, False, is also what RESP3 calls false."""


class ConnectionOptions(msgspec.Struct, frozen=True):
    """What all connections of a store have in common.

    Args:
        timeout_s: deadline of a question, s.
        max_in_flight: most unanswered questions.
        credentials: who we are.
        db: database number.
        tls: None without TLS.
        name: what the server's CLIENT LIST shows.
    """

    timeout_s: float = 0.05
    max_in_flight: int = 10_000
    credentials: Credentials = Credentials()
    db: int = 0
    tls: ssl.SSLContext | None = None
    name: str = "tidegate"


class Connection(asyncio.Protocol):
    """Keeps itself connected until it is closed.

    Args:
        locate: says where the server is, before each attempt; may raise `StoreUnavailable`.
        options: see there.
        must_be_master: refuse a server that does not say it is a master.
        in_cluster: whether the server is one of a cluster; it must say the same.
        subscribe: a channel to subscribe to; what comes goes to `on_push`.
        on_push: is given what the server says unasked.
        on_change: is told when the connection came up or went down.
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
        self.endpoint = Endpoint()
        self.up = False
        self.why_down = "it was not connected yet"
        self.event = next(_EVENTS)
        self._down_at = asyncio.get_running_loop().time()
        """Names the last thing that went wrong here: what fails by it is one failure, however many calls it meets."""
        self.loads: dict[str, float] = {}
        """When each script was last loaded here, monotonic s."""
        self.refuses_load = False
        """Whether SCRIPT LOAD is refused here: by an ACL, or because the command was renamed."""
        self._locate = locate
        self._options = options
        self._max_in_flight = options.max_in_flight
        self._must_be_master = must_be_master
        self._in_cluster = in_cluster
        self._subscribe = subscribe
        self._on_push = on_push
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reader = hiredis.Reader(notEnoughData=_NOTHING)
        self._out: list[bytes] = []
        self._pending: deque[asyncio.Future[Any]] = deque()
        self._sent = self._answered = self._given_up = 0
        self._marks: deque[tuple[float, int]] = deque()
        self._tick: asyncio.TimerHandle | None = None
        self._tick_due = 0.0
        self._waited = False
        self._tick_s = min(_TICK_S, options.timeout_s / 20)
        self._stall_s = max(STALL_S, 4 * options.timeout_s)
        self._owed: deque[tuple[float, int]] = deque()
        self._late: deque[asyncio.Future[Any] | None] = deque()
        """Of each question that was given up and is not answered yet; they are always the first ones in `_pending`."""
        self._seen_answered = 0
        self._last_answer = 0.0
        self._marked_at = 0.0
        self._subscribing: asyncio.Future[None] | None = None
        self._pauses = 0
        self._gone = asyncio.Event()
        self._came = asyncio.Event()
        self._keeping = SUPERVISOR.start("redis_connection", self._keep_connected)
        self._keeping.add_done_callback(self._ended)

    def __repr__(self) -> str:
        return f"<Connection {self.endpoint} {'up' if self.up else 'down'}, {len(self._pending)} in flight>"

    @property
    def in_flight(self) -> int:
        """Questions that the server has not answered, those given up included."""
        return len(self._pending)

    def ask(self, command: bytes) -> asyncio.Future[Any]:
        """Put a question.

        Args:
            command: one command in RESP.

        Returns:
            The reply to come; an error of the server comes as a `hiredis.ReplyError`, not raised. Fails with `LateAnswer` when
            the timeout passes, and with `StoreUnavailable` when the connection is lost.

        Raises:
            StoreUnavailable: at once, while the server cannot be reached or too many questions are open.
        """
        if not self.up:
            raise StoreUnavailable(
                f"Redis at {self.endpoint} cannot be reached: {self.why_down}",
                reason="disconnected",
                # What one broken connection takes down is one failure; where it does not come back soon, each call is one.
                event=self.event if self._loop.time() - self._down_at < REPAIR_S else None,
                shard=str(self.endpoint),
            )
        if len(self._pending) >= self._max_in_flight:
            raise StoreUnavailable(
                f"Redis at {self.endpoint} has {len(self._pending)} unanswered calls: it is slower than what is asked of it "
                "(counters.max_in_flight)",
                reason="overload",
                shard=str(self.endpoint),
            )
        return self._put(command)

    async def ask_patiently(self, command: bytes) -> Any:
        """Put a question, and wait for its reply also past the timeout: for what no check waits for.

        Args:
            command: one command in RESP.

        Returns:
            The reply.

        Raises:
            StoreUnavailable: if the connection is lost first, as it is when the server owes answers for too long.
        """
        return await patiently(self.ask(command))

    def _put(self, command: bytes) -> asyncio.Future[Any]:
        future = self._loop.create_future()
        self._pending.append(future)
        self._sent += 1
        out = self._out
        if not out:
            self._loop.call_soon(self._flush)
            if self._tick is None:
                self._arm(self._loop.time())
        out.append(command)
        return future

    async def wait_up(self, timeout_s: float) -> bool:
        """Wait until it is connected.

        Args:
            timeout_s: how long.

        Returns:
            Whether it is.
        """
        if not self.up:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._came.wait(), timeout_s)
        return self.up

    def drop(self, why: str) -> None:
        """Give up the present connection; a new one is made.

        Args:
            why: for those who wait for an answer, and the log.
        """
        self.why_down = why
        self.event = next(_EVENTS)
        self._down_at = asyncio.get_running_loop().time()
        if self._transport is not None:
            self._transport.abort()
        self._down()

    async def close(self) -> None:
        """End it for good."""
        await stop(self._keeping)
        self.drop("it was closed")

    def _ended(self, _: asyncio.Task[None]) -> None:
        """Its loop is about to end, with all tasks cancelled and nobody to call `close`: the socket must not outlive it."""
        if self._transport is not None:
            self._transport.abort()

    # The protocol's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        # uvloop's transports do not derive from asyncio.Transport, though they are all that it is.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        reader, pending = self._reader, self._pending
        next_reply = reader.gets
        try:
            reader.feed(data)
            while (reply := next_reply()) is not _NOTHING:
                if type(reply) is _Push:
                    self._pushed(reply)
                    if self._pending is not pending:
                        return  # it was dropped by who was given the push; the rest is of a connection that is no more
                elif pending:
                    future = pending.popleft()
                    self._answered += 1
                    if not future.done():
                        future.set_result(reply)
                    elif self._answered <= self._given_up:
                        late = self._late.popleft()
                        if late is not None and not late.done():
                            late.set_result(reply)
                elif self._subscribing is not None and isinstance(reply, hiredis.ReplyError):
                    # A subscription is confirmed by a push, and refused by a reply to no question.
                    self._refuse_subscription(reply)
                else:
                    raise hiredis.ProtocolError("a reply came that nobody asked for")
        except hiredis.ProtocolError as error:
            # What follows cannot be told apart any more: an answer might go to the wrong question.
            self.drop(f"it broke the protocol: {error}")

    def _pushed(self, push: list[Any]) -> None:
        if self._subscribing is not None and push[0] == b"subscribe" and not self._subscribing.done():
            self._subscribing.set_result(None)
        if self._on_push is not None:
            self._on_push(push)

    def _refuse_subscription(self, reply: hiredis.ReplyError) -> None:
        if self._subscribing is not None and not self._subscribing.done():
            self._subscribing.set_exception(
                StoreUnavailable(
                    f"Redis at {self.endpoint} refuses SUBSCRIBE {self._subscribe}: {reply}: the user needs +subscribe and "
                    f"&{self._subscribe}",
                    reason="refused",
                )
            )

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        if self.up or self._pending:
            self.why_down = str(exc) if exc else "it closed the connection"
            self.event = next(_EVENTS)
            self._down_at = asyncio.get_running_loop().time()
        self._down()

    def _flush(self) -> None:
        out = self._out
        self._out = []
        if self._transport is not None and out:
            self._transport.write(b"".join(out))

    # Deadlines: marks in the stream of questions instead of a timer for each, which would cost more than the question itself.

    def _arm(self, now: float) -> None:
        self._tick_due = now + self._tick_s
        self._tick = self._loop.call_at(self._tick_due, self._ticked)

    def _ticked(self) -> None:
        now = self._loop.time()
        self._marks.append((now, self._sent))
        # When the loop itself was held up, replies may lie unread in the socket: once they are read before anything is given up.
        self._waited = now - self._tick_due > _LATE_S and not self._waited
        if not self._waited:
            overdue = now - self._options.timeout_s
            while self._marks and self._marks[0][0] <= overdue:
                mark = self._marks.popleft()
                self._give_up(mark[1])
                self._owed.append(mark)
        while self._owed and self._owed[0][1] <= self._answered:
            self._owed.popleft()
        if not self._pending:
            self._tick = None
            self._marks.clear()
            self._owed.clear()
            return
        if self._seen_answered != self._answered:
            self._seen_answered, self._last_answer = self._answered, now
        if self._owed and not self._waited:
            owed_s = now - self._owed[0][0]
            if min(owed_s, now - self._last_answer) > self._stall_s or owed_s > MAX_LATE * self._stall_s:
                self.drop(f"it owed an answer for {owed_s:.3g} s")
                self._tick = None
                return
            if self.up and now - self._marked_at > _MARK_EVERY_S:
                self._marked_at = now
                self._mark()
        self._arm(now)

    def _mark(self) -> None:
        """Ask for something that only one answer fits: late replies are read, so they must not be those of other questions."""
        word = secrets.token_hex(4).encode()
        asked = self._put(encode_command("PING", word))

        def check(done: asyncio.Future[Any]) -> None:
            error = None if done.cancelled() else done.exception()
            if isinstance(error, LateAnswer):
                error.answer.add_done_callback(check)
            elif error is None and not done.cancelled() and done.result() != word and self.up:
                self.drop("its answers do not fit the questions")

        asked.add_done_callback(check)

    def _give_up(self, sent: int) -> None:
        """Fail the questions up to a place in the stream that are still open; their places wait for the replies."""
        first = max(self._given_up - self._answered, 0)
        last = sent - self._answered
        if last > first:
            message = f"Redis at {self.endpoint} did not answer within {self._options.timeout_s * 1000:g} ms"
            shard = str(self.endpoint)
            for future in itertools.islice(self._pending, first, last):
                if future.done():
                    self._late.append(None)
                    continue
                late = self._loop.create_future()
                self._late.append(late)
                future.set_exception(LateAnswer(message, late, shard=shard))
                future.exception()  # whoever asked may have gone
        self._given_up = max(self._given_up, sent)

    # Coming and going.

    def _down(self) -> None:
        was_up = self.up
        self.up = False
        self._came.clear()
        self._transport = None
        self._out = []
        self._marks.clear()
        self._owed.clear()
        self.loads.clear()
        self.refuses_load = False
        pending, self._pending = self._pending, deque()
        late, self._late = self._late, deque()
        self._sent = self._answered = self._given_up = 0
        subscribing = () if self._subscribing is None else (self._subscribing,)
        if pending or subscribing:
            error = StoreUnavailable(
                f"the connection to Redis at {self.endpoint} was lost: {self.why_down}",
                reason="disconnected",
                event=self.event,
                shard=str(self.endpoint),
            )
            for future in itertools.chain(pending, late, subscribing):
                if future is not None and not future.done():
                    future.set_exception(error)
                    future.exception()
        self._gone.set()
        if was_up and self._on_change is not None:
            self._on_change(self)

    async def _keep_connected(self) -> None:
        if self._transport is not None:
            self.drop("restarted")  # left behind by a run that failed
            # Its connection_lost comes in a later turn of the loop, and must not be taken for that of the next connection.
            await asyncio.sleep(_FIRST_PAUSE_S)
        while True:
            self._gone.clear()
            quiet = logging.DEBUG if self._pauses else logging.WARNING
            try:
                async with asyncio.timeout(max(_CONNECT_S, 4 * self._options.timeout_s)):
                    await self._connect()
            except (OSError, StoreUnavailable, TimeoutError, UnicodeError) as error:
                # UnicodeError: of a host that a node or a sentinel names and that no resolver takes.
                why = getattr(error, "message", None) or str(error) or "it did not answer in time"
                logger.log(quiet, "Redis at %s: %s", self.endpoint, why, extra=self._told)
                self.drop(why)
            except Exception as error:
                # The supervisor starts anew; what is half connected must not go on calling this protocol.
                self.drop(f"unhandled exception while connecting: {type(error).__name__}")
                raise
            else:
                if self._pauses:
                    logger.log(logging.INFO, "Redis at %s is connected again", self.endpoint, extra=self._told)
                up_since = self._loop.time()
                await self._gone.wait()
                if self._loop.time() - up_since >= STEADY_S:
                    self._pauses, quiet = 0, logging.WARNING
                logger.log(quiet, "connection to Redis at %s lost: %s", self.endpoint, self.why_down, extra=self._told)
            # Jittered, so that many instances do not come back at once. Only a connection that lasted shortens the next pause: a
            # server that accepts, greets and closes would be asked without end.
            pause_s = min(_FIRST_PAUSE_S * 2**self._pauses, _LONGEST_PAUSE_S)
            self._pauses = min(self._pauses + 1, 10)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))

    @property
    def _told(self) -> dict[str, dict[str, str]]:
        """What a log line about this connection says beside its text."""
        return {"ecs": {"server.address": str(self.endpoint)}}

    async def _connect(self) -> None:
        options = self._options
        self.endpoint = endpoint = await self._locate()
        self._reader = hiredis.Reader(notEnoughData=_NOTHING)
        if endpoint.path:
            await self._loop.create_unix_connection(lambda: self, endpoint.path)
        else:
            await self._loop.create_connection(lambda: self, endpoint.host, endpoint.port, ssl=options.tls)
        hello = ["HELLO", "3"]
        if options.credentials.password or options.credentials.username:
            hello += ["AUTH", options.credentials.username or "default", options.credentials.password]
        hello += ["SETNAME", options.name]
        asked = [self._put(encode_command(*hello))]
        if options.db:
            asked.append(self._put(encode_command("SELECT", str(options.db))))
        if self._must_be_master:
            asked.append(self._put(encode_command("ROLE")))
        replies = [await patiently(future) for future in asked]
        for reply in replies:
            if isinstance(reply, hiredis.ReplyError):
                raise StoreUnavailable(f"Redis at {endpoint} refuses us: {reply}", reason="refused")
        clustered = isinstance(replies[0], dict) and replies[0].get(b"mode") == b"cluster"
        if clustered is not self._in_cluster:
            remedy = (
                "is a cluster's node: write redis+cluster://"
                if clustered
                else "is no cluster: write redis:// for redis+cluster://"
            )
            raise StoreUnavailable(f"Redis at {endpoint} {remedy} in counters.url", reason="refused")
        if self._must_be_master:
            role = replies[-1][0] if isinstance(replies[-1], list) and replies[-1] else None
            if role != b"master":
                named = role.decode(errors="replace") if isinstance(role, bytes) else f"server whose role is {role!r:.40}"
                raise StoreUnavailable(f"Redis at {endpoint} is a {named}, not the master", reason="not_master")
        if self._subscribe is not None and self._transport is not None:
            # Its confirmation is a push, not a reply: no question is put.
            self._subscribing = self._loop.create_future()
            self._transport.write(encode_command("SUBSCRIBE", self._subscribe))
            try:
                await self._subscribing
            finally:
                self._subscribing = None
        if self._transport is None:
            raise StoreUnavailable(f"Redis at {endpoint} closed the connection", reason="disconnected")
        self.up = True
        self._came.set()
        if self._on_change is not None:
            self._on_change(self)


async def patiently(asked: asyncio.Future[Any]) -> Any:
    """The reply to a question, also past its timeout.

    Args:
        asked: as `Connection.ask` gave it.

    Returns:
        The reply.

    Raises:
        StoreUnavailable: if the connection is lost first.
    """
    try:
        return await asked
    except LateAnswer as late:
        return await late.answer
