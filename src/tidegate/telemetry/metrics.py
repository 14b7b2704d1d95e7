"""Metrics, under the names that dashboards and alerts use.

The hot path counts in plain integers (0.3 µs per check; the counters of `prometheus_client` cost 2.7 µs), which a collector
reads on each scrape. API keys, addresses and paths are never labels.
"""

from __future__ import annotations

import asyncio
import platform
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tidegate.decision import Decision
from tidegate.latency import BUCKETS_NS, BUCKETS_S, LatencyHistogram
from tidegate.observation import Observation, PassedCheck
from tidegate.policy.limits import LimitSet

MAX_RULE_LABELS: Final = 1000
"""Maximum number of rules, and of tiers, with a series of their own; the rest share the label `(other)`."""
NEAR_LIMIT_DIVISOR: Final = 5
"""A check is near its limit if at most limit / 5 remains."""
OTHER: Final = "(other)"
_MAX_LIMIT_SETS: Final = 4096
_FASTEST_NS: Final = BUCKETS_NS[0]
_SAMPLES_PER_SLICE: Final = 100
"""Lines of a scrape rendered (in about 0.3 ms) before the event loop can run checks."""

# Published names of error types; any other error is counted under its code in lower case.
_ERROR_TYPES: Final = {"CATALOG_UNAVAILABLE": "db_connection"}
# Exported as 0 from the start: `rate()` does not see the first increment of a series that begins with it.
_KNOWN_ERRORS: Final = (
    "api_key_expired",
    "api_key_lookups_exceeded",
    "api_key_revoked",
    "bad_request",
    "blocked",
    "db_connection",
    "invalid_api_key",
    "missing_api_key",
    "store_unavailable",
)


class Metrics:
    """Counts the observations of the gate, and collects the counts of other components."""

    def __init__(self, version: str) -> None:
        self.degraded = 0
        self.policy_reloads = 0
        self.policy_reload_errors = 0
        self.policy_valid = True
        self.errors: dict[str, int] = {}
        self.shadow_blocked: dict[str, int] = {}
        self.latency = LatencyHistogram()
        # By tier and rule: [allowed, blocked]. By tier: allowed near the limit.
        self._unlimited = [0, 0]
        self._by_rule: dict[tuple[str | None, str | None], list[int]] = {}
        self._by_limits: dict[LimitSet, list[int]] = {}
        self._near: dict[str, int] = {}
        self._over: dict[tuple[str | None, str | None], int] = {}
        self._gauges: list[tuple[str, str, Callable[[], float]]] = []
        self._counters: list[tuple[str, str, Callable[[], float]]] = []
        self._labelled: list[tuple[str, str, str, Callable[[], Mapping[str, float]], bool]] = []
        self._histograms: list[tuple[str, str, LatencyHistogram]] = [
            ("rate_limiter_latency_seconds", "Time from the arrival of a check at the gate to its decision.", self.latency)
        ]
        self._error_sources: list[Callable[[], Iterable[tuple[str, int]]]] = []
        self._version = version

    def observe(self, observation: Observation) -> None:
        """Count one check."""
        decision = observation.decision
        if decision is None:
            kind = _ERROR_TYPES.get(observation.error or "", (observation.error or "").lower())
            self.errors[kind] = self.errors.get(kind, 0) + 1
            return
        limits = decision.limits
        counts = self._unlimited if limits is None else self._by_limits.get(limits) or self._limits_counts(limits)
        if decision.allowed:
            counts[0] += 1
            binding, remaining = decision.binding, decision.remaining
            if (
                remaining is not None
                and binding is not None
                and remaining * NEAR_LIMIT_DIVISOR <= (binding.burst or binding.amount)
                and limits is not None
            ):
                self._count_near(limits, decision, observation.cost)
        else:
            counts[1] += 1
        if decision.degraded:
            self.degraded += 1
        # `LatencyHistogram.add`, written out: a call costs as much as what it does.
        latency, ns = self.latency, observation.latency_ns
        latency.counts[bisect_left(BUCKETS_NS, ns)] += 1
        latency.sum_ns += ns
        if observation.shadow_denied:
            for rule in observation.shadow_denied:
                name = rule if rule in self.shadow_blocked or len(self.shadow_blocked) < MAX_RULE_LABELS else OTHER
                self.shadow_blocked[name] = self.shadow_blocked.get(name, 0) + 1

    def observe_passed(self, passed: Sequence[PassedCheck]) -> None:
        """As `observe`, for several checks that passed."""
        counts_by_limits, latency_counts = self._by_limits, self.latency.counts
        total_ns = fast = 0
        last: LimitSet | None = None
        counts: list[int] = []
        for decision, ns, cost, subject, _ in passed:
            limits, binding, remaining = decision.limits, decision.binding, decision.remaining
            if limits is None or binding is None or remaining is None:
                self.observe(Observation(decision, None, ns, (), subject, None, cost))
                continue
            if limits is not last:
                last, counts = limits, counts_by_limits.get(limits) or self._limits_counts(limits)
            counts[0] += 1
            if remaining * NEAR_LIMIT_DIVISOR <= (binding.burst or binding.amount):
                self._count_near(limits, decision, cost)
            total_ns += ns
            if ns <= _FASTEST_NS:
                fast += 1
            else:
                latency_counts[bisect_left(BUCKETS_NS, ns)] += 1
        latency_counts[0] += fast
        self.latency.sum_ns += total_ns

    def _count_near(self, limits: LimitSet, decision: Decision, cost: int) -> None:
        tier = limits.tier or ""
        near = tier if tier in self._near or len(self._near) < MAX_RULE_LABELS else OTHER
        self._near[near] = self._near.get(near, 0) + 1
        # What is above a quota or a soft limit is near it too. A peek is not counted: it admits nothing.
        if decision.overage and cost:
            self._add_overage(limits.tier, limits.rule, decision.overage)

    def _decided(self, blocked: int) -> int:
        """Checks that were allowed (0) or blocked (1)."""
        return self._unlimited[blocked] + sum(counts[blocked] for counts in self._by_rule.values())

    def _add_overage(self, tier: str | None, rule: str | None, units: int) -> None:
        key = (tier, rule)
        if key not in self._over and len(self._over) >= MAX_RULE_LABELS:
            key = (OTHER, OTHER)
        self._over[key] = self._over.get(key, 0) + units

    def _limits_counts(self, limits: LimitSet) -> list[int]:
        """The counts of the rule that a limit set is of. Sets are replaced when the policy changes; their rule's counts go on."""
        if len(self._by_limits) >= _MAX_LIMIT_SETS:
            self._by_limits.clear()
        key = (limits.tier, limits.rule)
        counts = self._by_limits[limits] = self._by_rule.get(key) or self._rule_counts(*key)
        return counts

    def _rule_counts(self, tier: str | None, rule: str | None) -> list[int]:
        """The new counts of a rule; those of `(other)` if there are too many rules."""
        key = (tier, rule) if len(self._by_rule) < MAX_RULE_LABELS else (OTHER, OTHER)
        return self._by_rule.setdefault(key, [0, 0])

    def add_gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a gauge; `read` returns its value on each scrape."""
        self._gauges.append((name, text, read))

    def add_counter(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a counter; `name` is without `_total`, `read` returns its value on each scrape."""
        self._counters.append((name, text, read))

    def add_labelled_counter(self, name: str, text: str, label: str, read: Callable[[], Mapping[str, float]]) -> None:
        """Add a counter with one label; `name` is without `_total`, `read` returns the count of each label value."""
        self._labelled.append((name, text, label, read, False))

    def add_labelled_gauge(self, name: str, text: str, label: str, read: Callable[[], Mapping[str, float]]) -> None:
        """Add a gauge with one label; `read` returns the value of each label value."""
        self._labelled.append((name, text, label, read, True))

    def add_histogram(self, name: str, text: str, latencies: LatencyHistogram) -> None:
        """Add a histogram of durations in seconds."""
        self._histograms.append((name, text, latencies))

    def add_errors(self, read: Callable[[], Iterable[tuple[str, int]]]) -> None:
        """Add counts to `rate_limiter_errors`; the types that `read` returns must differ from those of refused checks."""
        self._error_sources.append(read)

    async def exposition(self) -> bytes:
        """All metrics in Prometheus' text format 0.0.4.

        Yields to the event loop in between: with 1,000 rules the rendering would delay checks too long. Each metric family
        is a consistent snapshot, the whole exposition is not.
        """
        parts: list[bytes] = []
        for family in self.collect():
            for first in range(0, max(len(family.samples), 1), _SAMPLES_PER_SLICE):
                part = Metric(family.name, family.documentation, family.type)
                part.samples = family.samples[first : first + _SAMPLES_PER_SLICE]
                text = generate_latest(_Families([part]))
                # HELP and TYPE belong above the first sample only.
                parts.append(text if not first else text[text.index(f"\n{part.samples[0].name}".encode()) + 1 :])
                await asyncio.sleep(0)
        return b"".join(parts)

    def collect(self) -> Iterator[Metric]:
        """All metric families, for a registry."""
        requests = CounterMetricFamily("rate_limiter_requests", "Checks decided.", labels=["status"])
        requests.add_metric(["allowed"], self._decided(0))
        requests.add_metric(["blocked"], self._decided(1))
        yield requests
        for name, text, latencies in self._histograms:
            yield _histogram(name, text, latencies)
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
        yield from self._rule_families()
        yield CounterMetricFamily(
            "rate_limiter_degraded", "Checks decided without the counter store because it was unavailable.", self.degraded
        )
        yield from self._policy_families()
        yield from self._component_families()

    def _rule_families(self) -> Iterator[Metric]:
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
        over = CounterMetricFamily(
            "rate_limiter_overage_units",
            "Units of allowed checks above a quota or a soft limit, by tier and the rule that answered.",
            labels=["tier", "rule"],
        )
        for (tier, rule), units in self._over.items():
            over.add_metric([tier or "", rule or ""], units)
        yield over
        shadow = CounterMetricFamily(
            "rate_limiter_shadow_blocked", "Checks that a shadow rule would have blocked.", labels=["rule"]
        )
        for rule, count in sorted(self.shadow_blocked.items()):
            shadow.add_metric([rule], count)
        yield shadow

    def _policy_families(self) -> Iterator[Metric]:
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

    def _component_families(self) -> Iterator[Metric]:
        for name, text, read in self._gauges:
            yield GaugeMetricFamily(name, text, read())
        for name, text, read in self._counters:
            yield CounterMetricFamily(name, text, read())
        for name, text, label, read_each, is_gauge in self._labelled:
            family = (GaugeMetricFamily if is_gauge else CounterMetricFamily)(name, text, labels=[label])
            for value, counted in sorted(read_each().items()):
                family.add_metric([value], counted)
            yield family


def _histogram(name: str, text: str, latencies: LatencyHistogram) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text)
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*BUCKETS_S, float("inf")), latencies.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else repr(bound), total))
    family.add_metric([], buckets=buckets, sum_value=latencies.sum_ns / 1e9)
    return family


class _Families(Collector):
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Sequence[Metric]:
        return self._families
