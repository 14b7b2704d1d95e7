"""Holds on Redis. Counters that one server counts are charged in one step; see `hold.lua` and `reclaim.lua`.

In a cluster a rule may count by another subject than its tier's own limits, on another server. Then the servers are called one
after the other, and where one denies, what the others reserved is given back at once: in between another check may be denied that
would have passed; more than a limit is never admitted.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from typing import Any, Final, Protocol

import msgspec

from tidegate.counters import Counters
from tidegate.counters.adjustments import of_adjustment
from tidegate.counters.crossings import CrossingWatch
from tidegate.counters.holds import (
    MAX_HOLDS,
    HeldCounter,
    HoldHandle,
    HoldSettlement,
    has_ended,
    new_id,
    not_found,
    raw_id,
    too_many,
)
from tidegate.counters.redis.command_templates import CommandTemplate, encoded, hold_command, hold_numbers, script_head
from tidegate.counters.redis.error_replies import shown
from tidegate.counters.redis.hold_ends import HoldEnds
from tidegate.counters.redis.keyspace import hash_tag, name_of, slot_of_tag
from tidegate.counters.redis.resp import encode_command
from tidegate.counters.redis.scripts import Script, script
from tidegate.counters.watched import MAX_TEXT, WatchedSet
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import Algorithm, AnyAlgorithm, ConcurrencyAlgorithm, FailureAlgorithm, LimitSet, QuotaAlgorithm

RunScript = Callable[[bytes, Script, bytes], Awaitable[Any]]
"""Runs a script, whose command is ready, on the server of a hash tag; raises `StoreUnavailable` where there is no reply."""

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

    Attributes:
        watch: finds the thresholds that holds and adjustments cross; None for none. The templates must be of the same.
        ends: counts open holds.
    """

    def __init__(self, run: RunScript, run_late: RunScript, template: TemplateOf, most: int = MAX_HOLDS) -> None:
        self.most = most
        self.watch: CrossingWatch | None = None
        self.ends = HoldEnds()
        self._run = run
        self._run_late = run_late
        self._template = template

    async def open(
        self, counters: Counters, cost: int, ttl_us: int, rule: str | None, sharded: bool
    ) -> tuple[Decision, HoldHandle | None]:
        """See `HoldingCounterStore.open_hold`.

        Args:
            sharded: whether subjects may lie on several servers.
        """
        if len(counters) == 1 or not sharded:
            hold = new_id()
            decision, held = await self._open_part(counters, hold, cost, ttl_us)
            if not decision.allowed:
                return decision, None
            self.ends.note(decision.at_us + ttl_us, 1)
            return decision, HoldHandle(hold, cost, rule, (held,))
        handle = HoldHandle(new_id(), cost, rule)
        decided: list[Decision] = []
        for part in _parts(counters):
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
        self.ends.note(decided[0].at_us + ttl_us, 1)
        least = min(decided, key=lambda each: each.remaining or 0)
        return _of_check(least, counters, max(each.overage for each in decided)), handle

    async def _open_part(self, counters: Counters, hold: str, cost: int, ttl_us: int) -> tuple[Decision, tuple[HeldCounter, ...]]:
        template = self._template(counters)
        subject = counters[0][1]
        tag = hash_tag(subject)
        numbers = hold_numbers(ttl_us, self.most)
        if len(counters) == 1:
            tags = [tag]
            keys = [b"tg:{%b}%b" % (tag, template.name)]
        else:
            tags = [tag if each == subject else hash_tag(each) for _, each in counters]
            keys = [_key(*each) for each in zip(tags, template.names, strict=True)]
        reply = await self._run(tag, template.hold_script, hold_command(template, keys, cost, raw_id(hold), numbers))
        if type(reply) is list and len(reply) == 6 and len(keys) == 1 and reply[0] > 0 and type(reply[5]) is bytes:
            # One counter, most often.
            record = reply.pop()
            return template.decision(reply), (HeldCounter(tag, template.name, template.parameters[0], record),)
        if type(reply) is not list or len(reply) < 5:
            raise StoreUnavailable(f"unexpected reply from Redis to a hold: {shown(reply)}", reason="garbage")
        if reply[0] == 0:
            raise too_many(self.most)
        decision = template.decision(reply[:5])
        if not decision.allowed:
            return decision, ()
        records = reply[5 : 5 + len(counters)]
        left = reply[5 + len(counters) :]
        if len(records) != len(counters) or len(left) != template.watched or not all(type(each) is bytes for each in records):
            raise StoreUnavailable(f"unexpected reply from Redis to a hold: {shown(reply)}", reason="garbage")
        if left and cost and self.watch is not None:
            self.watch.note_all(counters, left[0], cost, decision.at_us)
        held = map(HeldCounter, tags, template.names, template.parameters, records)
        if self.watch is None or not template.watched:
            return decision, tuple(held)
        return decision, tuple(_watched(each, self.watch, *counter) for each, counter in zip(held, counters, strict=True))

    async def _cancel(self, handle: HoldHandle) -> None:
        for part in handle.parts:
            await self._settle_part(handle.id, part, 0)

    async def settle(self, handle: HoldHandle, cost: int, success: bool = False) -> HoldSettlement:
        """See `HoldingCounterStore.settle_hold`."""
        if len(handle.parts) == 1:
            settled_here = await self._settle_part(handle.id, handle.parts[0], cost, success, self.ends)
            if settled_here is None:
                raise not_found()
            return settled_here
        counts_failures = [any(_counts_failures(each.parameters) for each in part) for part in handle.parts]
        settled = []
        for part, counts in zip(handle.parts, counts_failures, strict=True):
            # Where failures are counted, everything else is charged what was reserved.
            used = cost if counts or not any(counts_failures) else handle.cost
            each = await self._settle_part(handle.id, part, used, success, self.ends if part is handle.parts[0] else None)
            if each is not None:
                settled.append((counts, each))
        if not settled:
            raise not_found()
        least = min((each for _, each in settled), key=lambda each: each.remaining or 0)
        outcome = next((each.cost for counts, each in settled if counts), least.cost)
        return least if least.cost == outcome else msgspec.structs.replace(least, cost=outcome)

    async def _settle_part(
        self, hold: str, part: Sequence[HeldCounter], cost: int, success: bool = False, ends: HoldEnds | None = None
    ) -> HoldSettlement | None:
        """None for a hold that is not known.

        Args:
            ends: takes it off where it was settled in time; None where another part of the hold does.
        """
        watched = self._watched_counters(part)
        if len(part) == 1:
            [held] = part
            sent: tuple[bytes, ...] = (held.parameters,)
            work, head, middle = _settlement_of(sent, bool(watched))
            key = b"tg:{%b}%b" % (held.tag, held.name)
            command = b"%b$%d\r\n%b\r\n%b$%d\r\n%b\r\n$12\r\n%b\r\n%b" % (
                *(head, len(key), key, middle, len(held.record), held.record, raw_id(hold)),
                _ending(cost, success),
            )
        else:
            sent = tuple(each.parameters for each in part)
            work, head, middle = _settlement_of(sent, bool(watched))
            keys = b"".join(encoded(_key(each.tag, each.name)) for each in part)
            records = b"".join(encoded(each.record) for each in part)
            command = b"".join((head, keys, middle, records, encoded(raw_id(hold)), _ending(cost, success)))
        reply = await self._run_late(part[0].tag, work, command)
        try:
            if watched and type(reply[0]) is list:
                reply = self._note_change(watched, reply)
            if reply[0] == 0:
                return None
            status, charged, late, binding, least, reset, _, _ = reply
            if ends is not None and late > 1:
                ends.note(late, -1)
            return HoldSettlement(charged, late == 1, _capacity(sent, abs(binding)), max(least, 0), reset, status == 2)
        except (TypeError, ValueError, IndexError):
            raise StoreUnavailable(f"unexpected reply from Redis to a settlement: {shown(reply)}", reason="garbage") from None

    def _watched_counters(self, part: Sequence[HeldCounter]) -> list[tuple[LimitSet | None, HeldCounter]]:
        """The counters of a part with the limits whose thresholds are watched; none where no counter has any."""
        if self.watch is None or not any(each.watched for each in part):
            return []
        return [(None if each.watched is None else each.watched.limit_set(), each) for each in part]

    def _note_change(self, watched: Sequence[tuple[LimitSet | None, HeldCounter]], reply: Any) -> Any:
        """Report what a settlement crossed.

        Returns:
            The reply of the script alone.
        """
        settled, before, after, at_us = reply
        for limits, each in watched:
            count = len(_limits_of(each.parameters))
            if limits is not None and len(limits.limits) == count and self.watch is not None:
                self.watch.note_change(((limits, each.subject),), before[:count], after[:count], at_us)
            before, after = before[count:], after[count:]
        return settled

    async def adjust(self, counters: Counters, units: int, sharded: bool) -> Decision:
        """See `AdjustingCounterStore.adjust`; servers of a cluster are called one after the other.

        Args:
            sharded: whether subjects may lie on several servers.
        """
        decided: list[Decision] = []
        for part in _parts(counters) if sharded else (counters,):
            template = self._template(part)
            watch = self.watch if template.watched and units > 0 else None
            work = script("adjust", frozenset(limits.algorithm for limits, _ in part), crossings=watch is not None)
            keys = [_key(hash_tag(subject), name) for (_, subject), name in zip(part, template.names, strict=True)]
            reply = await self._run(hash_tag(part[0][1]), work, _command(work, keys, (*template.parameters, b"%d" % units)))
            if watch is not None:
                reply = _change_noted(watch, part, reply)
            decided.append(template.decision(reply))
        least = min(decided, key=lambda each: each.remaining or 0)
        return of_adjustment(_of_check(least, counters, max(each.overage for each in decided)), units)

    async def count(self, counters: Counters) -> list[int]:
        """See `HoldCountingStore.count_holds`; one call for each subject."""
        counts = [0] * len(counters)
        places: dict[bytes, list[int]] = {}
        for place, (_, subject) in enumerate(counters):
            places.setdefault(hash_tag(subject), []).append(place)
        work = script("count_holds", frozenset())
        for tag, own in places.items():
            keys = [_key(tag, name_of(counters[place][0])) for place in own]
            reply = await self._run(tag, work, _command(work, keys, ()))
            for place, found in zip(own, _counted(reply, len(own)), strict=True):
                counts[place] = found
        return counts

    async def renew(self, handle: HoldHandle, ttl_us: int) -> None:
        """See `HoldingCounterStore.renew_hold`."""
        for part in handle.parts:
            keys = [_key(each.tag, each.name) for each in part]
            numbers = (raw_id(handle.id), b"%d" % ttl_us)
            work = script("renew_hold", frozenset())
            reply = await self._run_late(part[0].tag, work, _command(work, keys, (*(each.record for each in part), *numbers)))
            status = reply[0] if type(reply) is list and reply else None
            if status == 0:
                raise not_found()
            if status == 2:
                raise has_ended()
            if status != 1 or len(reply) != 3 or not all(type(each) is int for each in reply):
                raise StoreUnavailable(f"unexpected reply from Redis to a renewal: {shown(reply)}", reason="garbage")
            if part is handle.parts[0]:
                self.ends.note(reply[2], -1)
                self.ends.note(reply[1], 1)


def _watched(held: HeldCounter, watch: CrossingWatch, limits: LimitSet, subject: str) -> HeldCounter:
    """What a hold charged, with its limits where their thresholds are watched."""
    if not held.record or len(subject) > MAX_TEXT or not watch.marks(limits):
        return held
    found = WatchedSet.of(limits)
    return held if found is None else msgspec.structs.replace(held, watched=found, subject=subject)


def _change_noted(watch: CrossingWatch, counters: Counters, reply: Any) -> Any:
    """Report what an adjustment crossed; returns the reply of the script alone."""
    try:
        adjusted, before, after, at_us = reply
        watch.note_change(counters, before, after, at_us)
    except (TypeError, ValueError):
        raise StoreUnavailable(f"unexpected reply from Redis to an adjustment: {shown(reply)}", reason="garbage") from None
    return adjusted


def _counted(reply: Any, count: int) -> list[int]:
    if type(reply) is not list or len(reply) != count or not all(type(each) is int for each in reply):
        raise StoreUnavailable(f"unexpected reply from Redis to a count of holds: {shown(reply)}", reason="garbage")
    return reply


def _key(tag: bytes, name: bytes) -> bytes:
    return b"tg:{%b}%b" % (tag, name)


def _command(work: Script, keys: Sequence[bytes], arguments: Sequence[bytes]) -> bytes:
    return encode_command("EVALSHA", work.sha, str(len(keys)), *keys, *arguments)


@lru_cache(maxsize=1024)
def _ending(cost: int, success: bool) -> bytes:
    """The last two arguments of a settlement."""
    return encoded(b"%d" % cost) + encoded(b"%d" % success)


def _parts(counters: Counters) -> list[Counters]:
    """The counters of each server of a cluster; of the first subject first."""
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


@lru_cache(maxsize=1024)
def _settlement_of(parameters: tuple[bytes, ...], crossings: bool = False) -> tuple[Script, bytes, bytes]:
    """The script for counters with these parameters, and of its command what is before the keys, and before the records.

    Raises:
        HoldNotFound: for an id that no instance made.
    """
    try:
        algorithms = frozenset(_BY_LUA_NAME[str(msgspec.msgpack.decode(each)[0]).removeprefix("soft:")] for each in parameters)
    except (msgspec.MsgspecError, KeyError, IndexError, TypeError):
        raise not_found() from None
    work = script("settle_hold", algorithms, crossings=crossings)
    return work, script_head(work, len(parameters), 3 * len(parameters) + 3), b"".join(map(encoded, parameters))


@lru_cache(maxsize=1024)
def _counts_failures(parameters: bytes) -> bool:
    try:
        return bool(msgspec.msgpack.decode(parameters)[0] == FailureAlgorithm.FAILURES)
    except (msgspec.MsgspecError, KeyError, IndexError, TypeError):
        raise not_found() from None


@lru_cache(maxsize=1024)
def _capacity(parameters: tuple[bytes, ...], place: int) -> int | None:
    """The most that can be had at once under a limit, by its place among those of a part's counters, 1 for the first."""
    for each in parameters:
        limits = _limits_of(each)
        if place <= len(limits):
            return limits[place - 1]
        place -= len(limits)
    return None


@lru_cache(maxsize=1024)
def _limits_of(parameters: bytes) -> tuple[int, ...]:
    """The most that can be had at once under each limit of a counter."""
    algorithm, *numbers = msgspec.msgpack.decode(parameters)
    width = 4 if algorithm.endswith(("bucket", "quota")) else 3 if algorithm == FailureAlgorithm.FAILURES else 2
    return tuple(int(each) for each in numbers[1::width])
