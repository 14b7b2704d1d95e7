"""What an instance records of its checks: violations and usage; and one observer out of several."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from tidegate.catalog.sql.database import Database
from tidegate.gate.gate import Observer, PassedObserver
from tidegate.ledger.aggregate import UsageCounts
from tidegate.ledger.maintenance import Retention
from tidegate.ledger.writer import UsageWriter
from tidegate.observation import Observation, PassedCheck
from tidegate.settings import Settings
from tidegate.telemetry.collectors import collect_usage, collect_violations
from tidegate.telemetry.metrics import Metrics
from tidegate.violations.recorder import Violations, ViolationWriter
from tidegate.violations.storage import SHADOW_TABLE


class CheckRecorders:
    """The recorders that the settings enable, and the tasks that write what they recorded.

    Args:
        metrics: get what the writers count.
        database: where they write.

    Attributes:
        observers: called for every check.
        passed: called for the checks of a turn that passed, in place of the observers; those that count blocked checks alone need
            no call.
        tasks: by name; each runs until cancelled.
        usage: writes the ledger; None if it is disabled.
    """

    def __init__(self, settings: Settings, metrics: Metrics, database: Database) -> None:
        self.observers: list[Observer] = []
        self.passed: list[PassedObserver] = []
        self.tasks: dict[str, Callable[[], Awaitable[None]]] = {}
        self.usage: UsageWriter | None = None
        self._flushes: list[Callable[[], Awaitable[None]]] = []
        if settings.violations.enabled:
            shadow = Violations(settings.violations.max_entries)
            violations = Violations(settings.violations.max_entries, shadow)
            writing = database, settings.violations.flush_s, settings.violations.keep_days
            writer, shadow_writer = ViolationWriter(violations, *writing), ViolationWriter(shadow, *writing, SHADOW_TABLE)
            collect_violations(metrics, writer, shadow_writer)
            self.observers.append(violations.observe)
            for name, each in (("violations_writer", writer), ("shadow_violations_writer", shadow_writer)):
                self.tasks[name] = each.run
                self._flushes.append(each.flush)
        ledger = settings.ledger
        if ledger.enabled:
            counts = UsageCounts(latency=metrics.latency)
            retention = Retention(ledger.keep_days, ledger.traffic_days, ledger.minutes_days, ledger.max_callers)
            self.usage = UsageWriter(counts, database, ledger.flush_s, retention)
            collect_usage(metrics, self.usage)
            self.observers.append(counts.observe)
            self.passed.append(counts.observe_passed)
            self.tasks["ledger_writer"] = self.usage.run
            self._flushes.append(self.usage.flush)

    async def flush(self) -> None:
        """Write what is recorded, before the database is closed."""
        # At the same time: while the database does not answer, one after the other would take longer than a worker has to end.
        await asyncio.gather(*(flush() for flush in self._flushes))


def observe_all(observers: Sequence[Observer]) -> Observer:
    """An observer that calls several, in this order.

    Args:
        observers: one or more.

    Returns:
        The only one itself.
    """
    if len(observers) == 1:
        return observers[0]

    def observe(observation: Observation) -> None:
        for each in observers:
            each(observation)

    return observe


def observe_all_passed(observers: Sequence[PassedObserver]) -> PassedObserver:
    """As `observe_all`, of the checks of a turn that passed."""

    def observe(passed: Sequence[PassedCheck]) -> None:
        for each in observers:
            each(passed)

    return observe
