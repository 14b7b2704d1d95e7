"""Reservations on Redis: one script call for each, on the one shard of its subject (`reserve.lua`, `release.lua`).

A caller that reserves waits anyway: its calls have the deadline of commands that no check waits for, so that an answer that comes
late is not lost.
"""

from __future__ import annotations

import binascii
import hashlib
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from tidegate.algorithms.reservations import RESERVABLE
from tidegate.counters import Counters
from tidegate.counters.holds import new_id
from tidegate.counters.redis.commands import LATE_TIMEOUT_S, Command, RedisCommands
from tidegate.counters.redis.error_replies import ScriptFailed, shown
from tidegate.counters.redis.keyspace import hash_tag, key_of, name_of, reset_key_of, slot_of_tag
from tidegate.counters.redis.resp import encode_command
from tidegate.counters.redis.scripts import Script, layout_names, parameters, script
from tidegate.counters.reservations import Reservation, ReservationHandle, ReservedCounter, not_found
from tidegate.decision import Decision
from tidegate.errors import BadRequest, StoreUnavailable
from tidegate.policy.limits import AnyAlgorithm, LimitSet

_ALGORITHMS: dict[str, AnyAlgorithm] = layout_names(RESERVABLE)


class RedisReservations(RedisCommands):
    """`ReservingCounterStore` and `NamedReservingStore` on Redis. Parameters: see `RedisCounters`."""

    async def reserve(self, counters: Counters, cost: int, ahead_us: int) -> Reservation:
        """See `ReservingCounterStore.reserve`.

        Raises:
            BadRequest: if the counters lie on several shards.
        """
        await self.start()
        if self._is_spread([hash_tag(subject) for _, subject in counters]):
            raise BadRequest(
                "these limits count by different subjects, which lie on different shards of the Redis cluster, and cannot be "
                "reserved together: check, and try again after retry_after",
                field="subject",
            )
        return await self._reserve(counters, cost, ahead_us)

    async def reserve_named(
        self, counters: Counters, cost: int, ahead_us: int
    ) -> tuple[Reservation, ReservationHandle | None] | None:
        """See `NamedReservingStore.reserve_named`."""
        await self.start()
        if self._is_spread([hash_tag(subject) for _, subject in counters]):
            return None
        charged = tuple(ReservedCounter(hash_tag(subject), name_of(limits), parameters(limits)) for limits, subject in counters)
        handle = ReservationHandle(new_id(), cost, 0, charged)
        place = await self._reserve(counters, cost, ahead_us, (_remembered_key(handle),))
        return place, msgspec.structs.replace(handle, at_us=place.at_us) if place.wait_s and cost else None

    async def release_named(self, handle: ReservationHandle) -> bool:
        """See `NamedReservingStore.release_named`."""
        await self.start()
        charged = handle.counters
        if not charged or self._is_spread([each.tag for each in charged]):
            raise not_found()
        work = _release_script([each.parameters for each in charged])
        keys = [b"tg:{%b}%b" % (each.tag, each.name) for each in charged]
        every = (*keys, *(key + b".reset" for key in keys), _remembered_key(handle))
        # What is remembered says when it was reserved, and for when.
        numbers = (b"%d" % handle.cost, b"0", b"%d" % handle.at_us)
        command = encode_command("EVALSHA", work.sha, str(len(every)), *every, *(each.parameters for each in charged), *numbers)
        reply = (await self._each([(charged[0].tag, command, work)], wait_late=True))[0]
        if isinstance(reply, StoreUnavailable):
            raise reply
        if reply == -1:
            raise not_found()
        return bool(reply) and reply == sum(map(_limits_in, charged))

    async def _reserve(self, counters: Counters, cost: int, ahead_us: int, remembered: Sequence[bytes] = ()) -> Reservation:
        tag = hash_tag(counters[0][1])
        work = script("reserve", frozenset(limits.algorithm for limits, _ in counters))
        keys = [*(key_of(limits, subject) for limits, subject in counters), *remembered]
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

    def _is_spread(self, tags: Sequence[bytes]) -> bool:
        """Whether subjects with these hash tags may lie on several shards."""
        return len(tags) > 1 and self._require_topology().sharded and len({slot_of_tag(tag) for tag in tags}) > 1

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


def _remembered_key(handle: ReservationHandle) -> bytes:
    """Where a reservation is remembered: under a digest of what its id says, but for the moment, so that no id can be changed."""
    said = msgspec.msgpack.encode((handle.id, handle.cost, handle.counters))
    digest = binascii.b2a_base64(hashlib.blake2b(said, digest_size=18).digest(), newline=False)
    return b"tg:{%b}%b.reserved" % (handle.counters[0].tag, digest)


def _release_script(sent: Sequence[bytes]) -> Script:
    """The script for parameters that came with an id.

    Raises:
        ReservationNotFound: if they are not those of limits that can be reserved.
    """
    try:
        algorithms = frozenset(_ALGORITHMS[str(msgspec.msgpack.decode(each)[0])] for each in sent)
    except (msgspec.MsgspecError, KeyError, IndexError, TypeError):
        raise not_found() from None
    return script("release", algorithms)


def _limits_in(charged: ReservedCounter) -> int:
    """How many limits parameters have."""
    name, *values = msgspec.msgpack.decode(charged.parameters)
    return len(values) // (4 if _ALGORITHMS[name].is_bucket else 2)
