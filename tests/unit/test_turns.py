"""Checks that arrive together are observed together: what is counted is what they would have counted one by one."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import Clock
from tests.unit.test_telemetry import values
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check, Decision
from tidegate.gate.gate import Gate
from tidegate.ledger.aggregate import EntryKey, UsageCounts
from tidegate.observation import PassedCheck, UsageMemo
from tidegate.policy.toml_reader import parse_policy
from tidegate.server.observers import observe_all, observe_all_passed
from tidegate.telemetry.metrics import Metrics

NOON_US = 1_700_049_600_000_000
POLICY = """
[[tiers]]
name = "free"
limits = ["20/day"]
  [[tiers.rules]]
  endpoint = "/a/*"
  limits = ["6/minute"]
  [[tiers.rules]]
  endpoint = "/soft"
  mode = "soft"
  limits = ["2/minute"]
[[tiers]]
name = "open"
  [[tiers.rules]]
  endpoint = "/a/*"
  limits = ["4/minute"]
[[tiers]]
name = "watched"
  [[tiers.rules]]
  endpoint = "/a/*"
  limits = ["9/minute"]
  [[tiers.rules]]
  name = "would deny"
  endpoint = "/a/*"
  mode = "shadow"
  limits = ["1/minute"]
[[api_keys]]
key = "demo-free-key-0001"
tier = "free"
[[api_keys]]
key = "demo-free-key-0002"
tier = "open"
[[api_keys]]
key = "demo-free-key-0003"
tier = "watched"
"""
KEYS = ("demo-free-key-0001", "demo-free-key-0002", "demo-free-key-0003")
Step = tuple[int, str, str, int]


class Side:
    """A gate with counters and recorders of its own.

    Args:
        together: whether the checks that pass in one turn are observed together.
    """

    def __init__(self, clock: Clock, together: bool) -> None:
        self.metrics = Metrics("x")
        self.usage = UsageCounts()
        self.together: list[PassedCheck] = []
        passed = observe_all_passed([self.metrics.observe_passed, self.usage.observe_passed, self.together.extend])
        self.gate = Gate(
            CachedCatalog(PolicyCatalog(parse_policy(POLICY))),
            MemoryCounters(clock=clock),
            observe_all([self.metrics.observe, self.usage.observe]),
            observe_passed=passed if together else None,
        )

    async def start(self) -> None:
        """Have the policy and the callers cached."""
        for key in KEYS:
            await self.gate.check(Check.of("/warm", api_key=key))

    def turn(self, steps: list[Step]) -> list[Any]:
        """Decide checks that arrived together."""
        answers: list[Any] = []
        self.gate.begin_turn()
        for _, key, path, cost in steps:
            answer = self.gate.check_now(Check.of(path, api_key=key, ip="192.0.2.1", cost=cost))
            if not isinstance(answer, Decision):
                answer.close()
            answers.append(answer.headers if isinstance(answer, Decision) else None)
        self.gate.end_turn()
        return answers

    def counted(self) -> tuple[dict[Any, float], dict[tuple[int, EntryKey], list[int]]]:
        """What the metrics say of the checks, but for the time that they took, and the units of the ledger."""
        units: dict[tuple[int, EntryKey], list[int]] = {}
        for minute in self.usage.take():
            for (answer, *who), used in minute.rows():
                name = getattr(answer, "name", answer)  # each side has limits of its own
                total = units.setdefault((minute.start_us, (name, *who)), [0, 0, 0])  # type: ignore[arg-type]
                for place, each in enumerate(used):
                    total[place] += each
        timed = "rate_limiter_latency_seconds"
        return {
            name: value
            for name, value in values(self.metrics).items()
            if not name[0].startswith(timed) or name[0].endswith("_count")
        }, units


@settings(max_examples=60)
@given(
    st.lists(
        st.lists(
            st.tuples(
                st.integers(0, 40_000_000),
                st.sampled_from(KEYS),
                st.sampled_from(("/a/1", "/soft", "/free")),
                st.integers(0, 3),
            ),
            max_size=8,
        ),
        max_size=6,
    )
)
def test_what_is_observed_together_counts_as_one_by_one(turns: list[list[Step]]) -> None:
    clock = Clock(NOON_US)
    sides = [Side(clock, True), Side(clock, False)]
    for side in sides:
        asyncio.run(side.start())
    for steps in turns:
        clock.now_us += sum(step[0] for step in steps)
        assert sides[0].turn(steps) == sides[1].turn(steps)
    assert sides[0].counted() == sides[1].counted()


async def test_checks_of_a_turn_are_observed_at_its_end() -> None:
    side = Side(Clock(NOON_US), True)
    await side.start()
    side.gate.begin_turn()
    for _ in range(2):
        decision = side.gate.check_now(Check.of("/a/1", api_key="demo-free-key-0001", cost=3))
        assert isinstance(decision, Decision)
        assert decision.allowed
    denied = side.gate.check_now(Check.of("/a/1", api_key="demo-free-key-0001", cost=3))
    assert isinstance(denied, Decision)
    assert not denied.allowed
    assert side.together == []
    side.gate.end_turn()
    assert [(cost, subject[:2], memo.key_id) for _, _, cost, subject, memo in side.together] == [
        (3, "k:", denied.caller.key_id if denied.caller is not None else "")
    ] * 2
    assert sum(side.metrics.latency.counts) == 6, "three of the start, three of the turn"
    alone = await side.gate.check(Check.of("/a/2", api_key="demo-free-key-0002"))
    assert alone.allowed
    assert len(side.together) == 2, "a check between turns is observed by itself"


def test_a_passed_check_without_limits_is_counted() -> None:
    """The gate gives none."""
    metrics = Metrics("x")
    metrics.observe_passed([(Decision(True, unlimited_tier="free", at_us=NOON_US), 5, 1, "k:1", UsageMemo())])
    assert values(metrics)["rate_limiter_requests_total", (("status", "allowed"),)] == 1
