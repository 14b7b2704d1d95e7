"""Metrics and health."""

from __future__ import annotations

import asyncio
import re

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tidegate.decision import Decision
from tidegate.latency import BUCKETS_S, LatencyHistogram
from tidegate.observation import Observation
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.telemetry import health
from tidegate.telemetry.health import Health
from tidegate.telemetry.metrics import MAX_RULE_LABELS, Metrics


def values(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(asyncio.run(metrics.exposition()).decode())
        for sample in family.samples
    }


def test_counts_and_latencies() -> None:
    metrics = Metrics("1.2.3")
    for latency_ns in (5_000, 10_000, 10_001, 9_000_000, 2_000_000_000):
        metrics.observe(Observation(Decision(True), None, latency_ns))
    metrics.observe(Observation(Decision(False, degraded=True), None, 100))
    for code in ("INVALID_API_KEY", "INVALID_API_KEY", "CATALOG_UNAVAILABLE"):
        metrics.observe(Observation(None, code, 1))
    found = values(metrics)
    assert found["rate_limiter_requests_total", (("status", "allowed"),)] == 5
    assert found["rate_limiter_requests_total", (("status", "blocked"),)] == 1
    assert found["rate_limiter_errors_total", (("type", "invalid_api_key"),)] == 2
    assert found["rate_limiter_errors_total", (("type", "db_connection"),)] == 1
    assert found["rate_limiter_degraded_total", ()] == 1
    buckets = {
        dict(labels)["le"]: value for (name, labels), value in found.items() if name == "rate_limiter_latency_seconds_bucket"
    }
    assert (buckets["1e-05"], buckets["5e-05"], buckets["0.01"], buckets["1.0"], buckets["+Inf"]) == (3, 4, 5, 5, 6)
    assert found["rate_limiter_latency_seconds_sum", ()] == pytest.approx(2.009025101)
    assert 0.01 in BUCKETS_S, "the objective's threshold is a bucket's bound"
    assert any(name == "rate_limiter_build_info" and dict(labels)["version"] == "1.2.3" for name, labels in found)


def test_labels_are_bounded() -> None:
    metrics = Metrics("x")
    for number in range(MAX_RULE_LABELS + 100):
        metrics.observe(Observation(Decision(True), None, 1, (f"rule {number}",)))
    assert len(metrics.shadow_blocked) == MAX_RULE_LABELS + 1
    assert metrics.shadow_blocked["(other)"] == 100


def of_rule(tier: str, rule: str | None, allowed: bool, remaining: int) -> Observation:
    limits = LimitSet(f"{tier}:{rule}", Algorithm.FIXED_WINDOW, [Limit.parse("10/minute")], rule=rule, tier=tier)
    return Observation(Decision(allowed, limits.limits[0], remaining, limits=limits), None, 1)


def test_counts_by_tier_and_rule_and_near_the_limit() -> None:
    metrics = Metrics("x")
    for remaining in (9, 3, 2, 1, 0):
        metrics.observe(of_rule("free", "/a", True, remaining))
    metrics.observe(of_rule("free", "/a", False, 0))
    metrics.observe(of_rule("free", None, False, 0))
    found = values(metrics)

    def count(tier: str, rule: str, status: str) -> float:
        return found["rate_limiter_rule_requests_total", (("rule", rule), ("status", status), ("tier", tier))]

    assert (count("free", "/a", "allowed"), count("free", "/a", "blocked"), count("free", "", "blocked")) == (5, 1, 1)
    assert found["rate_limiter_near_limit_total", (("tier", "free"),)] == 3, "with a fifth left or less, and allowed"


def test_labels_of_tiers_and_rules_are_bounded() -> None:
    metrics = Metrics("x")
    for number in range(MAX_RULE_LABELS + 50):
        metrics.observe(of_rule(f"tier{number}", f"/{number}", True, 0))
    metrics.observe(of_rule("tier0", "/0", True, 0))
    found = values(metrics)
    by_rule = {labels: value for (name, labels), value in found.items() if name == "rate_limiter_rule_requests_total"}
    assert len(by_rule) == 2 * (MAX_RULE_LABELS + 1)
    assert by_rule[("rule", "(other)"), ("status", "allowed"), ("tier", "(other)")] == 50
    assert by_rule[("rule", "/0"), ("status", "allowed"), ("tier", "tier0")] == 2
    near = [value for (name, _), value in found.items() if name == "rate_limiter_near_limit_total"]
    assert (len(near), sum(near)) == (MAX_RULE_LABELS + 1, MAX_RULE_LABELS + 51)


def test_values_that_others_keep() -> None:
    metrics = Metrics("x")
    metrics.add_gauge("held", "things held", lambda: 7)
    metrics.add_counter("dropped", "things dropped", lambda: 3)
    metrics.add_labelled_gauge("state", "of shards", "shard", lambda: {"h:1": 2})
    metrics.add_errors(lambda: [("redis_timeout", 4)])
    tally = LatencyHistogram()
    tally.add(10_000_000)
    tally.add(10_000_001)
    metrics.add_histogram("store_seconds", "calls", tally)
    found = values(metrics)
    assert (found["held", ()], found["dropped_total", ()]) == (7, 3)
    assert found["state", (("shard", "h:1"),)] == 2
    assert found["rate_limiter_errors_total", (("type", "redis_timeout"),)] == 4
    assert found["store_seconds_bucket", (("le", "0.01"),)] == 1
    assert found["store_seconds_count", ()] == 2


async def test_health_is_the_worst_component_and_gives_the_reason() -> None:
    checked = Health()

    async def well() -> None:
        await asyncio.sleep(0)

    async def unwell() -> None:
        raise ConnectionError("refused")

    checked.add("good", well)
    assert (await checked.report()).status == "healthy"
    checked.add("bad", unwell)
    report = await checked.report()
    assert report.status == "unhealthy"
    assert report.components["bad"].reason == "ConnectionError"
    assert report.components["good"].status == report.components["rate_limiter"].status == "healthy"
    assert re.fullmatch(r"\d{4}-.*\+00:00", report.timestamp)


async def test_probes_are_shared_and_never_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PROBE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(health, "PROBE_TTL_S", 1000)
    calls = 0
    hang = asyncio.Event()

    async def ping() -> None:
        nonlocal calls
        calls += 1
        await hang.wait()

    checked = Health()
    checked.add("slow", ping)
    for _ in range(3):
        reports = await asyncio.gather(*(checked.report() for _ in range(20)))
        assert {report.components["slow"].reason for report in reports} == {"no answer within 0.05 s"}
    assert calls == 1, "nobody asks a part that has not answered the last one"
    hang.set()
    monkeypatch.setattr(health, "PROBE_TIMEOUT_S", 60)
    assert (await checked.report()).status == "healthy"
    await asyncio.gather(*(checked.report() for _ in range(20)))
    assert calls == 1, "an answer holds for its time"
    monkeypatch.setattr(health, "PROBE_TTL_S", 0)
    await checked.report()
    assert calls == 2


async def test_a_scrape_lets_checks_have_their_turn() -> None:
    metrics = Metrics("x")
    for number in range(MAX_RULE_LABELS):
        metrics.observe(of_rule("free", f"rule {number}", True, 5))
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    told = await metrics.exposition()
    counting.cancel()
    registry = CollectorRegistry()
    registry.register(metrics)  # type: ignore[arg-type]
    assert told == generate_latest(registry), "as prometheus_client makes it in one go"
    assert turns >= 2 * MAX_RULE_LABELS // 100, "no more than 100 lines at a time"
