"""Checks that were decided at their deadline because a slow shard had not answered, and the answers that come afterwards.

A slow shard goes on counting: what was sent to it is charged or denied, and its reply comes late. So the reply is processed.

- *Admitted here and charged there*: it is counted; nothing is owed.
- *Admitted here and denied there*: what was admitted is owed to the store, and the denial is remembered: no more is admitted.
- *Denied here and charged there*: the units are prepaid. The next check of the same subject and cost uses them, without a call,
  within a second and within the windows in which they were charged (algorithms with windows; for others they are lost).
- *No reply can come any more*: what was admitted is owed.

What is admitted at a deadline has to be so little that the store will most probably charge it, whatever the other instances do
at the same time. Each reply says what remains; while that is less than half of the limit it is remembered, and always where
units are leased: checks that leases decide bring no replies, so the last one may be old. At a deadline an instance admits,
beyond what it knows to be charged, at most its share of what remained above a quarter of the limit: that quarter is a reserve
for what other instances may have used since; where they may have used more, by the last two answers, twice as much as they use
in the time since is the reserve; where this instance used leases since, twice what it used for each of the others. What was
seen in one span of time says little of another where the numbers are small: three may come where none were seen. Where nothing
is remembered, half of the limit was left at the last reply, if there was one: then it is a share of a quarter of the limit, and
one check in any case. Where one answer alone is known, of less than half of the limit, nothing is admitted once it is 0.2 s
old: it shows no rate. An old answer that shows no rate is never taken to leave more than half of the limit. A single instance
needs no reserve.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias

from tidegate.counters import Charge, GrantingDecision, LateAnswer
from tidegate.counters.redis.split_charge import await_late_answer
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import Algorithm, LimitSet

MAX_SCARCE: Final = 100_000
MAX_PREPAID: Final = 10_000
PREPAID_TTL_US: Final = 1_000_000
RETRY_US: Final = 500_000
"""`Retry-After` of a check denied at its deadline, µs: by then the reply has come or the connection is dropped."""
_ALONE_US: Final = 200_000
"""How long a single answer is used where less than half of the limit remained, µs: it shows no rate of the others."""
_RATE_OVER_US: Final = 100_000
"""Answers closer together than this, µs, are not compared."""
_WINDOWS: Final = (Algorithm.FIXED_WINDOW, Algorithm.SLIDING_WINDOW)
_Counters: TypeAlias = tuple[tuple[LimitSet, str], ...]


class _Scarce(NamedTuple):
    """What an answer said of which less than half of the limit remained; moments are monotonic µs.

    Args:
        until_us: it is known until then.
        remaining: units.
        window_until_us: until then no more can remain, but for units that are given back.
        sent_us: not later than the moment of the figure.
        at_us: the same by the store's clock.
        rate: units that all instances use in a second, at most, by the last answers; below 0 where one answer alone is known.
    """

    until_us: int
    remaining: int
    window_until_us: int
    sent_us: int
    at_us: int
    rate: float


class LateAnswers:
    """The checks of one instance that a slow shard has not answered.

    Args:
        now_us: returns monotonic µs.
        settle: called with each charge whose answer came, whether it was admitted at its deadline, when it was sent
            (monotonic µs), and the answer.

    Attributes:
        answers: number by outcome: `allowed`, `denied`, `lost`.
        used: checks that were allowed by prepaid units.
        prepaid: units charged for checks that were denied: by counters and cost, their expiry (monotonic µs) and the decision.
    """

    def __init__(
        self, now_us: Callable[[], int], settle: Callable[[Charge, bool, int, Decision | StoreUnavailable], None]
    ) -> None:
        self.answers = {"allowed": 0, "denied": 0, "lost": 0}
        self.used = 0
        self.prepaid: OrderedDict[tuple[_Counters, int], deque[tuple[int, Decision]]] = OrderedDict()
        self._now_us = now_us
        self._settle = settle
        self._scarce: OrderedDict[_Counters, _Scarce] = OrderedDict()
        self._outstanding: dict[_Counters, int] = {}
        self._waiting: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Number of answers that are still to come."""
        return len(self._waiting)

    def observe(self, counters: _Counters, decision: Decision, sent_us: int | None = None) -> None:
        """Remember that little remains; called for each such answer, in time or late.

        Args:
            decision: of the store.
            sent_us: when the charge was sent, monotonic µs; now where None.
        """
        if len(self._scarce) >= MAX_SCARCE and counters not in self._scarce:
            self._scarce.popitem(last=False)
        now_us, at_us, remaining, rate = self._now_us(), decision.at_us, decision.remaining or 0, -1.0
        before = self._scarce.get(counters)
        if before is not None and now_us < before.until_us:
            if before.at_us > at_us:
                return
            # Answers that come together say little of the rate: it does not fall at once.
            used, passed_us = max(before.remaining - remaining, 0), at_us - before.at_us
            rate = max(_at_most(used) * 1e6 / passed_us if passed_us >= _RATE_OVER_US else -1.0, before.rate / 2)
        until_us = now_us + decision.reset_after_us
        # A sliding window that has ended gives back more and more before all of it counts no longer.
        window_until_us = min(until_us, now_us + _window_left_us(counters, decision))
        sent_us = now_us if sent_us is None else sent_us
        self._scarce[counters] = _Scarce(until_us, remaining, window_until_us, sent_us, at_us, rate)

    def may_admit(self, charge: Charge, instances: int, uncharged: int = 0, leased: int | None = None) -> bool:
        """Whether a check may pass at its deadline.

        Args:
            instances: how many share the limits, 1 or more.
            uncharged: units that this instance admitted without the store since it last answered, as far as no answer is awaited.
            leased: units that it used from leases since then; None where nothing is leased. The answer is as old as they are:
                each other instance may have used twice as many in that time, and it is not known whether a store that is lost now
                had charged them.
        """
        capacity = min(limit.capacity for limits, _ in charge.counters for limit in limits.limits)
        outstanding = self._outstanding.get(charge.counters, 0) + uncharged + (leased or 0)
        # A single instance knows of all usage.
        reserve = max(capacity // 4, 2 * (leased or 0) * (instances - 1)) if instances > 1 else 0
        known = self._scarce.get(charge.counters)
        if known is not None and known.until_us > (now_us := self._now_us()):
            remaining = known.remaining
            if instances > 1:
                age_us = now_us - known.sent_us
                if known.rate < 0 and age_us > _ALONE_US:
                    if known.remaining * 2 < capacity:
                        return False
                    remaining = capacity // 2
                    if leased is not None:
                        reserve = max(reserve, 2 * math.ceil(_at_most(leased)) * (instances - 1))
                reserve = max(reserve, math.ceil(2 * known.rate * age_us / 1e6))
            return outstanding + charge.cost <= max(remaining - reserve, 0) // instances
        if not outstanding:
            return charge.cost <= max(capacity // instances, 1)
        return outstanding + charge.cost <= (capacity // 2 - reserve) // instances

    def remaining(self, counters: _Counters) -> int | None:
        """What remained at the store's last answer, as far as it is known that no more can remain now.

        Returns:
            Units; None where half of the limit or more remained, where there was no answer in the current window, and for
            algorithms without windows.
        """
        known = self._scarce.get(counters)
        return known.remaining if known is not None and self._now_us() < known.window_until_us else None

    def track(self, charge: Charge, late: LateAnswer, admitted: bool, started_us: int) -> None:
        """Process the answer when it comes.

        Args:
            late: as the store raised it.
            admitted: whether the check was admitted, and its units are to be counted.
            started_us: when the charge was sent, monotonic µs.
        """
        if admitted:
            self._outstanding[charge.counters] = self._outstanding.get(charge.counters, 0) + charge.cost
        task = asyncio.ensure_future(self._read(charge, late, admitted, started_us))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    def take_prepaid(self, charge: Charge) -> Decision | None:
        """Prepaid units for a check like this one.

        Returns:
            The store's decision; None where there is none.
        """
        key = (charge.counters, charge.cost)
        entries = self.prepaid.get(key)
        if entries is None:
            return None
        now_us = self._now_us()
        while entries and entries[0][0] <= now_us:
            entries.popleft()
        decision = entries.popleft()[1] if entries else None
        if not entries:
            del self.prepaid[key]
        self.used += decision is not None
        return decision

    def clear(self) -> None:
        """A counter was reset: what was remembered is no longer valid."""
        self._scarce.clear()
        self.prepaid.clear()

    def sweep(self) -> None:
        """Drop prepaid units that have expired."""
        now_us = self._now_us()
        while self.prepaid:
            entries = self.prepaid[next(iter(self.prepaid))]
            if entries[-1][0] > now_us:
                return
            self.prepaid.popitem(last=False)

    async def close(self, timeout_s: float) -> None:
        """Wait for the answers still to come; those that do not come count as lost."""
        if self._waiting:
            await asyncio.wait(tuple(self._waiting), timeout=timeout_s)
        waiting = tuple(self._waiting)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    async def _read(self, charge: Charge, late: LateAnswer, admitted: bool, started_us: int) -> None:
        answer: Decision | StoreUnavailable
        try:
            answer = await await_late_answer(late)
        except StoreUnavailable as error:
            answer = error
        except asyncio.CancelledError:
            answer = StoreUnavailable("the instance shut down before the answer came", reason="timeout")
        self._resolve(charge, admitted, started_us, answer)

    def _resolve(self, charge: Charge, admitted: bool, started_us: int, answer: Decision | StoreUnavailable) -> None:
        counters = charge.counters
        if admitted:
            left = self._outstanding.get(counters, 0) - charge.cost
            if left > 0:
                self._outstanding[counters] = left
            else:
                self._outstanding.pop(counters, None)
        if isinstance(answer, StoreUnavailable):
            self.answers["lost"] += 1
        else:
            self.answers["allowed" if answer.allowed else "denied"] += 1
            self.observe(counters, answer.after_grant() if isinstance(answer, GrantingDecision) else answer, started_us)
            if answer.allowed and charge.cost and not admitted:
                self._keep_prepaid(charge, answer)
        self._settle(charge, admitted, started_us, answer)

    def _keep_prepaid(self, charge: Charge, decision: Decision) -> None:
        left_us = PREPAID_TTL_US
        for limits, _ in charge.counters:
            if limits.algorithm not in _WINDOWS:
                return
            for limit in limits.limits:
                # A month begins on a whole second, where a window of one second begins too.
                window_us = PREPAID_TTL_US if limit.calendar_month else limit.window_us
                left_us = min(left_us, window_us - decision.at_us % window_us)
        if len(self.prepaid) >= MAX_PREPAID:
            self.prepaid.popitem(last=False)
        entries = self.prepaid.setdefault((charge.counters, charge.cost), deque())
        # The caller has taken the grant; the decision alone is used again.
        plain = decision.without_grant() if isinstance(decision, GrantingDecision) else decision
        entries.append((self._now_us() + left_us, plain))


def _at_most(seen: int) -> float:
    """How many may come in a time like one in which so many were seen: chance makes much more of small numbers, 3 of none."""
    return seen + 2 * math.sqrt(seen) + 3


def _window_left_us(counters: _Counters, decision: Decision) -> int:
    """µs until the window that a decision is about ends; 0 where not all limits count in plain windows."""
    binding = decision.binding
    if binding is None or any(limits.algorithm not in _WINDOWS or not limits.plain for limits, _ in counters):
        return 0
    if binding.is_calendar:
        return decision.reset_after_us
    return binding.window_us - decision.at_us % binding.window_us
