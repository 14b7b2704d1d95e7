"""Holds on Redis. Counters that one server counts are charged in one step; see `hold.lua` and `reclaim.lua`.

In a cluster a rule may count by another subject than its tier's own limits, on another server. Then the servers are called one
after the other, and where one denies, what the others reserved is given back at once: in between another check may be denied that
would have passed; more than a limit is never admitted.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from typing import Any, Final, Protocol

import msgspec

from tidegate.counters import Counters
from tidegate.counters.adjustments import of_adjustment
from tidegate.counters.holds import (
    MAX_HOLDS,
    HeldCounter,
    HoldHandle,
    HoldSettlement,
    has_ended,
    new_id,
    not_found,
    too_many,
)
from tidegate.counters.redis.command_templates import CommandTemplate
from tidegate.counters.redis.error_replies import shown
from tidegate.counters.redis.keyspace import hash_tag, name_of, slot_of_tag
from tidegate.counters.redis.scripts import Script, boundaries_end_us, parameters, script
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import (
    Algorithm,
    AnyAlgorithm,
    ConcurrencyAlgorithm,
    FailureAlgorithm,
    LimitSet,
    QuotaAlgorithm,
)

RunScript = Callable[[bytes, Script, Sequence[bytes], Sequence[bytes]], Awaitable[Any]]
"""Runs a script on the server of a hash tag, with keys and arguments; raises `StoreUnavailable` where there is no reply."""

_BY_LUA_NAME: Final[dict[str, AnyAlgorithm]] = {
    **{each.value: each for each in Algorithm if each is not Algorithm.LEAKY_BUCKET},
    QuotaAlgorithm.QUOTA.value: QuotaAlgorithm.QUOTA,
    ConcurrencyAlgorithm.CONCURRENT.value: ConcurrencyAlgorithm.CONCURRENT,
    FailureAlgorithm.FAILURES.value: FailureAlgorithm.FAILURES,
}


class TemplateOf(Protocol):
    """Gives what is prepared for some counters."""

    def __call__(self, counters: Counters) -> CommandTemplate:
        """The template."""
        ...


class RedisHolds:
    """Opens, settles and renews holds.

    Args:
        run: for scripts that answer a check: ends at its deadline.
        run_late: for all others: waits for late replies.
        template: decodes replies.
        most: holds of one counter.
    """

    def __init__(self, run: RunScript, run_late: RunScript, template: TemplateOf, most: int = MAX_HOLDS) -> None:
        self.most = most
        self._run = run
        self._run_late = run_late
        self._template = template

    async def open(
        self, counters: Counters, cost: int, ttl_us: int, rule: str | None, sharded: bool
    ) -> tuple[Decision, HoldHandle | None]:
        """See `HoldingCounterStore.open_hold`.

        Args:
            counters: as there.
            cost: as there.
            ttl_us: as there.
            rule: as there.
            sharded: whether subjects may lie on several servers.
        """
        handle = HoldHandle(new_id(), cost, rule)
        decided: list[Decision] = []
        for part in _parts(counters, sharded):
            try:
                decision, held = await self._open_part(part, handle.id, cost, ttl_us)
            except BaseException:
                await self._cancel(handle)
                raise
            if not decision.allowed:
                await self._cancel(handle)
                return _of_check(decision, counters), None
            decided.append(decision)
            handle = msgspec.structs.replace(handle, parts=(*handle.parts, held))
        least = min(decided, key=lambda each: each.remaining or 0)
        return _of_check(least, counters, max(each.overage for each in decided)), handle

    async def _open_part(self, counters: Counters, hold: str, cost: int, ttl_us: int) -> tuple[Decision, tuple[HeldCounter, ...]]:
        work = script("hold", frozenset(limits.algorithm for limits, _ in counters))
        tags = [hash_tag(subject) for _, subject in counters]
        prepared = [_prepared(limits) for limits, _ in counters]
        names = [name for name, _ in prepared]
        sent = [own or parameters(limits, charging=True) for (limits, _), (_, own) in zip(counters, prepared, strict=True)]
        numbers = msgspec.msgpack.encode((hold, ttl_us, self.most))
        keys = [_key(tag, name) for tag, name in zip(tags, names, strict=True)]
        reply = await self._run(tags[0], work, keys, [*sent, b"%d" % cost, numbers])
        if type(reply) is not list or len(reply) < 5:
            raise StoreUnavailable(f"unexpected reply from Redis to a hold: {shown(reply)}", reason="garbage")
        if reply[0] == 0:
            raise too_many(self.most)
        decision = self._template(counters).decision(reply[:5])
        records = reply[5:]
        if decision.allowed and (len(records) != len(counters) or not all(type(each) is bytes for each in records)):
            raise StoreUnavailable(f"unexpected reply from Redis to a hold: {shown(reply)}", reason="garbage")
        held = tuple(HeldCounter(*each) for each in zip(tags, names, sent, records, strict=False))
        return decision, held

    async def _cancel(self, handle: HoldHandle) -> None:
        for part in handle.parts:
            await self._settle_part(handle.id, part, 0)

    async def settle(self, handle: HoldHandle, cost: int, success: bool) -> HoldSettlement:
        """See `HoldingCounterStore.settle_hold`."""
        counts_failures = [FailureAlgorithm.FAILURES in _algorithms(part) for part in handle.parts]
        settled = []
        for part, counts in zip(handle.parts, counts_failures, strict=True):
            # Where failures are counted, everything else is charged what was reserved.
            used = cost if counts or not any(counts_failures) else handle.cost
            each = await self._settle_part(handle.id, part, used, success)
            if each is not None:
                settled.append(each)
        if not settled:
            raise not_found()
        least = min(settled, key=lambda each: each.remaining or 0)
        return least if len(settled) == 1 else msgspec.structs.replace(least, cost=settled[0].cost)

    async def _settle_part(
        self, hold: str, part: Sequence[HeldCounter], cost: int, success: bool = False
    ) -> HoldSettlement | None:
        """None for a hold that is not known."""
        arguments = [each.parameters for each in part] + [each.record for each in part]
        work = script("settle_hold", _algorithms(part))
        keys = [_key(each.tag, each.name) for each in part]
        reply = await self._run_late(part[0].tag, work, keys, [*arguments, msgspec.msgpack.encode((hold, cost, success))])
        try:
            if reply[0] == 0:
                return None
            status, charged, late, binding, least, reset, _, _ = reply
            return HoldSettlement(charged, late == 1, _capacity(part, abs(binding)), max(least, 0), reset, status == 2)
        except (TypeError, ValueError, IndexError):
            raise StoreUnavailable(f"unexpected reply from Redis to a settlement: {shown(reply)}", reason="garbage") from None

    async def adjust(self, counters: Counters, units: int, sharded: bool) -> Decision:
        """See `AdjustingCounterStore.adjust`; servers of a cluster are called one after the other.

        Args:
            counters: as there.
            units: as there.
            sharded: whether subjects may lie on several servers.
        """
        decided: list[Decision] = []
        for part in _parts(counters, sharded):
            work = script("adjust", frozenset(limits.algorithm for limits, _ in part))
            tags = [hash_tag(subject) for _, subject in part]
            prepared = [_prepared(limits) for limits, _ in part]
            keys = [_key(tag, name) for tag, (name, _) in zip(tags, prepared, strict=True)]
            sent = [own or parameters(limits, charging=True) for (limits, _), (_, own) in zip(part, prepared, strict=True)]
            reply = await self._run(tags[0], work, keys, [*sent, b"%d" % units])
            decided.append(self._template(part).decision(reply))
        least = min(decided, key=lambda each: each.remaining or 0)
        return of_adjustment(_of_check(least, counters, max(each.overage for each in decided)), units)

    async def renew(self, handle: HoldHandle, ttl_us: int) -> None:
        """See `HoldingCounterStore.renew_hold`."""
        for part in handle.parts:
            keys = [_key(each.tag, each.name) for each in part]
            numbers = msgspec.msgpack.encode((handle.id, ttl_us))
            work = script("renew_hold", frozenset())
            reply = await self._run_late(part[0].tag, work, keys, [*(each.record for each in part), numbers])
            status = reply[0] if type(reply) is list and reply else None
            if status == 0:
                raise not_found()
            if status == 2:
                raise has_ended()
            if status != 1:
                raise StoreUnavailable(f"unexpected reply from Redis to a renewal: {shown(reply)}", reason="garbage")


@lru_cache(maxsize=4096)
def _prepared(limits: LimitSet) -> tuple[bytes, bytes]:
    """The name of a counter, and its parameters; empty where these change with time, as those of quotas do."""
    changes = boundaries_end_us(limits, time.time_ns() // 1000) is not None
    return name_of(limits), b"" if changes else parameters(limits, charging=True)


def _key(tag: bytes, name: bytes) -> bytes:
    return b"tg:{%b}%b" % (tag, name)


def _parts(counters: Counters, sharded: bool) -> list[Counters]:
    """The counters of each server; of the first subject first."""
    if not sharded or len(counters) == 1:
        return [counters]
    by_slot: dict[int, list[Any]] = {}
    for counter in counters:
        by_slot.setdefault(slot_of_tag(hash_tag(counter[1])), []).append(counter)
    return [tuple(part) for part in by_slot.values()]


def _of_check(decision: Decision, counters: Counters, overage: int | None = None) -> Decision:
    """The decision of a part as that of the whole check."""
    limits = counters[0][0]
    overage = decision.overage if overage is None else overage
    if decision.limits is limits and decision.overage == overage:
        return decision
    return msgspec.structs.replace(decision, limits=limits, overage=overage)


@lru_cache(maxsize=256)
def _decoded(parameters: bytes) -> tuple[Any, ...]:
    """Parameters of a counter; few differ, and each is read twice by a settlement."""
    return msgspec.msgpack.decode(parameters, type=tuple)


def _algorithms(part: Sequence[HeldCounter]) -> frozenset[AnyAlgorithm]:
    """The algorithms that a part's counters use; raises `HoldNotFound` for an id that no instance made."""
    try:
        return frozenset(_BY_LUA_NAME[str(_decoded(each.parameters)[0]).removeprefix("soft:")] for each in part)
    except (msgspec.MsgspecError, KeyError, IndexError):
        raise not_found() from None


def _capacity(part: Sequence[HeldCounter], place: int) -> int | None:
    """The most that can be had at once under a limit, by its place among those of a part's counters, 1 for the first."""
    for each in part:
        algorithm, *numbers = _decoded(each.parameters)
        width = 4 if algorithm.endswith(("bucket", "quota")) else 3 if algorithm == FailureAlgorithm.FAILURES else 2
        count = len(numbers) // width
        if place <= count:
            return int(numbers[(place - 1) * width + 1])
        place -= count
    return None
