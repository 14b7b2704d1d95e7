"""Which endpoint pattern covers which, held against what the matcher does."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cpu_time import assert_cpu_below
from tidegate.policy.coverage import covers, shadow_warnings
from tidegate.policy.globs import endpoint_expression

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


def test_head_goes_with_get_where_rules_are_compared() -> None:
    def row(number: int, endpoint: str, methods: list[str], priority: int = 0) -> dict[str, object]:
        named = f"{' '.join(methods)} {endpoint}"
        return {
            "id": number,
            "mode": "enforce",
            "name": named,
            "endpoint_pattern": endpoint,
            "methods": methods,
            "priority": priority,
        }

    wide, narrow = row(1, "/api/*", ["GET"], 5), row(2, "/api/x", ["HEAD"])
    assert "'HEAD /api/x' never answers" in shadow_warnings("t", 2, [wide, narrow])[0]
    # The two have one endpoint: HEAD is the second one's, and the first leaves it what it has.
    assert shadow_warnings("t", 2, [row(1, "/api/x", ["GET"], 5), narrow]) == []
    # GET brings HEAD along, which the wider rule does not take.
    rows = [wide, row(3, "/api/*", ["HEAD"]), row(4, "/api/x", ["GET"], 1)]
    assert shadow_warnings("t", 4, rows) == []
