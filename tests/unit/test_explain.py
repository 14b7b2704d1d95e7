"""Why a request gets its answer: it names the rule that a check names, and charges nothing."""

from __future__ import annotations

import itertools

import pytest

from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check
from tidegate.gate.explain import MAX_CANDIDATES, Explanation, access_of, explain
from tidegate.gate.gate import Gate
from tidegate.policy.toml_reader import parse_policy

POLICY = """
[attributes]
user = "header:X-User"

[[tiers]]
name = "free"
limits = ["50/day"]

  [[tiers.rules]]
  name = "all"
  endpoint = "/api/*"
  limits = ["10/minute"]

  [[tiers.rules]]
  name = "item"
  endpoint = "/api/items/{id}"
  methods = ["GET"]
  limits = ["5/minute"]

  [[tiers.rules]]
  name = "urgent"
  endpoint = "/api/items/*"
  methods = ["POST"]
  limits = ["3/minute"]
  priority = 7

  [[tiers.rules]]
  name = "of user"
  endpoint = "/api/items/{id}"
  match = { user = "a*" }
  subject = "user"
  limits = ["2/minute"]

  [[tiers.rules]]
  name = "trial"
  endpoint = "/api/items/*"
  limits = ["1/minute"]
  mode = "shadow"

[anonymous]
tier = "free"
"""
IP = "203.0.113.7"


def _gate(text: str = POLICY) -> Gate:
    return Gate(CachedCatalog(PolicyCatalog(parse_policy(text))), MemoryCounters())


async def _explain(gate: Gate, check: Check) -> Explanation:
    return await explain(gate.counters, await gate.unkeyed_caller(check.tier, check.attributes), check)


async def test_each_rule_has_its_reason() -> None:
    found = await _explain(_gate(), Check.of("/api/items/7", "POST", ip=IP, attributes={"user": "bob"}))
    results = {each.compiled.rule.name: (each.result, each.reason) for each in found.candidates}
    assert found.rule is not None
    assert found.rule.rule.name == "urgent"
    assert results["urgent"][0] == "answers"
    assert results["all"] == ("outranked", "it matches, but its priority 0 is lower than 7: 'urgent' answers")
    assert results["item"] == ("not_matched", "the method POST is not one of its methods (GET, HEAD)")
    assert results["of user"] == ("not_matched", "the attribute user = 'bob' does not match 'a*'")
    assert results["trial"][0] == "watches"
    other = await _explain(_gate(), Check.of("/other", ip=IP))
    assert {each.reason for each in other.candidates} == {"the path does not match its endpoint"}
    assert other.rule is None
    assert [each.limits.rule for each in other.counters] == [None], "the tier's own limits hold everywhere"


async def test_it_agrees_with_checks_and_charges_nothing() -> None:
    gate = _gate()
    paths = ("/api/items/7", "/api/items/7/x", "/api", "/api/", "/other")
    users = ({}, {"user": "ann"}, {"user": "bob"})
    for path, method, attributes in itertools.product(paths, ("GET", "HEAD", "POST"), users):
        check = Check.of(path, method, ip=IP, attributes=attributes, cost=0)
        found = await _explain(gate, check)
        decision = await gate.check(check)
        assert decision.rule == (None if found.rule is None else found.rule.rule.name), check
        answering = [each.compiled for each in found.candidates if each.result == "answers"]
        assert answering == ([] if found.rule is None else [found.rule])
    check = Check.of("/api/items/7", "POST", ip=IP)
    for left in (3, 2, 1):
        found = await _explain(gate, check)
        assert (found.allowed, found.counters[0].left) == (True, left)
        assert (await gate.check(check)).allowed
    found = await _explain(gate, check)
    assert (found.allowed, found.counters[0].left) == (False, 0)
    assert not (await gate.check(check)).allowed


async def test_what_a_request_lacks_is_named() -> None:
    found = await _explain(_gate(), Check.of("/api/items/7"))
    assert found.allowed is None
    assert found.problem is not None
    assert "ip is needed" in found.problem


@pytest.mark.parametrize("count", [MAX_CANDIDATES - 1, MAX_CANDIDATES + 300])
async def test_many_rules_are_bounded_and_the_matching_ones_come_first(count: int) -> None:
    rules = "".join(f'[[tiers.rules]]\nendpoint = "/no/{number}"\nlimits = ["1/minute"]\n' for number in range(count))
    text = f'[[tiers]]\nname = "t"\n{rules}[[tiers.rules]]\nendpoint = "/*"\nlimits = ["1/minute"]\n[anonymous]\ntier = "t"\n'
    found = await _explain(_gate(text), Check.of("/yes", ip=IP))
    assert found.candidates[0].result == "answers"
    assert len(found.candidates) + found.left_out == count + 1
    assert len(found.candidates) <= MAX_CANDIDATES


SOLD = """
[[tiers]]
name = "free"
limits = ["50/day"]
quotas = ["2/month"]
overage = { up_to = "100%" }

  [[tiers.rules]]
  endpoint = "/soft"
  limits = ["1/hour"]
  mode = "soft"

  [[tiers.rules]]
  endpoint = "/free"
  action = "allow"

  [[tiers.rules]]
  endpoint = "/closed"
  action = "deny"

[[access]]
action = "deny"
from = ["198.51.100.0/24"]

[anonymous]
tier = "free"
"""


async def test_quotas_soft_rules_and_access_lists() -> None:
    gate = _gate(SOLD)
    check = Check.of("/soft", ip=IP)
    for left in (2, 1, 0, 0):
        found = await _explain(gate, check)
        assert (found.allowed, found.counters[-1].left) == (True, left)
        assert (await gate.check(check)).allowed
    assert (await _explain(gate, check)).allowed is False
    assert not (await gate.check(check)).allowed
    for path, allowed in (("/free", True), ("/closed", False)):
        found = await _explain(gate, Check.of(path, ip=IP))
        assert (found.allowed, found.counters, found.candidates[0].result) == (allowed, (), "answers")
    caller = await gate.unkeyed_caller(None, {})
    assert await access_of(gate.access, check, caller) == (None, False)
    message, _ = await access_of(gate.access, Check.of("/soft", ip="198.51.100.7"), caller)
    assert message is not None
    assert gate.access.denied == 0, "an explanation is no check"
