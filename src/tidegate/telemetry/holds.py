"""Registers the metrics of holds."""

from __future__ import annotations

from collections.abc import Mapping

from tidegate.counters import CounterStore
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.redis.hold_ends import HoldEnds
from tidegate.gate.holds import HoldFigures
from tidegate.telemetry.metrics import Metrics


def collect_holds(metrics: Metrics, figures: HoldFigures, counters: CounterStore, ends: HoldEnds | None = None) -> None:
    """Register the metrics of holds.

    Args:
        figures: of this instance.
        counters: the store.
        ends: of holds on Redis; None for others.
    """

    def outcomes() -> Mapping[str, float]:
        return {
            "opened": figures.opened,
            "denied": figures.denied,
            "settled": figures.settled,
            "late": figures.late,
            "degraded": figures.degraded,
        }

    metrics.add_labelled_counter(
        "rate_limiter_holds", "Holds of this instance: opened or denied, and settled in time or late.", "outcome", outcomes
    )
    metrics.add_labelled_counter(
        "rate_limiter_hold_units_reserved", "Units that settled holds had reserved.", "rule", lambda: figures.reserved_units
    )
    metrics.add_labelled_counter(
        "rate_limiter_hold_units_used", "Units that settled holds used.", "rule", lambda: figures.used_units
    )
    if isinstance(counters, MemoryCounters):
        metrics.add_gauge("rate_limiter_holds_open", "Open holds of counters in memory.", lambda: counters.open_holds)
        metrics.add_counter(
            "rate_limiter_holds_expired", "Holds of counters in memory that expired unsettled.", lambda: counters.expired_holds
        )
    if ends is not None:
        metrics.add_gauge(
            "rate_limiter_holds_open", "Open holds: opened here less settled here. Sum over all instances.", lambda: ends.open
        )
        metrics.add_gauge(
            "rate_limiter_holds_expired_unsettled",
            "Holds that expired, opened here less settled here in time. Sum over all instances.",
            lambda: ends.expired,
        )
