"""Random plans at the whole gate: rule, limits and quotas together never admit more than any of them.

Customers change tier and anchor in mid-period, keys are rotated, and time passes through leap years and changes of clocks.
"""

from __future__ import annotations

import asyncio
import datetime
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases.quotas import us
from tests.conftest import Clock
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.changes import CUSTOMER, KEY
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check
from tidegate.gate.gate import Gate
from tidegate.policy.key_format import hash_api_key
from tidegate.policy.model import ApiKey
from tidegate.policy.periods import Period, PeriodAnchor
from tidegate.policy.toml_reader import parse_policy

DAY_US = 86_400_000_000
MOST = {"small": {Period.MONTH: 9, Period.WEEK: 6}, "large": {Period.MONTH: 14, Period.WEEK: 9}}
"""Large has 8 a week and 13 a month, and 10 % above them."""
POLICY = parse_policy(
    """
[[tiers]]
name = "small"
quotas = ["9/month", "6/week"]
limits = ["7/day"]
[[tiers.rules]]
endpoint = "/x"
algorithm = "fixed_window"
subject = "customer"
limits = ["5/day"]
[[tiers]]
name = "large"
quotas = ["13/month", "8/week"]
overage = { up_to = "13%" }
[[tiers.rules]]
endpoint = "/x"
algorithm = "fixed_window"
subject = "customer"
limits = ["7/day"]
[[customers]]
name = "acme"
tier = "small"
"""
)
RULE = {"small": 5, "large": 7}
CHECKS = st.tuples(
    st.just("checks"),
    st.one_of(st.integers(0, DAY_US), st.integers(DAY_US // 3, 9 * DAY_US)),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 1)), min_size=1, max_size=6),
)
CHANGE = st.one_of(
    st.tuples(st.just("rotate"), st.integers(0, 1)),
    st.tuples(st.just("tier"), st.sampled_from(["small", "large"])),
    st.tuples(
        st.just("anchor"),
        st.dates(min_value=datetime.date(2024, 1, 1), max_value=datetime.date(2028, 12, 31)),
        st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Pacific/Auckland"]),
    ),
)
STEP = st.one_of(CHECKS, CHECKS, CHECKS, CHECKS, CHANGE)
"""Mostly checks, with a third of a day to nine days between them: quotas fill up between changes."""


class Sold:
    """A gate with one customer and two keys, and all that was admitted."""

    def __init__(self, start_us: int) -> None:
        self.clock = Clock(start_us)
        self.catalog = PolicyCatalog(POLICY)
        self.cached = CachedCatalog(self.catalog)
        self.gate = Gate(self.cached, MemoryCounters(clock=self.clock), wall_clock_ns=lambda: self.clock.now_us * 1000)
        self.customer = POLICY.customers[0]
        self.keys = ["key-of-acme-000-0", "key-of-acme-000-1"]
        self.records = [ApiKey(hash_api_key(key), "small", customer="acme", inherits_tier=True) for key in self.keys]
        self.anchor, self.moved_at = PeriodAnchor(), start_us
        self.admitted: list[tuple[int, int, str]] = []
        self.version = 0
        self.publish()

    def publish(self) -> None:
        records = tuple(msgspec.structs.replace(each, tier=self.customer.tier) for each in self.records)
        self.catalog.replace(msgspec.structs.replace(POLICY, customers=(self.customer,), api_keys=records))
        self.version += 1
        self.cached.touched(self.version, [(CUSTOMER, "acme"), *((KEY, each.sha256) for each in self.records)])

    def rotate(self, number: int) -> None:
        old = self.records[number]
        self.keys[number] = f"key-of-acme-{self.version:03}-{number}"
        self.records[number] = msgspec.structs.replace(old, sha256=hash_api_key(self.keys[number]), counts_as=old.owner)
        self.publish()

    def move(self, **fields: Any) -> None:
        self.customer = msgspec.structs.replace(self.customer, **fields)
        if "anchor" in fields:
            self.clock.now_us += 1
            self.anchor, self.moved_at = self.customer.period_anchor, self.clock.now_us
        self.publish()

    async def check(self, cost: int, number: int) -> None:
        decision = await self.gate.check(Check.of("/x", api_key=self.keys[number], cost=cost))
        tier, day = self.customer.tier, self.clock.now_us // DAY_US
        if decision.allowed:
            assert 0 <= decision.overage <= cost
            self.admitted.append((self.clock.now_us, cost, tier))
            for period, most in MOST[tier].items():
                assert self.used(period) <= most
            assert sum(units for at, units, by in self.admitted if at // DAY_US == day and by == tier) <= RULE[tier]

    def used(self, period: Period) -> int:
        """Units that were admitted in the current period, by the anchor that it has."""
        begin, end = self.anchor.bounds(period, self.clock.now_us)
        return sum(cost for at, cost, _ in self.admitted if max(begin, self.moved_at) <= at < end)


@settings(max_examples=60)
@given(st.integers(us("2023-12-01T00:00Z"), us("2028-06-01T00:00Z")), st.lists(STEP, min_size=10, max_size=40))
def test_no_plan_admits_more_than_it_says(start_us: int, steps: list[tuple[Any, ...]]) -> None:
    async def run() -> None:
        sold = Sold(start_us)
        for step in steps:
            if step[0] == "rotate":
                sold.rotate(step[1])
            elif step[0] == "tier":
                sold.move(tier=step[1])
            elif step[0] == "anchor":
                sold.move(anchor=step[1].isoformat(), timezone=step[2])
            else:
                for cost, number in step[2]:
                    sold.clock.now_us += step[1]
                    await sold.check(cost, number)

    asyncio.run(run())
