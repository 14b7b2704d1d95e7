"""Which limit of a file in the form of envoyproxy/ratelimit is for a descriptor, and what the worst descriptor costs."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from tests.cpu_time import TRIES, assert_cpu_below, cpu_s
from tidegate.doors.grpc.descriptor_tree import MAX_SIMILAR_WILDCARDS, Node


def tree(*descriptors: tuple[str, str]) -> tuple[Node, dict[Node, int]]:
    """A node with these below it, and the place of each."""
    root, places = Node(), {}
    for place, (key, value) in enumerate(descriptors):
        node = Node()
        if root.add(key, value, node) is not None:
            places[node] = place
    return root, places


def scanned(descriptors: list[tuple[str, str]], key: str, value: str) -> int | None:
    """The same by the book: the value itself, the first wildcard in order, the key alone."""
    for place, descriptor in enumerate(descriptors):
        if value and descriptor == (key, value):
            return place
    for place, (name, pattern) in enumerate(descriptors):
        expression = ".*".join(map(re.escape, pattern.split("*")))
        if name == key and "*" in pattern and re.fullmatch(expression, value, re.DOTALL):
            return place
    return next((place for place, descriptor in enumerate(descriptors) if descriptor == (key, "")), None)


@given(
    descriptors=st.lists(st.tuples(st.sampled_from("kl"), st.text("ab*", max_size=5)), max_size=12),
    key=st.sampled_from("kl"),
    value=st.text("ab*", max_size=7),
)
def test_the_node_is_the_one_that_a_scan_finds(descriptors: list[tuple[str, str]], key: str, value: str) -> None:
    root, places = tree(*descriptors)
    found = root.child(key, value)
    assert (None if found is None else places[found]) == scanned(descriptors, key, value)


def test_what_is_there_already_is_not_replaced() -> None:
    root, places = tree(("k", ""), ("k", "a"), ("k", "a*"), ("k", ""), ("k", "a"), ("k", "a*"))
    assert sorted(places.values()) == [0, 1, 2]
    assert {places[node] for node in root.children()} == {0, 1, 2}


def test_many_wildcards_cost_a_descriptor_little() -> None:
    """20,000 wildcards with ends of their own; and as many as may be with the same ones, against a long value."""
    root, places = tree(
        *(("k", f"*-{number}") for number in range(20_000)), *(("l", f"a*{n}*z") for n in range(MAX_SIMILAR_WILDCARDS))
    )
    found = root.child("k", "value-777")
    assert found is not None
    assert places[found] == 777

    def absent() -> None:
        for number in range(200):
            assert root.child("k", f"value-x{number}") is None

    def walk() -> None:
        for node in range(20_000):
            assert not f"value-x{node}".endswith("-0")

    # 200 values cost less than ten walks through all wildcards would, where walking costs 200.
    assert_cpu_below(10 * min(cpu_s(walk) for _ in range(TRIES)), absent)
    assert root.child("l", "a" * 8000 + "z") is None
    assert_cpu_below(1, lambda: root.child("l", "a" * 8000 + "z"))
