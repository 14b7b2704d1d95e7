"""Commands to one Redis server on one connection, and the matching of its replies.

All commands sent within one iteration of the event loop go out in one write; replies are matched in the order of the commands. A
command without a reply within the timeout fails with `LateAnswer`; its caller can still have the reply when it comes. At most
`max_in_flight` commands are unanswered at once, those past their deadline included: a server that stopped reading cannot make
the process grow. A server whose replies are overdue and that is silent for `STALL_S` is disconnected: it hangs, or its replies
no longer match. One that goes on answering is slow: it is disconnected only when a reply is `MAX_LATE` times as late.

A forged array header can make the parser reserve 8 bytes of address space for each announced element, at most 32 GiB; memory is
used only for elements that arrive. Where the reservation fails, that is a protocol error and the connection is dropped.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import ssl
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable
from typing import Any, Final

import hiredis
import msgspec

from tidegate.counters import LateAnswer
from tidegate.counters.redis.resp import encode_command
from tidegate.counters.redis.url import Credentials, Endpoint
from tidegate.errors import StoreUnavailable

RECONNECT_GRACE_S: Final = 0.3
"""For so long after a connection is lost, s, all calls that fail for want of it count as one failure."""
STALL_S: Final = 1.0
MAX_LATE: Final = 2
"""How many times `STALL_S` a reply may be late while others come."""
_TICK_S: Final = 0.001
_LOOP_DELAY_S: Final = 0.010
_VERIFY_INTERVAL_S: Final = 0.1
"""Interval of the check that late replies belong to our commands, s."""
_EVENTS: Final = itertools.count(1)
_Push: Final = hiredis.PushNotification
_INCOMPLETE: Final = object()
"""What the parser returns while a reply is incomplete. Its default, False, is also a RESP3 value."""


class ConnectionOptions(msgspec.Struct, frozen=True):
    """Options common to all connections of a store.

    Args:
        timeout_s: deadline of a command, s.
        max_in_flight: most unanswered commands, those past their deadline included.
        credentials: user and password.
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


class Pipeline(asyncio.Protocol):
    """The commands in flight on one connection; a subclass connects it."""

    def __init__(self, options: ConnectionOptions) -> None:
        self.endpoint = Endpoint()
        self.up = False
        self.down_reason = "not connected yet"
        self.event = next(_EVENTS)
        """Identifies the last failure: calls that fail because of it count as one, however many they are."""
        self._options = options
        self._max_in_flight = options.max_in_flight
        self._loop = asyncio.get_running_loop()
        self._down_at = self._loop.time()
        self._transport: asyncio.Transport | None = None
        self._reader = new_reader()
        self._out: list[bytes] = []
        self._pending: deque[asyncio.Future[Any]] = deque()
        self._sent = self._answered = self._given_up = 0
        self._marks: deque[tuple[float, int]] = deque()
        self._tick: asyncio.TimerHandle | None = None
        self._tick_due = 0.0
        self._postponed = False
        self._tick_s = min(_TICK_S, options.timeout_s / 20)
        self._stall_s = max(STALL_S, 4 * options.timeout_s)
        self._overdue: deque[tuple[float, int]] = deque()
        self._late_replies: deque[asyncio.Future[Any] | None] = deque()
        """One for each command past its deadline and without a reply; these are always the first ones in `_pending`."""
        self._answered_before = 0
        self._last_answer = 0.0
        self._verified_at = 0.0

    @property
    def in_flight(self) -> int:
        """Commands without a reply, those past their deadline included."""
        return len(self._pending)

    def send(self, command: bytes) -> asyncio.Future[Any]:
        """Send a command.

        Args:
            command: one command in RESP.

        Returns:
            The future reply; an error of the server comes as a `hiredis.ReplyError`, not raised. Fails with `LateAnswer` when
            the timeout passes, and with `StoreUnavailable` when the connection is lost.

        Raises:
            StoreUnavailable: at once, while the server cannot be reached or `max_in_flight` commands are unanswered.
        """
        if not self.up:
            raise StoreUnavailable(
                f"Redis at {self.endpoint} cannot be reached: {self.down_reason}",
                reason="disconnected",
                # All calls that one lost connection fails are one failure; where it does not come back soon, each call is one.
                event=self.event if self._loop.time() - self._down_at < RECONNECT_GRACE_S else None,
                shard=str(self.endpoint),
            )
        if len(self._pending) >= self._max_in_flight:
            raise StoreUnavailable(
                f"Redis at {self.endpoint} has {len(self._pending)} unanswered commands, the most allowed: it is slower than the "
                "load (counters.max_in_flight)",
                reason="overload",
                shard=str(self.endpoint),
            )
        return self._enqueue(command)

    async def send_and_wait(self, command: bytes) -> Any:
        """Send a command and wait for its reply, also past the timeout: for commands that no check waits for.

        Args:
            command: one command in RESP.

        Raises:
            StoreUnavailable: if the connection is lost first, as it is when replies are overdue for too long.
        """
        return await reply_whenever(self.send(command))

    def _enqueue(self, command: bytes) -> asyncio.Future[Any]:
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

    @abstractmethod
    def drop(self, why: str) -> None:
        """Drop the present connection.

        Args:
            why: for the errors of pending commands, and the log.
        """

    @abstractmethod
    def _pushed(self, push: list[Any]) -> None:
        """Handle a push of the server."""

    @abstractmethod
    def _unexpected_reply(self, reply: Any) -> None:
        """Handle a reply without a command; raises `hiredis.ProtocolError` where it is not valid."""

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        reader, pending = self._reader, self._pending
        next_reply = reader.gets
        try:
            reader.feed(data)
            while (reply := next_reply()) is not _INCOMPLETE:
                if type(reply) is _Push:
                    self._pushed(reply)
                    if self._pending is not pending:
                        return  # `on_push` dropped the connection: the rest of the data is void
                elif pending:
                    future = pending.popleft()
                    self._answered += 1
                    if not future.done():
                        future.set_result(reply)
                    elif self._answered <= self._given_up:
                        late = self._late_replies.popleft()
                        if late is not None and not late.done():
                            late.set_result(reply)
                else:
                    self._unexpected_reply(reply)
        except (hiredis.ProtocolError, MemoryError) as error:
            # The replies that follow cannot be matched any more: one might go to the wrong command.
            self.drop(f"protocol error: {str(error) or 'a reply announces more elements than fit in memory'}")

    def flush(self) -> None:
        """Write at once what was enqueued: in a loop that ends there is no next turn."""
        self._flush()

    def _flush(self) -> None:
        out = self._out
        self._out = []
        if self._transport is not None and out:
            self._transport.write(b"".join(out))

    # Deadlines: marks in the stream of commands. A timer for each command would cost more than the command itself.

    def _arm(self, now: float) -> None:
        self._tick_due = now + self._tick_s
        self._tick = self._loop.call_at(self._tick_due, self._ticked)

    def _ticked(self) -> None:
        now = self._loop.time()
        self._marks.append((now, self._sent))
        # After a delay of the loop itself replies may be unread in the socket: they are read once before any command times out.
        self._postponed = now - self._tick_due > _LOOP_DELAY_S and not self._postponed
        if not self._postponed:
            overdue = now - self._options.timeout_s
            while self._marks and self._marks[0][0] <= overdue:
                mark = self._marks.popleft()
                self._give_up(mark[1])
                self._overdue.append(mark)
        while self._overdue and self._overdue[0][1] <= self._answered:
            self._overdue.popleft()
        if not self._pending:
            self._tick = None
            self._marks.clear()
            self._overdue.clear()
            return
        if self._answered_before != self._answered:
            self._answered_before, self._last_answer = self._answered, now
        if self._overdue and not self._postponed:
            overdue_s = now - self._overdue[0][0]
            if min(overdue_s, now - self._last_answer) > self._stall_s or overdue_s > MAX_LATE * self._stall_s:
                self.drop(f"a reply was overdue for {overdue_s:.3g} s")
                self._tick = None
                return
            if self.up and now - self._verified_at > _VERIFY_INTERVAL_S:
                self._verified_at = now
                self._verify_order()
        self._arm(now)

    def _verify_order(self) -> None:
        """Send a PING with a nonce: late replies are used, so they must not belong to other commands."""
        nonce = secrets.token_hex(4).encode()
        ping = self._enqueue(encode_command("PING", nonce))

        def check(done: asyncio.Future[Any]) -> None:
            error = None if done.cancelled() else done.exception()
            if isinstance(error, LateAnswer):
                error.answer.add_done_callback(check)
            elif error is None and not done.cancelled() and done.result() != nonce and self.up:
                self.drop("its replies do not match the commands sent")

        ping.add_done_callback(check)

    def _give_up(self, sent: int) -> None:
        """Fail the open commands up to a place in the stream; their replies are still expected in order."""
        first = max(self._given_up - self._answered, 0)
        last = sent - self._answered
        if last > first:
            message = f"Redis at {self.endpoint} did not answer within {self._options.timeout_s * 1000:g} ms"
            shard = str(self.endpoint)
            for future in itertools.islice(self._pending, first, last):
                if future.done():
                    self._late_replies.append(None)
                    continue
                late = self._loop.create_future()
                self._late_replies.append(late)
                future.set_exception(LateAnswer(message, late, shard=shard))
                future.exception()  # marks it as retrieved: the caller may have been cancelled
        self._given_up = max(self._given_up, sent)

    # Losing the connection.

    def _note_failure(self, why: str) -> None:
        self.down_reason = why
        self.event = next(_EVENTS)
        self._down_at = self._loop.time()

    def _abandon(self, others: Iterable[asyncio.Future[None]]) -> None:
        """Fail all commands, and other futures, with the reason of the lost connection; begin anew."""
        self._transport = None
        self._out = []
        self._marks.clear()
        self._overdue.clear()
        pending, self._pending = self._pending, deque()
        late, self._late_replies = self._late_replies, deque()
        self._sent = self._answered = self._given_up = 0
        waiting = [future for future in itertools.chain(pending, late, others) if future is not None and not future.done()]
        if waiting:
            error = StoreUnavailable(
                f"connection to Redis at {self.endpoint} lost: {self.down_reason}",
                reason="disconnected",
                event=self.event,
                shard=str(self.endpoint),
            )
            for future in waiting:
                future.set_exception(error)
                future.exception()  # marks it as retrieved: the caller may have been cancelled


def new_reader() -> hiredis.Reader:
    """A parser of replies for a new connection."""
    return hiredis.Reader(notEnoughData=_INCOMPLETE)


async def reply_whenever(sent: asyncio.Future[Any]) -> Any:
    """The reply to a command, also past its timeout.

    Args:
        sent: as `Connection.send` returned it.

    Raises:
        StoreUnavailable: if the connection is lost first.
    """
    try:
        return await sent
    except LateAnswer as late:
        return await late.answer
