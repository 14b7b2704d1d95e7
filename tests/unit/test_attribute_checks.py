"""Checks with attributes: which tier answers, whom a rule counts, and what is refused without a charge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.conftest import Clock
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.redis.keyspace import hash_tag
from tidegate.decision import Check, Decision
from tidegate.errors import BadRequest, InvalidApiKey, MissingApiKey, TidegateError
from tidegate.gate.gate import Gate
from tidegate.gate.subjects import DescriptorCheck
from tidegate.observation import Observation
from tidegate.policy.matching import attribute_subject, subject_of
from tidegate.policy.rules import Subject
from tidegate.policy.toml_reader import parse_policy

KEY = "demo-free-key-0001"
POLICY = f"""
[callers]
tier_from = "plan"
default_tier = "public"
[anonymous]
tier = "nobody"
[[tiers]]
name = "nobody"
[[tiers]]
name = "public"
  [[tiers.rules]]
  endpoint = "/*"
  subject = "user"
  limits = ["2/day"]
[[tiers]]
name = "pro"
  [[tiers.rules]]
  endpoint = "/api/*"
  subject = ["user", "org"]
  on_missing = "deny"
  limits = ["2/day"]
  [[tiers.rules]]
  endpoint = "/skip"
  subject = "user"
  on_missing = "skip"
  limits = ["1/day"]
  [[tiers.rules]]
  endpoint = "/pair"
  subject = ["user", "api_key"]
  limits = ["1/day"]
  [[tiers.rules]]
  match = {{ service = "pay" }}
  subject = ["user"]
  limits = ["1/day"]
  [[tiers.rules]]
  endpoint = "/*"
  subject = "user"
  mode = "shadow"
  on_missing = "deny"
  limits = ["1/day"]
  name = "watching"
[[tiers]]
name = "limited"
limits = ["3/day"]
  [[tiers.rules]]
  endpoint = "/*"
  subject = "user"
  limits = ["2/day"]
[[api_keys]]
key = "{KEY}"
tier = "pro"
"""


class Later(MemoryCounters):
    """A store that is awaited, as one on Redis is."""

    immediate = False

    async def charge(self, charges: Any) -> Any:
        return await super().charge(charges)


@pytest.fixture(params=["at once", "later"])
def gate(request: pytest.FixtureRequest, clock: Clock, seen: list[Observation]) -> Gate:
    store = (MemoryCounters if request.param == "at once" else Later)(clock=clock)
    return Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), store, seen.append)


async def ask(gate: Gate, path: str = "/x", key: str | None = None, ip: str | None = "203.0.113.7", **fields: Any) -> Decision:
    tier = fields.pop("tier", None)
    return await gate.check(Check.of(path, "GET", key, ip, attributes=fields, tier=tier))


async def test_which_tier_answers(gate: Gate) -> None:
    for _ in range(2):  # loaded, then cached
        assert (await ask(gate, "/none", KEY)).tier == "pro", "an API key has its tier"
        assert (await ask(gate, "/none", KEY, plan="limited")).tier == "pro", "whatever its attributes say"
        assert (await ask(gate, "/none", tier="limited")).tier == "limited"
        assert (await ask(gate, "/none", tier="pro", plan="limited")).tier == "pro", "a tier that is named goes before attributes"
        assert (await ask(gate, "/none", plan="limited")).tier == "limited"
        assert (await ask(gate, "/none", plan="unheard-of")).tier == "public"
        assert (await ask(gate, "/none", user="1")).tier == "public"
        assert (await ask(gate, "/none")).tier == "public"
        with pytest.raises(BadRequest, match="there is no tier 'gold'"):
            await ask(gate, "/none", tier="gold")
        with pytest.raises(InvalidApiKey):
            await ask(gate, "/none", "demo-unknown-key-01", plan="pro")
    with pytest.raises(BadRequest, match="tier and api_key came together"):
        await ask(gate, "/none", KEY, tier="pro")


@pytest.mark.parametrize(
    ("tables", "tier"),
    [
        ('[callers]\ntier_from = "plan"\n[anonymous]\ntier = "nobody"\n', "nobody"),
        ('[anonymous]\ntier = "nobody"\n', "nobody"),
        ('[callers]\ntier_from = "plan"\n', None),
        ("", None),
    ],
)
async def test_callers_whom_nothing_gives_a_tier(tables: str, tier: str | None, clock: Clock) -> None:
    text = tables + POLICY[POLICY.index("[[tiers]]") :]
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(text))), MemoryCounters(clock=clock))
    for _ in range(2):
        if tier is None:
            with pytest.raises(MissingApiKey):
                await ask(gate, plan="none")
        else:
            assert (await ask(gate, plan="none")).tier == tier
    assert (await ask(gate, "/none", tier="pro")).tier == "pro"


async def test_names_of_no_tier_cost_no_look_up(clock: Clock) -> None:
    class Counting(PolicyCatalog):
        looked_up = 0

        async def tier(self, name: str, min_version: int = 0) -> Any:
            self.looked_up += 1
            return await super().tier(name, min_version)

        async def tier_names(self) -> list[str]:
            self.looked_up += 1
            return await super().tier_names()

    catalog = Counting(parse_policy(POLICY))
    gate = Gate(CachedCatalog(catalog), MemoryCounters(clock=clock))
    for number in range(100):
        assert (await ask(gate, plan=f"made-up-{number}")).tier == "public"
        with pytest.raises(BadRequest):
            await ask(gate, tier=f"made-up-{number}")
    assert catalog.looked_up == 2, "the names, once, and the default tier"


async def test_a_tier_that_is_made_or_dropped_later(clock: Clock) -> None:
    catalog = PolicyCatalog(parse_policy(POLICY))
    cached = CachedCatalog(catalog)
    gate = Gate(cached, MemoryCounters(clock=clock))
    assert (await ask(gate, "/none", plan="late")).tier == "public"
    catalog.replace(parse_policy(POLICY + '[[tiers]]\nname = "late"\n'))
    cached.touched(2, [("tier", "late")])
    assert (await ask(gate, "/none", plan="late")).tier == "late"
    catalog.replace(parse_policy(POLICY))
    cached.touched(3, [("tier", "late")])
    assert (await ask(gate, "/none", plan="late")).tier == "public"
    # The tables themselves.
    catalog.replace(parse_policy(POLICY.replace('default_tier = "public"', 'default_tier = "limited"')))
    cached.touched(4, [("anonymous", "")])
    assert (await ask(gate, "/none", plan="late")).tier == "limited"


async def test_each_value_is_counted_apart(gate: Gate, seen: list[Observation]) -> None:
    assert [(await ask(gate, user="1")).allowed for _ in range(3)] == [True, True, False]
    assert seen[-1].subject == "a:user=1"
    assert (await ask(gate, user="2")).remaining == 1
    assert (await ask(gate, ip="198.51.100.1", user="1")).allowed is False, "wherever from"
    assert (await ask(gate)).remaining == 1
    assert seen[-1].subject == "i:203.0.113.7", "without the attribute: by ip"
    with pytest.raises(BadRequest, match="attribute 'user' is missing, and the rule '/\\*' counts such checks by ip"):
        await ask(gate, ip=None, org="1")


async def test_each_combination_is_counted_apart(gate: Gate, seen: list[Observation]) -> None:
    assert [(await ask(gate, "/api/x", KEY, org="a", user="1")).allowed for _ in range(3)] == [True, True, False]
    assert seen[-1].subject == "a:org=a&user=1"
    assert (await ask(gate, "/api/x", KEY, org="b", user="1")).remaining == 1
    assert (await ask(gate, "/api/x", KEY, org="a", user="2")).remaining == 1
    before = len(seen)
    for fields in ({"org": "a"}, {}, {"org": "a", "user": ""}):
        with pytest.raises(BadRequest, match=r"attribute '(user|org)' is missing: the rule '/api/\*' counts by it"):
            await ask(gate, "/api/x", KEY, **fields)
    assert [each.error for each in seen[before:]] == ["BAD_REQUEST"] * 3
    assert (await ask(gate, "/api/x", KEY, org="a", user="2", plan="any")).remaining == 0, "nothing was charged meanwhile"


async def test_a_key_and_an_attribute_together(gate: Gate, seen: list[Observation]) -> None:
    assert (await ask(gate, "/pair", KEY, user="1")).allowed
    assert not (await ask(gate, "/pair", KEY, user="1")).allowed
    assert (await ask(gate, "/pair", user="1", tier="pro")).allowed
    assert seen[-1].subject == "a:ip=203.0.113.7&user=1", "without a key its address counts"
    with pytest.raises(BadRequest, match="ip is needed"):
        await ask(gate, "/pair", ip=None, user="1", tier="pro")


async def test_a_rule_that_is_skipped_leaves_the_check_to_others(gate: Gate) -> None:
    assert (await ask(gate, "/skip", tier="pro")).rule is None
    assert (await ask(gate, "/skip", tier="pro", user="1")).rule == "/skip"
    assert not (await ask(gate, "/skip", tier="pro", user="1")).allowed


async def test_shadow_rules_count_attributes_and_never_refuse(gate: Gate, seen: list[Observation]) -> None:
    for _ in range(2):
        assert (await ask(gate, "/other", tier="pro", user="1")).allowed
    assert seen[-1].shadow_denied == ("watching",)
    assert (await ask(gate, "/other", tier="pro", user="2")).allowed
    assert seen[-1].shadow_denied == ()
    assert (await ask(gate, "/other", tier="pro", ip=None)).allowed, "it cannot be counted, and only watches"


async def test_limits_of_the_tier_are_charged_beside(gate: Gate) -> None:
    for user in ("1", "2", "3"):
        assert (await ask(gate, tier="limited", user=user)).allowed
    fourth = await ask(gate, tier="limited", user="4")
    assert (fourth.allowed, fourth.limit) == (False, 3), "the tier's own limits count the address"
    with pytest.raises(BadRequest, match="ip is needed"):
        await ask(gate, tier="limited", user="4", ip=None)


async def test_many_at_once(gate: Gate) -> None:
    checks = [
        Check.of("/x", ip="203.0.113.7", attributes=[("user", "1")]),
        Check.of("/x", ip="203.0.113.7", attributes={"user": "1"}),
        Check.of("/x", ip="203.0.113.7", attributes={"user": "1"}),
        Check.of("/api/x", ip="203.0.113.7", tier="pro"),
        Check.of("/x", tier="gold"),
        Check.of("/none", ip="203.0.113.7", attributes={"plan": "limited"}),
        Check.of("/none", api_key=KEY),
    ]
    answers = await gate.check_many(checks)
    told = [each.message if isinstance(each, TidegateError) else (each.tier, each.allowed) for each in answers]
    assert told[:3] == [("public", True), ("public", True), ("public", False)]
    assert "attribute 'org' is missing" in str(told[3])
    assert "there is no tier 'gold'" in str(told[4])
    assert told[5:] == [("limited", True), ("pro", True)]


async def test_descriptors_are_attributes(gate: Gate) -> None:
    entries = {"service": "pay", "user": "1", "plan": "pro"}
    for allowed in (True, False):
        (plan,) = await gate.plan_many([DescriptorCheck(entries, None, 1)])
        assert plan is not None
        (settled,) = await gate.decide([plan])
        assert isinstance(settled.outcome, Decision)
        assert (settled.outcome.tier, settled.outcome.allowed) == ("pro", allowed)


@pytest.mark.parametrize(
    "given_",
    [
        {"user": "x" * 257},
        {"Bad": "x"},
        {f"a{number}": "x" for number in range(17)},
        [("user", "1"), ("user", "2")],
        [1],
        [("a",)],
    ],
)
def test_attributes_that_are_refused(given_: Any) -> None:
    with pytest.raises(BadRequest):
        Check.of("/x", attributes=given_)


_values = st.text(max_size=256) | st.sampled_from(
    [
        "1",
        "1&user=2",
        "1&",
        "=",
        "%",
        "%26",
        "a:user=1",
        "org=1",
        "\0",
        ":",
        "/",
        "😀",
        "x" * 256,
        "é" * 256,
        "203.0.113.7",
        "*",
        "#",
    ]
)
_attributes = st.dictionaries(st.sampled_from(["user", "org", "plan"]), _values.filter(bool), min_size=1)


@given(st.lists(_attributes, min_size=2, max_size=5))
@example([{"org": "1", "user": "2"}, {"org": "1&user=2"}, {"user": "2"}, {"org": "1", "plan": "user=2"}])
@example([{"user": "x" * 256}, {"user": "x" * 255}, {"org": "x" * 256}])
def test_distinct_attributes_never_share_a_counter(given_: list[Mapping[str, str]]) -> None:
    """Of one rule the parts are always the same; here even different ones stay apart."""
    subjects = [attribute_subject(sorted(each), each, "", None) or "" for each in given_]
    others = [subject_of(Subject.API_KEY, "k:" + "0" * 24, None, "t"), subject_of(Subject.IP, "", "203.0.113.7", "t"), "t:user=1"]
    distinct = {tuple(sorted(each.items())) for each in given_}
    assert len(set(subjects)) == len(distinct)
    assert len({hash_tag(each) for each in subjects}) == len(distinct)
    assert not set(subjects) & set(others)
