"""Which endpoint pattern covers which, held against what the matcher does."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cpu_time import assert_cpu_below
from tidegate.errors import PolicyError
from tidegate.policy.coverage import coverage_warnings, covers, unreachable_rules
from tidegate.policy.globs import endpoint_expression
from tidegate.policy.matching import CompiledTier
from tidegate.policy.model import Tier
from tidegate.policy.rules import Rule

PATTERNS = st.lists(st.sampled_from(["/", "a", "b", "*", "/{x}", "/{y}/"]), max_size=6).map(lambda parts: "/" + "".join(parts))
PATHS = st.text("/ab", max_size=8).map(lambda text: "/" + text)


@pytest.mark.parametrize(
    ("wider", "pattern", "covered"),
    [
        ("/api/*", "/api/v1", True),
        ("/api/*", "/api/{id}/x", True),
        ("/api/*", "/api/v*/x", True),
        ("/api/*", "/api", False),
        ("/api/{id}", "/api/{name}", True),
        ("/api/{id}", "/api/v1", True),
        ("/api/{id}", "/api/*", False),
        ("/api/{id}", "/api/", False),
        ("/api/v1", "/api/{id}", False),
        ("*/x", "/a/b/x", True),
        ("/*/x", "/x", False),
        ("/a**", "/a", True),
        ("/a*b*c", "/a*c", False),
        ("/a*b*c", "/axb*c", True),
    ],
)
def test_covers(wider: str, pattern: str, covered: bool) -> None:
    assert covers(wider, pattern) is covered


@given(wider=PATTERNS, pattern=PATTERNS, path=PATHS)
def test_what_is_covered_is_matched(wider: str, pattern: str, path: str) -> None:
    if covers(wider, pattern) and re.fullmatch(endpoint_expression(pattern), path, re.DOTALL):
        assert re.fullmatch(endpoint_expression(wider), path, re.DOTALL)


@given(pattern=PATTERNS)
def test_every_pattern_covers_itself(pattern: str) -> None:
    assert covers(pattern, pattern)


def test_spiteful_patterns_cost_little() -> None:
    wider, pattern = "/" + "*a" * 500, "/" + "a*" * 250 + "b" * 500
    assert not covers(wider, pattern)
    assert_cpu_below(1, lambda: covers(wider, pattern))


def rule(endpoint: str, methods: list[str], priority: int = 0) -> Rule:
    return Rule.make(endpoint, ["1/s"], methods, priority=priority, name=f"{' '.join(methods)} {endpoint}")


def test_head_goes_with_get_where_rules_are_compared() -> None:
    wide, narrow = rule("/api/*", ["GET"], 5), rule("/api/x", ["HEAD"])
    assert unreachable_rules([wide, narrow]) == {narrow.name: wide.name}
    assert "'HEAD /api/x' never answers" in coverage_warnings("t", [wide, narrow], narrow.name)[0]
    # The two have one endpoint: HEAD is the second one's, and the first leaves it what it has.
    rules = [rule("/api/x", ["GET"], 5), narrow]
    assert coverage_warnings("t", rules, narrow.name) == []
    assert unreachable_rules(rules) == {}
    # GET brings HEAD along, which the wider rule does not take.
    rules = [wide, rule("/api/*", ["HEAD"]), rule("/api/x", ["GET"], 1)]
    assert coverage_warnings("t", rules, "GET /api/x") == []
    assert unreachable_rules(rules) == {}


def test_shadow_rules_neither_cover_nor_are_covered() -> None:
    rules = [Rule.make("/a", ["1/s"], name=name, mode="shadow", priority=9) for name in ("one", "two")]
    rules.append(Rule.make("/a", ["1/s"], name="enforcing"))
    assert unreachable_rules(rules) == {}
    assert coverage_warnings("t", rules, "one") == []


@given(st.lists(st.tuples(PATTERNS, st.sampled_from(["", "GET", "HEAD", "POST"]), st.integers(0, 1)), max_size=6), PATHS)
def test_a_rule_that_is_called_unreachable_never_answers(drawn: list[tuple[str, str, int]], path: str) -> None:
    rules = []
    for number, (endpoint, method, priority) in enumerate(drawn):
        with contextlib.suppress(PolicyError):
            rules.append(Rule.make(endpoint, ["1/s"], [method] if method else [], priority=priority, name=f"r{number}"))
    tier = CompiledTier(Tier.make("t", rules))
    unreachable = unreachable_rules(rules)
    for method in ("GET", "HEAD", "POST", "PUT"):
        answers = tier.match(method, path)
        assert answers is None or answers.rule.name not in unreachable
    for name, preferred in unreachable.items():
        assert any(f"rule {name!r} never answers" in warning for warning in coverage_warnings("t", rules, name)), preferred
