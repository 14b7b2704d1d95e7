"""Denial cache: a subject that was denied until T is denied until T without a call to the store.

A denial is remembered for its cost: a smaller cost may pass, a larger one passes later or never. The cache is never stricter than
the store: the time counts from before the call, and until T nothing that others consume can make room. A raised limit or a
re-loaded policy makes new limit sets, and a denial belongs to its own set; when a counter is reset, `clear` is called. Where
units are leased, others may give some back before T: then the store is asked again after the life of a lease, after twice as long
where it denies again before T, and so on; the denial is used until T only where the store does not answer.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from tidegate.decision import Decision
from tidegate.policy.limits import LimitSet

MAX_DENIALS: Final = 100_000
SWEEP_STEPS: Final = 2_000
"""Most denials that one sweep examines: about 1 ms."""
_Counters = tuple[tuple[LimitSet, str], ...]


class DenialCache:
    """At most `max_entries` denials; beyond, the oldest go first.

    Args:
        max_entries: 1 or more; each costs about 500 bytes.
    """

    def __init__(self, max_entries: int = MAX_DENIALS) -> None:
        self.max_entries = max_entries
        self.answered = 0
        # Ordered: finding the first key of a plain dict walks the gaps of all that were deleted before it.
        self.entries: OrderedDict[tuple[_Counters, int], tuple[int, Decision, int, int]] = OrderedDict()

    def __len__(self) -> int:
        """Number of denials, expired ones included."""
        return len(self.entries)

    def find(self, counters: _Counters, cost: int, now_us: int, *, unanswered: bool = False) -> Decision | None:
        """The denial of a charge, with its times as of now.

        Args:
            now_us: monotonic µs.
            unanswered: whether the store was asked and has not answered.

        Returns:
            The denial; None where the store, or what decides without it, must.
        """
        entry = self.entries.get((counters, cost))
        if entry is None:
            return None
        until_us, decision, retry_at_us, _ = entry
        if until_us <= now_us and not (unanswered and now_us < retry_at_us):
            if retry_at_us <= now_us:
                del self.entries[counters, cost]
            return None
        self.answered += 1
        left_us = retry_at_us - now_us
        passed_us = (decision.retry_after_us or 0) - left_us
        return Decision(
            False,
            decision.binding,
            decision.remaining,
            max(decision.reset_after_us - passed_us, left_us),
            left_us,
            decision.at_us + passed_us,
            decision.limits,
        )

    def remember(self, counters: _Counters, cost: int, decision: Decision, started_us: int, ttl_us: int | None = None) -> None:
        """Remember a denial of the store.

        Args:
            decision: the store's.
            started_us: monotonic µs before the call.
            ttl_us: for how long, at most, the first time; until the retry where None.
        """
        retry_us = decision.retry_after_us
        if not retry_us:
            return
        before = self.entries.pop((counters, cost), None)
        if ttl_us is not None and before is not None and before[0] <= started_us < before[2]:
            # What others had leased at the first denial has come back by now, and was used.
            ttl_us = 2 * before[3]
        if len(self.entries) >= self.max_entries:
            self.entries.popitem(last=False)
        valid_us = retry_us if ttl_us is None else min(retry_us, ttl_us)
        self.entries[counters, cost] = (started_us + valid_us, decision, started_us + retry_us, valid_us)

    def sweep(self, now_us: int, steps: int = SWEEP_STEPS) -> None:
        """Drop expired denials, a bounded number at a time.

        Args:
            now_us: monotonic µs.
            steps: most denials to examine; those that are still valid move to the end, so that the next sweep examines others.
        """
        entries = self.entries
        for _ in range(min(steps, len(entries))):
            key = next(iter(entries))
            if entries[key][2] <= now_us:
                del entries[key]
            else:
                entries.move_to_end(key)

    def clear(self) -> None:
        """Drop all: a counter was reset."""
        self.entries.clear()
