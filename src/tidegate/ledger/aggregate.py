"""Counts the units of checks between two writes. No check waits for anything, and memory is bounded."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Final, TypeAlias

from tidegate.counters.holds import HoldAccount
from tidegate.decision import Observation
from tidegate.latency import LatencyHistogram
from tidegate.ledger.caller_table import CallerTable
from tidegate.policy.limits import LimitSet
from tidegate.timestamps import now_us

MINUTE_US: Final = 60_000_000
MAX_ENTRIES: Final = 20_000
"""Maximum number of entries (rule, subject and API key) of a minute between two writes."""
MAX_SUMS: Final = 100_000
"""Maximum number of sums (rule and API key) of entries that did not fit."""
MAX_MINUTES: Final = 16
"""Maximum number of minutes between two writes; more come only if a clock jumps."""

Answer: TypeAlias = LimitSet | str | tuple[str, str] | None
"""What answered: limits; the name of the tier of which none applied, None without one; for a hold the names of tier and rule."""
EntryKey: TypeAlias = tuple[Answer, str | None, str, str]
"""What answered, the subject that it counted, the id of the API key and the customer (empty for none)."""
SumKey: TypeAlias = tuple[Answer, str, str]
"""The same without the subject."""


class Minute:
    """The units of one minute.

    Attributes:
        table: units by what answered, subject, API key and customer.
        sums: units of the entries that were removed from the table, by what answered, API key and customer.
        token: identifies the table as long as no entry is removed from it: `UsageMemo` remembers entries by it.
    """

    __slots__ = ("sums", "table", "token")

    def __init__(self, max_entries: int) -> None:
        self.table: CallerTable[EntryKey] = CallerTable(max_entries)
        self.sums: dict[SumKey, list[int]] = {}
        self.token = object()


class UsageCounts:
    """Counts units, and the latency of checks. For use in one event loop.

    Args:
        max_entries: maximum number of entries of a minute between two writes; if more come, those with the fewest units are
            counted without their subject.
        latency: durations of all checks.

    Attributes:
        unattributed: units that are counted without their API key and customer, because there were more than `MAX_SUMS` of them.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES, latency: LatencyHistogram | None = None) -> None:
        self.max_entries = max_entries
        self.unattributed = 0
        self._latency = latency
        self._latency_before = [] if latency is None else list(latency.counts)
        self._minutes: dict[int, Minute] = {}
        # The half-open interval of the current minute; empty before the first check.
        self._from_us = 0
        self._to_us = 0
        self._minute = Minute(max_entries)
        self._entries = self._minute.table.entries
        self._token = self._minute.token

    def __len__(self) -> int:
        """Number of entries counted since the last `take`."""
        return sum(len(minute.table.entries) + len(minute.sums) for minute in self._minutes.values())

    def observe(self, observation: Observation) -> None:
        """Count the units of one check. Costs 0.2 µs if the caller's last check had the same entry; see `bench/ledger.py`."""
        decision = observation.decision
        if decision is None:
            return
        cost = observation.cost
        if not cost or observation.held:
            return
        at_us = decision.at_us or now_us()  # a check without limits has no time of the store
        if not self._from_us <= at_us < self._to_us:
            self._select(at_us)
        answer, subject, memo = decision.limits or decision.unlimited_tier, observation.subject, observation.memo
        if memo is not None and memo.usage_subject is subject and memo.usage_answer is answer and memo.usage_token is self._token:
            entry = memo.usage_entry
        else:
            key = (answer, subject, observation.key_id, observation.customer)
            entry = self._entries.get(key) or self._add_entry(key)
            if memo is not None:
                memo.usage_subject = subject
                memo.usage_answer = answer
                memo.usage_token = self._token
                memo.usage_entry = entry
        if decision.allowed:
            entry[0] += cost
            if decision.overage:
                entry[2] += decision.overage
        else:
            entry[1] += cost

    def count_settled(self, account: HoldAccount, rule: str, units: int, over: int) -> None:
        """Count what a hold was charged, in the minute of its settlement. One that expires was charged nothing.

        Args:
            account: of the hold.
            rule: its name; empty for none.
            units: charged.
            over: those of them above a quota or a soft limit.
        """
        if not units:
            return
        at_us = now_us()
        if not self._from_us <= at_us < self._to_us:
            self._select(at_us)
        key = ((account.tier, rule), account.subject, account.key_id, account.customer)
        add_units(self._entries.get(key) or self._add_entry(key), (units, 0, over))

    def take(self) -> dict[int, Minute]:
        """The minutes counted since the last call, by their start; counting starts again from zero. Takes constant time."""
        finished, self._minutes = self._minutes, {}
        self._from_us = self._to_us = 0
        return finished

    def take_latency(self) -> list[int]:
        """Checks by bucket of `tidegate.latency` since the last call."""
        if self._latency is None:
            return []
        before, self._latency_before = self._latency_before, list(self._latency.counts)
        return [now - then for now, then in zip(self._latency_before, before, strict=True)]

    def _select(self, at_us: int) -> None:
        """Continue with the minute of a time: checks are not observed exactly in the order of their times."""
        minute_us = at_us - at_us % MINUTE_US
        minute = self._minutes.get(minute_us)
        if minute is None:
            if len(self._minutes) >= MAX_MINUTES:
                minute_us = _nearest(minute_us, sorted(self._minutes))
                minute = self._minutes[minute_us]
            else:
                minute = self._minutes[minute_us] = Minute(self.max_entries)
        self._minute = minute
        self._entries = minute.table.entries
        self._token = minute.token
        self._from_us, self._to_us = minute_us, minute_us + MINUTE_US

    def _add_entry(self, key: EntryKey) -> list[int]:
        entry, replaced = self._minute.table.add_key(key)
        if replaced is not None:
            # Nobody may add to the entry that was removed.
            self._token = self._minute.token = object()
            (answer, _, key_id, customer), units = replaced
            sums = self._minute.sums
            at: SumKey = (answer, key_id, customer)
            if at not in sums and len(sums) >= MAX_SUMS:
                at = (answer, "", "")
                self.unattributed += units[0] + units[1]
            add_units(sums.setdefault(at, [0, 0, 0]), units)
        return entry


def add_units(total: list[int], units: Sequence[int]) -> None:
    """Add units admitted, blocked and over."""
    total[0] += units[0]
    total[1] += units[1]
    total[2] += units[2]


def _nearest(minute_us: int, minutes: Sequence[int]) -> int:
    return minutes[max(bisect_right(minutes, minute_us) - 1, 0)]
