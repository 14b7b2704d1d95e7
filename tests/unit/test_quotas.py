"""Quotas in memory: the table of cases, a model of random plans, and what the gate charges."""

from __future__ import annotations

import asyncio
import datetime
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from tests.cases.quotas import CASES, Step, quotas_of, us
from tests.conftest import Clock
from tidegate.admin.models.overrides import LimitOverride
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.catalog.shared_entries import EntrySeal, InvalidEntry, TierEntry, require_valid_tier
from tidegate.cli.key_limits import changed_overrides, parse_change
from tidegate.counters import Charge
from tidegate.counters.fallback import LocalShares
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check, Decision
from tidegate.errors import PolicyError
from tidegate.gate.gate import Gate
from tidegate.observation import Observation
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.policy.matching import CompiledTier
from tidegate.policy.periods import Period, PeriodAnchor
from tidegate.policy.quotas import Overage, Quota, QuotaLimit, fit_quotas
from tidegate.policy.toml_reader import parse_policy, policy_warnings
from tidegate.policy.toml_writer import policy_text

KEY = "a-key-of-a-customer-1"
OTHER_KEY = "a-key-of-a-customer-2"


@pytest.mark.parametrize("name", CASES)
def test_table_of_cases(name: str) -> None:
    clock = Clock(0)
    memory = MemoryCounters(clock=clock)
    for step in CASES[name]:
        clock.now_us = step.at_us
        decision = memory.charge_all(((step.limits, "k:1"),), step.cost)
        require_as_expected(step, decision)


def require_as_expected(step: Step, decision: Decision) -> None:
    assert (decision.allowed, decision.remaining, decision.overage) == (step.allowed, step.remaining, step.over), step
    if step.resets and (step.allowed or decision.retry_after_us is not None):
        assert step.at_us + decision.reset_after_us == us(step.resets) or step.at.startswith("2026-11-01T23"), step
    assert step.allowed or bool(step.resets) == (decision.retry_after_us is not None), step


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("100/fortnight", "unknown period 'fortnight'"),
        ("100/2months", "one month at a time"),
        ("0/month", "whole number from 1"),
        ("1000000000001/month", "whole number from 1"),
        ("100/month burst 5", "has a burst"),
        ("a lot", "is not understood: write '100000/month'"),
        (7, "is not understood"),
        ("1" * 50_000 + "/day", "is not understood"),
    ],
)
def test_quotas_that_are_refused(text: object, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        Quota.parse(text)


@pytest.mark.parametrize(
    "value", ["20%", 20, {"up_to": 20}, {"up_to": "0%"}, {"up_to": "20"}, {"upto": "20%"}, {"up_to": "x" * 9999}, []]
)
def test_overages_that_are_refused(value: object) -> None:
    with pytest.raises(PolicyError, match="overage"):
        Overage.parse(value)


def test_spellings_of_quotas() -> None:
    assert [quota.text for quota in fit_quotas(["1_000 per month", "5/weeks", "3/d", "2 / h", "9/m", "7/s", "8/y"])] == [
        "7/second",
        "9/minute",
        "2/hour",
        "3/day",
        "5/week",
        "1000/month",
        "8/year",
    ]
    with pytest.raises(PolicyError, match="same period"):
        fit_quotas(["1/day", "2/days"])


ANCHORS = st.builds(
    PeriodAnchor.make,
    st.dates(min_value=datetime.date(2020, 1, 1), max_value=datetime.date(2030, 12, 31)),
    st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Africa/Cairo", "Pacific/Auckland"]),
)
ADVANCES = st.one_of(st.integers(0, 3_600_000_000), st.integers(0, 40 * 86_400_000_000), st.integers(0, 400 * 86_400_000_000))
PERIODS = st.sampled_from([Period.DAY, Period.WEEK, Period.MONTH, Period.YEAR, Period.HOUR])


@given(
    st.integers(us("2023-01-01T00:00Z"), us("2029-01-01T00:00Z")),
    st.lists(PERIODS, min_size=1, max_size=3, unique=True),
    st.lists(
        st.one_of(
            st.tuples(st.just("check"), ADVANCES, st.integers(1, 6)),
            st.tuples(st.just("anchor"), ANCHORS),
            st.tuples(st.just("amount"), st.integers(1, 12)),
        ),
        max_size=40,
    ),
    st.sampled_from([None, 50]),
)
def test_nothing_ever_admits_more_than_any_of_rule_tier_and_quotas(
    start: int, periods: list[Period], steps: list[tuple[Any, ...]], overage: int | None
) -> None:
    """The admissions of each period are counted beside the store, from scratch: since the anchor moved last, and what of the
    period before that counts on.
    """
    clock = Clock(start)
    memory = MemoryCounters(clock=clock)
    rule = LimitSet("pro:rule", Algorithm.SLIDING_WINDOW, [Limit.parse("20/day")], rule="rule", tier="pro")
    tier = LimitSet("pro", Algorithm.FIXED_WINDOW, [Limit.parse("9/hour")], tier="pro")
    anchor, amount, moved_at = PeriodAnchor(), 7, start
    admitted: list[tuple[int, int]] = []
    carried: dict[Period, tuple[int, int]] = {}

    def used(period: Period, at_us: int) -> int:
        begin, end = anchor.bounds(period, at_us)
        last, units = carried.get(period, (0, 0))
        return sum(cost for at, cost in admitted if max(begin, moved_at) <= at < end) + (units if last >= begin else 0)

    for step in steps:
        if step[0] == "anchor":
            if admitted:
                carried = {period: (admitted[-1][0], used(period, admitted[-1][0])) for period in periods}
            clock.now_us += 1
            anchor, moved_at = step[1], clock.now_us
            continue
        if step[0] == "amount":
            # Also a change of tier: the quotas of all tiers have one counter for a subject.
            amount = step[1]
            continue
        clock.now_us += step[1]
        cost = step[2]
        quotas = quotas_by_anchor(tuple(f"{amount}/{period}" for period in periods), overage, anchor)
        most = amount + amount * (overage or 0) // 100
        counters = ((rule, "s"), (tier, "s"), (quotas, "s"))
        before = memory.charge_all(counters, 0)
        decision = memory.charge_all(counters, cost)
        fits = all(used(period, clock.now_us) + cost <= most for period in periods)
        assert fits or not decision.allowed
        assert fits or cost > most or decision.retry_after_us is not None
        if not decision.allowed:
            assert not fits or not isinstance(decision.binding, QuotaLimit), "a quota denies no sooner than it must"
            assert memory.charge_all(counters, 0) == before, "a denial consumes nothing"
            if decision.retry_after_us is None:
                continue
            clock.now_us += decision.retry_after_us - 1
            assert not memory.charge_all(counters, cost).allowed
            clock.now_us += 1
            decision = memory.charge_all(counters, cost)
            assert decision.allowed
        over = max(used(period, clock.now_us) + cost - amount for period in periods)
        assert decision.overage == min(max(over, 0), cost)
        admitted.append((clock.now_us, cost))
        hour, day = clock.now_us // 3_600_000_000, clock.now_us // 86_400_000_000
        assert sum(units for at, units in admitted if at // 3_600_000_000 == hour) <= 9
        assert sum(units for at, units in admitted if at // 86_400_000_000 == day) <= 20


def test_quotas_are_leased_unless_units_above_them_pass() -> None:
    policy = parse_policy(
        """
        [[tiers]]
        name = "t"
        quotas = ["9/month"]
        [[tiers.rules]]
        endpoint = "/leased"
        quotas = ["9/month"]
        [[tiers.rules]]
        endpoint = "/over"
        quotas = ["9/month"]
        overage = true
        [[tiers.rules]]
        endpoint = "/soft"
        mode = "soft"
        quotas = ["9/month"]
        [[tiers.rules]]
        endpoint = "/off"
        leases = false
        quotas = ["9/month"]
        """
    )
    tier = CompiledTier(policy.tiers[0])
    assert tier.quotas is not None
    assert tier.quotas.of(PeriodAnchor()).leasable
    leasable = {}
    for path in ("/leased", "/over", "/soft", "/off"):
        rule = tier.match("GET", path)
        assert rule is not None
        assert rule.quotas is not None
        leasable[path] = rule.quotas.of(PeriodAnchor()).leasable
    assert leasable == {"/leased": True, "/over": False, "/soft": False, "/off": False}


def quotas_by_anchor(texts: tuple[str, ...], overage: int | None, anchor: PeriodAnchor) -> LimitSet:
    limits = quotas_of(texts, overage)
    return type(limits)(
        limits.name,
        limits.algorithm,
        [
            QuotaLimit(
                limit.amount,
                limit.window_us,
                label=limit.label,
                most=limit.most,
                clock=type(limit.clock)(limit.clock.period, anchor),
            )
            for limit in limits.limits
            if isinstance(limit, QuotaLimit)
        ],
    )


POLICY = f"""
[[tiers]]
name = "pro"
quotas = ["10/month", "6/day"]
limits = ["9/hour"]

  [[tiers.rules]]
  endpoint = "/api/*"
  limits = ["4/minute"]

  [[tiers.rules]]
  endpoint = "/export"
  quotas = ["2/month"]
  overage = {{ up_to = "50%" }}

  [[tiers.rules]]
  endpoint = "/soft"
  limits = ["1/minute"]
  mode = "soft"

[[tiers]]
name = "max"
quotas = ["20/month"]
overage = true

[[api_keys]]
key = "{KEY}"
tier = "pro"

[[api_keys]]
key = "{OTHER_KEY}"
tier = "max"
"""


@pytest.fixture
def gate(clock: Clock) -> Callable[..., Decision]:
    clock.now_us = us("2026-11-03T12:00Z")
    observed: list[Observation] = []
    made = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), MemoryCounters(clock=clock), observed.append)

    def check(path: str, key: str = KEY, cost: int = 1) -> Decision:
        decision = asyncio.run(made.check(Check.of(path, api_key=key, ip="192.0.2.1", cost=cost)))
        check.observation = observed[-1]  # type: ignore[attr-defined]
        return decision

    check.gate = made  # type: ignore[attr-defined]
    return check


def test_every_request_of_the_tier_is_charged_whichever_rule_answers(gate: Any, clock: Clock) -> None:
    assert gate("/api/a", cost=2).remaining == 2, "of the rule"
    assert (gate("/unmatched").remaining, gate("/unmatched").rule) == (3, None), "of the day's quota"
    assert gate("/export").remaining == 1
    denied = gate("/api/b", cost=2)
    assert (denied.allowed, denied.remaining, str(denied.binding)) == (False, 1, "6/day")
    assert gate.observation.denied_by.rule is None
    assert gate.observation.subject == gate.observation.subject, "the caller's"
    assert gate("/api/b").allowed, "the denied one consumed nothing"
    clock.now_us = us("2026-11-04T00:00Z")
    assert gate("/api/c", cost=4).allowed
    denied = gate("/unmatched", cost=2)
    assert (denied.allowed, str(denied.binding)) == (False, "10/month")
    assert clock.now_us + denied.retry_after_us == us("2026-12-01T00:00Z")


def test_quotas_of_a_rule_and_their_overage(gate: Any, clock: Clock) -> None:
    assert (gate("/export", cost=2).overage, gate("/export").overage) == (0, 1)
    denied = gate("/export")
    assert (denied.allowed, denied.rule, str(denied.binding), denied.overage) == (False, "/export", "2/month", 0)
    assert gate.observation.denied_by.rule == "/export"
    usage = asyncio.run(gate.gate.usage(KEY))
    export = next(each for each in usage.rules if each.rule == "/export")
    (window,) = export.windows
    assert (window.remaining, window.overage, window.at_us + window.reset_after_us) == (0, 1, us("2026-12-01T00:00Z"))
    own = usage.rules[0]
    assert [(str(limit), window.remaining) for limit, window in zip(own.limits, own.windows, strict=True)] == [
        ("9/hour", 6),
        ("6/day", 3),
        ("10/month", 7),
    ]


def test_a_soft_rule_passes_and_says_what_is_above_it(gate: Any, clock: Clock) -> None:
    assert [gate("/soft").overage for _ in range(3)] == [0, 1, 1]
    assert gate("/soft").allowed
    assert asyncio.run(gate.gate.usage(KEY)).rules[0].windows[1].remaining == 2, "the quotas are charged all the same"
    assert not gate("/soft", cost=3).allowed, "the tier's quota is not soft"


def test_a_change_of_tier_keeps_what_was_consumed(gate: Any, clock: Clock) -> None:
    assert gate("/x", OTHER_KEY, cost=19).overage == 0
    assert (gate("/x", OTHER_KEY, cost=3).overage, gate("/x", OTHER_KEY).allowed) == (2, True)
    moved = POLICY.replace('tier = "max"', 'tier = "pro"')
    before = gate.gate.counters
    later = Gate(CachedCatalog(PolicyCatalog(parse_policy(moved))), before)
    denied = asyncio.run(later.check(Check.of("/x", api_key=OTHER_KEY)))
    assert (denied.allowed, str(denied.binding)) == (False, "10/month")
    assert asyncio.run(later.reset(api_key=OTHER_KEY)) == 5
    assert asyncio.run(later.check(Check.of("/x", api_key=OTHER_KEY))).allowed


def test_a_share_of_a_quota_goes_back_whole(clock: Clock) -> None:
    clock.now_us = us("2026-11-03T12:00Z")
    limits = quotas_of(("10/month", "8/day"), 50)
    local = LocalShares(100, clock)
    charge = Charge(((limits, "k:1"),), 3)
    assert [local.charge(charge, 2).overage for _ in range(2)] == [0, 2], "half of 8 a day, and of the half above it"
    assert not local.charge(charge, 2).allowed
    store = MemoryCounters(clock=clock)
    store.charge_all(((limits, "k:1"),), 1)
    states = local.take(limits, "k:1")
    assert states is not None
    store.add(limits, "k:1", states)
    assert [window.remaining for window in asyncio.run(store.windows([(limits, "k:1")]))[0]] == [1, 3]


def test_a_tier_with_quotas_is_kept_in_the_shared_cache_and_verified() -> None:
    tier = parse_policy(POLICY).tiers[0]
    seal = EntrySeal(b"a secret of 16 bytes or more")
    name, decoder = b"tier pro", msgspec.msgpack.Decoder(TierEntry)
    opened = seal.open(name, seal.seal(name, TierEntry(1, tier)), decoder).value
    assert opened == tier
    require_valid_tier(opened, "pro")
    for forged in (
        msgspec.structs.replace(tier, quotas=(Quota(0, Period.DAY),)),
        msgspec.structs.replace(tier, quotas=tier.quotas[::-1]),
        msgspec.structs.replace(tier, quotas=(), overage=Overage()),
        msgspec.structs.replace(tier, overage=Overage(-5)),
        msgspec.structs.replace(tier, rules=(msgspec.structs.replace(tier.rules[1], quotas=()),)),
    ):
        with pytest.raises(InvalidEntry):
            require_valid_tier(forged, "pro")


def test_the_policies_of_the_page_on_plans_are_valid() -> None:
    page = Path(__file__, "../../../docs/plans.md").resolve().read_text(encoding="utf-8")
    policies = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert policies
    for text in policies:
        # What is not about tiers needs a tier beside it.
        policy = parse_policy(text if "[[tiers]]" in text else f'[[tiers]]\nname = "pro"\nlimits = ["1/s"]\n{text}')
        assert policy_warnings(policy) == []


OWN = (
    POLICY
    + f"""
[[customers]]
name = "acme"
tier = "pro"
anchor = "2026-01-31"
timezone = "Europe/Berlin"
quotas = ["50/month", "40/day"]
  [[customers.overrides]]
  quotas = ["90/month"]
  until = "2100-01-01T00:00:00Z"
  [[customers.overrides]]
  rule = "/export"
  limits = ["30/minute"]
  quotas = ["3/year"]

[[api_keys]]
key = "{KEY}-of-acme"
customer = "acme"

[[api_keys]]
key = "{KEY}-of-acme-too"
customer = "acme"
"""
).replace(
    '\n  [[tiers.rules]]\n  endpoint = "/export"\n',
    '\n  [[tiers.rules]]\n  endpoint = "/export"\n  name = "/export"\n  limits = ["9/second"]\n',
)


def test_quotas_of_a_customer_replace_those_of_its_tier_and_count_all_its_keys(clock: Clock) -> None:
    policy = parse_policy(OWN)
    assert parse_policy(policy_text(policy)) == policy
    clock.now_us = us("2026-11-03T12:00Z")
    gate = Gate(CachedCatalog(PolicyCatalog(policy)), MemoryCounters(clock=clock))
    keys = [f"{KEY}-of-acme", f"{KEY}-of-acme-too"]

    def check(path: str, key: str, cost: int) -> Decision:
        clock.advance(7 * 3600)
        return asyncio.run(gate.check(Check.of(path, api_key=key, cost=cost)))

    first = check("/x", keys[0], 9)
    assert first.limits is not None
    assert '"quota 90/month";q=90' in first.limits.quotas, "the one that ends takes precedence, as long as it holds"
    assert [(check("/x", keys[number % 2], 9).allowed) for number in range(9)] == [True] * 9
    denied = check("/x", keys[1], 1)
    assert (denied.allowed, str(denied.binding)) == (False, "90/month")
    assert denied.retry_after_us is not None
    assert clock.now_us + denied.retry_after_us == us("2026-11-30T00:00+01:00")
    clock.now_us = us("2026-11-30T00:00+01:00")
    assert [check("/export", key, 2).overage for key in keys] == [0, 1], "of a year's 3"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("quotas = []", "quotas is an empty list"),
        ('quotas = ["1/day"]\n[[api_keys.overrides]]\nquotas = ["2/day"]', "the tier's quotas are overridden twice"),
        ("[[api_keys.overrides]]\nuntil = 2100-01-01", "'limits' is missing"),
        ('[[api_keys.overrides]]\nrule = "/no"\nquotas = ["2/day"]', "has no rule '/no'"),
    ],
)
def test_overrides_of_quotas_that_are_refused(text: str, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        parse_policy(f'[[tiers]]\nname = "t"\nquotas = ["5/day"]\n[[api_keys]]\nkey = "{KEY}"\ntier = "t"\n{text}\n')


def test_limits_and_quotas_of_a_key_are_changed_apart() -> None:
    own = [
        LimitOverride(rule=None, quotas=["5/day"]),
        LimitOverride(rule="/a", limits=["1/minute"], quotas=["9/month"]),
    ]
    until = "2100-01-01T00:00:00Z"
    changes = [parse_change("quota=7/month,3/day", until), parse_change("/a=2/minute", None)]
    sent = changed_overrides(["8/hour"], own, changes)
    assert sent.limits == ["8/hour"]
    assert [(each.rule, each.limits, each.quotas, each.until) for each in sent.overrides] == [
        (None, [], ["5/day"], None),
        ("/a", ["2/minute"], [], None),
        ("/a", [], ["9/month"], None),
        (None, [], ["3/day", "7/month"], until),
    ]
    rest = changed_overrides(None, sent.overrides, [parse_change("quota=default", None)])
    assert [each.rule for each in rest.overrides] == ["/a", "/a"]
    with pytest.raises(typer.BadParameter, match="unknown period"):
        parse_change("quota=5/fortnight", None)
