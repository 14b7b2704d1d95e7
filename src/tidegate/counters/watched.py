"""What the id of a hold says of a counter whose thresholds are watched: any instance can report what its settlement crosses."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import msgspec

from tidegate.errors import PolicyError
from tidegate.policy.limits import Algorithm, Limit, LimitSet, QuotaAlgorithm
from tidegate.policy.periods import PeriodAnchor
from tidegate.policy.quotas import CompiledQuotas, QuotaLimit, fit_quotas

MAX_TEXT: Final = 512
"""Most characters of the names of a counter; one with more is not watched: ids have a bound."""
_QUOTAS: Final = "quotas/"


class WatchedSet(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The limits of a counter, as far as a crossing names them.

    Args:
        name: of the limit set.
        algorithm: how they count.
        tier: name of the tier.
        rule: name of the rule; None for a tier's own.
        limits: their texts.
        soft: as that of the limit set.
        anchor: of quotas: month, day, weekday and time zone; None for others.
    """

    name: str
    algorithm: str
    tier: str
    rule: str | None
    limits: tuple[str, ...]
    soft: bool = False
    anchor: tuple[int, int, int, str] | None = None

    @classmethod
    def of(cls, limits: LimitSet) -> WatchedSet | None:
        """That of a limit set; None for limits of requests in progress or failures, and where its names are too long."""
        first = limits.limits[0]
        anchor = first.clock.anchor if isinstance(first, QuotaLimit) else None
        if anchor is None and not isinstance(limits.algorithm, Algorithm):
            return None
        if len(limits.name) + len(limits.tier or "") + len(limits.rule or "") > MAX_TEXT:
            return None
        return cls(
            limits.name,
            limits.algorithm.value,
            limits.tier or "",
            limits.rule,
            tuple(limit.text for limit in limits.limits),
            limits.soft,
            None if anchor is None else (anchor.month, anchor.day, anchor.weekday, anchor.timezone),
        )

    def limit_set(self) -> LimitSet | None:
        """The limit set; None where an instance could not have made this."""
        return _limit_set(self)


@lru_cache(maxsize=1024)
def _limit_set(watched: WatchedSet) -> LimitSet | None:
    tier = watched.tier or None
    try:
        if watched.anchor is None:
            algorithm = Algorithm(watched.algorithm)
            limits = [Limit.parse(text) for text in watched.limits]
            return LimitSet(watched.name, algorithm, limits, rule=watched.rule, tier=tier, soft=watched.soft)
        if watched.algorithm != QuotaAlgorithm.QUOTA or not watched.name.startswith(_QUOTAS):
            return None
        quotas, counter = fit_quotas(watched.limits), watched.name.removeprefix(_QUOTAS)
        month, day, weekday, timezone = watched.anchor
        if not (quotas and 1 <= month <= 12 and 1 <= day <= 31 and 0 <= weekday <= 6):
            return None
        anchor = PeriodAnchor(month, day, weekday, timezone)
        PeriodAnchor.make(timezone=timezone)
        return CompiledQuotas(quotas, None, watched.rule, watched.tier, counter=counter).of(anchor)
    except (PolicyError, ValueError):
        return None
