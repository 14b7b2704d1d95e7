"""Reservations on Redis: one script call for each, on the one shard of its subject (`reserve.lua`, `release.lua`).

A caller that reserves waits anyway: its calls have the deadline of commands that no check waits for, so that an answer that comes
late is not lost.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tidegate.counters import Counters
from tidegate.counters.redis.commands import LATE_TIMEOUT_S, Command, RedisCommands
from tidegate.counters.redis.error_replies import ScriptFailed, shown
from tidegate.counters.redis.keyspace import hash_tag, key_of, reset_key_of, slot_of_tag
from tidegate.counters.redis.resp import encode_command
from tidegate.counters.redis.scripts import parameters, script
from tidegate.counters.reservations import Reservation
from tidegate.decision import Decision
from tidegate.errors import BadRequest, StoreUnavailable
from tidegate.policy.limits import LimitSet


class RedisReservations(RedisCommands):
    """`ReservingCounterStore` on Redis. Parameters: see `RedisCounters`."""

    async def reserve(self, counters: Counters, cost: int, ahead_us: int) -> Reservation:
        """See `ReservingCounterStore.reserve`.

        Raises:
            BadRequest: if the counters lie on several shards.
        """
        await self.start()
        tag = self._only_tag(counters)
        work = script("reserve", frozenset(limits.algorithm for limits, _ in counters))
        keys = [key_of(limits, subject) for limits, subject in counters]
        arguments = (*(parameters(limits) for limits, _ in counters), b"%d" % cost, b"%d" % ahead_us)
        sent: Command = (tag, encode_command("EVALSHA", work.sha, str(len(keys)), *keys, *arguments), work)
        reply = (await self._each([sent], wait_late=True))[0]
        if isinstance(reply, ScriptFailed):
            await self._reset_corrupt(counters, cost, time.monotonic() + LATE_TIMEOUT_S)
            reply = (await self._each([sent], wait_late=True))[0]
        if isinstance(reply, StoreUnavailable):
            raise reply
        return _reservation(reply, counters, cost)

    async def release(self, reservation: Reservation) -> bool:
        """See `ReservingCounterStore.release`."""
        await self.start()
        counters = reservation.counters
        work = script("release", frozenset(limits.algorithm for limits, _ in counters))
        keys = [key_of(*each) for each in counters] + [reset_key_of(*each) for each in counters]
        moments = (reservation.cost, reservation.decision.at_us, reservation.at_us)
        arguments = (*(parameters(limits) for limits, _ in counters), *(b"%d" % number for number in moments))
        command = encode_command("EVALSHA", work.sha, str(len(keys)), *keys, *arguments)
        reply = (await self._each([(hash_tag(counters[0][1]), command, work)], wait_late=True))[0]
        if isinstance(reply, StoreUnavailable):
            raise reply
        return bool(reply == sum(len(limits.limits) for limits, _ in counters))

    def _only_tag(self, counters: Counters) -> bytes:
        tag = hash_tag(counters[0][1])
        if self._require_topology().sharded and len({slot_of_tag(hash_tag(subject)) for _, subject in counters}) > 1:
            raise BadRequest(
                "these limits count by different subjects, which lie on different shards of the Redis cluster, and cannot be "
                "reserved together: check, and try again after retry_after",
                field="subject",
            )
        return tag

    async def _reset_corrupt(self, counters: Sequence[tuple[LimitSet, str]], cost: int, deadline: float) -> bool:
        raise NotImplementedError


def _reservation(reply: Any, counters: Counters, cost: int) -> Reservation:
    try:
        binding, least, reset, retry, now, moment = reply
        places = [limit for limits, _ in counters for limit in limits.limits]
        limit = places[abs(binding) - 1]
        if binding < 0:
            denial = Decision(False, limit, least, reset, None if retry < 0 else retry, now, counters[0][0])
            return Reservation(denial, cost=cost)
        return Reservation(Decision(True, limit, least, reset, 0, now, counters[0][0]), counters, cost, moment)
    except (TypeError, ValueError, IndexError):
        raise StoreUnavailable(f"unexpected reply from Redis to a reservation: {shown(reply)}", reason="garbage") from None
