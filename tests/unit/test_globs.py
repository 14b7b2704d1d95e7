"""Patterns with `*`: what they match, held against regular expressions that go back; and what the worst of them cost."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cpu_time import assert_cpu_below
from tidegate.policy.globs import Glob, endpoint_expression, endpoint_matcher
from tidegate.policy.matching import CompiledTier
from tidegate.policy.model import Tier
from tidegate.policy.rules import Rule


def naive(pattern: str, text: str) -> bool:
    parts = re.split(r"(\*|\{\w*\})", pattern)
    expression = "".join(".*" if part == "*" else "[^/]+" if part.startswith("{") else re.escape(part) for part in parts)
    return re.fullmatch(expression, text, re.DOTALL) is not None


@given(pattern=st.text("ab*", max_size=10), text=st.text("ab", max_size=14))
def test_a_glob_matches_what_backtracking_matches(pattern: str, text: str) -> None:
    assert Glob(pattern).matches(text) == naive(pattern, text)


_SEGMENT = st.sampled_from(["a", "b", "ab", "*", "a*", "*b", "a*b*", "{x}", "{y}", ""])
_PATTERN = st.lists(_SEGMENT, min_size=1, max_size=6).map(lambda parts: "/" + "/".join(parts))


@given(pattern=_PATTERN, path=st.text("ab/", max_size=14).map("/".__add__))
def test_an_endpoint_matches_what_backtracking_matches(pattern: str, path: str) -> None:
    assert endpoint_matcher(pattern)(path) == naive(pattern, path)
    assert (re.fullmatch(endpoint_expression(pattern), path, re.DOTALL) is not None) == naive(pattern, path)


HOSTILE = {
    "four stars": ("/*/a/*/b/*/c/*/z", "/" + "a/b/" * 1500 + "z"),
    "four stars, and it matches": ("/*/a/*/b/*/c/*/z", "/" + "a/b/c/" * 1365 + "z"),
    "stars and parameters": ("/*/{x}/a/*/{y}/b/*/c", "/" + "x/a/y/b/" * 1000 + "d/c"),
    "many stars": ("/" + "*a" * 500 + "*b", "/" + "a" * 8000 + "c"),
    "many parameters": ("/*" + "/{p}" * 50 + "/x*y", "/" + "a/" * 4000 + "xy"),
    "a repetitive piece": ("/*" + "a" * 49 + "b" + "a" * 49 + "*x", "/" + "a" * 8000 + "x"),
    # Only the expression refuses it, the searches before it do not.
    "stars before a parameter": ("/*a*a*a*a*a/{p}/z", "/" + "a" * 130 + "/x/y/z"),
    "only stars": ("/" + "*" * 1000 + "b", "/" + "a" * 8000),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("mode", ["enforce", "shadow"])
def test_no_pattern_makes_a_path_expensive(name: str, mode: str) -> None:
    """The first of these took 39 s of CPU for one check; all of them take less than 10 ms."""
    pattern, path = HOSTILE[name]
    tier = CompiledTier(Tier.make("t", [Rule.make(pattern, ["1/s"], mode=mode, name="hostile")]))
    assert_cpu_below(1, lambda: (tier.match("GET", path), tier.shadow_rules("GET", path)))


def test_a_walk_through_parameters_looks_at_each_node_once() -> None:
    """Literal and parameter at every level: the trie has as many nodes as the patterns have segments, whatever the path."""
    depth = 9
    choices = [[f"{number >> place & 1}" for place in range(depth)] for number in range(2**depth)]
    rules = [
        Rule.make("/" + "/".join("a" if each == "0" else "{p}" for each in choice) + "/end", ["1/s"], name="".join(choice))
        for choice in choices
    ]
    tier = CompiledTier(Tier.make("t", rules))
    found = tier.match("GET", "/" + "a/" * depth + "end")
    assert found is not None
    assert found.rule.name == "0" * depth
    found = tier.match("GET", "/" + "b/" * depth + "end")
    assert found is not None
    assert found.rule.name == "1" * depth
    assert tier.match("GET", "/" + "a/" * 4000 + "end") is None
    assert tier.match("GET", "/" + "a/" * depth) is None


def test_a_deep_pattern_is_no_deep_recursion() -> None:
    pattern = "/" + "/".join(["{p}"] * 255)
    tier = CompiledTier(Tier.make("t", [Rule.make(pattern, ["1/s"], name="deep")]))
    assert tier.match("GET", "/" + "/".join("x" * 255)) is not None
    assert tier.match("GET", "/" + "/".join("x" * 256)) is None
