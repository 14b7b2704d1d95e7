"""Failures at the two ports. Beneath them everything is real: counters in memory, policies as they are parsed."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import enum
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from tidegate.algorithms import State
from tidegate.catalog.changes import KEY, TIER, Changes, Item
from tidegate.counters import Charge, ChargeOutcome
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Decision
from tidegate.errors import CatalogUnavailable, StoreUnavailable
from tidegate.policy.attributes import CallerPolicy
from tidegate.policy.limits import LimitSet
from tidegate.policy.model import ApiKey, Policy, Tier

TIMEOUT_S = 0.05
SLOW_S = 0.03
LATE_S = 0.5

_T = TypeVar("_T")


class Fault(enum.Enum):
    """What happens to each call of an instance to the store."""

    NONE = enum.auto()
    SLOW = enum.auto()
    """It is answered, not much before the deadline."""
    LOST = enum.auto()
    """It never arrives."""
    REPLY_LOST = enum.auto()
    """It is done, and nobody hears of it."""
    LATE = enum.auto()
    """It is done long after its deadline."""
    DOWN = enum.auto()
    """It fails at once."""
    HALF = enum.auto()
    """Of a batch the second half fails, as where one of two shards is away; a single charge is done."""


class SharedStore:
    """The one store of all instances: it may die with what it holds, and a copy that is behind may take its place.

    Args:
        clock: of the store, µs since the epoch.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self.clock = clock
        self.counters = MemoryCounters(clock=clock)
        self.alive = True
        self.resets = 0
        self._replica = MemoryCounters(clock=clock)
        self.known: dict[int, LimitSet] = {}

    def replicate(self) -> None:
        """What is held now is what a failover leaves."""
        # Limit sets are compared by identity: the copy must hold the same ones.
        kept: dict[int, Any] = {**self.known, id(self.clock): self.clock}
        self._replica = copy.deepcopy(self.counters, kept)

    def fail_over(self) -> None:
        """The replica takes over; what came after its last word is lost."""
        self.counters = self._replica
        self.alive = True
        self.replicate()


class Told:
    """What a link tells the model of, where the instance cannot know it."""

    def charged(self, charge: Charge, decision: Decision) -> None:
        """A charge was decided, and nobody was told."""

    def wiped(self, counters: Iterable[tuple[LimitSet, str]]) -> None:
        """Counters were reset, and nobody was told."""

    def absorbed(self, instance: int, limits: LimitSet, subject: str, answered: bool) -> None:
        """What an instance admitted was added."""


class Link:
    """One instance's way to the store: what `GuardedCounters` takes as its Redis.

    Args:
        store: where it leads.
        told: the model.
    """

    timeout_s = TIMEOUT_S
    started = True

    def __init__(self, store: SharedStore, instance: int, instances: int, told: Told) -> None:
        self.fault = Fault.NONE
        self._store = store
        self._instance = instance
        self._instances = instances
        self._told = told

    @property
    def well(self) -> bool:
        return self._store.alive and self.fault in (Fault.NONE, Fault.SLOW)

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def ping(self) -> None:
        await self._call(lambda answered: None)

    def shard_of(self, subject: str) -> str:
        return "the one"

    def shards(self) -> set[str]:
        return {"the one"}

    complete = True
    refunds = 0

    async def probe(self, shard: str, cost: int) -> None:
        await self._call(lambda answered: None)

    async def charge_one(self, charge: Charge, sent_ns: int = 0) -> Decision:
        return await self._call(lambda answered: self._charge(charge, answered))

    async def charge(self, charges: Sequence[Charge], sent_ns: int = 0) -> list[ChargeOutcome]:
        half = (len(charges) + 1) // 2 if self.fault is Fault.HALF and self._store.alive else len(charges)
        try:
            done: list[ChargeOutcome] = await self._call(
                lambda answered: [self._charge(each, answered) for each in charges[:half]]
            )
        except StoreUnavailable as error:
            return [error] * len(charges)
        return done + [_gone() for _ in charges[half:]]

    async def reset(self, counters: Sequence[tuple[LimitSet, str]]) -> None:
        def forget(answered: bool) -> None:
            for limits, _ in counters:
                self._store.known[id(limits)] = limits
            # Memory never waits: one step is the whole of it.
            with contextlib.suppress(StopIteration):
                self._store.counters.reset(counters).send(None)
            if not answered:
                self._told.wiped(counters)

        await self._call(forget)

    async def absorb(self, states: Iterable[tuple[LimitSet, str, Sequence[State]]]) -> list[StoreUnavailable | None]:
        taken = list(states)

        def add(answered: bool) -> None:
            for limits, subject, each in taken:
                self._store.known[id(limits)] = limits
                self._store.counters.add(limits, subject, each)
                self._told.absorbed(self._instance, limits, subject, answered)

        try:
            if self.fault is Fault.LATE and self._store.alive:
                # Nothing waits for it but the debt itself, so its answer is waited for.
                await asyncio.sleep(LATE_S)
                if not self._store.alive:
                    raise _gone()
                add(True)
            else:
                await self._call(add)
        except StoreUnavailable as error:
            return [error] * len(taken)
        return [None] * len(taken)

    async def run(self, tag: bytes, work: Any, keys: Any, arguments: Any) -> list[int]:
        """A heartbeat: the only script that the guard runs by itself."""
        if not self.well:
            raise _gone()
        return [self._instances, self._store.resets, self._store.clock()]

    async def call(self, tag: bytes, *parts: Any) -> None:
        """The guard announces resets, and that it leaves."""
        if not self.well:
            raise _gone()
        if parts[0] == "INCR":
            self._store.resets += 1

    def _charge(self, charge: Charge, answered: bool) -> Decision:
        for limits, _ in charge.counters:
            self._store.known[id(limits)] = limits
        decision = self._store.counters.charge_all(charge.counters, charge.cost)
        if not answered:
            self._told.charged(charge, decision)
        return decision

    async def _call(self, effect: Callable[[bool], _T]) -> _T:
        fault = self.fault if self._store.alive else Fault.DOWN
        if fault is Fault.DOWN:
            raise _gone()
        if fault in (Fault.NONE, Fault.HALF):
            return effect(True)
        if fault is Fault.SLOW:
            await asyncio.sleep(SLOW_S)
            return effect(True)
        if fault is Fault.REPLY_LOST:
            effect(False)
        elif fault is Fault.LATE:
            asyncio.get_running_loop().call_later(LATE_S, effect, False)
        await asyncio.sleep(TIMEOUT_S)
        raise StoreUnavailable("no answer within the deadline", reason="timeout")


def _gone() -> StoreUnavailable:
    return StoreUnavailable("the connection is gone", reason="disconnected", event=object())


class Trouble(enum.Enum):
    """What happens to each question to the catalog."""

    NONE = enum.auto()
    FAILS = enum.auto()
    SLOW = enum.auto()
    """What it answers is of the moment at which it was asked."""


class FaultyCatalog:
    """A catalog of all versions that a policy had. Any replica may be behind, unless a version is asked for.

    Args:
        policy: the first version.
    """

    def __init__(self, policy: Policy) -> None:
        self.policies = [policy]
        self.trouble = Trouble.NONE
        self.behind = 0
        self.log_from = 0
        """What was changed up to this version the log does not tell any more."""
        self._items: list[list[Item]] = [[]]

    @property
    def head(self) -> int:
        """The version now; the first one is 0."""
        return len(self.policies) - 1

    def change(self, policy: Policy, *items: Item) -> None:
        """Make a version."""
        self.policies.append(policy)
        self._items.append(list(items))

    def keys_changed(self, since: int) -> dict[str, int]:
        """The last change of each key that was changed after a version."""
        return {
            name: version for version in range(since + 1, self.head + 1) for kind, name in self._items[version] if kind == KEY
        }

    async def api_key(self, sha256: str, min_version: int = 0) -> tuple[int, ApiKey | None]:
        version, policy = await self._ask(min_version)
        return version, next((each for each in policy.api_keys if each.sha256 == sha256), None)

    async def tier(self, name: str, min_version: int = 0) -> tuple[int, Tier | None]:
        version, policy = await self._ask(min_version)
        return version, next((each for each in policy.tiers if each.name == name), None)

    async def caller_policy(self, min_version: int = 0) -> tuple[int, CallerPolicy]:
        version, policy = await self._ask(min_version)
        return version, policy.caller_policy

    async def tier_names(self) -> list[str]:
        return sorted(tier.name for tier in (await self._ask(self.head))[1].tiers)

    async def changes(self, since: int) -> Changes:
        await self._ask(self.head)
        if since < self.log_from:
            return Changes(self.head, self.head, versions=(self.head,))
        found: dict[Item, int] = {}
        for version in range(since + 1, self.head + 1):
            found.update(dict.fromkeys(self._items[version], version))
        items = sorted(((version, item) for item, version in found.items()), key=lambda each: each[0])
        return Changes(self.head, since, tuple(items), tuple(range(since, self.head + 1)))

    async def _ask(self, min_version: int) -> tuple[int, Policy]:
        version = max(self.head - self.behind, min(min_version, self.head), 0)
        policy = self.policies[version]
        if self.trouble is Trouble.SLOW:
            await asyncio.sleep(0.2)
        if self.trouble is Trouble.FAILS:
            raise CatalogUnavailable("away")
        return version, policy


__all__ = ["KEY", "TIER", "Fault", "FaultyCatalog", "Link", "SharedStore", "Told", "Trouble"]
