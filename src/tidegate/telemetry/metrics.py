"""Metrics with the names that dashboards and alerts are written for.

The hot path counts in plain integers (0.3 µs a check; `prometheus_client`'s own counters cost 2.7 µs) and a collector hands
them over when somebody scrapes. No API key, ip or path is ever a label.
"""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tidegate.decision import Observation
from tidegate.latency import BUCKETS_S, LatencyHistogram

MAX_RULE_LABELS: Final = 1000
"""Most rules that are told apart, and most tiers; the others are counted together."""
NEAR: Final = 5
"""A caller with a fifth of its limit left or less is near it."""
OTHER: Final = "(other)"
_SAMPLES_A_TURN: Final = 100
"""So many lines of a scrape are made, in about 0.3 ms, before checks have their turn."""

# The names of the errors in the requirement; any other error counts under its code in lower case.
_ERROR_TYPES: Final = {"CATALOG_UNAVAILABLE": "db_connection"}
# Told from the beginning as 0: the first error of a series that was not there before is no rise to `rate()`.
_KNOWN_ERRORS: Final = (
    "api_key_expired",
    "api_key_lookups_exceeded",
    "api_key_revoked",
    "bad_request",
    "db_connection",
    "invalid_api_key",
    "missing_api_key",
    "store_unavailable",
)


class Metrics:
    """Counts what the gate observes, and collects what others count.

    Args:
        version: of Tidegate, for the build metric.
    """

    def __init__(self, version: str) -> None:
        self.allowed = 0
        self.blocked = 0
        self.degraded = 0
        self.policy_reloads = 0
        self.policy_reload_errors = 0
        self.policy_valid = True
        self.errors: dict[str, int] = {}
        self.shadow_blocked: dict[str, int] = {}
        self.latency = LatencyHistogram()
        # By tier and rule: allowed, blocked. By tier: allowed near the limit.
        self._by_rule: dict[tuple[str | None, str | None], list[int]] = {}
        self._near: dict[str, int] = {}
        self._gauges: list[tuple[str, str, Callable[[], float]]] = []
        self._counters: list[tuple[str, str, Callable[[], float]]] = []
        self._labelled: list[tuple[str, str, str, Callable[[], Mapping[str, float]], bool]] = []
        self._histograms: list[tuple[str, str, LatencyHistogram]] = [
            ("rate_limiter_latency_seconds", "Time from the arrival of a check at the gate to its decision.", self.latency)
        ]
        self._error_sources: list[Callable[[], Iterable[tuple[str, int]]]] = []
        self._version = version

    def observe(self, seen: Observation) -> None:
        """Count one check.

        Args:
            seen: what the gate saw.
        """
        decision = seen.decision
        if decision is None:
            kind = _ERROR_TYPES.get(seen.error or "", (seen.error or "").lower())
            self.errors[kind] = self.errors.get(kind, 0) + 1
            return
        allowed = decision.allowed
        limits = decision.limits
        if limits is not None:
            tally = self._by_rule.get((limits.tier, limits.rule)) or self._tally_of(limits.tier, limits.rule)
            if not allowed:
                tally[1] += 1
            else:
                tally[0] += 1
                binding, remaining = decision.binding, decision.remaining
                if binding is not None and remaining is not None and remaining * NEAR <= (binding.burst or binding.amount):
                    tier = limits.tier or ""
                    near = tier if tier in self._near or len(self._near) < MAX_RULE_LABELS else OTHER
                    self._near[near] = self._near.get(near, 0) + 1
        if allowed:
            self.allowed += 1
        else:
            self.blocked += 1
        if decision.degraded:
            self.degraded += 1
        self.latency.add(seen.latency_ns)
        if seen.shadow_denied:
            for rule in seen.shadow_denied:
                name = rule if rule in self.shadow_blocked or len(self.shadow_blocked) < MAX_RULE_LABELS else OTHER
                self.shadow_blocked[name] = self.shadow_blocked.get(name, 0) + 1

    def _tally_of(self, tier: str | None, rule: str | None) -> list[int]:
        """The tally of a rule that was not met yet; where there are too many, that of all others."""
        key = (tier, rule) if len(self._by_rule) < MAX_RULE_LABELS else (OTHER, OTHER)
        return self._by_rule.setdefault(key, [0, 0])

    def add_gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Collect a value that somebody else keeps.

        Args:
            name: of the metric.
            text: what it is, with its unit.
            read: gives the value when somebody scrapes.
        """
        self._gauges.append((name, text, read))

    def add_counter(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Collect a count that somebody else keeps and that only grows.

        Args:
            name: of the metric, without `_total`.
            text: what it counts.
            read: gives the count when somebody scrapes.
        """
        self._counters.append((name, text, read))

    def add_labelled_counter(self, name: str, text: str, label: str, read: Callable[[], Mapping[str, float]]) -> None:
        """Collect counts that somebody else keeps by a label of few values, and that only grow.

        Args:
            name: of the metric, without `_total`.
            text: what it counts.
            label: its name.
            read: gives the count of each value when somebody scrapes.
        """
        self._labelled.append((name, text, label, read, False))

    def add_labelled_gauge(self, name: str, text: str, label: str, read: Callable[[], Mapping[str, float]]) -> None:
        """Collect values that somebody else keeps by a label of few values.

        Args:
            name: of the metric.
            text: what it is, with its unit.
            label: its name.
            read: gives the value of each when somebody scrapes.
        """
        self._labelled.append((name, text, label, read, True))

    def add_histogram(self, name: str, text: str, tally: LatencyHistogram) -> None:
        """Collect durations that somebody else counts.

        Args:
            name: of the metric, in seconds.
            text: what took so long.
            tally: of the durations.
        """
        self._histograms.append((name, text, tally))

    def add_errors(self, read: Callable[[], Iterable[tuple[str, int]]]) -> None:
        """Collect errors that no check was refused for, beside those that one was.

        Args:
            read: gives types, none of which a refusal has, and counts that only grow.
        """
        self._error_sources.append(read)

    async def exposition(self) -> bytes:
        """All metrics in Prometheus' text format 0.0.4.

        Checks are decided meanwhile: with 1,000 rules it would hold them up for longer than any may take.

        Returns:
            The bytes; each family is of one moment, all of them together are not.
        """
        parts: list[bytes] = []
        for family in self.collect():
            for first in range(0, max(len(family.samples), 1), _SAMPLES_A_TURN):
                part = Metric(family.name, family.documentation, family.type)
                part.samples = family.samples[first : first + _SAMPLES_A_TURN]
                text = generate_latest(_Families([part]))
                # What it is stands above its first sample only.
                parts.append(text if not first else text[text.index(f"\n{part.samples[0].name}".encode()) + 1 :])
                await asyncio.sleep(0)
        return b"".join(parts)

    def collect(self) -> Iterator[Metric]:
        """All metrics, for a registry.

        Yields:
            Metric families.
        """
        requests = CounterMetricFamily("rate_limiter_requests", "Checks decided.", labels=["status"])
        requests.add_metric(["allowed"], self.allowed)
        requests.add_metric(["blocked"], self.blocked)
        yield requests
        for name, text, tally in self._histograms:
            yield _histogram(name, text, tally)
        errors = CounterMetricFamily(
            "rate_limiter_errors",
            "Checks refused with an error, or decided without the counter store, by error type.",
            labels=["type"],
        )
        found = dict.fromkeys(_KNOWN_ERRORS, 0) | self.errors
        for source in self._error_sources:
            found.update(source())
        for kind, count in sorted(found.items()):
            errors.add_metric([kind], count)
        yield errors
        by_rule = CounterMetricFamily(
            "rate_limiter_rule_requests", "Checks decided, by tier and rule.", labels=["tier", "rule", "status"]
        )
        for (tier, rule), (allowed, blocked) in self._by_rule.items():
            by_rule.add_metric([tier or "", rule or "", "allowed"], allowed)
            by_rule.add_metric([tier or "", rule or "", "blocked"], blocked)
        yield by_rule
        near = CounterMetricFamily(
            "rate_limiter_near_limit", "Checks allowed with at most a fifth of the limit remaining.", labels=["tier"]
        )
        for name, count in sorted(self._near.items()):
            near.add_metric([name], count)
        yield near
        shadow = CounterMetricFamily(
            "rate_limiter_shadow_blocked", "Checks that a shadow rule would have blocked.", labels=["rule"]
        )
        for rule, count in sorted(self.shadow_blocked.items()):
            shadow.add_metric([rule], count)
        yield shadow
        yield CounterMetricFamily(
            "rate_limiter_degraded", "Checks decided without the counter store because it was unavailable.", self.degraded
        )
        yield CounterMetricFamily("rate_limiter_policy_reloads", "Policy files applied.", self.policy_reloads)
        yield CounterMetricFamily(
            "rate_limiter_policy_reload_errors",
            "Policy files refused; the previous policy stayed active.",
            self.policy_reload_errors,
        )
        yield GaugeMetricFamily(
            "rate_limiter_policy_valid",
            "1 while the policy file is active, 0 while it is refused.",
            int(self.policy_valid),
        )
        build = GaugeMetricFamily(
            "rate_limiter_build_info", "Always 1; version of Tidegate and of Python as labels.", labels=["version", "python"]
        )
        build.add_metric([self._version, platform.python_version()], 1)
        yield build
        for name, text, read in self._gauges:
            yield GaugeMetricFamily(name, text, read())
        for name, text, read in self._counters:
            yield CounterMetricFamily(name, text, read())
        for name, text, label, read_each, is_gauge in self._labelled:
            family = (GaugeMetricFamily if is_gauge else CounterMetricFamily)(name, text, labels=[label])
            for value, counted in sorted(read_each().items()):
                family.add_metric([value], counted)
            yield family


def _histogram(name: str, text: str, tally: LatencyHistogram) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text)
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*BUCKETS_S, float("inf")), tally.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else repr(bound), total))
    family.add_metric([], buckets=buckets, sum_value=tally.sum_ns / 1e9)
    return family


class _Families(Collector):
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Sequence[Metric]:
        return self._families
