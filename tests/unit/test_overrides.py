"""Overrides of keys that end: in the policy file, in the cache, and at the gate."""

from __future__ import annotations

import pytest

from tidegate.admin.models import LimitOverride
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.cli.key_limits import changed_overrides, parse_change, until_time
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check
from tidegate.errors import PolicyError
from tidegate.gate.gate import Gate
from tidegate.policy.toml_reader import parse_policy
from tidegate.policy.toml_writer import policy_text
from tidegate.timestamps import parse_timestamp

KEY = "a-key-of-sixteen-or-more"
END_US = parse_timestamp("2026-12-04T00:00:00Z", "until")
POLICY = f"""
[[tiers]]
name = "pro"
limits = ["10/day"]
[[tiers.rules]]
endpoint = "/a"
limits = ["2/day"]
[[tiers.rules]]
endpoint = "/ip"
subject = "ip"
limits = ["2/day"]
[[api_keys]]
key = "{KEY}"
tier = "pro"
  [[api_keys.overrides]]
  rule = "/a"
  limits = ["3/day"]
  [[api_keys.overrides]]
  rule = "/a"
  limits = ["5/day"]
  until = 2026-12-04T00:00:00Z
  [[api_keys.overrides]]
  limits = ["20/day"]
  until = "2026-12-04"
"""


def test_the_file_reads_and_writes_overrides_that_end() -> None:
    policy = parse_policy(POLICY)
    found = [(each.rule, [limit.text for limit in each.limits], each.until_us) for each in policy.api_keys[0].overrides]
    assert found == [("/a", ["3/day"], None), ("/a", ["5/day"], END_US), ("", ["20/day"], END_US)]
    again = parse_policy(policy_text(policy)).api_keys[0].overrides
    assert sorted(again, key=repr) == sorted(policy.api_keys[0].overrides, key=repr)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('rule = "/a"\n  limits = ["3/day"]', 'rule = "/ip"\n  limits = ["3/day"]', "a key cannot have limits of its own there"),
        ("until = 2026-12-04T00:00:00Z", "", "overridden twice"),
        ("until = 2026-12-04T00:00:00Z", "until = 2026-12-04T00:00:00", "until 2026-12-04T00:00:00 has no offset"),
        ('until = "2026-12-04"', 'until = "tomorrow"', "until 'tomorrow' is not a valid timestamp"),
    ],
)
def test_the_file_refuses(old: str, new: str, reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        parse_policy(POLICY.replace(old, new))


async def test_limits_go_back_by_themselves_at_the_end() -> None:
    now_us = END_US - 1
    cached = CachedCatalog(PolicyCatalog(parse_policy(POLICY)), l1_ttl_s=3600)
    gate = Gate(cached, MemoryCounters(), wall_clock_ns=lambda: now_us * 1000)
    first = await gate.check(Check.of("/a", api_key=KEY))
    assert (first.limit, first.remaining) == (5, 4)
    for _ in range(2):
        await gate.check(Check.of("/a", api_key=KEY))
    loaded = cached.misses
    now_us = END_US
    # The permanent override applies again, and what was consumed counts.
    back = await gate.check(Check.of("/a", api_key=KEY))
    assert (back.allowed, back.limit, back.remaining) == (False, 3, 0)
    usage = await gate.usage(KEY)
    assert [rule.limits[0].text for rule in usage.rules if rule.rule in (None, "/a")] == ["10/day", "3/day"]
    assert cached.misses == loaded  # the end loads nothing


def test_changes_of_the_command_line() -> None:
    assert parse_change("GET /a=1/minute,5/day", None) == (
        "GET /a",
        LimitOverride(rule="GET /a", limits=["1/minute", "5/day"], until=None),
    )
    assert parse_change("descriptor:user=*=default", None) == ("descriptor:user=*", None)
    until = until_time("9000-01-01")
    assert until == "9000-01-01T00:00:00Z"
    raised = parse_change("/a=9/day", until)
    kept = [LimitOverride(rule="/a", limits=["3/day"]), LimitOverride(rule="/b", limits=["1/day"])]
    changed = changed_overrides(["20/day"], kept, [raised])
    assert changed.limits == ["20/day"]
    assert [(each.rule, each.until) for each in changed.overrides] == [("/a", None), ("/b", None), ("/a", until)]
    removed = changed_overrides(["20/day"], changed.overrides, [("/a", None), (None, None)])
    assert (removed.limits, [each.rule for each in removed.overrides]) == (None, ["/b"])
