"""Each PostgreSQL, from postgres_exporter's metrics and from Tidegate's."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.layout import Row, choice, dashboard
from dashboards.panels import Panel, Query, Steps, lines, number, up
from dashboards.promql import or_none, rate, total

_HERE = 'instance=~"$postgres", datname=~"$database"'
_SERVER = 'instance=~"$postgres"'
_CONFLICTS = ("snapshot", "lock", "bufferpin", "deadlock", "tablespace")


def made() -> Dashboard:
    """Make the dashboard.

    Returns:
        It.
    """
    return dashboard(
        "postgresql",
        "Tidegate: PostgreSQL",
        "Does the catalog's database accept reads and writes, and do its replicas keep up?",
        [
            Row("All", _all()),
            Row("As Tidegate sees it", _tidegate()),
            Row("Replication", _replication()),
            Row("Work", _work()),
        ],
        [
            choice("postgres", "PostgreSQL", "label_values(pg_up, instance)"),
            choice("database", "Database", 'label_values(pg_stat_database_tup_returned{datname!~"|template.*"}, datname)'),
        ],
    )


def _each(metric: str) -> str:
    return rate(metric, _HERE, "instance")


def _all() -> list[list[Panel]]:
    return [
        [
            number(
                "Down",
                "A PostgreSQL, or its exporter, does not respond.",
                "short",
                Query('count(pg_up == 0 or up{job="postgres"} == 0) or vector(0)'),
                "servicedown",
                Steps(None, 1),
            ),
            number(
                "Worst lag",
                "Of the replica with the largest lag. Yellow and red where ReplicationLag warns and pages.",
                "s",
                Query("max(pg_replication_lag_seconds)"),
                "replicationlag",
                Steps(10, 60),
            ),
            number(
                "Connections in use",
                "Share of `max_connections`, of the server with most. At 100 % all new connections are refused, also yours.",
                "percentunit",
                Query("max(sum by (instance) (pg_stat_activity_count) / max by (instance) (pg_settings_max_connections))"),
                "servicedown",
                Steps(0.7, 0.9),
            ),
            number(
                "Found in memory",
                "Share of blocks read. Below 99 % for long: `shared_buffers` is too small for the catalog.",
                "percentunit",
                Query(
                    "sum(rate(pg_stat_database_blks_hit[$__rate_interval])) / "
                    "(sum(rate(pg_stat_database_blks_hit[$__rate_interval])) + "
                    "sum(rate(pg_stat_database_blks_read[$__rate_interval])))"
                ),
                "servicedown",
                Steps(0.99, 0.9, low_is_bad=True),
            ),
            number(
                "Replicas out of rotation",
                "Removed from rotation by Tidegate, of the instance with most. Red where ReplicaEjected begins.",
                "short",
                Query("max(rate_limiter_replicas - rate_limiter_replicas_asked) or vector(0)"),
                "replicaejected",
                Steps(None, 1),
            ),
            number(
                "Checks refused",
                "Per second, because no database responded and nothing was cached.",
                "ops",
                Query('sum(rate(rate_limiter_errors_total{type="db_connection"}[$__rate_interval]))'),
                "availabilitybudgetburn",
                Steps(None, 0.001),
            ),
        ]
    ]


def _tidegate() -> list[list[Panel]]:
    return [
        [
            lines(
                "Look-ups",
                "Per second, by instance. Rises after a restart; otherwise the caches lack the requested keys.",
                "ops",
                Query(rate("rate_limiter_database_queries_total", by="instance"), "{{instance}}"),
                see="cachehitratelow",
            ),
            lines(
                "Connections to the primary",
                "All instances, for reading. All in use for long: slow queries, or raise `catalog.pool_size`.",
                "short",
                Query(total("rate_limiter_database_connections", by="state"), "{{state}}"),
                see="catalog",
                stacked=True,
            ),
            lines(
                "Lag of the worst replica",
                "Age of the oldest change it lacks, by instance. Notices a replica that lost its primary, which "
                "PostgreSQL's own lag does not.",
                "s",
                Query(or_none("max by (instance) (rate_limiter_replica_lag_seconds)", "instance"), "{{instance}}"),
                see="replicationlag",
                steps=Steps(10, 60),
            ),
        ],
        [
            lines(
                "Replicas asked",
                "And configured, by instance. Fewer asked: one fails, does not answer in time, or lags. 0 "
                "where none is configured.",
                "short",
                Query(
                    or_none(total("rate_limiter_replicas_asked", by="instance"), "instance"),
                    "asked by {{instance}}",
                ),
                Query("max(rate_limiter_replicas) or vector(0)", "configured"),
                see="replicaejected",
            ),
            lines(
                "Replicas out of rotation",
                "Number per interval, by instance. If it grows steadily: a replica is unstable.",
                "short",
                Query(
                    or_none("sum by (instance) (increase(rate_limiter_replica_ejections_total[$__rate_interval]))", "instance"),
                    "{{instance}}",
                ),
                see="replicaejected",
            ),
            lines(
                "Violations that wait",
                "Entries not written yet, by instance. If it grows and stays high: the primary does not accept writes.",
                "short",
                Query(total("rate_limiter_violations_pending", by="instance"), "{{instance}}"),
                see="violationsdropped",
            ),
        ],
    ]


def _replication() -> list[list[Panel]]:
    return [
        [
            lines(
                "Lag",
                "Age of the last change replayed, by server; a primary has 0. The dashed lines are where "
                "ReplicationLag warns and pages.",
                "s",
                Query(f"max by (instance) (pg_replication_lag_seconds{{{_SERVER}}})", "{{instance}}"),
                see="replicationlag",
                steps=Steps(10, 60),
            ),
            lines(
                "Conflicts",
                "Queries per second that a replica cancelled to continue replay, by server. A few are normal; many: a "
                "long query there, or `hot_standby_feedback`.",
                "ops",
                Query(_each("pg_stat_database_conflicts"), "{{instance}}"),
                see="replicationlag",
            ),
            lines(
                "Conflicts by reason",
                "A second. Snapshot: rows that the primary has removed; lock: a table that it changes; bufferpin: "
                "a page that a query holds.",
                "ops",
                *(
                    Query(f"sum(rate(pg_stat_database_conflicts_confl_{reason}{{{_HERE}}}[$__rate_interval]))", reason)
                    for reason in _CONFLICTS
                ),
                see="replicationlag",
            ),
        ]
    ]


def _work() -> list[list[Panel]]:
    return [
        [
            lines(
                "Tuples read",
                "Per second, by server: scanned, and fetched by an index. Many more scanned: a query without an index.",
                "ops",
                Query(_each("pg_stat_database_tup_returned"), "scanned, {{instance}}"),
                Query(_each("pg_stat_database_tup_fetched"), "fetched, {{instance}}"),
                see="cachehitratelow",
            ),
            lines(
                "Tuples written",
                "Per second: mostly violations, which are written in batches.",
                "ops",
                Query(rate("pg_stat_database_tup_inserted", _HERE), "inserted"),
                Query(rate("pg_stat_database_tup_updated", _HERE), "updated"),
                Query(rate("pg_stat_database_tup_deleted", _HERE), "deleted"),
                see="violationsdropped",
            ),
            lines(
                "Transactions",
                "Per second, by server. Many rolled back: see its log.",
                "ops",
                Query(_each("pg_stat_database_xact_commit"), "committed, {{instance}}"),
                Query(_each("pg_stat_database_xact_rollback"), "rolled back, {{instance}}"),
                see="servicedown",
            ),
        ],
        [
            lines(
                "Connections by state",
                "All servers. `idle in transaction` for long holds locks and row versions: find it in pg_stat_activity.",
                "short",
                Query(total("pg_stat_activity_count", _HERE, "state"), "{{state}}"),
                see="violationsdropped",
                stacked=True,
            ),
            lines(
                "Longest transaction",
                "By server. On a replica it blocks replay.",
                "s",
                Query(f"max by (instance) (pg_stat_activity_max_tx_duration{{{_HERE}}})", "{{instance}}"),
                see="replicationlag",
            ),
            lines(
                "Found in memory",
                "Share of blocks read, by server. Low right after a restart.",
                "percentunit",
                Query(
                    f"{_each('pg_stat_database_blks_hit')} / "
                    f"(({_each('pg_stat_database_blks_hit')} + {_each('pg_stat_database_blks_read')}) > 0)",
                    "{{instance}}",
                ),
                see="servicedown",
                most=1,
            ),
        ],
        [
            lines(
                "Deadlocks",
                "Per second, by server. Above 0: another program writes to Tidegate's tables.",
                "ops",
                Query(_each("pg_stat_database_deadlocks"), "{{instance}}"),
                see="servicedown",
            ),
            lines(
                "Locks",
                "Held or waited for, by mode.",
                "short",
                Query(total("pg_locks_count", _HERE, "mode"), "{{mode}}"),
                see="violationsdropped",
            ),
            lines(
                "Size",
                "By database. Grows with violations, which have a partition a day.",
                "bytes",
                Query(f"max by (datname) (pg_database_size_bytes{{{_HERE}}})", "{{datname}}"),
                see="violationsdropped",
            ),
            up("PostgreSQL", "pg_up", _SERVER, "servicedown"),
        ],
    ]
