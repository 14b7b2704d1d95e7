"""The order of the tests for the workers of pytest-xdist."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.run_order import APART, COMPUTING_S, WAITING_S, in_order, portion_of

TESTS = Path(__file__).parents[1]


def ordered(*nodeids: str) -> list[str]:
    items: list[Any] = [SimpleNamespace(nodeid=nodeid) for nodeid in nodeids]
    return [item.nodeid for item in in_order(items)]


def test_whole_files_and_single_tests() -> None:
    assert portion_of("tests/unit/test_gate.py::test_one[a::b/c.py]") == "tests/unit/test_gate.py"
    assert portion_of("tests/integration/test_reshard.py::test_one[a]") == "tests/integration/test_reshard.py::test_one[a]"


def test_those_that_wait_and_those_that_compute_take_turns_the_longest_first() -> None:
    assert ordered(
        "a/test_short.py::t", "a/test_long.py::t", "a/test_long.py::u", "a/test_stack.py::t", "a/test_reshard.py::t"
    ) == [
        "a/test_reshard.py::t",
        "a/test_long.py::t",
        "a/test_long.py::u",
        "a/test_stack.py::t",
        "a/test_short.py::t",
    ]


def test_files_known_to_compute_long_come_before_files_of_more_tests() -> None:
    assert ordered("a/test_b.py::t", "a/test_b.py::u", "a/test_docs_site.py::t") == [
        "a/test_docs_site.py::t",
        "a/test_b.py::t",
        "a/test_b.py::u",
    ]


def test_nothing_is_lost_where_one_kind_is_missing() -> None:
    assert ordered("a/test_b.py::t", "a/test_a.py::t") == ["a/test_b.py::t", "a/test_a.py::t"]
    assert ordered() == []


def test_the_files_are_there() -> None:
    there = {path.name for path in TESTS.rglob("test_*.py")}
    assert APART <= WAITING_S.keys() | COMPUTING_S.keys() <= there
    assert not WAITING_S.keys() & COMPUTING_S.keys()
