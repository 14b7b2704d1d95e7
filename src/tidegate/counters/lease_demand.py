"""How much of a subject to lease, and for how long, by how often this instance checks it. No I/O; one event loop.

- *Busy subjects*: a lease lives for `ttl_us`. What is wanted grows to what the last lease would have needed until its end where
  that ran out early, at most eight times as much; it falls to what was used, or half, where units remained.
- *Slow subjects*, checked less than `_CHECKS` times in that life: one lease for so many checks, which lives longer, a minute at
  most. Without that each of their checks would be a call. Not for buckets: those of an instance that dies would be held back for
  as long.
- The first check of a subject, or the first after a long pause, leases nothing: most do not come again soon.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from tidegate.counters import Counters

MAX_WANT: Final = 1_000_000
_MAX_GROWTH: Final = 8
_CHECKS: Final = 16
_LONGER: Final = 12
"""Leases of slow subjects live so many times as long as others, at most."""
_MAX_LIFE_US: Final = 60_000_000
_PAUSES: Final = 3
"""A subject whose checks are so rare that fewer would use its lease is not leased."""
_IDLE_PAUSES: Final = 6


class Wish(NamedTuple):
    """What to lease.

    Args:
        units: 1 or more.
        life_us: of the lease.
        idle_us: after so long without use it is given back.
        slow: whether it lives longer than those of busy subjects.
        ahead: units that are used while a lease of a busy subject lives, by the pauses between checks; 0 where few.
    """

    units: int
    life_us: int
    idle_us: int
    slow: bool
    ahead: int


class LeaseDemand:
    """What this instance knows of the demand of its subjects.

    Args:
        ttl_us: life of the leases of busy subjects.
        max_subjects: most subjects that are known.
    """

    def __init__(self, ttl_us: int, max_subjects: int) -> None:
        self._ttl_us = ttl_us
        self._max_subjects = max_subjects
        self._max_life_us = max(ttl_us, min(_LONGER * ttl_us, _MAX_LIFE_US))
        # By hash: subjects that share one are leased a little early.
        # Since when, the pause between two checks (-1: unknown), units wanted.
        self._known: dict[int, tuple[int, int, int]] = {}

    def answered(self, counters: Counters, now_us: int) -> None:
        """The store decided a check."""
        key = hash(counters)
        known = self._known.get(key)
        if known is None or now_us - known[0] > self._longest_pause_us:
            self._note(key, now_us, -1, 0)
            return
        at_us, pause_us, units = known
        passed_us = now_us - at_us
        self._note(key, now_us, passed_us if pause_us < 0 else (pause_us + passed_us) // 2, units)

    def ran_out(self, counters: Counters, units: int, held_us: int, now_us: int) -> None:
        """A lease was used up, or nearly.

        Args:
            units: of it.
            held_us: since its request was sent.
        """
        pause_us = held_us // units
        _, _, wanted = self._known.get(hash(counters), (0, 0, 0))
        if 2 * held_us < self._ttl_us:
            needed = units * self._ttl_us // max(held_us, 1)
            wanted = max(wanted, min(needed, _MAX_GROWTH * units, MAX_WANT))
        self._note(hash(counters), now_us, pause_us, wanted)

    def left_over(self, counters: Counters, units: int, used: int, held_us: int, now_us: int) -> None:
        """A lease was given up with units in it.

        Args:
            units: of it.
            used: of these.
            held_us: since its request was sent.
        """
        self._note(hash(counters), now_us, held_us // max(used, 1), max(used, units // 2))

    def wish(self, counters: Counters, cost: int, now_us: int) -> Wish | None:
        """What to lease with the next check of a subject, or for it.

        Args:
            cost: of the check, 1 or more.

        Returns:
            None for nothing.
        """
        known = self._known.get(hash(counters))
        if known is None or now_us - known[0] > self._longest_pause_us:
            return None
        at_us, pause_us, units = known
        pause_us = max(now_us - at_us if pause_us < 0 else max(pause_us, (now_us - at_us) // 2), 1)
        ahead = min(cost * self._ttl_us // pause_us, MAX_WANT)
        if _CHECKS * pause_us <= self._ttl_us or any(limits.algorithm.is_bucket for limits, _ in counters):
            first = cost * min(self._ttl_us // pause_us, _MAX_GROWTH)
            return Wish(min(max(units, first, 2 * cost), MAX_WANT), self._ttl_us, self._ttl_us // 2, False, ahead)
        life_us = min(_CHECKS * pause_us, self._max_life_us)
        checks = life_us // pause_us
        if checks < _PAUSES:
            return None
        idle_us = max(_IDLE_PAUSES * pause_us, self._ttl_us // 2)
        return Wish(min(cost * checks, MAX_WANT), life_us, idle_us, True, ahead)

    @property
    def _longest_pause_us(self) -> int:
        return self._max_life_us // _PAUSES

    def _note(self, key: int, at_us: int, pause_us: int, units: int) -> None:
        if len(self._known) >= self._max_subjects and key not in self._known:
            # The busy ones are known again after a few checks.
            self._known.clear()
        self._known[key] = (at_us, pause_us, units)
