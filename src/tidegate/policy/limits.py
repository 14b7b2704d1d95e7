"""Limits such as `100/minute` or `100/minute burst 20`; and `LimitSet`, a rule's limits made ready to be counted."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from tidegate.errors import PolicyError
from tidegate.policy.durations import UNITS_US, window_text
from tidegate.policy.fields import short
from tidegate.timestamps import US_PER_S

if TYPE_CHECKING:
    from tidegate.policy.failures import FailureCount

MAX_AMOUNT: Final = 1_000_000_000
MAX_LOG_AMOUNT: Final = 100_000
MAX_FAILURES: Final = 1_000
"""Largest amount of a limit of failures."""
MAX_WINDOW_US: Final = 366 * 86_400 * US_PER_S
MONTH_US: Final = 31 * 86_400 * US_PER_S
YEAR_US: Final = 366 * 86_400 * US_PER_S
MAX_EXACT: Final = 2**53
"""Doubles hold integers exactly up to here; Lua counts in doubles, so no state may need more."""

_CALENDAR: Final = {"month": "month", "months": "month", "year": "year", "years": "year", "y": "year"}
_LIMIT: Final = re.compile(
    r"\s*([0-9_]+)(?:\s*/\s*|\s+per\s+)([0-9]*)\s*([A-Za-z]+)(?:\s+burst\s+([0-9_]+))?\s*", re.ASCII | re.IGNORECASE
)

_CONCURRENT: Final = re.compile(r"\s*([0-9_]+)\s+concurrent\s*", re.ASCII | re.IGNORECASE)


class Algorithm(enum.StrEnum):
    """How a limit counts; what each guarantees is in `tidegate.algorithms`."""

    FIXED_WINDOW = "fixed_window"
    SLIDING_WINDOW = "sliding_window"
    SLIDING_LOG = "sliding_log"
    TOKEN_BUCKET = "token_bucket"
    LEAKY_BUCKET = "leaky_bucket"

    @property
    def is_bucket(self) -> bool:
        """Whether the algorithm takes a burst."""
        return self in (Algorithm.TOKEN_BUCKET, Algorithm.LEAKY_BUCKET)


class QuotaAlgorithm(enum.StrEnum):
    """How a quota counts. Not among the algorithms, because no rule names it: see `tidegate.algorithms.quota`."""

    QUOTA = "quota"

    @property
    def is_bucket(self) -> bool:
        """Whether the algorithm takes a burst."""
        return False


class ConcurrencyAlgorithm(enum.StrEnum):
    """How requests in progress count. Not among the algorithms: no rule names it. See `tidegate.algorithms.concurrent`."""

    CONCURRENT = "concurrent"

    @property
    def is_bucket(self) -> bool:
        """Whether the algorithm takes a burst."""
        return False


class FailureAlgorithm(enum.StrEnum):
    """How failures count. Not among the algorithms: a rule names it by `count`. See `tidegate.algorithms.failures`."""

    FAILURES = "failures"

    @property
    def is_bucket(self) -> bool:
        """Whether the algorithm takes a burst."""
        return False


AnyAlgorithm: TypeAlias = Algorithm | QuotaAlgorithm | ConcurrencyAlgorithm | FailureAlgorithm
IN_PROGRESS: Final = frozenset((ConcurrencyAlgorithm.CONCURRENT, FailureAlgorithm.FAILURES))
"""Algorithms that count requests in progress: a hold takes one, and a check none."""


class OnFailure(enum.StrEnum):
    """What a rule answers while the counter store is unavailable."""

    DEFAULT = "default"
    """What the setting `counters.on_failure` says."""
    LOCAL = "local"
    ALLOW = "allow"
    DENY = "deny"


class Limit(msgspec.Struct, frozen=True, gc=False):
    """`amount` units of cost per window.

    Args:
        amount: 1 to 1,000,000,000.
        window_us: length of the window in µs, 1 s to 366 days; for a calendar month 31 days, for a year 366, the longest ones
            (algorithms that do not align to the calendar count them so, and thus never admit too much in any of them).
        calendar_month: whether the window is the UTC calendar month.
        burst: capacity of a bucket, 1 to 1,000,000,000; None where the algorithm's default holds.
        label: what the limit is called in answers; its text where empty.
        calendar_year: whether the window is the UTC calendar year.
        concurrent: whether `amount` requests may be in progress at once, whatever the time; `window_us` means nothing then.
    """

    amount: int
    window_us: int
    calendar_month: bool = False
    burst: int | None = None
    label: str = ""
    calendar_year: bool = False
    concurrent: bool = False

    @classmethod
    def parse(cls, text: object) -> Limit:
        """Read `100/minute`, `100 per minute`, `30/90s`, `1000/month`, `100/minute burst 20` or `20 concurrent`.

        Args:
            text: the limit as written in a policy.

        Raises:
            PolicyError: naming the text and the forms that are understood.
        """
        match = _LIMIT.fullmatch(text) if isinstance(text, str) and len(text) <= 80 else None
        if match is None and isinstance(text, str) and len(text) <= 80 and (slots := _CONCURRENT.fullmatch(text)):
            return cls(_whole(slots[1], "number of requests", text), US_PER_S, concurrent=True)
        if match is None:
            raise PolicyError(
                f"limit {short(text)} is not understood: write '100/minute', '30/90s', '1000/month', '500/week', "
                "'100/minute burst 20' or '20 concurrent'"
            )
        amount_text, count_text, unit, burst_text = match.groups()
        amount = _whole(amount_text, "amount", str(text))
        burst = None if burst_text is None else _whole(burst_text, "burst", str(text))
        count = int(count_text) if count_text else 1
        if calendar := _CALENDAR.get(unit.lower()):
            if count != 1:
                raise PolicyError(
                    f"limit {text!r}: a {calendar} is the calendar {calendar}, one at a time: write '{amount}/{calendar}', "
                    f"or a window of fixed length such as '{amount}/90d'"
                )
            month = calendar == "month"
            return cls(amount, MONTH_US if month else YEAR_US, month, burst, calendar_year=not month)
        if unit.lower() not in UNITS_US:
            raise PolicyError(
                f"limit {text!r} has the unknown unit {unit!r}: use second, minute, hour, day, week, month or year "
                "(or s, m, h, d, w, y)"
            )
        window_us = count * UNITS_US[unit.lower()]
        if not US_PER_S <= window_us <= MAX_WINDOW_US:
            raise PolicyError(f"limit {text!r}: the window must be between 1 second and 366 days")
        return cls(amount, window_us, False, burst)

    @property
    def capacity(self) -> int:
        """The most that can be had at once: the burst of a bucket, else the amount."""
        return self.amount if self.burst is None else self.burst

    @property
    def window_name(self) -> str:
        """Which window this is, whatever its amount: `month`, `year` or its length like `60s`."""
        if self.is_calendar:
            return "month" if self.calendar_month else "year"
        return "concurrent" if self.concurrent else f"{self.window_us // US_PER_S}s"

    @property
    def is_calendar(self) -> bool:
        """Whether the window is a calendar month or year, whose length varies."""
        return self.calendar_month or self.calendar_year

    @property
    def text(self) -> str:
        """The limit in the form that `parse` reads, shortest unit form first."""
        if self.concurrent:
            return f"{self.amount} concurrent"
        unit = self.window_name if self.is_calendar else window_text(self.window_us // US_PER_S)
        return f"{self.amount}/{unit}" + ("" if self.burst is None else f" burst {self.burst}")

    def __str__(self) -> str:
        return self.text


class LimitSet:
    """The limits that are counted together under one name, ready for a counter store.

    Two sets of the same name share their counters, whatever their amounts: that is how a changed limit keeps what
    has been consumed. Compared by identity, because stores remember what they prepared for each.

    Args:
        name: the counter's name: unambiguous, stable across restarts and instances.
        algorithm: how all of `limits` count.
        limits: 1 to 16, no two of the same window; sorted by window, bursts filled in.
        on_failure: what to answer while the store is unavailable.
        rule: the rule's name for answers, None for a tier's own limits.
        tier: the tier's name for answers.
        quotas: the value of the `RateLimit-Policy` header; of these limits alone where None.
        leases: whether instances may lease units, so that they decide without a call to the store.
        soft: whether a check that these limits deny passes all the same, reported as over.
        shadow: whether they only watch: no notification is sent for them.
        failures: for limits of failures, what follows them; None for others.

    Attributes:
        plain: whether a decision by these limits never has an overage.
        leasable: whether instances may lease units: they are allowed to, the algorithm allows it, and the limits are not soft.

    Raises:
        PolicyError: if the limits do not fit the algorithm or each other.
    """

    __slots__ = (
        "__weakref__",
        "algorithm",
        "failures",
        "leasable",
        "limits",
        "name",
        "on_failure",
        "plain",
        "quotas",
        "rule",
        "shadow",
        "soft",
        "tier",
    )

    def __init__(
        self,
        name: str,
        algorithm: AnyAlgorithm,
        limits: Iterable[Limit],
        on_failure: OnFailure = OnFailure.DEFAULT,
        *,
        rule: str | None = None,
        tier: str | None = None,
        quotas: str | None = None,
        leases: bool = True,
        soft: bool = False,
        shadow: bool = False,
        failures: FailureCount | None = None,
    ) -> None:
        self.name = name
        self.algorithm = algorithm
        self.limits = fit_limits(algorithm, limits)
        self.on_failure = on_failure
        self.rule = rule
        self.tier = tier
        self.soft = soft
        self.shadow = shadow
        self.failures = failures
        self.plain = not soft and isinstance(algorithm, Algorithm)
        self.leasable = leases and not soft and algorithm not in _UNLEASED
        self.quotas = quotas or ", ".join(quota_text(limit) for limit in self.limits)

    def single_sets(self) -> tuple[LimitSet, ...]:
        """A set of each limit by itself, with the name of this one; the last ones that were made are kept.

        Returns:
            One for each limit, in order.
        """
        return _single_sets(self)

    def __repr__(self) -> str:
        return f"LimitSet({self.name!r}, {self.algorithm}, {[limit.text for limit in self.limits]})"


_UNLEASED: Final = frozenset((Algorithm.SLIDING_LOG, ConcurrencyAlgorithm.CONCURRENT))


@lru_cache(maxsize=1024)
def _single_sets(limits: LimitSet) -> tuple[LimitSet, ...]:
    return tuple(
        LimitSet(
            limits.name,
            limits.algorithm,
            (limit,),
            limits.on_failure,
            rule=limits.rule,
            tier=limits.tier,
            failures=limits.failures,
        )
        for limit in limits.limits
    )


def quota_text(limit: Limit) -> str:
    """One quota of the `RateLimit-Policy` header (draft-ietf-httpapi-ratelimit-headers-10, section 3)."""
    if limit.concurrent:
        return f'"{limit.label or limit.text}";q={limit.capacity};qu="concurrent-requests"'
    return f'"{limit.label or limit.text}";q={limit.capacity};w={limit.window_us // US_PER_S}'


def fit_limits(algorithm: AnyAlgorithm, limits: Iterable[Limit]) -> tuple[Limit, ...]:
    """Check that limits suit an algorithm and each other; fill in bursts; sort by window.

    Args:
        algorithm: how they will count.
        limits: 1 to 16 of them.

    Returns:
        The limits as they will be counted, the shortest window first.

    Raises:
        PolicyError: naming the limit that does not fit, and why.
    """
    fitted: dict[str, Limit] = {}
    for given in limits:
        limit = given
        if limit.concurrent and algorithm is not ConcurrencyAlgorithm.CONCURRENT:
            raise PolicyError(
                f"limit {limit.text!r} counts requests in progress, which only limits of rules can: move it to a rule"
            )
        if limit.burst is not None and not algorithm.is_bucket:
            raise PolicyError(
                f"limit {limit.text!r} has a burst, which {algorithm} cannot give: "
                "drop the burst or use token_bucket or leaky_bucket"
            )
        if algorithm is FailureAlgorithm.FAILURES and (limit.amount > MAX_FAILURES or limit.is_calendar):
            raise PolicyError(
                f"limit {limit.text!r} cannot count failures: their times are stored, so at most {MAX_FAILURES} in a window of "
                "fixed length such as 15m, 1h or 30d"
            )
        if algorithm is Algorithm.SLIDING_LOG and limit.amount > MAX_LOG_AMOUNT:
            raise PolicyError(
                f"limit {limit.text!r}: sliding_log keeps every request, so at most {MAX_LOG_AMOUNT}: use sliding_window"
            )
        if algorithm.is_bucket:
            burst = limit.burst or (limit.amount if algorithm is Algorithm.TOKEN_BUCKET else 1)
            limit = msgspec.structs.replace(limit, burst=burst)
            if burst * (limit.window_us // math.gcd(limit.amount, limit.window_us)) > MAX_EXACT:
                raise PolicyError(
                    f"limit {limit.text!r} cannot be counted exactly in integers: use a rounder amount or a smaller burst"
                )
        if limit.window_name in fitted:
            raise PolicyError(
                f"limits {fitted[limit.window_name].text!r} and {limit.text!r} have the same window: keep the one meant"
            )
        fitted[limit.window_name] = limit
    if not 1 <= len(fitted) <= 16:
        raise PolicyError(f'{len(fitted)} limits given: a rule takes 1 to 16, for example limits = ["100/minute"]')
    return tuple(sorted(fitted.values(), key=lambda each: each.window_us))


def split_limits(limits: Iterable[Limit]) -> tuple[tuple[Limit, ...], Limit | None]:
    """The limits of a rule by how they count.

    Returns:
        The limits per window, and that of requests in progress; None where there is none.

    Raises:
        PolicyError: if there are two of the latter.
    """
    given = tuple(limits)
    slots = [limit for limit in given if limit.concurrent]
    if len(slots) > 1:
        raise PolicyError(f"limits {slots[0].text!r} and {slots[1].text!r} both count requests in progress: keep the one meant")
    if not slots:
        return given, None
    return tuple(limit for limit in given if not limit.concurrent), slots[0]


def is_zero(limit: object) -> bool:
    """Whether a text is a limit that admits nothing, such as `0/day`; a rule denies then."""
    match = _LIMIT.fullmatch(limit) if isinstance(limit, str) and len(limit) <= 80 else None
    return match is not None and match[1].strip("0_") == "" and match[4] is None


def _whole(text: str, what: str, limit: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= MAX_AMOUNT:
        remedy = "; to deny everything, use action = 'deny' on a rule, or a block" if is_zero(limit) else ""
        raise PolicyError(f"limit {limit!r}: the {what} must be a whole number from 1 to {MAX_AMOUNT}{remedy}")
    return value
