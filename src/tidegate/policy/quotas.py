"""Quotas such as `100000/month`: what a plan sells, counted in fixed periods by every request of a tier, or of a rule.

A quota starts anew with each period, which an anchor places (see `periods`); `overage` says whether requests above it pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from tidegate.errors import PolicyError
from tidegate.policy.fields import short
from tidegate.policy.limits import MAX_EXACT, Limit, LimitSet, OnFailure, QuotaAlgorithm
from tidegate.policy.periods import Period, PeriodAnchor
from tidegate.policy.shared_limits import share
from tidegate.timestamps import US_PER_S

MAX_QUOTA: Final = 10**12
MAX_OVERAGE_PERCENT: Final = 10_000
UNBOUNDED: Final = MAX_EXACT - 1
"""Most units of a quota whose overage has no end: more than any period can count."""
MAX_QUOTAS: Final = len(Period)

_QUOTA: Final = re.compile(r"\s*([0-9_]{1,20})(?:\s*/\s*|\s+per\s+)([0-9]*)\s*([A-Za-z]+)\s*", re.ASCII)
_PERIOD_OF: Final = {
    **{period.value: period for period in Period},
    **{f"{period.value}s": period for period in Period},
    **{period.value[0]: period for period in Period if period is not Period.MONTH},
    "m": Period.MINUTE,
    "sec": Period.SECOND,
    "min": Period.MINUTE,
}
_PERCENT: Final = re.compile(r"([0-9]{1,6})\s*%", re.ASCII)


class Quota(msgspec.Struct, frozen=True, gc=False):
    """`amount` units in each period.

    Args:
        amount: 1 to 1,000,000,000,000.
        period: its kind.
    """

    amount: int
    period: Period

    @classmethod
    def parse(cls, text: object) -> Quota:
        """Read `100000/month` or `5000 per day`.

        Args:
            text: the quota as written in a policy.

        Raises:
            PolicyError: naming the text and the forms that are understood.
        """
        match = _QUOTA.fullmatch(text) if isinstance(text, str) and len(text) <= 80 else None
        if match is None:
            if isinstance(text, str) and "burst" in text.lower():
                raise PolicyError(f"quota {short(text)} has a burst, which a quota cannot give: put bursts into 'limits'")
            raise PolicyError(f"quota {short(text)} is not understood: write '100000/month' or '5000/day'")
        amount_text, count, unit = match.groups()
        try:
            amount = int(amount_text)
        except ValueError:
            amount = 0
        if not 1 <= amount <= MAX_QUOTA:
            raise PolicyError(f"quota {text!r}: the amount must be a whole number from 1 to {MAX_QUOTA}")
        period = _PERIOD_OF.get(unit.lower())
        if period is None:
            raise PolicyError(
                f"quota {text!r} has the unknown period {unit!r}: use second, minute, hour, day, week, month or year"
            )
        if count not in ("", "1"):
            raise PolicyError(
                f"quota {text!r}: a quota is for one {period} at a time: write '{amount}/{period}', or put a limit of {count} "
                f"{period}s into 'limits'"
            )
        return cls(amount, period)

    @property
    def text(self) -> str:
        """The quota in the form that `parse` reads."""
        return f"{self.amount}/{self.period}"

    def __str__(self) -> str:
        return self.text


class Overage(msgspec.Struct, frozen=True, gc=False):
    """Requests above a quota pass and are reported as over.

    Args:
        percent: up to so many percent above the quota, 1 to 10,000; None for without end.
    """

    percent: int | None = None

    @classmethod
    def parse(cls, value: object) -> Overage | None:
        """Read the field `overage` of a policy: `true`, `false`, or a table such as `{ up_to = "20%" }`.

        Returns:
            The overage; None where requests above the quota are denied.

        Raises:
            PolicyError: naming the value and the forms that are understood.
        """
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if not isinstance(value, Mapping) or set(value) != {"up_to"}:
            raise PolicyError(f'overage {short(value)} is not understood: write true, or {{ up_to = "20%" }}')
        match = _PERCENT.fullmatch(value["up_to"]) if isinstance(value["up_to"], str) else None
        percent = 0 if match is None else int(match[1])
        if not 1 <= percent <= MAX_OVERAGE_PERCENT:
            raise PolicyError(
                f"overage up_to {short(value['up_to'])} must be a whole percentage from 1% to {MAX_OVERAGE_PERCENT}%, such as "
                '"20%"; for no end write overage = true'
            )
        return cls(percent)

    @property
    def value(self) -> bool | dict[str, str]:
        """As `parse` reads it."""
        return True if self.percent is None else {"up_to": f"{self.percent}%"}

    def most(self, amount: int) -> int:
        """The most units that pass in a period of a quota."""
        return UNBOUNDED if self.percent is None else amount + amount * self.percent // 100


class PeriodClock:
    """The periods of one kind by one anchor. The last one is remembered: most moments are in it.

    Args:
        period: their kind.
        anchor: when they begin.
    """

    __slots__ = ("_end", "_start", "anchor", "period")

    def __init__(self, period: Period, anchor: PeriodAnchor) -> None:
        self.period = period
        self.anchor = anchor
        self._start = self._end = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PeriodClock) and (self.period, self.anchor) == (other.period, other.anchor)

    def __hash__(self) -> int:
        return hash((self.period, self.anchor))

    def bounds(self, now_us: int) -> tuple[int, int]:
        """The period that contains a moment. Costs 0.1 µs, and 10 µs for the first moment of a period."""
        if not self._start <= now_us < self._end:
            self._start, self._end = self.anchor.bounds(self.period, now_us)
        return self._start, self._end


class QuotaLimit(Limit, frozen=True, gc=False, kw_only=True):
    """A quota ready to be counted.

    Args:
        most: the most units that pass in a period, with overage; at least `amount`.
        clock: its periods.
    """

    most: int
    clock: PeriodClock

    @property
    def window_name(self) -> str:
        """Which period this is, whatever its amount and anchor."""
        return f"quota {self.clock.period}"

    @property
    def text(self) -> str:
        """The quota in the form that `Quota.parse` reads."""
        return f"{self.amount}/{self.clock.period}"


def fit_quotas(quotas: Iterable[Quota | str]) -> tuple[Quota, ...]:
    """Validate quotas that are counted together.

    Args:
        quotas: quotas or their texts.

    Returns:
        The quotas, the shortest period first.

    Raises:
        PolicyError: naming the quota that does not fit, and why.
    """
    found: dict[Period, Quota] = {}
    for each in quotas:
        quota = each if isinstance(each, Quota) else Quota.parse(each)
        if quota.period in found:
            raise PolicyError(
                f"quotas {found[quota.period].text!r} and {quota.text!r} are for the same period: keep the one meant"
            )
        found[quota.period] = quota
    return tuple(sorted(found.values(), key=lambda each: each.period.longest_us))


def require_quotas(overage: Overage | None, quotas: tuple[Quota, ...]) -> None:
    """Refuse an overage where there is no quota that it could be about.

    Raises:
        PolicyError: naming the remedy.
    """
    if overage is not None and not quotas:
        raise PolicyError('overage is for quotas, and there are none here: add quotas = ["100000/month"], or leave it out')


class CompiledQuotas:
    """Quotas of a tier or a rule, ready to be counted for callers of any anchor.

    Args:
        quotas: 1 or more.
        overage: what happens above them.
        rule: name of the rule; None for those of a tier.
        on_failure: what is answered while the counter store is unavailable.
        counter: name of the rule's counter; that of the rule where empty.
        shadow: whether they are those of a rule that only watches.
        leases: whether instances may lease units. They never lease those of quotas with overage: units that wait at one instance
            would be reported as over at another.
    """

    __slots__ = ("_by_anchor", "_counter", "_leases", "_on_failure", "_shadow", "overage", "quotas", "rule", "tier")

    def __init__(
        self,
        quotas: tuple[Quota, ...],
        overage: Overage | None,
        rule: str | None,
        tier: str,
        on_failure: OnFailure = OnFailure.DEFAULT,
        counter: str = "",
        *,
        shadow: bool = False,
        leases: bool = True,
    ) -> None:
        self._counter = counter or rule
        self._leases = leases and overage is None
        self.quotas = quotas
        self.overage = overage
        self.rule = rule
        self.tier = tier
        self._on_failure = on_failure
        self._shadow = shadow
        self._by_anchor: dict[PeriodAnchor, LimitSet] = {}

    @property
    def header(self) -> str:
        """Their part of the `RateLimit-Policy` header."""
        return self.of(_ANY).quotas

    def of(self, anchor: PeriodAnchor) -> LimitSet:
        """The limits for callers of one anchor; at most `MAX_ANCHORS` are kept.

        Args:
            anchor: when their periods begin.

        Returns:
            The limits: those of all anchors share counters, and so do those of all tiers. So a caller whose anchor or tier
            changes goes on with what it has consumed.
        """
        found = self._by_anchor.get(anchor)
        if found is None:
            if len(self._by_anchor) >= MAX_ANCHORS:
                self._by_anchor.clear()
            found = self._by_anchor[anchor] = self._limit_set(anchor)
        return found

    def _limit_set(self, anchor: PeriodAnchor) -> LimitSet:
        label = "quota" if self.rule is None else "rule quota"
        limits = [
            QuotaLimit(
                quota.amount,
                quota.period.longest_us // US_PER_S * US_PER_S,
                label=f"{label} {quota.text}",
                most=quota.amount if self.overage is None else self.overage.most(quota.amount),
                clock=PeriodClock(quota.period, anchor),
            )
            for quota in self.quotas
        ]
        return share(
            LimitSet(
                quota_name(self._counter),
                QuotaAlgorithm.QUOTA,
                limits,
                self._on_failure,
                rule=self.rule,
                tier=self.tier,
                shadow=self._shadow,
                leases=self._leases,
            )
        )


MAX_ANCHORS: Final = 4096
_ANY: Final = PeriodAnchor()


def quota_name(rule: str | None) -> str:
    """The name of the counter of a tier's quotas, or of a rule's: without the tier, so that a change of tier keeps it.

    Args:
        rule: name of the rule's counter; None for the tier's quotas.
    """
    # '/' is in no tier's name, so no other counter has this name; a rule's name is not empty.
    return f"quotas/{rule or ''}"
