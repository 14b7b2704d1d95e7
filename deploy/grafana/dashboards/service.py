"""What Tidegate does: decisions, latency, errors, who is limited, and what each instance, its store and its catalog do."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import (
    GREEN,
    RED,
    STATUS_COLOURS,
    YELLOW,
    Panel,
    Query,
    Row,
    Steps,
    bars,
    choice,
    dashboard,
    lines,
    number,
    or_none,
    pie,
    states,
)

_HERE = 'instance=~"$instance"'
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
        "Does it decide, how fast, whom does it block, and what stands in its way?",
        [
            Row("All instances", _all()),
            Row("Tiers and rules", _rules()),
            Row("Each instance", _instances()),
            Row("Counter store", _store()),
            Row("Catalog and policy", _catalog()),
            Row("Violations", _violations()),
        ],
        [
            choice("instance", "Instance", "label_values(rate_limiter_build_info, instance)"),
            choice("tier", "Tier", "label_values(rate_limiter_rule_requests_total, tier)"),
        ],
    )


def _rate(metric: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}{{{_HERE}}}[$__rate_interval]))"


def _all() -> list[list[Panel]]:
    return [
        [
            number(
                "Checks", "Decided a second, by all instances.", "reqps", Query("sum(job:rate_limiter_requests:rate5m)"), "checks"
            ),
            number(
                "Blocked",
                "Share of decided checks. A jump: look below which tier and rule.",
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
                "Errors to a decided check, callers' mistakes included. Red where HighErrorRate begins.",
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
                "Prometheus cannot scrape them. The others take over.",
                "short",
                Query('count(up{job="tidegate"} == 0) or vector(0)'),
                "instancedown",
                Steps(1, 2),
            ),
        ],
        [
            lines(
                "Allowed and blocked",
                "Checks a second. The dashed line is where SuspiciousActivity begins, if blocked reaches it.",
                "reqps",
                Query(_rate("rate_limiter_requests_total", "status"), "{{status}}"),
                see="suspiciousactivity",
                steps=Steps(None, 1000),
                colours=STATUS_COLOURS,
            ),
            pie(
                "Allowed to blocked",
                "Checks of the whole time shown. More blocked than your customers expect: a limit is "
                "too low, or somebody abuses.",
                "short",
                Query(f"sum by (status) (increase(rate_limiter_requests_total{{{_HERE}}}[$__range]))", "{{status}}"),
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
                "Over 5 minutes, callers' mistakes included. The dashed line is where HighErrorRate begins.",
                "percentunit",
                Query("job:rate_limiter_errors_per_request:ratio_rate5m", "errors to a check"),
                see="higherrorrate",
                steps=Steps(None, 0.01),
            ),
            lines(
                "Errors by type",
                "Errors a second. redis_…: decided all the same; db_connection, store_unavailable, internal: "
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
                "The ten with most checks a second.",
                "reqps",
                Query(f'sort_desc(topk(10, sum by (tier) ({_BY_RULE}{{tier=~"$tier"}})))', "{{tier}}"),
                see="checks",
            ),
            bars(
                "Rules that block most",
                "The ten with most blocked checks a second. One that blocks all at once: was its limit lowered?",
                "reqps",
                Query(
                    f'sort_desc(topk(10, sum by (tier, rule) ({_BY_RULE}{{tier=~"$tier", status="blocked"}})))',
                    "{{tier}} {{rule}}",
                ),
                see="suspiciousactivity",
            ),
            lines(
                "Blocked by tier",
                "Checks a second.",
                "reqps",
                Query(f'sum by (tier) ({_BY_RULE}{{tier=~"$tier", status="blocked"}})', "{{tier}}"),
                see="suspiciousactivity",
                stacked=True,
            ),
        ],
        [
            lines(
                "Near the limit",
                "Allowed with a fifth of the limit left or less, a second. Grows before blocked does: talk to the "
                "customer, or raise the limit.",
                "reqps",
                Query(
                    or_none(
                        f'sum by (tier) (rate(rate_limiter_near_limit_total{{{_HERE}, tier=~"$tier"}}[$__rate_interval]))', "tier"
                    ),
                    "{{tier}}",
                ),
                see="checks",
            ),
            lines(
                "Shadow rules",
                "What each would have blocked, a second. Flat at what you expect: let it enforce.",
                "reqps",
                Query(or_none(_rate("rate_limiter_shadow_blocked_total", "rule"), "rule"), "{{rule}}"),
                see="checks",
            ),
        ],
    ]


def _instances() -> list[list[Panel]]:
    return [
        [
            lines(
                "Checks by instance",
                "A second. At the dashed line, 10,000, an autoscaler adds instances; uneven: look at the gateway's balance.",
                "reqps",
                Query(f"sum by (instance) (rate_limiter_requests_per_second{{{_HERE}}})", "{{instance}}"),
                see="recorded",
                steps=Steps(None, 10_000),
            ),
            lines(
                "P99 by instance",
                "One that is slower than the others: its machine is busy, or its way to Redis.",
                "s",
                Query(
                    "histogram_quantile(0.99, sum by (le, instance) "
                    f"(rate(rate_limiter_latency_seconds_bucket{{{_HERE}}}[$__rate_interval])))",
                    "{{instance}}",
                ),
                see="highlatency",
                steps=Steps(None, 0.01),
            ),
            lines(
                "In flight",
                "Requests being answered. Grows and stays: the instance is full, add instances.",
                "short",
                Query(f"sum by (instance) (rate_limiter_in_flight{{{_HERE}}})", "{{instance}}"),
                see="checks",
            ),
        ],
        [
            lines(
                "Versions that run",
                "Instances by version. Two for long: a roll-out is stuck.",
                "short",
                Query(f"count by (version, python) (rate_limiter_build_info{{{_HERE}}})", "{{version}}, Python {{python}}"),
                see="process",
            ),
            lines(
                "Processes",
                "Workers of each instance that answered. Fewer than `server.workers`: one starts again, look at the log.",
                "short",
                Query(
                    f"sum by (instance) (rate_limiter_workers{{{_HERE}}}) or sum by (instance) "
                    f"(rate_limiter_build_info{{{_HERE}}})",
                    "{{instance}}",
                ),
                see="process",
            ),
        ],
    ]


def _store() -> list[list[Panel]]:
    return [
        [
            lines(
                "Latency of the store",
                "Calls to Redis, those given up included. The dashed line is where RedisLatencyHigh begins.",
                "s",
                Query(
                    "histogram_quantile(0.5, sum by (le) (rate(rate_limiter_store_latency_seconds_bucket[$__rate_interval])))",
                    "P50",
                ),
                Query("job:rate_limiter_store_latency_seconds:p99_rate5m", "P99"),
                see="redislatencyhigh",
                steps=Steps(None, 0.01),
            ),
            lines(
                "Decided without Redis",
                "Share of checks. The dashed line is where DegradedDecisions begins.",
                "percentunit",
                Query("job:rate_limiter_degraded_per_request:ratio_rate2m", "share"),
                see="degradeddecisions",
                steps=Steps(None, 0.01),
            ),
            lines(
                "Why without Redis",
                "Checks a second by reason.",
                "reqps",
                Query(or_none(_rate("rate_limiter_fallbacks_total", "reason"), "reason"), "{{reason}}"),
                see="degradeddecisions",
            ),
        ],
        [
            states(
                "Breakers",
                "Of each shard that failed lately, as the worst instance sees it. Open while Redis answers its "
                "exporter: the way between.",
                Query(or_none(f"max by (shard) (rate_limiter_breaker_state{{{_HERE}}})", "shard"), "{{shard}}"),
                {0: ("closed", GREEN), 1: ("half open", YELLOW), 2: ("open", RED)},
                see="circuitopen",
            ),
            lines(
                "Shards",
                "Connected and left alone, by instance. Fewer connected than you run: one is down, or a "
                "new one is not known yet.",
                "short",
                Query(f"sum by (instance) (rate_limiter_store_shards_up{{{_HERE}}})", "connected, {{instance}}"),
                Query(f"sum by (instance) (rate_limiter_breakers_open{{{_HERE}}})", "left alone, {{instance}}"),
                see="circuitopen",
            ),
            lines(
                "Calls not answered yet",
                "Grows: Redis is slow or hangs.",
                "short",
                Query(f"sum by (instance) (rate_limiter_store_in_flight{{{_HERE}}})", "{{instance}}"),
                see="redislatencyhigh",
            ),
        ],
        [
            lines(
                "Instances that share the counters",
                "As each last heard. Fewer than you run: one does not reach Redis.",
                "short",
                Query(f"sum by (instance) (rate_limiter_instances{{{_HERE}}})", "{{instance}}"),
                see="counter-store",
            ),
            lines(
                "Owed after an outage",
                "Counters still to be put back. Must fall to 0 when Redis is back.",
                "short",
                Query(f"sum by (instance) (rate_limiter_counters_owed{{{_HERE}}})", "owed, {{instance}}"),
                Query(f"sum(increase(rate_limiter_counters_put_back_total{{{_HERE}}}[$__rate_interval]))", "put back"),
                see="counter-store",
            ),
            lines(
                "Denied from memory",
                "Checks a second that were no call to Redis. Nothing to do: this is load that Redis does not have.",
                "reqps",
                Query(_rate("rate_limiter_denials_remembered_total", "instance"), "{{instance}}"),
                see="counter-store",
            ),
        ],
    ]


def _catalog() -> list[list[Panel]]:
    return [
        [
            lines(
                "Answered by the caches",
                "Share of look-ups of keys and tiers, memory and Redis together. Below the dashed line CacheHitRateLow begins.",
                "percentunit",
                Query("job:rate_limiter_cache_hits:ratio_rate5m", "answered by a cache"),
                see="cachehitratelow",
                steps=Steps(None, 0.8, low_is_bad=True),
                most=1,
            ),
            lines(
                "Cache hits by level",
                "Look-ups a second: l1 is memory, l2 is Redis.",
                "ops",
                Query(_rate("rate_limiter_cache_hits_total", "level"), "found in {{level}}"),
                Query(_rate("rate_limiter_cache_misses_total", "level"), "missed by {{level}}"),
                see="catalog",
            ),
            lines(
                "Keys in memory",
                "At `cache.max_keys` for long: raise it.",
                "short",
                Query(f"sum by (instance) (rate_limiter_cached_keys{{{_HERE}}})", "{{instance}}"),
                see="catalog",
            ),
        ],
        [
            lines(
                "Caches in trouble",
                "Look-ups a second. Stale: the database does not answer. Errors: Redis did not, and the database was asked.",
                "ops",
                Query(f"sum(rate(rate_limiter_cache_stale_total{{{_HERE}}}[$__rate_interval]))", "answered past their time"),
                Query(
                    f"sum(rate(rate_limiter_shared_cache_errors_total{{{_HERE}}}[$__rate_interval])) or vector(0)",
                    "errors of the shared cache",
                ),
                see="catalog",
            ),
            lines(
                "Policy files",
                "Taken and refused, in each interval. Refused: the old policy stays in force, and the log names the line.",
                "short",
                Query(f"sum(increase(rate_limiter_policy_reloads_total{{{_HERE}}}[$__rate_interval]))", "taken"),
                Query(f"sum(increase(rate_limiter_policy_reload_errors_total{{{_HERE}}}[$__rate_interval]))", "refused"),
                see="policyreloadfailed",
                colours={"taken": GREEN, "refused": RED},
            ),
            states(
                "Policy file in force",
                "Refused: an instance that starts now ends. Mend the file before anything restarts.",
                Query(f"min by (instance) (rate_limiter_policy_valid{{{_HERE}}})", "{{instance}}"),
                {1: ("in force", GREEN), 0: ("refused", RED)},
                see="policyinvalid",
            ),
        ],
        [
            number(
                "Policy version",
                "When what is in force was last changed. Instances that differ for more than seconds: one "
                "does not hear of changes.",
                "dateTimeAsIso",
                Query(f"max by (instance) (rate_limiter_policy_version{{{_HERE}}})", "{{instance}}"),
                "catalog",
            ),
            number(
                "Versions apart",
                "Between the instance that is ahead and the one that is behind. 0 but for moments.",
                "ms",
                Query("max(rate_limiter_policy_version) - min(rate_limiter_policy_version)"),
                "catalog",
                Steps(1, 1000),
            ),
        ],
    ]


def _violations() -> list[list[Panel]]:
    return [
        [
            lines(
                "Violations written and lost",
                "Blocked checks a second that went to the database, and those that it does not have.",
                "ops",
                Query(f"sum(rate(rate_limiter_violations_written_total{{{_HERE}}}[$__rate_interval]))", "written"),
                Query(f"sum(rate(rate_limiter_violations_dropped_total{{{_HERE}}}[$__rate_interval]))", "lost"),
                see="violationsdropped",
                colours={"written": GREEN, "lost": RED},
            ),
            lines(
                "Violations that wait",
                "Entries not written yet. Grows and stays: the database does not take writes.",
                "short",
                Query(f"sum by (instance) (rate_limiter_violations_pending{{{_HERE}}})", "{{instance}}"),
                see="violationsdropped",
            ),
        ]
    ]
