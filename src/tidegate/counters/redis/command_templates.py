"""Commands for charges: all parts that do not depend on subject and cost are prepared once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Final

import msgspec

from tidegate.algorithms import State
from tidegate.algorithms.leases import Ahead
from tidegate.counters import Charge, GrantingDecision, LastDecision, LeaseRequest, LeaseReturn
from tidegate.counters.redis.keyspace import hash_tag, key_of, name_of, reset_key_of
from tidegate.counters.redis.resp import encode_command
from tidegate.counters.redis.scripts import Script, boundaries_end_us, parameters, script, wire_states
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import Limit, LimitSet
from tidegate.timestamps import US_PER_S

_COSTS: Final = tuple(b"$%d\r\n%d\r\n" % (len(str(cost)), cost) for cost in range(1000))
_KEY_HEADS: Final = tuple(b"$%d\r\ntg:{" % length for length in range(128))
"""How a key of so many bytes begins. Looked up and joined, a command costs half of what formatting it costs."""


class CommandTemplate:
    """The prepared parts of a charge's command: all that does not depend on subject and cost.

    Attributes:
        until_s: until when it may be used, s since the epoch: it holds the periods of quotas around now. None without quotas.
        watched: whether replies also have what is left of each limit.
        names: of the counters, and
        parameters: of their limits, as the ids of holds name them.
    """

    __slots__ = (
        "head",
        "hold_head",
        "hold_script",
        "lease_head",
        "lease_script",
        "limits",
        "limits_by_place",
        "name",
        "names",
        "parameters",
        "script",
        "suffix",
        "tail",
        "until_s",
        "watched",
    )

    def __init__(self, sets: tuple[LimitSet, ...], watched: bool = False) -> None:
        now_us = time.time_ns() // 1000
        ends = [end for limits in sets if (end := boundaries_end_us(limits, now_us)) is not None]
        self.until_s = min(ends) / US_PER_S if ends else None
        algorithms = frozenset(limits.algorithm for limits in sets)
        self.watched = watched
        self.script = script("charge", algorithms, watched=watched)
        self.lease_script = script("lease", algorithms, watched=watched)
        self.limits = sets[0]
        self.limits_by_place: tuple[Limit, ...] = tuple(limit for limits in sets for limit in limits.limits)
        self.head = script_head(self.script, len(sets), 2 * len(sets) + 1)
        self.lease_head = script_head(self.lease_script, len(sets), 2 * len(sets) + 2)
        self.hold_script = script("hold", algorithms, watched=watched)
        self.hold_head = script_head(self.hold_script, len(sets), 2 * len(sets) + 3)
        self.names = tuple(name_of(limits) for limits in sets)
        self.name = self.names[0]
        self.suffix = tuple(b"}" + name + b"\r\n" for name in self.names)
        self.parameters = tuple(parameters(limits, now_us, charging=True) for limits in sets)
        self.tail = b"".join(map(encoded, self.parameters))

    def decision(self, reply: Any) -> Decision:
        """The decision in a script's reply."""
        try:
            if len(reply) != 5:
                if len(reply) >= 7:
                    return self._granting(*reply[:7])
                reply = _without_left(reply)
            binding, least, reset, retry, now = reply
            limit = self.limits_by_place[(binding if binding > 0 else -binding) - 1]
            if least < 0:
                return Decision(binding > 0, limit, 0, reset, 0, now, self.limits, overage=-least)
            return Decision(binding > 0, limit, least, reset, None if retry < 0 else retry, now, self.limits)
        except (TypeError, ValueError, IndexError):
            raise StoreUnavailable(f"unexpected reply from Redis to a charge: {str(reply)[:100]}", reason="garbage") from None

    def left(self, reply: Any) -> tuple[int, Sequence[int | None]] | None:
        """The units leased, and what is left of each limit after the charge; None where the reply does not have it."""
        if len(reply) not in (6, 8) or not isinstance(reply[-1], list) or len(reply[-1]) != len(self.limits_by_place):
            return None
        return (reply[5] if len(reply) == 8 else 0), reply[-1]

    def script_of(self, charge: Charge) -> Script:
        """The script that a charge runs."""
        return self.script if charge.lease is None else self.lease_script

    def _granting(self, binding: int, least: int, reset: int, retry: int, now: int, granted: int, ends: Any) -> Decision:
        limit = self.limits_by_place[(binding if binding > 0 else -binding) - 1]
        retry_after = None if retry < 0 else retry
        if least < 0:
            return Decision(binding > 0, limit, 0, reset, 0, now, self.limits, overage=-least)
        if type(ends) is list:
            return self._exhausted(Decision(binding > 0, limit, least, reset, retry_after, now, self.limits), *ends)
        if not granted:
            return Decision(binding > 0, limit, least, reset, retry_after, now, self.limits)
        return GrantingDecision(binding > 0, limit, least, reset, retry_after, now, self.limits, granted=granted, ends_us=ends)

    def _exhausted(
        self,
        decision: Decision,
        denied_by: int,
        left: int,
        replenished: int,
        passes: int,
        granted: int,
        ends: int,
        current: int,
        previous: int,
        start_s: int,
    ) -> Decision:
        allowed, limit, remaining, reset, retry, now = (
            decision.allowed,
            decision.binding,
            decision.remaining,
            decision.reset_after_us,
            decision.retry_after_us,
            decision.at_us,
        )
        passes_after = None if passes < 0 else passes
        denial = Decision(False, self.limits_by_place[denied_by - 1], left, replenished, passes_after, now, self.limits)
        if not granted:
            if not allowed:
                return decision
            return LastDecision(allowed, limit, remaining, reset, retry, now, self.limits, following=denial)
        window = self.limits_by_place[0]
        return GrantingDecision(
            allowed,
            limit,
            remaining,
            reset,
            retry,
            now,
            self.limits,
            granted=granted,
            ends_us=ends,
            ahead=Ahead(current, previous, start_s * US_PER_S + window.window_us, window.window_us, window.amount),
            following=denial,
        )


def _without_left(reply: Any) -> Any:
    if len(reply) != 6 or not isinstance(reply[5], list):
        raise ValueError(reply)
    return reply[:5]


def hold_command(template: CommandTemplate, keys: Sequence[bytes], cost: int, hold: bytes, numbers: bytes) -> bytes:
    """The command that opens a hold; see `hold.lua`.

    Args:
        template: of its counters.
        keys: of its counters.
        hold: the 12 bytes of its id.
        numbers: `hold_numbers`.

    Returns:
        One command.
    """
    cost_part = _COSTS[cost] if cost < 1000 else encoded(b"%d" % cost)
    key_part = encoded(keys[0]) if len(keys) == 1 else b"".join(map(encoded, keys))
    return b"%b%b%b%b$12\r\n%b\r\n%b" % (template.hold_head, key_part, template.tail, cost_part, hold, numbers)


@lru_cache(maxsize=1024)
def hold_numbers(ttl_us: int, most: int) -> bytes:
    """The last argument of `hold.lua`: after how many µs the hold expires, and how many a counter may have."""
    return encoded(msgspec.msgpack.encode((ttl_us, most)))


def charge_command(template: CommandTemplate, charge: Charge, tag: bytes) -> bytes:
    """The command for a charge.

    Args:
        template: of its counters.
        tag: the hash tag of the first counter's subject.

    Returns:
        One command.
    """
    cost = charge.cost
    cost_part = _COSTS[cost] if cost < 1000 else encoded(b"%d" % cost)
    suffixes = template.suffix
    head = template.head
    if charge.lease is not None:
        head = template.lease_head
        cost_part += _lease_part(charge.lease)
    # A key is "tg:{" + tag + suffix without its line's end: 4 and -2 bytes.
    if len(suffixes) == 1:
        suffix = suffixes[0]
        return b"".join((head, _KEY_HEADS[len(tag) + len(suffix) + 2], tag, suffix, template.tail, cost_part))
    (_, subject), (_, other_subject) = charge.counters[0], charge.counters[-1]
    if len(suffixes) == 2 and subject == other_subject:
        first, second = suffixes
        size = len(tag) + 2
        first_head, second_head = _KEY_HEADS[size + len(first)], _KEY_HEADS[size + len(second)]
        return b"".join((head, first_head, tag, first, second_head, tag, second, template.tail, cost_part))
    keys = []
    for (_, each), suffix in zip(charge.counters, suffixes, strict=True):
        own = tag if each == subject else hash_tag(each)
        keys.append(b"$%d\r\ntg:{%b%b" % (len(own) + len(suffix) + 2, own, suffix))
    return b"%b%b%b%b" % (head, b"".join(keys), template.tail, cost_part)


@lru_cache(maxsize=1024)
def _lease_numbers(want: int, divisor: int, ttl_us: int, ahead: int) -> bytes:
    return encoded(msgspec.msgpack.encode((want, divisor, ttl_us, ahead)))


def _lease_part(lease: LeaseRequest) -> bytes:
    return _lease_numbers(lease.want, lease.divisor, lease.ttl_us, lease.ahead)


def script_head(work: Script, keys: int, arguments: int) -> bytes:
    """How the command begins that calls a script, before its keys.

    Args:
        keys: how many.
        arguments: how many, keys included.
    """
    count = b"%d" % keys
    return b"*%d\r\n$7\r\nEVALSHA\r\n$40\r\n%b\r\n$%d\r\n%b\r\n" % (arguments + 3, work.sha.encode(), len(count), count)


def encoded(raw: bytes) -> bytes:
    """One part of a command."""
    return b"$%d\r\n%b\r\n" % (len(raw), raw)


def batch_command(work: Script, layout: Sequence[int], keys: Sequence[bytes], sets: Iterable[LimitSet]) -> bytes:
    """The command for several charges on one server; see `charge_many.lua`.

    Args:
        layout: for each charge how many counters it has, its cost, and which of `sets` are theirs, the first being 2.
        keys: of all counters, in order.
        sets: the limit sets in use.

    Returns:
        One command.
    """
    arguments = (msgspec.msgpack.encode(layout), *(parameters(limits, charging=True) for limits in sets))
    return encode_command("EVALSHA", work.sha, str(len(keys)), *keys, *arguments)


def absorb_command(work: Script, limits: LimitSet, subject: str, states: Sequence[State]) -> bytes:
    """The command that adds to a counter what was admitted elsewhere.

    Args:
        states: one for each limit, None for nothing.

    Returns:
        One command.
    """
    arguments = (parameters(limits), wire_states(limits, states))
    return encode_command("EVALSHA", work.sha, "1", key_of(limits, subject), *arguments)


def give_back_command(work: Script, returns: Sequence[LeaseReturn]) -> bytes:
    """The command that gives up leases; see `give_back.lua`.

    Args:
        returns: the leases; all their counters are on one server.

    Returns:
        One command.
    """
    keys: list[bytes] = []
    which: dict[LimitSet, int] = {}
    plan: list[int] = []
    for each in returns:
        plan += (len(each.counters), each.granted, each.unused, each.at_us, each.ends_us)
        for limits, subject in each.counters:
            keys += (key_of(limits, subject), reset_key_of(limits, subject))
            plan.append(which.setdefault(limits, len(which) + 2))
    arguments = (msgspec.msgpack.encode(plan), *(parameters(limits) for limits in which))
    return encode_command("EVALSHA", work.sha, str(len(keys)), *keys, *arguments)
