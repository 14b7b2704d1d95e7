"""Notifications of one process: finds events, writes them to the queue in the database, and delivers what it claims there."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from tidegate.catalog.sql.database import Database
from tidegate.counters.crossings import Crossing, CrossingWatch
from tidegate.errors import CatalogUnavailable, PolicyError, TidegateError
from tidegate.jitter import JITTER
from tidegate.notifications.delivery import GONE, Attempt, in_daemon_thread, post
from tidegate.notifications.events import Event, crossing_key, threshold_event
from tidegate.notifications.sources import LOOK_BACK_S, AuditedChanges, ExpiredKeys
from tidegate.notifications.storage import MAX_ROWS, add_rows, claim, delete_old, finish
from tidegate.policy.notify import EventType, NotifyTarget, percents_of, require_secrets, secret_of
from tidegate.timestamps import US_PER_S, now_us

logger = logging.getLogger(__name__)

MAX_QUEUE: Final = 10_000
"""Most rows of one process that wait to be written to the database."""
MAX_RECENT: Final = 100_000
"""Most crossings that a process remembers, so that it does not report them again."""
DELIVERIES: Final = 8
"""Most deliveries of one process at a time."""
MAX_RETRY_S: Final = 3600.0
MAX_PAUSE_S: Final = 300.0
FLUSH_S: Final = 1.0

_POLL_S: Final = 1.0
_SCAN_S: Final = 5.0
_PURGE_S: Final = 3600.0
_CLAIM_MARGIN_S: Final = 30.0
_REASONS: Final = ("delivered", "retried", "failed", "dropped")


class NotifierOptions(msgspec.Struct, frozen=True):
    """Options of notifications.

    Args:
        retry_s: pause before the second attempt, s; it doubles from attempt to attempt, up to an hour.
        give_up_s: for how long delivery is attempted, s.
        timeout_s: of connecting, and of each read and write, s.
        max_pending: most rows in the database that wait for delivery.
        keep_days: how long rows of delivered and failed notifications are kept, days.
    """

    retry_s: float = 5.0
    give_up_s: float = 86_400.0
    timeout_s: float = 10.0
    max_pending: int = 100_000
    keep_days: int = 30


class Notifier:
    """Finds events and delivers them. For use in one event loop.

    Args:
        read_targets: returns the tables `[[notify]]` of the active policy.
        watch: receives what finds crossings in the counter store, None to stop; called when targets change.

    Attributes:
        counts: notifications of this process by result: delivered, attempts to be retried, failed for good, and dropped because
            a queue was full.
        failing: whether the last write to the database failed.
        when_needed: callback run once, when there are targets for the first time.
    """

    def __init__(
        self,
        database: Database,
        read_targets: Callable[[], Awaitable[Sequence[NotifyTarget]]],
        watch: Callable[[CrossingWatch | None], None],
        options: NotifierOptions | None = None,
    ) -> None:
        self.counts = dict.fromkeys(_REASONS, 0)
        self.failing = False
        self.when_needed: Callable[[], None] | None = None
        self._reason = ""
        self._database = database
        self._read_targets = read_targets
        self._watch = watch
        self._options = options or NotifierOptions()
        self._targets: tuple[NotifyTarget, ...] = ()
        self._queue: dict[str, dict[str, Any]] = {}
        self._recent: dict[tuple[str | int, ...], None] = {}
        self._queued = asyncio.Event()
        self._pauses: dict[str, tuple[float, float]] = {}
        """By URL that did not answer: the pause, s, and its end by the clock of the event loop."""
        self._sending = 0
        # Only the first look goes back: of a new [[notify]], later ones must not send what happened before.
        self._since_us: int | None = now_us() - LOOK_BACK_S * US_PER_S
        self._expired: ExpiredKeys | None = None
        self._audited: AuditedChanges | None = None

    @property
    def pending(self) -> int:
        """Rows that wait to be written to the database."""
        return len(self._queue)

    async def load_targets(self) -> None:
        """Read the targets, and watch the counters for their thresholds.

        Raises:
            CatalogUnavailable: if they cannot be read; the last ones stay active.
        """
        targets = tuple(await self._read_targets())
        if targets == self._targets:
            return
        self._targets = targets
        needed, self.when_needed = self.when_needed, None
        if needed is not None:
            needed()
        watched = any(EventType.THRESHOLD in target.events for target in targets)
        self._watch(CrossingWatch(functools.partial(percents_of, targets), self.crossed) if watched else None)

    def crossed(self, crossing: Crossing) -> None:
        """Queue the event of a crossing, unless this process has done so. Costs 2 µs if it has.

        Args:
            crossing: as the counter store found it.
        """
        key = crossing_key(crossing)
        if key in self._recent:
            return
        event = threshold_event(crossing)
        wanted = [target for target in self._targets if crossing.percent in target.percents_of(crossing.limits, crossing.limit)]
        if not self._enqueue(event, wanted):
            return
        if len(self._recent) >= MAX_RECENT:
            # The oldest half: the database still knows them.
            for old in list(self._recent)[: MAX_RECENT // 2]:
                del self._recent[old]
        self._recent[key] = None
        self._queued.set()

    def _enqueue(self, event: Event, targets: Sequence[NotifyTarget]) -> bool:
        rows = event.rows(targets, now_us(), round(self._options.give_up_s * US_PER_S))
        if len(self._queue) + len(rows) > MAX_QUEUE:
            self._drop(len(rows))
            return False
        self._queue.update((row["id"], row) for row in rows)
        return True

    def _drop(self, count: int) -> None:
        if not self.counts["dropped"]:
            logger.error(
                "notifications dropped because too many wait; raise [notifications] max_pending, or notify for fewer limits: see "
                "rate_limiter_notifications_total"
            )
        self.counts["dropped"] += count

    # Writing.

    async def write(self) -> None:
        """Find events and write them, until cancelled."""
        clock = asyncio.get_running_loop().time
        scan_at = purge_at = clock()
        while True:
            try:
                await self.load_targets()
                if clock() >= scan_at:
                    scan_at = clock() + _SCAN_S * JITTER.uniform(0.8, 1.2)
                    await self.scan()
                await self.flush()
                if self._targets and clock() >= purge_at:
                    purge_at = clock() + _PURGE_S * JITTER.uniform(0.8, 1.2)
                    await delete_old(self._database, now_us() - self._options.keep_days * 86_400 * US_PER_S)
                self._succeeded()
            except TidegateError as error:
                self._failed(error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._queued.wait(), _POLL_S * JITTER.uniform(0.8, 1.2))
                # What crosses together is written together.
                await asyncio.sleep(0.05)
            if self.failing:
                await asyncio.sleep(_POLL_S)
            self._queued.clear()

    async def scan(self) -> None:
        """Queue the events of API keys and blocks since the last call.

        Raises:
            CatalogUnavailable: if the database does not answer.
        """
        found: list[Event] = []
        since_us, self._since_us = self._since_us or now_us(), None
        if not self._wants(EventType.KEY_EXPIRED):
            self._expired = None
        else:
            self._expired = self._expired or ExpiredKeys(self._database, since_us)
            found += await self._expired.read(now_us())
        if not self._wants(EventType.KEY_REVOKED) and not self._wants(EventType.BLOCKED):
            self._audited = None
        else:
            self._audited = self._audited or AuditedChanges(self._database, since_us)
            found += await self._audited.read()
        for event in found:
            self._enqueue(event, [target for target in self._targets if target.wants(event.type, event.tier)])

    def _wants(self, event: EventType) -> bool:
        return any(event in target.events for target in self._targets)

    async def flush(self) -> None:
        """Write what is queued.

        Raises:
            CatalogUnavailable: if the database does not answer; nothing is lost.
        """
        while self._queue:
            rows = [row for row, _ in zip(self._queue.values(), range(MAX_ROWS), strict=False)]
            dropped = await add_rows(self._database, rows, self._options.max_pending)
            for row in rows:
                self._queue.pop(row["id"], None)
            if dropped:
                self._drop(dropped)

    async def flush_at_end(self) -> None:
        """Write what is queued, at the end of the process, within `FLUSH_S`; logs what is lost."""
        try:
            async with asyncio.timeout(FLUSH_S):
                await self.flush()
        except (TimeoutError, TidegateError):
            logger.warning("%d notifications were not written to the database and are lost with this process", self.pending)

    async def ping(self) -> None:
        """For `/health`.

        Raises:
            PolicyError: if the secret of a target is not there.
            CatalogUnavailable: if the last write failed.
        """
        if self.failing:
            raise CatalogUnavailable(f"notifications are not written to the database, they wait in memory: {self._reason}")
        require_secrets(self._targets)

    def _failed(self, error: TidegateError) -> None:
        self._reason = error.message
        if not self.failing:
            logger.warning("notifications are not written to the database, they wait in memory: %s", error.message)
        self.failing = True

    def _succeeded(self) -> None:
        if self.failing:
            logger.info("writing notifications works again")
        self.failing = False

    # Delivery.

    async def deliver(self) -> None:
        """Claim rows and deliver them, until cancelled."""
        while True:
            delivered = 0
            if self._targets:
                try:
                    delivered = await self.deliver_due()
                except TidegateError as error:
                    logger.debug("no notifications claimed: %s", error.message)
            if not delivered:
                await asyncio.sleep(_POLL_S * JITTER.uniform(0.5, 1.0))

    async def deliver_due(self) -> int:
        """Claim some rows that are due and deliver them.

        Returns:
            How many were claimed.

        Raises:
            CatalogUnavailable: if the database does not answer.
        """
        loop = asyncio.get_running_loop()
        paused = [url for url, (_, ends_at) in self._pauses.items() if ends_at > loop.time()]
        # A thread that a receiver keeps waiting counts as long as it runs.
        free = DELIVERIES - self._sending
        if free < 1:
            return 0
        now = now_us()
        until = now + round((self._options.timeout_s * 2 + _CLAIM_MARGIN_S) * US_PER_S)
        rows = await claim(self._database, now, until, free, paused)
        await asyncio.gather(*(self._deliver(row) for row in rows))
        return len(rows)

    async def _deliver(self, row: Mapping[str, Any]) -> None:
        attempt, final = await self._attempt(row)
        now = now_us()
        next_at_us: int | None = None
        if not attempt.delivered and not final:
            next_at_us = now + round(self._pause_s(row["attempts"]) * US_PER_S)
            if next_at_us > row["give_up_at_us"]:
                next_at_us = None
        try:
            await finish(self._database, row, attempt, now, next_at_us)
        except TidegateError as error:
            logger.warning("result of a delivery not stored, it is repeated with the same id: %s", error.message)
        if attempt.delivered:
            self.counts["delivered"] += 1
        elif next_at_us is not None:
            self.counts["retried"] += 1
        else:
            self.counts["failed"] += 1
            logger.error("notification %s was not delivered to %s: %s", row["id"], row["url"], attempt.error)

    async def _attempt(self, row: Mapping[str, Any]) -> tuple[Attempt, bool]:
        """Send a row. Returns the result, and whether a failure is final."""
        url = row["url"]
        target = next((each for each in self._targets if each.url == url), None)
        if target is None:
            with contextlib.suppress(TidegateError):
                await self.load_targets()
            target = next((each for each in self._targets if each.url == url), None)
            if target is None:
                return Attempt(None, "the policy has no [[notify]] with this url any more"), True
        try:
            key = secret_of(target.secret)
        except PolicyError as error:
            return Attempt(None, error.reason[:300]), False
        timeout_s, body = self._options.timeout_s, row["body"].encode()

        def send() -> Attempt:
            return post(url, key, row["id"], now_us() // US_PER_S, body, timeout_s)

        self._sending += 1
        sent = asyncio.ensure_future(in_daemon_thread(send))
        sent.add_done_callback(self._sent)
        try:
            # The time-out of `post` is one of each read and write: a receiver that sends a byte at a time would take longer.
            attempt = await asyncio.wait_for(asyncio.shield(sent), 2 * timeout_s)
        except TimeoutError:
            attempt = Attempt(None, "the receiver did not answer in time")
        except Exception as error:  # noqa: BLE001 - whatever a receiver causes must not end the delivery of others
            attempt = Attempt(None, f"sending failed: {type(error).__name__}")
        self._note_answer(url, attempt)
        return attempt, attempt.answer == GONE

    def _sent(self, sent: asyncio.Future[Attempt]) -> None:
        self._sending -= 1
        if not sent.cancelled():
            sent.exception()

    def _note_answer(self, url: str, attempt: Attempt) -> None:
        """Pause a URL that fails: the others would wait for its time-outs."""
        if attempt.delivered:
            self._pauses.pop(url, None)
            return
        pause_s, ends_at = self._pauses.get(url, (0.0, 0.0))
        now = asyncio.get_running_loop().time()
        if now >= ends_at:
            pause_s = min(max(2 * pause_s, self._options.retry_s), MAX_PAUSE_S)
            self._pauses[url] = (pause_s, now + pause_s * JITTER.uniform(0.5, 1.0))

    def _pause_s(self, attempts: int) -> float:
        """The pause after so many attempts, s."""
        return min(self._options.retry_s * 2.0 ** min(attempts - 1, 30), MAX_RETRY_S) * JITTER.uniform(0.8, 1.2)
