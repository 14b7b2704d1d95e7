"""What the counters of rules are called: a rule that is watched first keeps its counter when it is enforced."""

from __future__ import annotations

import asyncio

import pytest

from tests.conftest import Clock
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check, Decision
from tidegate.gate.gate import Gate
from tidegate.policy.counter_names import counter_names
from tidegate.policy.rules import Rule
from tidegate.policy.toml_reader import parse_policy


@pytest.mark.parametrize(
    ("rules", "names"),
    [
        ([{"mode": "shadow"}], ["/x"]),
        ([{"mode": "soft", "methods": ["GET"], "match": {"plan": "a*"}}], ["GET /x plan=a*"]),
        ([{"mode": "shadow", "name": "mine"}], ["mine"]),
        ([{"mode": "shadow"}, {}], ["/x shadow", "/x"]),
        ([{"mode": "shadow"}, {"mode": "soft"}], ["/x shadow", "/x"]),
        ([{"mode": "shadow"}, {"name": "/x", "methods": ["GET"]}], ["/x shadow", "/x"]),
    ],
)
def test_counters_are_named_without_the_mode_unless_another_rule_has_that_counter(
    rules: list[dict[str, object]], names: list[str]
) -> None:
    made = [Rule.make("/x", ["1/s"], **each) for each in rules]  # type: ignore[arg-type]
    assert list(counter_names(made).values()) == names


@pytest.mark.parametrize("mode", ["shadow", "soft"])
def test_what_a_rule_counted_before_it_is_enforced_counts(clock: Clock, mode: str) -> None:
    counters = MemoryCounters(clock=clock)

    def check(mode: str) -> Decision:
        policy = parse_policy(
            '[[tiers]]\nname = "t"\n[[tiers.rules]]\nendpoint = "/x"\nlimits = ["3/day"]\nquotas = ["9/month"]\n'
            f'mode = "{mode}"\n[anonymous]\ntier = "t"\n'
        )
        gate = Gate(CachedCatalog(PolicyCatalog(policy)), counters)
        return asyncio.run(gate.check(Check.of("/x", ip="192.0.2.1")))

    assert [check(mode).allowed for _ in range(3)] == [True] * 3
    denied = check("enforce")
    assert (denied.allowed, denied.limit) == (False, 3)
    clock.advance(2 * 86_400)
    assert check("enforce").remaining == 2
    clock.advance(2 * 86_400)
    # Of the quota too: 3 + 1 + 3 were counted.
    assert [check("enforce").allowed for _ in range(3)] == [True] * 3
    clock.advance(2 * 86_400)
    assert [check("enforce").allowed for _ in range(3)] == [True, True, False]
