"""Tidegate: decisions, latency, errors, who is limited, and the state of each instance, its store and its catalog."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards import promql, service_parts
from dashboards.layout import Row, choice, dashboard
from dashboards.panels import STATUS_COLOURS, Panel, Query, Steps, bars, lines, number, pie
from dashboards.service_parts import HERE, rate

_BY_RULE = "tier_rule:rate_limiter_rule_requests:rate5m"
_SLOW = Steps(0.005, 0.01)


def made() -> Dashboard:
    """Make the dashboard.

    Returns:
        It.
    """
    return dashboard(
        "service",
        "Tidegate: service",
        "Does it decide, how fast, whom does it block, and what is failing?",
        [
            Row("All instances", _all()),
            Row("Tiers and rules", _rules()),
            Row("Each instance", _instances()),
            Row("Counter store", service_parts.store()),
            Row("Catalog and policy", service_parts.catalog()),
            Row("Violations", service_parts.violations()),
        ],
        [
            choice("instance", "Instance", "label_values(rate_limiter_build_info, instance)"),
            choice("tier", "Tier", "label_values(rate_limiter_rule_requests_total, tier)"),
        ],
    )


def _all() -> list[list[Panel]]:
    return [
        [
            number(
                "Checks",
                "Decided per second, by all instances.",
                "reqps",
                Query("sum(job:rate_limiter_requests:rate5m)"),
                "checks",
            ),
            number(
                "Blocked",
                "Share of decided checks. After a jump: see below for the tier and rule.",
                "percentunit",
                Query('sum(job:rate_limiter_requests:rate5m{status="blocked"}) / sum(job:rate_limiter_requests:rate5m)'),
                "suspiciousactivity",
            ),
            number(
                "P99",
                "99 of 100 checks are decided within this time. Red where HighLatency begins.",
                "s",
                Query("job:rate_limiter_latency_seconds:p99_rate5m"),
                "highlatency",
                _SLOW,
            ),
            number(
                "Errors",
                "Errors of the service per decided check. Red where HighErrorRate begins.",
                "percentunit",
                Query("job:rate_limiter_errors_per_request:ratio_rate5m"),
                "higherrorrate",
                Steps(0.001, 0.01),
            ),
            number(
                "Decided without Redis",
                "Share of checks. Red where DegradedDecisions begins.",
                "percentunit",
                Query("job:rate_limiter_degraded_per_request:ratio_rate2m"),
                "degradeddecisions",
                Steps(0.0001, 0.01),
            ),
            number(
                "Instances that are down",
                "Prometheus cannot scrape them. The other instances take over.",
                "short",
                Query('count(up{job="tidegate"} == 0) or vector(0)'),
                "instancedown",
                Steps(1, 2),
            ),
        ],
        [
            lines(
                "Allowed and blocked",
                "Checks per second. The dashed line is where SuspiciousActivity begins, if blocked reaches it.",
                "reqps",
                Query(rate("rate_limiter_requests_total", "status"), "{{status}}"),
                see="suspiciousactivity",
                steps=Steps(None, 1000),
                colours=STATUS_COLOURS,
            ),
            pie(
                "Allowed to blocked",
                "Checks of the whole time shown. More blocked than your customers expect: a limit is "
                "too low, or somebody abuses.",
                "short",
                Query(f"sum by (status) (increase(rate_limiter_requests_total{{{HERE}}}[$__range]))", "{{status}}"),
                see="suspiciousactivity",
                colours=STATUS_COLOURS,
            ),
            lines(
                "Latency",
                "From a check's arrival at the gate to its decision, all instances. The dashed line is the objective, 10 ms.",
                "s",
                Query("job:rate_limiter_latency_seconds:p50_rate5m", "P50"),
                Query("job:rate_limiter_latency_seconds:p99_rate5m", "P99"),
                Query("job:rate_limiter_latency_seconds:p999_rate5m", "P99.9"),
                see="highlatency",
                steps=Steps(None, 0.01),
            ),
        ],
        [
            lines(
                "Errors to a check",
                "Over 5 minutes. Ours: the dashed line is where HighErrorRate begins. "
                "Callers' errors are what HighClientErrorRate is about.",
                "percentunit",
                Query("job:rate_limiter_errors_per_request:ratio_rate5m", "ours"),
                Query("job:rate_limiter_client_errors:ratio_rate5m", "callers'"),
                see="higherrorrate",
                steps=Steps(None, 0.01),
            ),
            lines(
                "Errors by type",
                "Errors per second. redis_…: decided anyway; db_connection, store_unavailable, internal: "
                "ours; the rest: callers'.",
                "ops",
                Query("job:rate_limiter_errors:rate5m", "{{type}}"),
                see="types-of-errors",
            ),
        ],
    ]


def _rules() -> list[list[Panel]]:
    return [
        [
            bars(
                "Busiest tiers",
                "The ten with most checks per second.",
                "reqps",
                Query(f'sort_desc(topk(10, sum by (tier) ({_BY_RULE}{{tier=~"$tier"}})))', "{{tier}}"),
                see="checks",
            ),
            bars(
                "Rules that block most",
                "The ten with most blocked checks per second. If one suddenly blocks everything: was its limit lowered?",
                "reqps",
                Query(
                    f'sort_desc(topk(10, sum by (tier, rule) ({_BY_RULE}{{tier=~"$tier", status="blocked"}})))',
                    "{{tier}} {{rule}}",
                ),
                see="suspiciousactivity",
            ),
            lines(
                "Blocked by tier",
                "Checks per second.",
                "reqps",
                Query(f'sum by (tier) ({_BY_RULE}{{tier=~"$tier", status="blocked"}})', "{{tier}}"),
                see="suspiciousactivity",
                stacked=True,
            ),
        ],
        [
            lines(
                "Near the limit",
                "Allowed with a fifth of the limit left or less, per second. Grows before blocked does: contact the "
                "customer, or raise the limit.",
                "reqps",
                Query(
                    promql.or_none(
                        f'sum by (tier) (rate(rate_limiter_near_limit_total{{{HERE}, tier=~"$tier"}}[$__rate_interval]))', "tier"
                    ),
                    "{{tier}}",
                ),
                see="checks",
            ),
            lines(
                "Shadow rules",
                "What each would have blocked, per second. When it is as low as you expect, switch the rule to enforce.",
                "reqps",
                Query(promql.or_none(rate("rate_limiter_shadow_blocked_total", "rule"), "rule"), "{{rule}}"),
                see="checks",
            ),
        ],
    ]


def _instances() -> list[list[Panel]]:
    return [
        [
            lines(
                "Checks by instance",
                "Per second. At the dashed line, 10,000, an autoscaler adds instances; if uneven, check the gateway's balancing.",
                "reqps",
                Query(promql.total("rate_limiter_requests_per_second", HERE, "instance"), "{{instance}}"),
                see="recorded",
                steps=Steps(None, 10_000),
            ),
            lines(
                "P99 by instance",
                "One that is slower than the others: its machine or its connection to Redis is slow.",
                "s",
                Query(
                    "histogram_quantile(0.99, sum by (le, instance) "
                    f"(rate(rate_limiter_latency_seconds_bucket{{{HERE}}}[$__rate_interval])))",
                    "{{instance}}",
                ),
                see="highlatency",
                steps=Steps(None, 0.01),
            ),
            lines(
                "In flight",
                "Requests being answered. If it grows and stays high: the instance is overloaded, add instances.",
                "short",
                Query(promql.total("rate_limiter_in_flight", HERE, "instance"), "{{instance}}"),
                see="checks",
            ),
        ],
        [
            lines(
                "Versions that run",
                "Instances by version. Two for long: a release is stuck.",
                "short",
                Query(f"count by (version, python) (rate_limiter_build_info{{{HERE}}})", "{{version}}, Python {{python}}"),
                see="process",
            ),
            lines(
                "Processes",
                "Workers of each instance that answered. Fewer than `server.workers`: one is restarting, see the log.",
                "short",
                Query(
                    f"sum by (instance) (rate_limiter_workers{{{HERE}}}) or sum by (instance) "
                    f"(rate_limiter_build_info{{{HERE}}})",
                    "{{instance}}",
                ),
                see="process",
            ),
        ],
    ]
