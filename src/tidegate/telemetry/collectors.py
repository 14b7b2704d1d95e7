"""Registers the metrics of the components of an instance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol

from tidegate.background import TaskSupervisor
from tidegate.breaker import BreakerState
from tidegate.catalog.blocks import Blocks
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.shared import SharedCatalog
from tidegate.catalog.sql.database import Database
from tidegate.counters import CounterStore
from tidegate.counters.factory import guard_of
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.lease_table import LeaseTable
from tidegate.counters.leased import LeasedCounters
from tidegate.counters.memory import MemoryCounters
from tidegate.gate.access import AccessControl
from tidegate.ledger.writer import UsageWriter
from tidegate.notifications.notifier import Notifier
from tidegate.telemetry.logs import lines_dropped, lines_suppressed
from tidegate.telemetry.metrics import Metrics
from tidegate.violations.recorder import ViolationWriter


class Connections(Protocol):
    """What a server of connections counts."""

    evicted: int
    refused: int

    @property
    def connections(self) -> int:
        """Open ones."""
        ...


_STATES: Final = {BreakerState.CLOSED: 0, BreakerState.HALF_OPEN: 1, BreakerState.OPEN: 2}


def collect_cache(
    metrics: Metrics, cached: CachedCatalog, shared: SharedCatalog | None = None, database: Database | None = None
) -> None:
    """Register the metrics of the catalog: its caches, its database and the read replicas."""

    def levels(one: int, two: int | None) -> dict[str, float]:
        return {"l1": one} if two is None else {"l1": one, "l2": two}

    metrics.add_labelled_counter(
        "rate_limiter_cache_hits",
        "Catalog look-ups answered from memory (l1) and from Redis (l2).",
        "level",
        lambda: levels(cached.hits, None if shared is None else shared.hits),
    )
    metrics.add_labelled_counter(
        "rate_limiter_cache_misses",
        "Catalog look-ups not found in memory (l1) and in Redis (l2).",
        "level",
        lambda: levels(cached.misses, None if shared is None else shared.misses),
    )
    metrics.add_counter("rate_limiter_cache_stale", "Catalog look-ups answered with a stale entry.", lambda: cached.stale)
    metrics.add_gauge("rate_limiter_cached_keys", "API keys in the cache, including unknown ones.", lambda: len(cached))
    limit = cached.unknown_keys
    if limit is not None:
        metrics.add_counter(
            "rate_limiter_unknown_keys_refused",
            "API key look-ups refused because the client address sent too many unknown keys.",
            lambda: limit.refused,
        )
    if shared is not None:
        metrics.add_counter("rate_limiter_shared_cache_errors", "Catalog look-ups in Redis that failed.", lambda: shared.errors)
        metrics.add_counter(
            "rate_limiter_shared_cache_refused",
            "Shared cache entries ignored: not sealed with the secret of this catalog, or invalid.",
            lambda: shared.refused,
        )
    if database is not None:
        _collect_database(metrics, database)


def _collect_database(metrics: Metrics, database: Database) -> None:
    metrics.add_counter(
        "rate_limiter_database_queries", "Catalog look-ups sent to the database or a replica.", lambda: database.queries
    )
    metrics.add_labelled_gauge(
        "rate_limiter_database_connections",
        "Connections to the primary database for reading.",
        "state",
        lambda: dict(database.connections),
    )
    replicas = database.replicas
    if replicas is not None:
        each = replicas.replicas
        metrics.add_gauge("rate_limiter_replicas", "Read replicas configured.", lambda: len(each))
        metrics.add_gauge(
            "rate_limiter_replicas_asked",
            "Read replicas in rotation.",
            lambda: sum(replica.ejected_because is None for replica in each),
        )
        metrics.add_counter(
            "rate_limiter_replica_ejections",
            "Times a replica was removed from rotation.",
            lambda: sum(replica.ejections for replica in each),
        )
        metrics.add_gauge(
            "rate_limiter_replica_lag_seconds",
            "Replication lag of the replica that lags most: age of its oldest missing change.",
            lambda: max(replica.lag_s for replica in each),
        )


def collect_counters(metrics: Metrics, counters: CounterStore) -> None:
    """Register the metrics of the counter store."""
    guard = guard_of(counters)
    if guard is not None:
        _collect_guarded(metrics, guard)
    if isinstance(counters, LeasedCounters):
        _collect_leases(metrics, counters.table)
    if isinstance(counters, MemoryCounters):
        metrics.add_gauge("rate_limiter_subjects", "Counters held in memory.", lambda: len(counters))
        metrics.add_counter(
            "rate_limiter_subjects_evicted",
            "Unexpired counters evicted because max_subjects was reached.",
            lambda: counters.evicted,
        )


def collect_background(metrics: Metrics, supervisor: TaskSupervisor) -> None:
    """Register the metric of failed background tasks."""
    metrics.add_labelled_counter(
        "rate_limiter_background_failures",
        "Background tasks that ended with an exception and were restarted.",
        "task",
        lambda: supervisor.failures,
    )


def collect_access(metrics: Metrics, access: AccessControl, blocks: Blocks) -> None:
    """Register the metrics of blocks, and of checks that were denied or allowed before anything was counted."""
    metrics.add_gauge("rate_limiter_blocks", "Blocks in the memory of this process.", lambda: len(blocks))
    metrics.add_labelled_counter(
        "rate_limiter_access",
        "Checks that [[access]] or a block denied, and checks that [[access]] allowed without counting them.",
        "action",
        lambda: {"allowed": access.exempt, "denied": access.denied},
    )


def collect_violations(metrics: Metrics, writer: ViolationWriter, shadow: ViolationWriter) -> None:
    """Register the metrics of recorded violations; what is lost or waits is that of both writers."""
    metrics.add_counter("rate_limiter_violations_written", "Blocked checks written to the database.", lambda: writer.written)
    metrics.add_counter(
        "rate_limiter_violations_dropped",
        "Blocked checks lost or possibly lost before they reached the database.",
        lambda: writer.dropped + shadow.dropped,
    )
    metrics.add_gauge(
        "rate_limiter_violations_pending",
        "Entries of blocked checks waiting to be written.",
        lambda: writer.pending + shadow.pending,
    )


def collect_usage(metrics: Metrics, writer: UsageWriter) -> None:
    """Register the metrics of the usage ledger and the traffic history."""
    metrics.add_counter("rate_limiter_ledger_units_written", "Units written to the usage ledger.", lambda: writer.written)
    metrics.add_gauge("rate_limiter_ledger_pending", "Rows of usage and traffic waiting to be written.", lambda: writer.pending)
    metrics.add_counter(
        "rate_limiter_ledger_units_unattributed",
        "Units written without their customer and API key because too many rows waited.",
        lambda: writer.unattributed,
    )
    metrics.add_counter(
        "rate_limiter_ledger_batches_repeated",
        "Batches that were repeated although an earlier attempt had been applied; they were not added again.",
        lambda: writer.repeated,
    )
    metrics.add_counter(
        "rate_limiter_traffic_rows_dropped",
        "Rows of the traffic history dropped because too many waited.",
        lambda: writer.dropped,
    )


def collect_notifications(metrics: Metrics, notifier: Notifier) -> None:
    """Register the metrics of notifications."""
    metrics.add_labelled_counter(
        "rate_limiter_notifications",
        "Notifications delivered, failed for good or dropped, and attempts that are retried.",
        "result",
        lambda: notifier.counts,
    )
    metrics.add_gauge(
        "rate_limiter_notifications_pending", "Notifications waiting to be written to the database.", lambda: notifier.pending
    )


def _collect_guarded(metrics: Metrics, counters: GuardedCounters) -> None:
    metrics.add_histogram(
        "rate_limiter_store_latency_seconds",
        "Duration of calls to the counter store, including calls that timed out.",
        counters.latency,
    )
    # An open breaker is no error of the store: the check was not sent to it.
    metrics.add_errors(
        lambda: [
            *((f"redis_{reason}", 0) for reason in ("timeout", "disconnected")),
            *((f"redis_{reason}", count) for reason, count in counters.degraded.items() if reason != "breaker_open"),
        ]
    )
    metrics.add_labelled_gauge(
        "rate_limiter_breaker_state",
        "Circuit breaker of each shard with recent failures: 0 closed, 1 half open, 2 open.",
        "shard",
        lambda: {shard: _STATES[breaker.state] for shard, breaker in counters.breakers.items()},
    )
    metrics.add_labelled_counter(
        "rate_limiter_fallbacks", "Checks decided without the counter store, by reason.", "reason", lambda: counters.degraded
    )
    metrics.add_gauge(
        "rate_limiter_breakers_open", "Shards of the counter store whose circuit breaker is open.", lambda: counters.open_breakers
    )
    metrics.add_labelled_counter(
        "rate_limiter_late_answers",
        "Counter store answers after the deadline of their check, by result; lost: can no longer arrive.",
        "answer",
        lambda: counters.late.answers,
    )
    metrics.add_counter(
        "rate_limiter_corrupt_counters",
        "Counters reset because their stored state was unreadable.",
        lambda: counters.store.corrupt.resets,
    )
    metrics.add_counter(
        "rate_limiter_store_charges", "Checks sent to the counter store, and requests for leases.", lambda: counters.store_calls
    )
    metrics.add_gauge(
        "rate_limiter_instances", "Instances sharing the counter store, from their heartbeats.", lambda: counters.instances
    )
    metrics.add_gauge("rate_limiter_counters_owed", "Counters waiting to be written back after an outage.", lambda: counters.owed)
    metrics.add_counter("rate_limiter_counters_put_back", "Counters written back after an outage.", lambda: counters.put_back)
    metrics.add_counter(
        "rate_limiter_denials_remembered",
        "Checks denied from the denial cache, without a call to the store.",
        lambda: counters.denials.answered,
    )
    metrics.add_gauge(
        "rate_limiter_store_in_flight",
        "Calls to the counter store waiting for an answer.",
        lambda: sum(connection.in_flight for connection in counters.store.connections()),
    )
    metrics.add_gauge(
        "rate_limiter_store_shards_up",
        "Shards of the counter store that are connected.",
        lambda: sum(connection.up for connection in counters.store.connections()),
    )


def _collect_leases(metrics: Metrics, table: LeaseTable) -> None:
    metrics.add_counter(
        "rate_limiter_lease_decisions", "Checks decided from leases, without a call to the store.", lambda: table.decisions
    )
    metrics.add_counter("rate_limiter_leased_units", "Units charged in advance for this instance.", lambda: table.leased)
    metrics.add_counter("rate_limiter_lease_units_returned", "Unused units given back to the store.", lambda: table.returned)
    metrics.add_counter("rate_limiter_lease_units_lost", "Unused units that the store did not take back.", lambda: table.lost)
    metrics.add_gauge("rate_limiter_leases", "Leases held.", lambda: len(table.leases))


class TlsCounts(Protocol):
    """Counts of the certificates of the listeners."""

    reloads: int
    reload_errors: int

    def expiries(self) -> Mapping[str, float]:
        """By setting of `[tls]`, when its first certificate expires, s since the epoch."""
        ...


def collect_tls(metrics: Metrics, certificates: TlsCounts | None, refused: Callable[[], Mapping[str, float]]) -> None:
    """Register the metrics of TLS on the listeners.

    Args:
        certificates: None if TLS is disabled.
        refused: returns the connections that were refused, by reason.
    """
    metrics.add_labelled_gauge(
        "rate_limiter_tls_certificate_expiry_timestamp_seconds",
        "When the first certificate in each file of [tls] expires, seconds since the epoch.",
        "file",
        lambda: {} if certificates is None else certificates.expiries(),
    )
    metrics.add_counter(
        "rate_limiter_tls_reloads",
        "Changed files of [tls] that were loaded.",
        lambda: 0 if certificates is None else certificates.reloads,
    )
    metrics.add_counter(
        "rate_limiter_tls_reload_errors",
        "Changed files of [tls] that were refused; the previous ones stayed in use.",
        lambda: 0 if certificates is None else certificates.reload_errors,
    )
    metrics.add_labelled_counter(
        "rate_limiter_tls_handshakes_refused",
        "TLS connections that were refused: handshake failed, dropped to make room, or no name of tls.client_names.",
        "reason",
        refused,
    )


def collect_log_lines(metrics: Metrics) -> None:
    """Count the log lines that were not written."""
    metrics.add_counter(
        "rate_limiter_log_lines_dropped", "Log lines dropped because the output was blocked or closed.", lines_dropped
    )
    metrics.add_counter("rate_limiter_log_lines_suppressed", "Repeated log lines suppressed.", lines_suppressed)


def collect_connections(metrics: Metrics, server: Connections) -> None:
    """Count the connections of the data plane."""
    metrics.add_gauge("rate_limiter_connections", "Open connections of the data plane.", lambda: server.connections)
    metrics.add_labelled_counter(
        "rate_limiter_connections_closed",
        "Connections closed at max_connections: idle ones evicted, or new ones refused.",
        "reason",
        lambda: {"evicted": server.evicted, "refused": server.refused},
    )
