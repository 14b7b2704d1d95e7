"""Counts the units of checks between two writes. No check waits for anything, and memory is bounded.

Most checks of a caller are answered by one rule, which counts one subject: these units are added in the cached caller itself
(`UsageMemo`), which the check has read anyway. The first other rules that answer it get entries there too, and everything else is
counted in a `CallerTable`. The buffer of the writer adds these parts up.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

from tidegate.counters.holds import HoldAccount
from tidegate.latency import LatencyHistogram
from tidegate.ledger.caller_table import CallerTable, Entry
from tidegate.observation import Observation, PassedCheck, UsageMemo
from tidegate.policy.limits import LimitSet
from tidegate.timestamps import now_us

MINUTE_US: Final = 60_000_000
MAX_ENTRIES: Final = 20_000
"""Maximum number of entries of a minute between two writes: as many in callers, for the rules that answered them first; as many
there for other rules; and as many in the table."""
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
Units: TypeAlias = tuple[int, int, int]
"""Units admitted, blocked and over."""


class Minute:
    """The units of one minute.

    Args:
        start_us: its start, µs since the epoch.
        max_entries: as of `UsageCounts`.

    Attributes:
        table: units by what answered, subject, API key and customer, of checks that no caller counts.
        sums: units of the entries that were removed from the table, by what answered, API key and customer.
        taken: whether a write has begun: no check is counted here any more.
    """

    __slots__ = ("_finished", "_memos", "_others", "max_entries", "start_us", "sums", "table", "taken")

    def __init__(self, start_us: int, max_entries: int) -> None:
        self.start_us = start_us
        self.max_entries = max_entries
        self.table: CallerTable[EntryKey] = CallerTable(max_entries)
        self.sums: dict[SumKey, list[int]] = {}
        self.taken = False
        self._memos: list[UsageMemo] = []
        self._others = 0
        # Of callers that count another minute by now.
        self._finished: list[tuple[EntryKey, Units]] = []

    def __len__(self) -> int:
        """Number of entries and sums."""
        return len(self._memos) + self._others + len(self.table.entries) + len(self.sums)

    def begin(self, memo: UsageMemo, answer: Answer, subject: str | None) -> bool:
        """Begin counting a caller's checks in its memo, if there is room and it does not count a later minute.

        Args:
            answer: what answered the check.
            subject: whom it counted.

        Returns:
            Whether it counts this minute now; its units are 0 then.
        """
        counted: Minute | None = memo.usage_minute
        if len(self._memos) >= self.max_entries or (
            counted is not None and counted.start_us >= self.start_us and not counted.taken
        ):
            return False
        if counted is not None:
            counted._finished.extend(counted._end(memo))
        self._memos.append(memo)
        memo.usage_minute = self
        memo.usage_answer = answer
        memo.usage_subject = subject
        return True

    def other_entry(self, memo: UsageMemo, answer: Answer, subject: str | None) -> Entry | None:
        """The entry of a caller of this minute for a rule that answered it later.

        Returns:
            None if it is of another subject, or there is no room.
        """
        others = memo.usage_others
        if others is None:
            others = memo.usage_others = {}
        entry: Entry | None = others.get(answer)
        if entry is None:
            if self._others >= self.max_entries:
                return None
            self._others += 1
            entry = others[answer] = Entry(subject)
        elif entry.subject is not subject and entry.subject != subject:
            return None
        return entry

    def table_entry(self, key: EntryKey) -> tuple[Entry, int]:
        """The entry of the table for a key.

        Returns:
            It, and the units that were added to `sums` without API key and customer, because there were more than `MAX_SUMS`.
        """
        entry = self.table.entries.get(key)
        if entry is not None:
            return entry, 0
        entry, replaced = self.table.add_key(key)
        if replaced is None:
            return entry, 0
        (answer, _, key_id, customer), removed = replaced
        at: SumKey = (answer, key_id, customer)
        unattributed = 0
        if at not in self.sums and len(self.sums) >= MAX_SUMS:
            at = (answer, "", "")
            unattributed = removed.admitted + removed.blocked
        add_units(self.sums.setdefault(at, [0, 0, 0]), removed.units)
        return entry, unattributed

    def rows(self) -> Iterator[tuple[EntryKey, Units]]:
        """Units with what they are counted for, of a minute that was taken; callers count another minute afterwards.

        Checks may be counted, in other minutes, while this runs. A key may come several times.
        """
        for memo in self._memos:
            if memo.usage_minute is self:
                yield from self._end(memo)
        yield from self._finished
        for key, entry in self.table.entries.items():
            yield key, entry.units

    def _end(self, memo: UsageMemo) -> list[tuple[EntryKey, Units]]:
        """End counting in a memo; returns what it counted."""
        key_id, customer = memo.key_id, memo.customer
        units = memo.usage_admitted, memo.usage_blocked, memo.usage_over
        ended: list[tuple[EntryKey, Units]] = [((memo.usage_answer, memo.usage_subject, key_id, customer), units)]
        if memo.usage_others is not None:
            ended += [((answer, entry.subject, key_id, customer), entry.units) for answer, entry in memo.usage_others.items()]
            memo.usage_others = None
        memo.usage_admitted = memo.usage_blocked = memo.usage_over = 0
        memo.usage_minute = memo.usage_answer = memo.usage_subject = None
        return ended


class UsageCounts:
    """Counts units, and the latency of checks. For use in one event loop.

    Args:
        max_entries: maximum number of entries of a minute between two writes, of each of the three kinds of `MAX_ENTRIES`; of the
            table, if more come, those with the fewest units are counted without their subject.
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
        self._minute = Minute(0, max_entries)

    def __len__(self) -> int:
        """Number of entries counted since the last `take`."""
        return sum(len(minute) for minute in self._minutes.values())

    def observe(self, observation: Observation) -> None:
        """Count the units of one check. Costs 0.2 µs if the caller counts it; see `bench/ledger.py`."""
        decision = observation.decision
        if decision is None:
            return
        cost = observation.cost
        if not cost or observation.held:
            return
        at_us = decision.at_us or now_us()  # a check without limits has no time of the store
        if not self._from_us <= at_us < self._to_us:
            self._select(at_us)
        memo, answer = observation.memo, decision.limits or decision.unlimited_tier
        if (
            memo is not None
            and memo.usage_minute is self._minute
            and memo.usage_answer is answer
            and memo.usage_subject is observation.subject
        ):
            if decision.allowed:
                memo.usage_admitted += cost
                if decision.overage:
                    memo.usage_over += decision.overage
            else:
                memo.usage_blocked += cost
            return
        if memo is not None and memo.usage_minute is not self._minute and self._minute.begin(memo, answer, observation.subject):
            if decision.allowed:
                memo.usage_admitted, memo.usage_over = cost, decision.overage
            else:
                memo.usage_blocked = cost
            return
        entry = self._entry(memo, answer, observation)
        if decision.allowed:
            entry.admitted += cost
            if decision.overage:
                entry.over += decision.overage
        else:
            entry.blocked += cost

    def observe_passed(self, passed: Sequence[PassedCheck]) -> None:
        """As `observe`, for several checks that passed."""
        from_us, to_us, minute = self._from_us, self._to_us, self._minute
        for decision, latency_ns, cost, subject, memo in passed:
            if (
                memo.usage_minute is minute
                and from_us <= decision.at_us < to_us
                and memo.usage_answer is decision.limits
                and memo.usage_subject is subject
                and not decision.overage
            ):
                memo.usage_admitted += cost
            else:
                self.observe(
                    Observation(decision, None, latency_ns, (), subject, None, cost, memo.key_id, memo.customer, (), memo)
                )
                from_us, to_us, minute = self._from_us, self._to_us, self._minute

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
        entry, unattributed = self._minute.table_entry(((account.tier, rule), account.subject, account.key_id, account.customer))
        self.unattributed += unattributed
        entry.admitted += units
        entry.over += over

    def take(self) -> list[Minute]:
        """The minutes counted since the last call; counting starts again from zero. Takes constant time."""
        finished, self._minutes = list(self._minutes.values()), {}
        for minute in finished:
            minute.taken = True
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
                minute = self._minutes[minute_us] = Minute(minute_us, self.max_entries)
        self._minute = minute
        self._from_us, self._to_us = minute_us, minute_us + MINUTE_US

    def _entry(self, memo: UsageMemo | None, answer: Answer, observation: Observation) -> Entry:
        """Where a check is counted that is not counted in its caller's memo."""
        minute = self._minute
        if memo is not None and memo.usage_minute is minute:
            other: Entry | None = minute.other_entry(memo, answer, observation.subject)
            if other is not None:
                return other
        entry, unattributed = minute.table_entry((answer, observation.subject, observation.key_id, observation.customer))
        self.unattributed += unattributed
        return entry


def add_units(total: list[int], units: Sequence[int]) -> None:
    """Add units admitted, blocked and over."""
    total[0] += units[0]
    total[1] += units[1]
    total[2] += units[2]


def _nearest(minute_us: int, minutes: Sequence[int]) -> int:
    return minutes[max(bisect_right(minutes, minute_us) - 1, 0)]
