"""A stack under load: what a drill does to it, when, and how the instances themselves say that they are."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Final, NamedTuple, Self, TypeVar

from tests.servers.ports import HOST

from drills.check_load import LOOSE, CheckLoad
from drills.figures import admitted_of, bucket_percentile_ms, uncounted
from drills.stack import Stack

T = TypeVar("T")
WARM_S: Final = 1.5
"""The first connections and scripts are not part of any figure."""
LOOK_EVERY_S: Final = 0.25
LOOK_WITHIN_S: Final = 2.0
SETTLE_S: Final = 45.0
_LEASED: Final = "rate_limiter_lease_decisions_total"


class Look(NamedTuple):
    """What the instances said of themselves at one moment.

    Args:
        at_s: since the start of the load.
        open_breakers: of each instance; None for one that did not answer.
        owed: counters to be put back, all instances together.
        latencies: how many checks took the instances no longer than so many s, all of them together, since they were started.
        leased: checks decided from leases since the instances were started.
        fallbacks: checks decided without Redis since then, by reason.
    """

    at_s: float
    open_breakers: tuple[int | None, ...]
    owed: int
    latencies: Mapping[float, int]
    leased: int = 0
    fallbacks: Mapping[str, int] = MappingProxyType({})


class Mark(NamedTuple):
    """Something that happened.

    Args:
        at_s: since the start of the load.
    """

    at_s: float
    what: str


class Running:
    """Load on a stack; an asynchronous context manager that begins it and ends it.

    Args:
        stack: that runs.
        rate: checks a second.
        subjects: how many addresses take turns.

    Attributes:
        load: what clients saw.
        marks: what happened.
        looks: what the instances said.
        ended_s: when the load ended, s since the start.
    """

    def __init__(self, stack: Stack, rate: float, subjects: int) -> None:
        self.stack = stack
        self.load = CheckLoad(stack.url, rate, subjects)
        self.marks: list[Mark] = []
        self.looks: list[Look] = []
        self.ended_s = 0.0
        self._until = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._started = time.monotonic()
        self._asking = asyncio.create_task(self.load.run(self._until))
        self._looking = asyncio.create_task(self._look_on())
        await self.rest(WARM_S)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.ended_s = self.now_s
        self._until.set()
        await self._asking
        await self._looking

    @property
    def now_s(self) -> float:
        """Since the start of the load."""
        return time.monotonic() - self._started

    async def rest(self, seconds: float) -> None:
        """Let the load go on.

        Args:
            seconds: how long.
        """
        await asyncio.sleep(seconds)

    def mark(self, what: str) -> float:
        """Note that something happens now.

        Returns:
            When, s since the start.
        """
        self.marks.append(Mark(self.now_s, what))
        print(f"  {self.now_s:6.1f} s  {what}", flush=True)
        return self.marks[-1].at_s

    async def until(self, holds: Callable[[], bool], timeout_s: float, what: str, every_s: float = 0.05) -> float:
        """Ask servers again and again, in a thread, and mark when something holds.

        Args:
            holds: may block; an `OSError` is a no.
            timeout_s: for how long.
            what: is marked.
            every_s: how often.

        Returns:
            When, s since the start.

        Raises:
            TimeoutError: if it does not hold in time.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                if await asyncio.to_thread(holds):
                    return self.mark(what)
            except OSError:
                pass  # a server that is away answers no question; asked again
            await asyncio.sleep(every_s)
        raise TimeoutError(f"{what}: not within {timeout_s:g} s")

    def breakers_open(self, wanted: int) -> bool:
        """Whether so many instances leave a shard alone, as they said last.

        Args:
            wanted: how many instances.
        """
        return bool(self.looks) and sum(1 for each in self.looks[-1].open_breakers if each) == wanted

    def first_look_s(self, holds: Callable[[Look], bool], since_s: float) -> float | None:
        """When the instances first said something.

        Args:
            since_s: from when on, s since the start.

        Returns:
            s since the start; None where they never did.
        """
        return next((look.at_s for look in self.looks if look.at_s >= since_s and holds(look)), None)

    def own_percentile_ms(self, quantile: float, since_s: float, until_s: float) -> float:
        """A quantile of how long checks took the instances, from their arrival at the gate to the decision.

        Balancer, network and the client, which share the machine with all else here, are not in it.

        Args:
            quantile: 0 to 1.
            since_s: checks after the first look from here on, s since the start.
            until_s: checks before the last look up to here.

        Returns:
            ms, as good as the histogram's buckets; 0 where there was no check.
        """
        # One that did not answer is missing in the sums.
        looks = [look for look in self.looks if since_s <= look.at_s <= until_s and None not in look.open_breakers]
        if not looks:
            return 0.0
        first, last = looks[0].latencies, looks[-1].latencies
        return bucket_percentile_ms({bound: count - first.get(bound, 0) for bound, count in last.items()}, quantile)

    async def books(self) -> Books:
        """After the load: wait, 45 s at most, until nothing is owed, and compare what was admitted to what Redis counted."""
        deadline = time.monotonic() + SETTLE_S
        while (owed := (await self._look()).owed) and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_EVERY_S)
        counted = await asyncio.to_thread(self.load.counted, self.stack.instances[0].url)
        admitted = admitted_of(self.load.seen, LOOSE)
        return Books(sum(admitted.values()), uncounted(admitted, counted), uncounted(counted, admitted), owed)

    async def _look_on(self) -> None:
        while not self._until.is_set():
            self.looks.append(await self._look())
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look(self) -> Look:
        pages = await asyncio.gather(*(_metrics(each.port) for each in self.stack.instances))
        answered = [page for page in pages if page is not None]
        return Look(
            self.now_s,
            tuple(None if page is None else _gauge(page, "rate_limiter_breakers_open") for page in pages),
            sum(_gauge(page, "rate_limiter_counters_owed") for page in answered),
            _buckets(answered),
            # Without leases there is no such metric.
            sum(_gauge(page, _LEASED) for page in answered if f"\n{_LEASED} " in page),
            _fallbacks(answered),
        )


class Books(NamedTuple):
    """What was admitted under the loose rule, and what Redis has counted of it.

    Args:
        admitted: units.
        uncounted: of them, those that Redis does not know.
        counted_twice: units that Redis counted and no client received: answers that came too late, debts paid again.
        owed: counters, of all rules, that were not put back in time.
    """

    admitted: int
    uncounted: int
    counted_twice: int
    owed: int


async def in_thread(act: Callable[[], T]) -> T:
    """Servers are controlled by blocking calls, which must not delay the load.

    Args:
        act: what is done.
    """
    return await asyncio.to_thread(act)


async def _metrics(port: int) -> str | None:
    # By hand: an HTTP library takes 10 ms for three of these, and the load waits meanwhile.
    try:
        async with asyncio.timeout(LOOK_WITHIN_S):
            reader, writer = await asyncio.open_connection(HOST, port)
            try:
                writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                head, _, page = (await reader.read(-1)).partition(b"\r\n\r\n")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return None
    # One that is killed meanwhile leaves half a page.
    length = re.search(rb"(?i)\ncontent-length: *(\d+)", head)
    whole = length is not None and len(page) == int(length[1]) and head.startswith(b"HTTP/1.1 200 ")
    return page.decode() if whole else None


def _gauge(page: str, name: str) -> int:
    found = re.search(rf"^{name} (\S+)$", page, re.MULTILINE)
    if found is None:
        raise ValueError(f"{name} does not stand in the metrics")
    return round(float(found[1]))


def _buckets(pages: Sequence[str]) -> dict[float, int]:
    counts: dict[float, int] = {}
    for page in pages:
        for bound, count in re.findall(r'^rate_limiter_latency_seconds_bucket\{le="([^"]+)"\} (\S+)$', page, re.MULTILINE):
            counts[float(bound)] = counts.get(float(bound), 0) + round(float(count))
    return counts


def _fallbacks(pages: Sequence[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for page in pages:
        for reason, count in re.findall(r'^rate_limiter_fallbacks_total\{reason="([^"]+)"\} (\S+)$', page, re.MULTILINE):
            counts[reason] = counts.get(reason, 0) + round(float(count))
    return counts
