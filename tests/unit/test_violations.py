"""Counting blocked checks: the summary beside a plain count, the sums, the bounds."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_telemetry import values
from tidegate.catalog.sql.column_text import shorten
from tidegate.catalog.sql.database import Database
from tidegate.catalog.sql.statements import load_statements
from tidegate.decision import Decision
from tidegate.observation import Observation, ShadowDenial
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.telemetry.collectors import collect_violations
from tidegate.telemetry.metrics import Metrics
from tidegate.violations import recorder as module
from tidegate.violations.recorder import Violations, ViolationWriter
from tidegate.violations.space_saving import SpaceSaving
from tidegate.violations.storage import partition_of

MINUTE_US = 60_000_000
NOON_US = 1_700_049_600_000_000


def limit_set(rule: str | None = "r", tier: str | None = "free") -> LimitSet:
    return LimitSet(f"{tier}/{rule}", Algorithm.FIXED_WINDOW, [Limit.parse("5/minute")], rule=rule, tier=tier)


LIMITS = limit_set()


def blocked(subject: str | None = "k:1", at_us: int = NOON_US, limits: LimitSet | None = LIMITS) -> Observation:
    return Observation(Decision(False, at_us=at_us, limits=limits), None, 1, (), subject, limits)


def taken(violations: Violations) -> dict[tuple[int, str, str, str], int]:
    rows = list(violations.take().rows())
    assert len(dict(rows)) == len(rows), "no key comes twice"
    return dict(rows)


@given(st.lists(st.integers(0, 30), max_size=400), st.integers(1, 40))
def test_the_summary_beside_a_plain_count(keys: list[int], capacity: int) -> None:
    summary: SpaceSaving[int] = SpaceSaving(capacity)
    for key in keys:
        summary.add(key)
    truth = Counter(keys)
    held = dict(summary.guaranteed())
    assert len(held) == len(summary) == min(len(truth), capacity)
    assert sum(truth.values()) >= sum(held.values())
    for key, count in held.items():
        assert 1 <= count <= truth[key]
        assert count >= truth[key] - len(keys) / capacity
    for key, count in truth.items():
        assert count <= len(keys) / capacity or key in held
    top = dict(summary.top(capacity))
    assert list(top.values()) == sorted(top.values(), reverse=True)
    for key, count in truth.items():
        assert count <= top.get(key, summary.floor), "a count is never too low"
    for key, count in top.items():
        assert count <= truth[key] + summary.floor
    if len(truth) <= capacity:
        assert held == truth
        assert summary.floor == 0
        assert summary.top(3) == sorted(truth.items(), key=lambda each: (-each[1], each[0]))[:3]


def test_a_key_that_comes_back_has_no_old_error() -> None:
    summary: SpaceSaving[str] = SpaceSaving(1)
    for key in "aab":
        summary.add(key)
    assert dict(summary.guaranteed()) == {"b": 1}
    for key in "bba":
        summary.add(key)
    assert dict(summary.guaranteed()) == {"a": 1}, "counted since it came back; its error is that of the one it replaced"


def test_only_what_was_blocked_counts() -> None:
    violations = Violations()
    violations.observe(Observation(Decision(True, at_us=NOON_US, limits=LIMITS), None, 1, (), "k:1"))
    violations.observe(Observation(Decision(True, at_us=NOON_US, limits=LIMITS), None, 1, ("shadow",), "k:1"))
    violations.observe(Observation(None, "STORE_UNAVAILABLE", 1))
    violations.observe(blocked(subject=None))
    violations.observe(blocked(limits=None))
    assert (len(violations), taken(violations)) == (0, {})
    violations.observe(blocked())
    assert (len(violations), taken(violations)) == (1, {(NOON_US, "free", "r", "k:1"): 1})
    assert taken(violations) == {}, "what was taken is not counted again"


def test_minutes_are_of_the_store_s_clock() -> None:
    violations = Violations()
    month_us = 1_701_388_800_000_000  # 2023-12-01 00:00:00 UTC
    for at_us in (month_us - 1, month_us, month_us + MINUTE_US - 1, month_us + MINUTE_US, 0):
        violations.observe(blocked(at_us=at_us))
    counted = {minute_us: count for (minute_us, *_), count in taken(violations).items()}
    assert counted == {month_us - MINUTE_US: 1, month_us: 2, month_us + MINUTE_US: 1, 0: 1}
    assert partition_of(month_us - 1) == "rate_limit_violations_20231130"
    assert partition_of(month_us) == "rate_limit_violations_20231201"
    assert partition_of(month_us + 86_400_000_000 - 1) == "rate_limit_violations_20231201"


def test_the_tier_s_own_limits_have_no_rule_and_a_limiter_no_tier() -> None:
    violations = Violations()
    violations.observe(blocked(limits=limit_set(rule=None)))
    violations.observe(blocked(limits=limit_set(rule=None, tier=None)))
    assert taken(violations) == {(NOON_US, "free", "", "k:1"): 1, (NOON_US, "", "", "k:1"): 1}


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from("ab"), st.sampled_from("xyz"), st.integers(0, 30)), max_size=300),
    st.integers(1, 50),
)
def test_sums_by_rule_are_exact_whatever_fits(checks: list[tuple[int, str, str, int]], capacity: int) -> None:
    violations = Violations(capacity)
    sets = {(tier, rule): limit_set(rule, tier) for tier in "ab" for rule in "xyz"}
    truth: Counter[tuple[int, str, str, str]] = Counter()
    for minute, tier, rule, subject in checks:
        violations.observe(blocked(f"k:{subject}", minute * MINUTE_US + 7, sets[tier, rule]))
        truth[minute * MINUTE_US, tier, rule, f"k:{subject}"] += 1
    rows = taken(violations)
    sums: defaultdict[tuple[int, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for at, counted in ((0, rows), (1, truth)):
        for (minute_us, tier, rule, _), count in counted.items():
            sums[minute_us, tier, rule][at] += count
    assert all(ours == true for ours, true in sums.values())
    assert all(count <= truth[key] for key, count in rows.items() if key[3])
    assert all(count > 0 for count in rows.values())
    if len(truth) <= capacity:
        assert rows == truth


def test_a_flood_of_subjects_grows_nothing_and_hides_nobody() -> None:
    violations = Violations(1_000)
    for number in range(1_000_000):
        violations.observe(blocked(f"i:{number}"))
        if number % 500 == 0:
            violations.observe(blocked("k:heavy"))
    summary = violations._interval.summary
    assert len(violations) == len(summary._counts) == 1_000
    assert len(summary._errors) <= 1_000
    assert sum(len(level) for level in summary._levels.values()) == 1_000
    assert all(summary._levels.values()), "no level stays behind empty"
    rows = taken(violations)
    assert len(rows) == 1_001
    assert sum(rows.values()) == 1_002_000
    assert 2_000 - 1_002 <= rows[NOON_US, "free", "r", "k:heavy"] <= 2_000
    assert rows[NOON_US, "free", "r", ""] > 900_000
    assert violations.dropped == 0


def test_sums_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SUMS", 3)
    violations = Violations()
    for minute in range(5):
        for _ in range(2):
            violations.observe(blocked(at_us=minute * MINUTE_US))
    assert (len(violations), violations.dropped) == (3, 4)
    assert sum(taken(violations).values()) == 6
    violations.observe(blocked(at_us=9 * MINUTE_US))
    assert violations.dropped == 4, "counting begins anew with the next interval"


@given(st.text(st.characters(), max_size=200), st.integers(64, 160))
def test_texts_fit_their_column(text: str, most: int) -> None:
    fitted = shorten(text, most)
    assert len(fitted) <= most
    assert "\0" not in fitted
    fitted.encode()
    assert shorten(fitted, most) == fitted


def test_clipped_texts_stay_apart() -> None:
    long = "i:" + "x" * 158
    assert shorten(long, 160) == long
    clipped = {shorten(long + end, 160) for end in ("a", "b", "ab", "\0", "\ud800")}
    assert len(clipped) == 5
    assert all(text.startswith("i:xxx") and len(text) == 160 for text in clipped)
    assert shorten("tür", 64) == "tür"
    assert shorten("a\0", 64) != shorten("a?", 64) == "a?"


def test_statements_come_by_name_without_comments() -> None:
    statements = load_statements("tidegate.catalog.sql", "partitions.sql")
    assert statements["drop"] == "DROP TABLE {partition}"
    assert statements["create"].startswith("CREATE TABLE {partition} (LIKE")
    assert all("--" not in statement and statement for statement in statements.values())


def test_metrics() -> None:
    metrics = Metrics("x")
    shadow = Violations()
    violations = Violations(shadow=shadow)
    database = object.__new__(Database)
    writer = ViolationWriter(violations, database)
    collect_violations(metrics, writer, ViolationWriter(shadow, database))
    violations.observe(blocked())
    denials = (ShadowDenial("free", "/watched", "k:1", 60_000_000), ShadowDenial("free", "/watched too", "k:1", 60_000_000))
    violations.observe(Observation(Decision(True), None, 0, shadow_denials=denials))
    violations.dropped, shadow.dropped = 3, 4
    writer.written = 5
    found = values(metrics)
    assert found["rate_limiter_violations_written_total", ()] == 5
    assert found["rate_limiter_violations_dropped_total", ()] == 7, "of both writers"
    assert found["rate_limiter_violations_pending", ()] == 3
    assert len(violations) == 1
