"""Remaining budgets of the two objectives, and their burn rates."""

from __future__ import annotations

from typing import NamedTuple

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.layout import Row, dashboard
from dashboards.panels import Panel, Query, Steps, lines, number

_PAIRS = (("5m", "1h", 14.4), ("30m", "6h", 6.0), ("2h", "1d", 3.0), ("6h", "3d", 1.0))
"""Short window, long window, and the burn rate at which both together alert, as in `deploy/prometheus/alerts.yml`."""


class _Objective(NamedTuple):
    name: str
    missed: str
    budget: float
    alert: str


_AVAILABLE = _Objective("available", "job:rate_limiter_unavailable", 0.0001, "availabilitybudgetburn")
_FAST = _Objective("within 10 ms", "job:rate_limiter_slow", 0.01, "latencybudgetburn")


def made() -> Dashboard:
    """Make the dashboard.

    Returns:
        It.
    """
    return dashboard(
        "slo",
        "Tidegate: objectives",
        "Are 99.99 % availability and 99 % within 10 ms met over 30 days, and if not, since when?",
        [
            Row("Budgets of 30 days", _budgets()),
            Row("99.99 % available: burn rates", _burn(_AVAILABLE)),
            Row("99 % within 10 ms: burn rates", _burn(_FAST)),
            Row("What burns it", _causes()),
        ],
        since="now-7d",
    )


def _left(objective: _Objective) -> str:
    return f"1 - {objective.missed}:ratio_rate30d / {objective.budget:g}"


def _budgets() -> list[list[Panel]]:
    steps = Steps(0.25, 0, low_is_bad=True)
    return [
        [
            *(
                number(
                    f"Left: {each.name}",
                    "Of the budget of the last 30 days. Below a quarter: postpone releases that can wait. Below 0: missed.",
                    "percentunit",
                    Query(_left(each)),
                    each.alert,
                    steps,
                )
                for each in (_AVAILABLE, _FAST)
            ),
            number(
                "Available",
                "Share of checks of the last 30 days that got a decision, or none because of a caller's error.",
                "percentunit",
                Query(f"1 - {_AVAILABLE.missed}:ratio_rate30d"),
                _AVAILABLE.alert,
                Steps(None, 0.9999, low_is_bad=True),
                decimals=4,
            ),
            number(
                "Within 10 ms",
                "Share of decisions of the last 30 days.",
                "percentunit",
                Query(f"1 - {_FAST.missed}:ratio_rate30d"),
                _FAST.alert,
                Steps(None, 0.99, low_is_bad=True),
                decimals=3,
            ),
        ],
        [
            lines(
                "Budget left",
                "Of the 30 days before each point in time. A step down is an outage; it recovers 30 days later.",
                "percentunit",
                *(Query(_left(each), each.name) for each in (_AVAILABLE, _FAST)),
                see="the-objectives",
                least=None,
                most=1,
            )
        ],
    ]


def _burn(objective: _Objective) -> list[list[Panel]]:
    return [
        [
            lines(
                f"{short} and {long}",
                f"1 uses the budget up in 30 days. Both above the dashed line, {rate:g}: "
                f"{'a page' if rate > 3 else 'a warning'}.",
                "short",
                *(Query(f"{objective.missed}:ratio_rate{window} / {objective.budget:g}", window) for window in (short, long)),
                see=objective.alert,
                steps=Steps(None, rate),
            )
            for short, long, rate in _PAIRS
        ]
    ]


def _causes() -> list[list[Panel]]:
    return [
        [
            lines(
                "No decision, by type",
                "Checks per second without a decision because of the service.",
                "reqps",
                Query('job:rate_limiter_errors:rate5m{type=~"db_connection|store_unavailable|internal"}', "{{type}}"),
                see="availabilitybudgetburn",
            ),
            lines(
                "Slower than 10 ms, by instance",
                "Share of its decisions. One instance: its machine. All: Redis, or too few instances.",
                "percentunit",
                Query(
                    '1 - sum by (instance) (rate(rate_limiter_latency_seconds_bucket{le="0.01"}[$__rate_interval]))'
                    " / (sum by (instance) (rate(rate_limiter_latency_seconds_count[$__rate_interval])) > 0)",
                    "{{instance}}",
                ),
                see="latencybudgetburn",
                steps=Steps(None, 0.01),
            ),
        ]
    ]
