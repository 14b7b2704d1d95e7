"""Merges the metrics of several workers into one exposition."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

# Metrics not listed here are summed. Those listed describe something that all workers share: the worst value is reported.
_MERGE_FUNCTIONS: Final[Mapping[str, Callable[[float, float], float]]] = {
    "rate_limiter_breaker_state": max,
    "rate_limiter_breakers_open": max,
    "rate_limiter_build_info": max,
    "rate_limiter_instances": max,
    "rate_limiter_policy_reload_errors": max,
    "rate_limiter_policy_valid": min,
    "rate_limiter_policy_version": max,
    "rate_limiter_replica_lag_seconds": max,
    "rate_limiter_replicas": max,
    "rate_limiter_replicas_asked": min,
    "rate_limiter_store_shards_up": min,
    "rate_limiter_tls_certificate_expiry_timestamp_seconds": min,
    "rate_limiter_tls_reload_errors": max,
    "rate_limiter_tls_reloads": max,
}


def combine(live: Iterable[bytes], past: Iterable[bytes] = (), answered: int | None = None) -> bytes:
    """Merge the expositions of several workers.

    Args:
        live: expositions of running workers.
        past: expositions of ended workers: their counters and histograms are included, their gauges are not.
        answered: value of `rate_limiter_workers`; None omits that metric.

    Returns:
        Prometheus' text format 0.0.4.
    """
    combined: dict[str, tuple[Metric, dict[tuple[str, tuple[tuple[str, str], ...]], float]]] = {}
    for runs, texts in ((True, live), (False, past)):
        for text in texts:
            for family in text_string_to_metric_families(text.decode()):
                if family.type == "gauge" and not runs:
                    continue
                join: Callable[[float, float], float] = _MERGE_FUNCTIONS.get(family.name, operator.add)
                _, values = combined.setdefault(family.name, (Metric(family.name, family.documentation, family.type), {}))
                for sample in family.samples:
                    series = sample.name, tuple(sorted(sample.labels.items()))
                    values[series] = join(values[series], sample.value) if series in values else sample.value
    families = []
    for metric, values in combined.values():
        for (name, labels), value in values.items():
            metric.add_sample(name, dict(labels), value)
        families.append(metric)
    if answered is not None:
        workers = Metric("rate_limiter_workers", "Worker processes that answered this scrape.", "gauge")
        workers.add_sample(workers.name, {}, answered)
        families.append(workers)
    return generate_latest(_Families(families))


class _Families(Collector):
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)
