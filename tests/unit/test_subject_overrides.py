"""Other limits for some subjects of a rule: in the policy file, at the gate, and in what shows them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.catalog.shared_entries import InvalidEntry, require_valid_tier
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check
from tidegate.errors import PolicyError
from tidegate.gate.gate import Gate
from tidegate.gate.subjects import DescriptorCheck
from tidegate.policy import subject_overrides
from tidegate.policy.matching import CompiledTier
from tidegate.policy.model import Policy, Tier
from tidegate.policy.overrides import SubjectOverride
from tidegate.policy.rules import Rule
from tidegate.policy.subject_overrides import override_id, subject_override
from tidegate.policy.toml_reader import parse_policy
from tidegate.policy.toml_writer import policy_text
from tidegate.timestamps import parse_timestamp

KEY = "a-key-of-sixteen-or-more"
POLICY = f"""
[anonymous]
tier = "public"
[[api_keys]]
key = "{KEY}"
tier = "public"
  [[api_keys.overrides]]
  rule = "/key"
  limits = ["9/day"]
[[tiers]]
name = "public"
quotas = ["1000000/month"]
  [[tiers.rules]]
  name = "users"
  endpoint = "/*"
  subject = "user"
  limits = ["2/day"]
  [[tiers.rules]]
  name = "members"
  endpoint = "/org"
  subject = ["user", "org"]
  limits = ["2/day"]
  [[tiers.rules]]
  endpoint = "/key"
  limits = ["2/day"]
  [[tiers.rules]]
  name = "pay"
  descriptor = {{ service = "pay" }}
  subject = "user"
  limits = ["2/day"]
  [[tiers.overrides]]
  rule = "users"
  subject = {{ user = "4*" }}
  limits = ["5/day"]
  [[tiers.overrides]]
  rule = "users"
  subject = {{ user = "42" }}
  limits = ["7/day", "100/month"]
  [[tiers.overrides]]
  rule = "members"
  subject = {{ org = "acme" }}
  limits = ["3/day"]
  [[tiers.overrides]]
  rule = "members"
  subject = {{ org = "acme", user = "root*" }}
  limits = ["4/day"]
  [[tiers.overrides]]
  rule = "pay"
  subject = {{ user = "42" }}
  limits = ["6/day"]
  [[tiers.overrides]]
  rule = "users"
  subject = {{ user = "past" }}
  limits = ["8/day"]
  until = 2026-01-01
  [[tiers.overrides]]
  rule = "users"
  subject = {{ user = "future" }}
  limits = ["8/day"]
  until = 2999-01-01T00:00:00Z
"""


def gate_of(policy: str | Policy = POLICY, store: MemoryCounters | None = None) -> Gate:
    read = parse_policy(policy) if isinstance(policy, str) else policy
    return Gate(CachedCatalog(PolicyCatalog(read)), MemoryCounters() if store is None else store)


async def left(gate: Gate, path: str = "/", cost: int = 0, api_key: str | None = None, **attributes: str) -> int | None:
    check = Check.of(path, "GET", api_key, ip="192.0.2.1", cost=cost, attributes=attributes)
    return (await gate.check(check)).remaining


def test_the_file_reads_and_writes_them() -> None:
    policy = parse_policy(POLICY)
    found = policy.tiers[0].overrides
    assert found[0] == SubjectOverride("users", (("user", "4*"),), found[0].limits)
    assert [limit.text for limit in found[1].limits] == ["7/day", "100/month"]
    assert found[3].subject == (("org", "acme"), ("user", "root*"))
    assert found[5].until_us == parse_timestamp("2026-01-01T00:00:00Z", "until")
    assert parse_policy(policy_text(policy)) == policy


async def test_which_limits_a_subject_has() -> None:
    gate = gate_of()
    assert await left(gate, user="1") == 2
    # The exact subject comes before a pattern, whatever the order in the file.
    assert (await left(gate, user="42"), await left(gate, user="43"), await left(gate, user="142")) == (7, 5, 2)
    # Values that are left open; more attributes come first.
    assert await left(gate, "/org", user="1", org="acme") == 3
    assert await left(gate, "/org", user="root1", org="acme") == 4
    assert await left(gate, "/org", user="root1", org="other") == 2
    # Counted by the address, for lack of an attribute that the rule counts.
    assert await left(gate, "/org", org="acme") == 2
    assert await left(gate, user="past") == 2
    assert await left(gate, user="future") == 8
    # A caller whose key has overrides of its own.
    assert (await left(gate, "/key", api_key=KEY), await left(gate, api_key=KEY, user="42")) == (9, 7)


async def test_an_override_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = gate_of()
    assert await left(gate, cost=1, user="future") == 7
    end_us = parse_timestamp("2999-01-01T00:00:00Z", "until")
    monkeypatch.setattr(subject_overrides, "now_us", lambda: end_us - 1)
    assert await left(gate, user="future") == 7
    monkeypatch.setattr(subject_overrides, "now_us", lambda: end_us)
    assert await left(gate, user="future") == 1, "what was consumed is kept"


async def test_usage_explanations_descriptors_batches_and_resets_know_them() -> None:
    gate = gate_of()
    check = Check.of("/", "GET", None, ip="192.0.2.1", attributes={"user": "42"})
    assert [each.remaining for each in await gate.check_many([check, check])] == [6, 5]  # type: ignore[union-attr]
    usage = await gate.usage(ip="192.0.2.1", attributes={"user": "42"})
    used = next(each for each in usage.rules if each.rule == "users")
    assert ([limit.text for limit in used.limits], used.decision.remaining) == (["7/day", "100/month"], 5)
    plans = await gate.plan_many([DescriptorCheck({"service": "pay", "user": "42"}, None, 1)])
    assert plans[0] is not None
    assert [each.outcome.remaining for each in await gate.decide(plans)] == [5]  # type: ignore[list-item, union-attr]
    assert await gate.reset(subject="user=42") == 2
    assert await left(gate, user="42") == 7


@given(
    st.dictionaries(st.sampled_from(["user", "org"]), st.text(min_size=1, max_size=256), min_size=2, max_size=2),
    st.integers(1, 5),
    st.integers(1, 9),
)
async def test_a_counter_does_not_depend_on_its_override(subject: dict[str, str], used: int, amount: int) -> None:
    store = MemoryCounters()
    rule = Rule.make("/*", ["5/day"], subject=["org", "user"], name="members")
    tier = Tier.make("public", [rule])
    before = gate_of(Policy((tier,), anonymous_tier="public"), store)
    assert await left(before, cost=used, **subject) == 5 - used
    if not all(value.isprintable() for value in subject.values()):
        with pytest.raises(PolicyError, match="printable"):
            subject_override(rule, subject, ["9/day"])
        return
    override = subject_override(rule, subject, [f"{amount}/day"])
    changed = Tier(tier.name, tier.rules, overrides=(override,))
    after = gate_of(Policy((changed,), anonymous_tier="public"), store)
    assert await left(after, **subject) == max(amount - used, 0)
    assert await left(before, **subject) == 5 - used


def test_of_several_patterns_the_most_specific_one_applies_in_any_order() -> None:
    rule = Rule.make("/*", ["1/day"], subject=["org", "user"], name="members")
    written = [
        ({"org": "a*"}, "2/day"),
        ({"org": "acm*"}, "3/day"),
        ({"org": "acme"}, "4/day"),
        ({"org": "a*", "user": "*"}, "5/day"),
        ({"org": "acme", "user": "4*"}, "6/day"),
    ]
    made = [subject_override(rule, subject, [limit]) for subject, limit in written]
    for count, expected in ((1, "2/day"), (2, "3/day"), (3, "4/day"), (4, "5/day"), (5, "6/day")):
        for overrides in (made[:count], made[:count][::-1]):
            compiled = CompiledTier(Tier("t", (rule,), overrides=tuple(overrides))).rules[0]
            found = compiled.limits_of("a:org=acme&user=42", {"org": "acme", "user": "42"})
            assert [limit.text for limit in found.limits] == [expected]
            assert found is compiled.limits_of("a:org=acme&user=42", {"org": "acme", "user": "42"}), "stores remember it"


def test_an_override_that_no_longer_fits_its_rule_has_no_effect() -> None:
    rule = Rule.make("/*", ["5/day"], subject="user", name="users")
    kept = subject_override(rule, {"user": "42"}, ["100000000/day"])
    tier = Tier("t", (rule,), overrides=(kept,))
    assert CompiledTier(tier).rules[0].overrides is not None
    for changed in (
        Rule.make("/*", ["5/day"], subject="org", name="users"),
        Rule.make("/*", ["5/day"], name="users"),
        Rule.make("/*", ["5/day"], subject="user", algorithm="sliding_log", name="users"),
        Rule.make("/*", ["5/day"], subject="user", name="renamed"),
        Rule.make("/*", [], subject="user", name="users", action="allow"),
    ):
        assert CompiledTier(Tier("t", (changed,), overrides=(kept,))).rules[0].overrides is None


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('rule = "users"\n  subject = { user = "4*" }', 'rule = "user"\n  subject = { user = "4*" }', "did you mean 'users'"),
        ('rule = "users"\n  subject = { user = "4*" }', 'rule = "/key"\n  subject = { user = "4*" }', "counts by api_key"),
        ('{ user = "4*" }', '{ org = "4*" }', "subject names 'org', which rule 'users' does not count by"),
        ('{ user = "4*" }', "{}", "not a table with a value"),
        ('{ user = "4*" }', '"user=4*"', "not a table with a value"),
        ('{ user = "4*" }', "{ user = 4 }", "printable characters, in quotes"),
        ('{ user = "4*" }', '{ user = "42" }', "two overrides for the subject 'user=42'"),
        ('limits = ["5/day"]', "limits = []", "limits"),
        ('limits = ["5/day"]', 'limits = ["often"]', "often"),
        ('limits = ["5/day"]', "", "'limits' is missing"),
        ('limits = ["5/day"]', 'limits = ["5/day"]\n  quotas = ["1/month"]', "unknown field 'quotas'"),
        ("until = 2026-01-01", 'until = "soon"', "not a valid timestamp"),
    ],
)
def test_what_is_not_valid_names_its_line(old: str, new: str, reason: str) -> None:
    assert old in POLICY
    with pytest.raises(PolicyError) as raised:
        parse_policy(POLICY.replace(old, new, 1), "p.toml")
    assert reason in str(raised.value)
    line = POLICY[: POLICY.index(old)].count("\n") + 1
    assert raised.value.line is not None
    assert line - 3 <= raised.value.line <= line + 12


def test_a_tier_has_so_many_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    many = POLICY + "".join(
        f'[[tiers.overrides]]\nrule = "users"\nsubject = {{ user = "x{n}*" }}\nlimits = ["1/day"]\n' for n in range(100)
    )
    with pytest.raises(PolicyError, match=r"overrides with '\*': at most 100"):
        parse_policy(many)
    monkeypatch.setattr(subject_overrides, "MAX_OVERRIDES", 6)
    with pytest.raises(PolicyError, match="7 overrides for subjects: at most 6"):
        parse_policy(POLICY)


def test_the_shared_cache_refuses_what_no_database_could_contain() -> None:
    tier = parse_policy(POLICY).tiers[0]
    require_valid_tier(tier, "public")
    first = tier.overrides[0]
    for wrong in (
        (first, first),
        (SubjectOverride("users", (), first.limits),),
        (SubjectOverride("users", first.subject, ()),),
        (SubjectOverride("users", first.subject, first.limits, 1 << 63),),
    ):
        with pytest.raises(InvalidEntry):
            require_valid_tier(Tier("public", overrides=wrong), "public")


def test_ids_differ_where_rule_or_subject_do() -> None:
    ids = [
        override_id("a", {"b": "c"}),
        override_id("a", {"b": "c*"}),
        override_id("b", {"b": "c"}),
        override_id("a", {"b": "c", "d": "e"}),
        override_id("a", {"b": "c&d=e"}),
    ]
    assert len(set(ids)) == len(ids)
    assert override_id("a", {"d": "e", "b": "c"}) == ids[3]
