"""A way to a store that grants leases and fails: it is killed, hangs, loses connections, fails over, or moves slots."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from tests.model.faults import Link, SharedStore, Told
from tests.model.lease_store import LeaseStore
from tidegate.algorithms import MERGE
from tidegate.counters import Charge, LateAnswer, LeaseReturn
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable

CONNECTION_LOST_S = 1.0
"""A connection is closed after so long without an answer."""


class LeasingStore(SharedStore):
    """The one store of all instances, whose counters lease."""

    def __init__(self, clock: Callable[[], int]) -> None:
        super().__init__(clock)
        self.leases = LeaseStore(clock)
        self.hung: list[Callable[[], None]] | None = None
        """What a hung server executes when it resumes; None while it runs."""
        self._behind: dict[Any, Any] = {}

    def replicate(self) -> None:
        """The replica has all that was charged until now."""
        if hasattr(self, "leases"):
            self._behind = dict(self.leases.states)

    def fail_over(self) -> None:
        """The replica takes over."""
        self.replace(self._behind)

    def replace(self, states: dict[Any, Any]) -> None:
        """Another server, with other counts, takes the place of this one."""
        self.leases.states = dict(states)
        self.alive = True

    def resume(self) -> None:
        """A hung server executes what it was sent meanwhile, in order."""
        waiting, self.hung = self.hung or [], None
        for execute in waiting:
            execute()


class LeasingLink(Link):
    """One instance's way to it.

    Args:
        store: where it leads.
        random: which calls fail while slots move.
    """

    def __init__(self, store: LeasingStore, instance: int, instances: int, random: Random) -> None:
        super().__init__(store, instance, instances, Told())
        self.server = store
        self.connection = 0
        self.moving = 0.0
        """Share of the calls that find their slot on its way."""
        self._random = random

    def grants(self, counters: Any) -> bool:
        return True

    def session(self, counters: Any) -> object:
        return self.connection

    async def give_back(self, returns: Sequence[LeaseReturn]) -> list[bool]:
        own = [each for each in returns if each.session == self.connection]
        await self._call(lambda answered: [self.server.leases.give_back(each) for each in own])
        return [each in own for each in returns]

    async def charge_one(self, charge: Charge, sent_ns: int = 0) -> Decision:
        if self._random.random() < self.moving:
            await asyncio.sleep(self.timeout_s)
            raise StoreUnavailable("the slot is moving", reason="migrating", shard="the one")
        if self.server.hung is None or not self.server.alive:
            return await super().charge_one(charge, sent_ns)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def execute() -> None:
            decision = self._charge(charge, True)
            if not answer.done():
                answer.set_result(decision)

        def lose() -> None:
            if not answer.done():
                answer.set_exception(StoreUnavailable("no answer for 1 s", reason="disconnected", shard="the one"))
                answer.exception()

        self.server.hung.append(execute)
        asyncio.get_running_loop().call_later(CONNECTION_LOST_S, lose)
        await asyncio.sleep(self.timeout_s)
        if answer.done():
            return answer.result()  # type: ignore[no-any-return]
        late = LateAnswer("not answered yet", answer, shard="the one")
        late.decode = lambda reply: reply
        raise late

    async def charge(self, charges: Sequence[Charge], sent_ns: int = 0) -> list[Any]:
        outcomes: list[Any] = []
        for each in charges:
            try:
                outcomes.append(await self.charge_one(each, sent_ns))
            except StoreUnavailable as error:
                outcomes.append(error)
        return outcomes

    async def absorb(self, states: Any) -> list[StoreUnavailable | None]:
        taken = list(states)
        if self.server.hung is not None or self._random.random() < self.moving:
            await asyncio.sleep(self.timeout_s)
            return [StoreUnavailable("not answered", reason="timeout")] * len(taken)

        def add(answered: bool) -> None:
            kept = self.server.leases.states
            for limits, subject, each in taken:
                for limit, state in zip(limits.limits, each, strict=True):
                    key = (limits.name, subject, limit.window_name)
                    if state is not None:
                        kept[key] = MERGE[limits.algorithm](limit, kept.get(key), state)

        try:
            await self._call(add)
        except StoreUnavailable as error:
            return [error] * len(taken)
        return [None] * len(taken)

    async def probe(self, shard: str, cost: int) -> None:
        if self.server.hung is not None:
            await asyncio.sleep(self.timeout_s)
            raise StoreUnavailable("not answered", reason="timeout")
        await super().probe(shard, cost)

    def _charge(self, charge: Charge, answered: bool) -> Decision:
        return self.server.leases.charge(charge)
