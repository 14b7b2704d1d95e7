"""Each Redis, from redis_exporter's metrics."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.layout import Row, choice, dashboard
from dashboards.panels import Panel, Query, Steps, bars, lines, number, up
from dashboards.promql import or_none, rate, total

_HERE = 'instance=~"$redis"'


def made() -> Dashboard:
    """Make the dashboard.

    Returns:
        It.
    """
    return dashboard(
        "redis",
        "Tidegate: Redis",
        "Is a Redis down, full, slow, or losing counters?",
        [
            Row("All", _all()),
            Row("Memory and keys", _memory()),
            Row("Work", _work()),
            Row("Replication", _replication()),
        ],
        [choice("redis", "Redis", "label_values(redis_up, instance)")],
    )


def _each(metric: str) -> str:
    return rate(metric, _HERE, "instance")


def _all() -> list[list[Panel]]:
    return [
        [
            number(
                "Down",
                "A Redis, or its exporter, does not respond.",
                "short",
                Query('count(redis_up == 0 or up{job="redis"} == 0) or vector(0)'),
                "redisdown",
                Steps(None, 1),
            ),
            number(
                "Fullest",
                "Largest share of `maxmemory`. Red where RedisMemoryHigh begins; 0 if no server has a limit.",
                "percentunit",
                Query("max(instance:redis_memory_used:ratio) or vector(0)"),
                "redismemoryhigh",
                Steps(0.75, 0.9),
            ),
            number(
                "Without a memory limit",
                "Servers without `maxmemory`: they grow until the machine's memory is full, without an alert. Set it.",
                "short",
                Query("count(redis_memory_max_bytes == 0) or vector(0)"),
                "redismemoryhigh",
                Steps(1, None),
            ),
            number(
                "Found keys",
                "Share of requested keys. Red where RedisHitRateLow begins; new subjects are misses too.",
                "percentunit",
                Query("job:redis_keyspace_hits:ratio_rate5m"),
                "redishitratelow",
                Steps(None, 0.8, low_is_bad=True),
            ),
            number(
                "Slots not served",
                "Of a cluster: their subjects are decided without Redis. Also 0 without a cluster.",
                "short",
                Query("max(redis_cluster_slots_fail) or vector(0)"),
                "redisdown",
                Steps(None, 1),
            ),
            number(
                "P99 as Tidegate sees it",
                "Calls of all instances, including the network. Red where RedisLatencyHigh begins.",
                "s",
                Query("job:rate_limiter_store_latency_seconds:p99_rate5m"),
                "redislatencyhigh",
                Steps(0.005, 0.01),
            ),
        ],
        [
            up("Redis", "redis_up", _HERE, "redisdown"),
            lines(
                "Commands",
                "Per second, by server. Uneven among masters: rebalance the slots.",
                "ops",
                Query(_each("redis_commands_processed_total"), "{{instance}}"),
                see="redislatencyhigh",
            ),
            lines(
                "CPU",
                "Cores in use, by server. Commands run on one: at the dashed line it is nearly saturated, add shards.",
                "short",
                Query(f"{_each('redis_cpu_sys_seconds_total')} + {_each('redis_cpu_user_seconds_total')}", "{{instance}}"),
                see="redislatencyhigh",
                steps=Steps(None, 0.9),
            ),
        ],
    ]


def _memory() -> list[list[Panel]]:
    return [
        [
            lines(
                "Share of maxmemory",
                "By server. The dashed line is where RedisMemoryHigh begins; at 100 % it refuses writes. No line "
                "for a server without a limit.",
                "percentunit",
                Query(f"instance:redis_memory_used:ratio{{{_HERE}}}", "{{instance}}"),
                see="redismemoryhigh",
                steps=Steps(None, 0.9),
                most=1,
                no_value="No server has maxmemory: set it",
            ),
            lines(
                "Memory",
                "By server: used, and resident. Much more resident than used: fragmentation.",
                "bytes",
                Query(f"redis_memory_used_bytes{{{_HERE}}}", "used, {{instance}}"),
                Query(f"redis_memory_used_rss_bytes{{{_HERE}}}", "given, {{instance}}"),
                see="redismemoryhigh",
            ),
            lines(
                "Keys",
                "By server; a subject has one for each limit. If it keeps growing: check how long your windows are.",
                "short",
                Query(total("redis_db_keys", _HERE, "instance"), "{{instance}}"),
                see="redismemoryhigh",
            ),
        ],
        [
            lines(
                "Found keys",
                "Share of requested keys, by server. Below the dashed line RedisHitRateLow begins.",
                "percentunit",
                Query(
                    f"{_each('redis_keyspace_hits_total')} / "
                    f"(({_each('redis_keyspace_hits_total')} + {_each('redis_keyspace_misses_total')}) > 0)",
                    "{{instance}}",
                ),
                see="redishitratelow",
                steps=Steps(None, 0.8, low_is_bad=True),
                most=1,
            ),
            lines(
                "Evicted",
                "Keys per second. Above 0: counters are evicted and limits admit more than configured. Set "
                "`maxmemory-policy noeviction`.",
                "ops",
                Query(_each("redis_evicted_keys_total"), "{{instance}}"),
                see="redishitratelow",
            ),
            lines(
                "Expired",
                "Keys per second: windows that ended. No action.",
                "ops",
                Query(_each("redis_expired_keys_total"), "{{instance}}"),
                see="redishitratelow",
            ),
        ],
    ]


def _work() -> list[list[Panel]]:
    return [
        [
            lines(
                "Time of a command",
                "Mean inside the server, by server. Grows with the load: slow commands of others, or a busy machine.",
                "s",
                Query(
                    f"{_each('redis_commands_duration_seconds_total')} / ({_each('redis_commands_total')} > 0)",
                    "{{instance}}",
                ),
                see="redislatencyhigh",
            ),
            bars(
                "Commands that take most",
                "Seconds per second, the top ten. Besides `evalsha`, `get`, `set`, `mget`: another program.",
                "s",
                Query(
                    "sort_desc(topk(10, sum by (cmd) "
                    f"(rate(redis_commands_duration_seconds_total{{{_HERE}}}[$__rate_interval]))))",
                    "{{cmd}}",
                ),
                see="redislatencyhigh",
            ),
            lines(
                "Clients",
                "Connections, by server. Tidegate keeps a few per instance; steady growth is a leak in some client.",
                "short",
                Query(f"redis_connected_clients{{{_HERE}}}", "{{instance}}"),
                see="counter-store",
            ),
        ],
        [
            lines(
                "Refused connections",
                "Per second: `maxclients` is reached. Raise it.",
                "ops",
                Query(_each("redis_rejected_connections_total"), "{{instance}}"),
                see="redisdown",
            ),
            lines(
                "Slow log",
                "Entries, by server. `redis-cli slowlog get 10` lists them.",
                "short",
                Query(f"redis_slowlog_length{{{_HERE}}}", "{{instance}}"),
                see="redislatencyhigh",
            ),
            lines(
                "Network",
                "Bytes per second, in and out, by server.",
                "Bps",
                Query(_each("redis_net_input_bytes_total"), "in, {{instance}}"),
                Query(_each("redis_net_output_bytes_total"), "out, {{instance}}"),
                see="redislatencyhigh",
            ),
        ],
    ]


def _replication() -> list[list[Panel]]:
    return [
        [
            lines(
                "Replicas",
                "Connected to each server. A master without one: its counters are lost with it.",
                "short",
                Query(f"redis_connected_slaves{{{_HERE}}}", "{{instance}}"),
                see="redisdown",
            ),
            lines(
                "Replicas cut off",
                "Replicas that have lost their master. None without replicas.",
                "short",
                Query(f"count(redis_master_link_up{{{_HERE}}} == 0) or vector(0)", "cut off"),
                see="redisdown",
                steps=Steps(None, 1),
            ),
            lines(
                "Bytes behind",
                "What each replica has not acknowledged. It is lost if the master dies now; grows: the "
                "replica or the network is slow.",
                "bytes",
                Query(
                    or_none(
                        f"redis_master_repl_offset{{{_HERE}}} - on (instance) group_right () "
                        f"redis_connected_slave_offset_bytes{{{_HERE}}}",
                        "slave_port",
                    ),
                    "{{slave_ip}}:{{slave_port}} of {{instance}}",
                ),
                see="redisdown",
            ),
        ]
    ]
