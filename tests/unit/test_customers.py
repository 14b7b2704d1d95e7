"""Customers at the gate: their keys and attribute values count as one, with tier, overrides and anchor of their own."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.changes import CUSTOMER, CUSTOMER_VALUE, KEY, Changes
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check
from tidegate.errors import BadRequest, PolicyError
from tidegate.gate.gate import Gate
from tidegate.policy.customers import Customer, value_digest
from tidegate.policy.key_format import hash_api_key
from tidegate.policy.model import ApiKey, Policy
from tidegate.policy.periods import PeriodAnchor
from tidegate.policy.toml_reader import parse_policy
from tidegate.policy.toml_writer import policy_text
from tidegate.timestamps import parse_timestamp

END_US = parse_timestamp("2026-12-04T00:00:00Z", "until")
FIRST, SECOND, OTHER = ("first-key-of-acme-", "second-key-of-acme", "key-of-somebody---")
POLICY = f"""
[[tiers]]
name = "pro"
[[tiers.rules]]
endpoint = "/all"
subject = "customer"
limits = ["10/day"]
[[tiers.rules]]
endpoint = "/each"
limits = ["3/day"]
[[tiers]]
name = "free"
[[tiers.rules]]
endpoint = "/*"
subject = "customer"
limits = ["1/day"]
[[customers]]
name = "acme"
external_id = "cus_42"
tier = "pro"
anchor = 2026-01-31
timezone = "Europe/Berlin"
metadata = {{ plan = "2026-b", seats = 5 }}
match = {{ org = ["acme", "acme-eu"] }}
  [[customers.overrides]]
  rule = "/all"
  limits = ["15/day"]
  until = 2026-12-04
[[api_keys]]
key = "{FIRST}"
customer = "acme"
[[api_keys]]
key = "{SECOND}"
customer = "acme"
  [[api_keys.overrides]]
  rule = "/each"
  limits = ["4/day"]
[[api_keys]]
key = "{OTHER}"
tier = "pro"
[callers]
default_tier = "free"
"""


def _gate(policy: Policy, now_us: int = END_US) -> Gate:
    return Gate(CachedCatalog(PolicyCatalog(policy)), MemoryCounters(), wall_clock_ns=lambda: now_us * 1000)


def test_the_file_reads_and_writes_customers() -> None:
    policy = parse_policy(POLICY)
    (customer,) = policy.customers
    assert (customer.external_id, customer.tier, customer.metadata) == ("cus_42", "pro", '{"plan":"2026-b","seats":5}')
    assert customer.period_anchor == PeriodAnchor(1, 31, 5, "Europe/Berlin")
    assert [(key.customer, key.tier, key.inherits_tier) for key in policy.api_keys[1:]] == [
        ("acme", "pro", True),
        ("", "pro", False),
    ]
    assert parse_policy(policy_text(policy)) == policy


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('timezone = "Europe/Berlin"', 'timezone = "Mars/Olympus"', "Mars/Olympus"),
        ("anchor = 2026-01-31", 'anchor = "2026-02-30"', "2026-02-30"),
        ('metadata = { plan = "2026-b", seats = 5 }', "metadata = { at = 2026-01-01 }", "is not a JSON value"),
        ('metadata = { plan = "2026-b", seats = 5 }', f'metadata = {{ text = "{"x" * 4096}" }}', "at most 4096"),
        ('match = { org = ["acme", "acme-eu"] }', 'match = { Org = "acme" }', "lower-case"),
        ('key = "second-key-of-acme"\ncustomer = "acme"', 'key = "second-key-of-acme"\ncustomer = "amce"', "did you mean 'acme'"),
        ('rule = "/all"', 'rule = "/none"', "has no rule '/none'"),
        ("[callers]", '[[customers]]\nname = "b"\nmatch = { org = "acme" }\n[callers]', "same match.org 'acme'"),
        ("[callers]", '[[customers]]\nname = "b"\nexternal_id = "cus_42"\n[callers]', "same external_id"),
        ("[callers]", '[[customers]]\nname = "acme"\n[callers]', "same name"),
        ('subject = "customer"', 'subject = ["customer", "org"]', "customers alone"),
    ],
)
def test_the_file_refuses(old: str, new: str, reason: str) -> None:
    assert old in POLICY
    with pytest.raises(PolicyError, match=reason):
        parse_policy(POLICY.replace(old, new, 1))


async def test_keys_and_attribute_values_of_a_customer_share_its_counter() -> None:
    gate = _gate(parse_policy(POLICY))
    first = await gate.check(Check.of("/all", api_key=FIRST))
    second = await gate.check(Check.of("/all", api_key=SECOND))
    by_value = await gate.check(Check.of("/all", attributes={"org": "acme-eu"}))
    assert [each.remaining for each in (first, second, by_value)] == [9, 8, 7]
    assert [each.customer for each in (first, second, by_value)] == ["acme"] * 3
    assert first.caller is not None
    assert first.caller.key_id == hash_api_key(FIRST)[:24]
    alone = await gate.check(Check.of("/all", api_key=OTHER))
    assert (alone.remaining, alone.customer) == (9, None)
    nobody = await gate.check(Check.of("/all", attributes={"org": "else"}, ip="192.0.2.1"))
    assert (nobody.tier, nobody.customer, nobody.remaining) == ("free", None, 0)
    # A key's own override, and no override of the customer, holds for a rule that counts keys.
    assert [(await gate.check(Check.of("/each", api_key=key))).limit for key in (FIRST, SECOND)] == [3, 4]
    usage = await gate.usage(FIRST)
    assert [(rule.subject, rule.decision.remaining) for rule in usage.rules if rule.rule == "/all"] == [("customer", 7)]


async def test_several_checks_of_one_request_find_customers() -> None:
    gate = _gate(parse_policy(POLICY))
    checks = [Check.of("/all", api_key=FIRST), Check.of("/all", attributes={"org": "acme"}), Check.of("/all", api_key=SECOND)]
    decided = await gate.check_many(checks)
    assert [(each.remaining, each.customer) for each in decided if not isinstance(each, Exception)] == [
        (9, "acme"),
        (8, "acme"),
        (7, "acme"),
    ]


async def test_an_override_of_a_customer_ends_for_all_of_its_callers() -> None:
    now_us = END_US - 1
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), MemoryCounters(), wall_clock_ns=lambda: now_us * 1000)
    for check in (
        Check.of("/all", api_key=FIRST),
        Check.of("/all", api_key=SECOND),
        Check.of("/all", attributes={"org": "acme"}),
    ):
        assert (await gate.check(check)).limit == 15
    now_us = END_US
    for check in (
        Check.of("/all", api_key=SECOND),
        Check.of("/all", attributes={"org": "acme"}),
        Check.of("/all", api_key=FIRST),
    ):
        assert (await gate.check(check)).limit == 10


async def test_a_change_of_a_customer_reaches_its_callers() -> None:
    policy = parse_policy(POLICY)
    catalog = PolicyCatalog(policy)
    cached = CachedCatalog(catalog)
    gate = Gate(cached, MemoryCounters(), wall_clock_ns=lambda: END_US * 1000)
    checks = [Check.of("/all", api_key=FIRST), Check.of("/all", attributes={"org": "acme"}, ip="192.0.2.1")]
    assert [(await gate.check(check)).tier for check in checks] == ["pro", "pro"]
    moved = msgspec.structs.replace(policy.customers[0], tier="free", overrides=(), match=(("org", ("acme-eu",)),))
    catalog.replace(msgspec.structs.replace(policy, customers=(moved,)))
    items = ((CUSTOMER, "acme"), (CUSTOMER_VALUE, value_digest("org", "acme")))
    cached.changed(Changes(2, 0, tuple((2, item) for item in items), (0, 1, 2)))
    found = [await gate.check(check) for check in checks]
    assert [(each.tier, each.customer) for each in found] == [("free", "acme"), ("free", None)]


@given(st.lists(st.sampled_from(["first", "second", "value", "rotate"]), max_size=30), st.booleans())
async def test_rotation_never_resets_a_counter(steps: list[str], owned: bool) -> None:
    """With a customer all keys and values share one counter; without one a key shares it with what it was rotated to."""
    policy = parse_policy(POLICY)
    catalog = PolicyCatalog(policy)
    cached = CachedCatalog(catalog)
    gate = Gate(cached, MemoryCounters(), wall_clock_ns=lambda: END_US * 1000)
    customer = "acme" if owned else ""
    keys = {"first": "first-0", "second": "second-0"}
    records = {name: ApiKey(hash_api_key(key), "pro", customer=customer) for name, key in keys.items()}
    used = dict.fromkeys(("first", "second", "all"), 0)

    def publish() -> None:
        catalog.replace(msgspec.structs.replace(policy, api_keys=tuple(records.values())))

    publish()
    for number, step in enumerate(steps, start=1):
        if step == "rotate":
            old = records["first"]
            keys["first"] = f"first-{number}"
            records["first"] = ApiKey(hash_api_key(keys["first"]), "pro", customer=customer, counts_as=old.owner)
            publish()
            cached.touched(number, [(KEY, old.sha256), (KEY, records["first"].sha256)])
            continue
        if step == "value":
            check, counted = Check.of("/all", attributes={"org": "acme"}), "all"
        else:
            check, counted = Check.of("/all", api_key=keys[step]), "all" if owned else step
        decision = await gate.check(check)
        assert decision.allowed == (used[counted] < 10)
        used[counted] += decision.allowed
        assert decision.remaining == 10 - used[counted]


def test_metadata_and_match_are_bounded() -> None:
    with pytest.raises(PolicyError, match="more than 1000 values"):
        Customer.make("a", match={"org": [str(number) for number in range(1001)]})
    deep: dict[str, object] = {}
    for _ in range(40):
        deep = {"a": deep}
    with pytest.raises(PolicyError, match="nested too deeply"):
        Customer.make("a", metadata=deep)


QUOTAS = f"""
[[tiers]]
name = "pro"
quotas = ["2/month"]
[[customers]]
name = "acme"
tier = "pro"
anchor = "2026-01-31"
  [[customers.overrides]]
  quotas = ["4/month"]
  until = 2026-12-04
[[api_keys]]
key = "{FIRST}"
customer = "acme"
[[api_keys]]
key = "{SECOND}"
customer = "acme"
[[api_keys]]
key = "{OTHER}"
tier = "pro"
  [[api_keys.overrides]]
  quotas = ["3/month"]
"""


async def test_quotas_count_the_customer_and_can_be_raised_until_a_time() -> None:
    now_us = END_US - 1
    policy = parse_policy(QUOTAS)
    assert parse_policy(policy_text(policy)) == policy
    gate = Gate(CachedCatalog(PolicyCatalog(policy)), MemoryCounters(), wall_clock_ns=lambda: now_us * 1000)
    allowed = [(await gate.check(Check.of("/a", api_key=key))).allowed for key in (FIRST, SECOND, FIRST)]
    assert allowed == [True, True, True]
    assert [(await gate.check(Check.of("/a", api_key=OTHER))).allowed for _ in range(4)] == [True, True, True, False]
    now_us = END_US
    assert not (await gate.check(Check.of("/a", api_key=SECOND))).allowed


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            'tier = "pro"\n  [[api_keys.overrides]]',
            'customer = "acme"\n  [[api_keys.overrides]]',
            "override them for the customer",
        ),
        ('quotas = ["3/month"]', 'quotas = ["3/month", "4/month"]', "for the same period"),
    ],
)
def test_the_file_refuses_overrides_of_quotas(old: str, new: str, reason: str) -> None:
    assert old in QUOTAS
    with pytest.raises(PolicyError, match=reason):
        parse_policy(QUOTAS.replace(old, new))


SOLD = f"""
[[tiers]]
name = "pro"
quotas = ["20/month"]
limits = ["15/day"]
[[tiers.rules]]
endpoint = "/all"
subject = "customer"
limits = ["10/day"]
[[tiers.rules]]
endpoint = "/each"
limits = ["12/day"]
quotas = ["9/year"]
[[tiers]]
name = "free"
[[tiers.rules]]
endpoint = "/all"
subject = "customer"
limits = ["1/day"]
quotas = ["8/month"]
[[customers]]
name = "acme"
tier = "pro"
[[customers]]
name = "none"
[[api_keys]]
key = "{FIRST}"
customer = "acme"
[[api_keys]]
key = "{OTHER}"
tier = "free"
"""


async def test_a_reset_of_a_key_keeps_what_its_customer_used_and_one_of_the_customer_what_the_key_used() -> None:
    gate = _gate(parse_policy(SOLD))

    async def left() -> dict[tuple[str | None, str], int | None]:
        usage = await gate.usage(FIRST)
        return {
            (each.rule, str(limit)): window.remaining
            for each in usage.rules
            for limit, window in zip(each.limits, each.windows, strict=True)
        }

    full = {
        (None, "15/day"): 15,
        (None, "20/month"): 20,
        ("/all", "10/day"): 10,
        ("/each", "12/day"): 12,
        ("/each", "9/year"): 9,
    }
    assert await left() == full
    for path in ("/all", "/each"):
        assert (await gate.check(Check.of(path, api_key=FIRST, cost=4))).allowed
    used = {place: amount - (8 if place[0] is None else 4) for place, amount in full.items()}
    assert await left() == used
    by_key = {(None, "15/day"), ("/each", "12/day")}
    assert await gate.reset(FIRST) == 2
    assert await left() == {place: full[place] if place in by_key else used[place] for place in full}
    assert await gate.reset(customer="acme") == 5, "the quotas of tiers and of two rules, and two rules by customer"
    assert await left() == full
    # A key without a customer is counted by the rules by customer itself.
    assert (await gate.check(Check.of("/all", api_key=OTHER))).allowed
    assert not (await gate.check(Check.of("/all", api_key=OTHER))).allowed
    assert await gate.reset(OTHER) == 2
    assert (await gate.check(Check.of("/all", api_key=OTHER))).remaining == 0
    with pytest.raises(BadRequest, match="there is no customer 'nobody'"):
        await gate.reset(customer="nobody")
