"""Parts of an instance: its counter store, catalog, policy and violations, for the dashboard of the service."""

from __future__ import annotations

from dashboards import promql
from dashboards.panels import GREEN, RED, YELLOW, Panel, Query, Steps, lines, number, states

HERE = 'instance=~"$instance"'
"""The instances that are chosen."""


def rate(metric: str, by: str) -> str:
    """A counter's rate on the instances that are chosen.

    Args:
        metric: the counter.
        by: labels to sum by.

    Returns:
        The expression.
    """
    return promql.rate(metric, HERE, by)


def store() -> list[list[Panel]]:
    """Panels of the counter store.

    Returns:
        Lines of them.
    """
    return [
        [
            lines(
                "Latency of the store",
                "Calls to Redis, including those that timed out. The dashed line is where RedisLatencyHigh begins.",
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
                "Checks per second by reason.",
                "reqps",
                Query(promql.or_none(rate("rate_limiter_fallbacks_total", "reason"), "reason"), "{{reason}}"),
                see="degradeddecisions",
            ),
        ],
        [
            states(
                "Breakers",
                "Of each shard that failed lately, as the worst instance sees it. Open while Redis answers its "
                "exporter: the way between.",
                Query(promql.or_none(f"max by (shard) (rate_limiter_breaker_state{{{HERE}}})", "shard"), "{{shard}}"),
                {0: ("closed", GREEN), 1: ("half open", YELLOW), 2: ("open", RED)},
                see="circuitopen",
            ),
            lines(
                "Shards",
                "Connected and left alone, by instance. Fewer connected than you run: one is down, or a "
                "new one is not known yet.",
                "short",
                Query(promql.total("rate_limiter_store_shards_up", HERE, "instance"), "connected, {{instance}}"),
                Query(promql.total("rate_limiter_breakers_open", HERE, "instance"), "left alone, {{instance}}"),
                see="circuitopen",
            ),
            lines(
                "Calls not answered yet",
                "If it grows: Redis is slow or hangs.",
                "short",
                Query(promql.total("rate_limiter_store_in_flight", HERE, "instance"), "{{instance}}"),
                see="redislatencyhigh",
            ),
        ],
        [
            lines(
                "Instances that share the counters",
                "As last seen by each. Fewer than you run: one does not reach Redis.",
                "short",
                Query(promql.total("rate_limiter_instances", HERE, "instance"), "{{instance}}"),
                see="counter-store",
            ),
            lines(
                "Owed after an outage",
                "Counters still to be written back. Must fall to 0 when Redis is available again.",
                "short",
                Query(promql.total("rate_limiter_counters_owed", HERE, "instance"), "owed, {{instance}}"),
                Query(f"sum(increase(rate_limiter_counters_put_back_total{{{HERE}}}[$__rate_interval]))", "put back"),
                see="counter-store",
            ),
            lines(
                "Denied from memory",
                "Checks per second that needed no call to Redis. No action: this is load that Redis is spared.",
                "reqps",
                Query(rate("rate_limiter_denials_remembered_total", "instance"), "{{instance}}"),
                see="counter-store",
            ),
        ],
        [
            lines(
                "Decided from leases and by Redis",
                "Checks per second that a lease decided, and calls that charge Redis. More leased checks, less load on Redis.",
                "reqps",
                Query(rate("rate_limiter_lease_decisions_total", ""), "from leases"),
                Query(rate("rate_limiter_store_charges_total", ""), "calls"),
                see="counter-store",
            ),
            lines(
                "Leased units",
                "Units per second charged in advance, given back unused, and lost. Lost units admit no request.",
                "short",
                Query(rate("rate_limiter_leased_units_total", ""), "leased"),
                Query(rate("rate_limiter_lease_units_returned_total", ""), "returned"),
                Query(rate("rate_limiter_lease_units_lost_total", ""), "lost"),
                see="counter-store",
            ),
            lines(
                "Leases",
                "Held by each instance; at most leases.max_subjects.",
                "short",
                Query(promql.total("rate_limiter_leases", HERE, "instance"), "{{instance}}"),
                see="counter-store",
            ),
        ],
    ]


def catalog() -> list[list[Panel]]:
    """Panels of the catalog, its caches and the policy.

    Returns:
        Lines of them.
    """
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
                "Look-ups per second: l1 is memory, l2 is Redis.",
                "ops",
                Query(rate("rate_limiter_cache_hits_total", "level"), "found in {{level}}"),
                Query(rate("rate_limiter_cache_misses_total", "level"), "missed by {{level}}"),
                see="catalog",
            ),
            lines(
                "Keys in memory",
                "If it stays at `cache.max_keys`: raise it.",
                "short",
                Query(promql.total("rate_limiter_cached_keys", HERE, "instance"), "{{instance}}"),
                see="catalog",
            ),
        ],
        [
            lines(
                "Caches in trouble",
                "Look-ups per second. Stale: no response of the database. Errors: none of Redis, database queried.",
                "ops",
                Query(promql.rate("rate_limiter_cache_stale_total", HERE), "answered past their time"),
                Query(
                    f"sum(rate(rate_limiter_shared_cache_errors_total{{{HERE}}}[$__rate_interval])) or vector(0)",
                    "errors of the shared cache",
                ),
                see="catalog",
            ),
            lines(
                "Policy files",
                "Applied and refused, per interval. Refused: the previous policy stays active, and the log names the line.",
                "short",
                Query(f"sum(increase(rate_limiter_policy_reloads_total{{{HERE}}}[$__rate_interval]))", "taken"),
                Query(f"sum(increase(rate_limiter_policy_reload_errors_total{{{HERE}}}[$__rate_interval]))", "refused"),
                see="policyreloadfailed",
                colours={"taken": GREEN, "refused": RED},
            ),
            states(
                "Policy file active",
                "Refused: the last valid policy stays active. An instance with an empty catalog does not start.",
                Query(f"min by (instance) (rate_limiter_policy_valid{{{HERE}}})", "{{instance}}"),
                {1: ("active", GREEN), 0: ("refused", RED)},
                see="policyinvalid",
            ),
        ],
        [
            number(
                "Policy version",
                "When the active policy was last changed. Instances that differ for more than seconds: one "
                "does not hear of changes.",
                "dateTimeAsIso",
                Query(f"max by (instance) (rate_limiter_policy_version{{{HERE}}})", "{{instance}}"),
                "catalog",
            ),
            number(
                "Versions apart",
                "Between the newest and the oldest version of all instances. 0 except for moments.",
                "ms",
                Query("max(rate_limiter_policy_version) - min(rate_limiter_policy_version)"),
                "catalog",
                Steps(1, 1000),
            ),
        ],
    ]


def violations() -> list[list[Panel]]:
    """Panels of what becomes of violations.

    Returns:
        Lines of them.
    """
    return [
        [
            lines(
                "Violations written and lost",
                "Blocked checks per second that were written to the database, and those that were dropped.",
                "ops",
                Query(promql.rate("rate_limiter_violations_written_total", HERE), "written"),
                Query(promql.rate("rate_limiter_violations_dropped_total", HERE), "lost"),
                see="violationsdropped",
                colours={"written": GREEN, "lost": RED},
            ),
            lines(
                "Violations that wait",
                "Entries not written yet. If it grows and stays high: the database does not accept writes.",
                "short",
                Query(promql.total("rate_limiter_violations_pending", HERE, "instance"), "{{instance}}"),
                see="violationsdropped",
            ),
        ]
    ]
