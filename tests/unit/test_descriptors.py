"""Descriptors in a policy: how they are written, which rule answers, and whom it counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Clock
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check
from tidegate.errors import BadRequest, InvalidApiKey, PolicyError
from tidegate.gate.gate import Gate
from tidegate.gate.subjects import DescriptorCheck
from tidegate.observation import Observation
from tidegate.policy.descriptors import canonical_descriptor, descriptor_entries, descriptor_text, entries_subject
from tidegate.policy.model import Policy
from tidegate.policy.toml_reader import parse_policy, policy_warnings
from tidegate.policy.toml_writer import policy_text

KEY, OTHER = "demo-free-key-0001", "demo-other-key-0001"
POLICY = f"""
[[tiers]]
name = "free"
limits = ["1/day"]
  [[tiers.rules]]
  descriptor = {{ service = "pay", user = "*" }}
  limits = ["2/hour"]
  [[tiers.rules]]
  descriptor = {{ service = "pay" }}
  limits = ["9/hour"]
  subject = "tier"
  [[tiers.rules]]
  descriptor = {{ model = "big-*" }}
  limits = ["5/hour"]
  priority = 3
  [[tiers.rules]]
  descriptor = {{ service = "*" }}
  limits = ["1/hour"]
  mode = "shadow"
[[tiers]]
name = "public"
  [[tiers.rules]]
  descriptor = {{ remote_address = "*" }}
  limits = ["1/hour"]
[anonymous]
tier = "public"
[[api_keys]]
key = "{KEY}"
tier = "free"
[[api_keys]]
key = "{OTHER}"
tier = "free"
  [[api_keys.overrides]]
  rule = "descriptor:model=big-*"
  limits = ["7/hour"]
"""


def gate_of(policy: Policy, clock: Clock, seen: list[Observation] | None = None) -> Gate:
    return Gate(CachedCatalog(PolicyCatalog(policy)), MemoryCounters(clock=clock), None if seen is None else seen.append)


async def ask(
    gate: Gate, entries: dict[str, str], key: str | None = KEY, cost: int = 1
) -> tuple[str | None, bool, int | None] | None:
    (plan,) = await gate.plan_many([DescriptorCheck(entries, key, cost)])
    if plan is None:
        return None
    outcome = (await gate.decide([plan]))[0].outcome
    assert not isinstance(outcome, Exception)
    return outcome.rule, outcome.allowed, outcome.remaining


async def test_the_rule_with_the_most_entries_answers_and_priority_goes_first(clock: Clock, seen: list[Observation]) -> None:
    gate = gate_of(parse_policy(POLICY), clock, seen)
    pay = "descriptor:service=pay&user=*"
    assert await ask(gate, {"service": "pay", "user": "a", "more": "x"}) == (pay, True, 1)
    assert await ask(gate, {"service": "pay", "user": "b"}) == (pay, True, 1)
    assert await ask(gate, {"service": "pay", "user": "a"}, OTHER) == (pay, True, 1)
    assert await ask(gate, {"service": "pay", "user": "a"}) == (pay, True, 0)
    assert await ask(gate, {"service": "pay", "user": "a"}) == (pay, False, 0)
    # By tier: all keys together.
    assert await ask(gate, {"service": "pay"}) == ("descriptor:service=pay", True, 8)
    assert await ask(gate, {"service": "pay"}, OTHER, 3) == ("descriptor:service=pay", True, 5)
    assert await ask(gate, {"service": "pay", "user": "a", "model": "big-1"}) == ("descriptor:model=big-*", True, 4)
    assert await ask(gate, {"model": "big-2"}) == ("descriptor:model=big-*", True, 4)
    assert await ask(gate, {"model": "big-2"}, OTHER) == ("descriptor:model=big-*", True, 6)
    assert await ask(gate, {"model": "small"}) is None
    # A shadow rule alone: counted, told, never in the way; the tier's limits over endpoints are not charged.
    assert [await ask(gate, {"service": "ship"}) for _ in range(2)] == [(None, True, None)] * 2
    assert seen[-1].shadow_denied == ("descriptor:service=* shadow",)
    assert (await gate.check(Check.of("/x", api_key=KEY))).remaining == 0


async def test_callers_without_a_key_and_wrong_ones(clock: Clock) -> None:
    gate = gate_of(parse_policy(POLICY), clock)
    assert await ask(gate, {"remote_address": "203.0.113.7"}, None) == ("descriptor:remote_address=*", True, 0)
    assert await ask(gate, {"remote_address": "203.0.113.7"}, None) == ("descriptor:remote_address=*", False, 0)
    assert await ask(gate, {"remote_address": "203.0.113.8"}, None) == ("descriptor:remote_address=*", True, 0)
    unknown, below = await gate.plan_many(
        [DescriptorCheck({"service": "pay"}, "demo-unknown-key-01", 1), DescriptorCheck({"service": "pay"}, KEY, -1)]
    )
    assert isinstance(unknown, InvalidApiKey)
    assert isinstance(below, BadRequest)
    closed = gate_of(parse_policy(POLICY.replace('[anonymous]\ntier = "public"', "")), clock)
    assert await ask(closed, {"remote_address": "203.0.113.7"}, None) is None


async def test_usage_and_paths_know_nothing_of_them(clock: Clock) -> None:
    gate = gate_of(parse_policy(POLICY), clock)
    assert [each.rule for each in (await gate.usage(KEY)).rules] == [None]
    assert (await gate.check(Check.of("/service=pay", api_key=KEY))).rule is None


def test_a_policy_with_descriptors_is_written_and_read_again() -> None:
    policy = parse_policy(POLICY)
    assert parse_policy(policy_text(policy)) == policy
    assert policy_warnings(policy) == []


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ('descriptor = { a = "b" }\nendpoint = "/x"', "side by side"),
        ('descriptor = "a"', 'write descriptor = { user = "*" }'),
        ("descriptor = {}", "0 entries"),
        ("descriptor = { a = 1 }", "value 1: it must be 1 to 256 printable characters"),
        ('descriptor = { a = "" }', "value ''"),
        ('descriptor = { a = "b" }\nmethods = ["GET"]', "methods are not for a descriptor"),
        ('descriptor = { a = "b" }\nsubject = "ip"', 'such as remote_address = "*"'),
        ('endpoint = "descriptor:a=b&a=c"', "has a key twice"),
        ('endpoint = "descriptor:"', "key ''"),
        ("descriptor = { " + ", ".join(f'k{number} = "*"' for number in range(17)) + " }", "17 entries"),
    ],
)
def test_what_is_rejected(rule: str, said: str) -> None:
    text = f'[[tiers]]\nname = "t"\n[[tiers.rules]]\nlimits = ["1/day"]\n{rule}\n'
    with pytest.raises(PolicyError) as refused:
        parse_policy(text, "p.toml")
    assert said in refused.value.reason
    assert refused.value.line is not None


_texts = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters="*"), min_size=1, max_size=20)


@given(st.dictionaries(_texts, _texts, min_size=1, max_size=5))
def test_text_and_entries_go_both_ways(entries: dict[str, str]) -> None:
    text = descriptor_text(entries)
    assert dict(descriptor_entries(text)) == entries
    assert canonical_descriptor(text) == text


@given(*[st.lists(st.tuples(st.text("a&=%#2", max_size=4), st.text("a&=%#2", max_size=4)), max_size=3)] * 2)
def test_no_two_lists_of_entries_are_one_subject(one: list[tuple[str, str]], two: list[tuple[str, str]]) -> None:
    assert (entries_subject(one) == entries_subject(two)) == (one == two or (not one and not two))
    if one != two:
        assert entries_subject(one, "0" * 24) != entries_subject(two, "0" * 24)
    assert entries_subject(one, "0" * 24) != entries_subject(two)
