"""Background work while shards fail and recover: probes, and adding usage during an outage to the store.

A shard whose breaker is open is probed in the background, with a real charge of a counter used for nothing else: so a breaker
closes within half a second of the shard's recovery, also without checks. One that opens again soon after is probed less and
less often, down to once in `open_s`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from tidegate.algorithms import State
from tidegate.breaker import Breaker, BreakerOptions, BreakerState
from tidegate.counters.fallback import LocalShares
from tidegate.counters.redis.topology import NO_SHARD
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import AnyAlgorithm, LimitSet

logger = logging.getLogger(__name__)

_BATCH_SIZE: Final = 200
_MAX_BREAKERS: Final = 1000


class Store(Protocol):
    """What this needs of the store."""

    @property
    def complete(self) -> bool:
        """Whether every subject has a server that counts it."""
        ...

    def shard_of(self, subject: str) -> str:
        """Which server counts a subject."""
        ...

    def shards(self) -> set[str]:
        """The servers that count."""
        ...

    async def probe(self, shard: str, cost: int) -> None:
        """Find out whether a shard decides checks."""
        ...

    async def absorb(self, states: Sequence[tuple[LimitSet, str, Sequence[State]]]) -> list[StoreUnavailable | None]:
        """Add what was admitted elsewhere."""
        ...


class Breakers:
    """One circuit breaker for each shard that failed recently; without any, the hot path is shorter.

    Args:
        store: whose shards they are.
    """

    def __init__(self, store: Store, options: BreakerOptions) -> None:
        self.by_shard: dict[str, Breaker] = {}
        self._store = store
        self._options = options
        self._probed_at: dict[str, float] = {}

    @property
    def open(self) -> dict[str, str]:
        """The shards whose breakers are not closed, and why."""
        return {shard: breaker.why for shard, breaker in self.by_shard.items() if breaker.state is not BreakerState.CLOSED}

    def admit(self, shards: Sequence[str], now: float) -> bool:
        """Whether a charge may be made; where a breaker is half open it is the probe, for all its shards or none."""
        breakers = [self.by_shard[shard] for shard in shards if shard in self.by_shard]
        if any(breaker.state is not BreakerState.CLOSED and not breaker.is_due(now) for breaker in breakers):
            return False
        return all(breaker.admits(now) for breaker in breakers)

    def succeeded(self, shard: str, now: float) -> None:
        """A shard answered."""
        breaker = self.by_shard.get(shard)
        if breaker is not None:
            if breaker.state is not BreakerState.CLOSED:
                logger.info("circuit breaker closed for Redis shard %s", shard, extra={"ecs": {"tidegate.shard": shard}})
            breaker.succeeded(now)

    def failed(self, shard: str, error: StoreUnavailable, now: float) -> None:
        """A call failed."""
        breaker = self.by_shard.get(shard)
        if breaker is None:
            if len(self.by_shard) >= _MAX_BREAKERS:
                self.by_shard.clear()
            breaker = self.by_shard[shard] = Breaker(self._options)
        was = breaker.state
        breaker.failed(now, error.details.get("event"), error.message)
        if breaker.state is BreakerState.OPEN and was is not BreakerState.OPEN:
            logger.error(
                "circuit breaker opened for Redis shard %s, retrying in %g s: %s",
                shard,
                breaker.options.open_s,
                error,
                extra={"ecs": {"tidegate.shard": shard, "error.code": error.code}},
            )

    def release(self, shards: Sequence[str]) -> None:
        """A probe failed on another shard: it has no outcome for these."""
        for shard in shards:
            if (breaker := self.by_shard.get(shard)) is not None:
                breaker.release()

    async def probe(self, now: Callable[[], float], every: bool = False) -> None:
        """Probe the shards whose breakers are open and whose time has come; drop breakers that are idle or whose shard is gone.

        Args:
            now: gives monotonic s.
            every: whether all are probed, due or not.
        """
        known = self._store.shards()
        for shard, breaker in list(self.by_shard.items()):
            gone = self._store.complete if shard == NO_SHARD else bool(known) and shard not in known
            if gone or breaker.is_idle(now()):
                del self.by_shard[shard]
        self._probed_at = {shard: at for shard, at in self._probed_at.items() if shard in self.by_shard}
        due = [
            shard
            for shard, breaker in self.by_shard.items()
            if breaker.state is not BreakerState.CLOSED
            and shard != NO_SHARD
            and (every or now() - self._probed_at.get(shard, float("-inf")) >= breaker.wait_s)
        ]
        self._probed_at.update(dict.fromkeys(due, now()))
        outcomes = await asyncio.gather(*(self._store.probe(shard, 1) for shard in due), return_exceptions=True)
        for shard, outcome in zip(due, outcomes, strict=True):
            if outcome is None:
                self.succeeded(shard, now())
            elif not isinstance(outcome, StoreUnavailable):
                raise outcome


class Debts:
    """Adds what was admitted without the store to the store.

    Args:
        store: where it is added.
        local: what is owed.
        breakers: which shards are called.

    Attributes:
        put_back: counters added so far.
        on_the_way: counters whose debts were taken out and are being added, by name, algorithm and subject; done when it is over.
    """

    def __init__(self, store: Store, local: LocalShares, breakers: Mapping[str, Breaker]) -> None:
        self.put_back = 0
        self.on_the_way: dict[tuple[str, AnyAlgorithm, str], asyncio.Future[None]] = {}
        self._store = store
        self._local = local
        self._breakers = breakers

    async def put_back_of(self, counters: Sequence[tuple[LimitSet, str]]) -> None:
        """Add to the store what some counters owe.

        Args:
            counters: pairs of limits and subject.

        Raises:
            StoreUnavailable: if a shard did not take it; that is owed again.
        """
        taken: list[tuple[LimitSet, str, tuple[State, ...]]] = []
        for limits, subject in counters:
            states = self._local.take(limits, subject)
            if states is not None:
                taken.append((limits, subject, states))
        if not taken:
            return
        outcomes: Sequence[StoreUnavailable | None] | None = None
        done = asyncio.get_running_loop().create_future()
        names = [(limits.name, limits.algorithm, subject) for limits, subject, _ in taken]
        self.on_the_way.update(dict.fromkeys(names, done))
        try:
            outcomes = await self._store.absorb(taken)
        finally:
            for name in names:
                if self.on_the_way.get(name) is done:
                    del self.on_the_way[name]
            failed = None
            for place, each in enumerate(taken):
                error = None if outcomes is None else outcomes[place]
                if outcomes is None or (error is not None and error.details.get("reason") != "script"):
                    self._local.give_back(*each)
                    failed = failed or error
                elif error is None:
                    self.put_back += 1
                else:
                    logger.error("usage of subject %.80r during the outage not added to its counter: %s", each[1], error)
            done.set_result(None)
        if failed is not None:
            raise failed

    async def settle(self) -> None:
        """Put back all that is owed to shards that are called; each debt present at the start is tried once.

        Raises:
            StoreUnavailable: if a shard did not take it.
        """
        left = len(self._local.owed)
        while left > 0:
            some = []
            for limits, subject in self._local.oldest(min(_BATCH_SIZE, left)):
                breaker = self._breakers.get(self._store.shard_of(subject))
                if breaker is None or breaker.state is BreakerState.CLOSED:
                    some.append((limits, subject))
                else:
                    self._local.defer(limits, subject)
            left -= _BATCH_SIZE
            await self.put_back_of(some)
            # Other tasks get their turn between batches.
            await asyncio.sleep(0)
