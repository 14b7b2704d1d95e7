"""Requests in time order → what a policy would have done."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cases.logs import AT
from tidegate.errors import SettingsError
from tidegate.policy.key_format import hash_api_key
from tidegate.policy.model import Policy
from tidegate.policy.toml_reader import parse_policy
from tidegate.timestamps import format_timestamp, parse_timestamp
from tidegate.tools.simulate.log_formats import Request
from tidegate.tools.simulate.replay import Replay
from tidegate.tools.simulate.tallies import MAX_SERIES, Series

MINUTE_US = 60_000_000

POLICY = """
[[tiers]]
name = "free"
limits = ["8/hour"]
  [[tiers.rules]]
  endpoint = "/a/*"
  algorithm = "fixed_window"
  limits = ["3/minute"]
  [[tiers.rules]]
  endpoint = "/login"
  methods = ["POST"]
  algorithm = "fixed_window"
  limits = ["1/minute"]
  subject = "ip"
  [[tiers.rules]]
  endpoint = "/a/*"
  algorithm = "fixed_window"
  limits = ["2/minute"]
  mode = "shadow"
  [[tiers.rules]]
  endpoint = "/never"
  limits = ["1/minute"]
[[tiers]]
name = "open"
  [[tiers.rules]]
  endpoint = "/all"
  algorithm = "fixed_window"
  limits = ["2/minute"]
  subject = "tier"
[[api_keys]]
key = "demo-free-key-0001"
name = "Ann"
tier = "free"
[[api_keys]]
key = "demo-free-key-0002"
tier = "free"
  [[api_keys.overrides]]
  rule = "/a/*"
  limits = ["1/minute"]
[[api_keys]]
key = "demo-free-key-0003"
tier = "free"
status = "revoked"
[[api_keys]]
key = "demo-free-key-0004"
tier = "free"
expires_at = 2023-11-14T22:14:00Z
"""


def replayed(
    requests: list[Request], policy: str = POLICY, tier: str | None = "free", by_ip: bool = True, **options: Any
) -> Replay:
    replay = Replay(parse_policy(policy), tier, by_ip, **options)
    for each in requests:
        replay.decide(each)
    replay.finish()
    return replay


def ask(
    path: str = "/a/x", ip: str = "10.0.0.1", at_us: int = AT, method: str = "GET", subject: str | None = None, key: str = ""
) -> Request:
    return Request(at_us, ip, method, path, ip if subject is None else subject, key)


def counts(replay: Replay) -> dict[str, tuple[int, int]]:
    return {rule: (tally.allowed, tally.blocked) for (_, rule), tally in replay.tallies.items() if tally.allowed or tally.blocked}


def test_a_rule_blocks_and_its_shadow_only_tells() -> None:
    replay = replayed([ask()] * 5)
    assert counts(replay) == {"/a/*": (3, 2), "/a/* shadow": (2, 3)}
    assert replay.top.top(10) == [(("i:10.0.0.1", "/a/*"), 2)]
    assert {tally.mode for (_, rule), tally in replay.tallies.items() if rule.endswith("shadow")} == {"shadow"}


def test_head_is_counted_under_get() -> None:
    policy = """
    [[tiers]]
    name = "free"
      [[tiers.rules]]
      endpoint = "/a"
      algorithm = "fixed_window"
      methods = ["GET"]
      limits = ["3/minute"]
      [[tiers.rules]]
      endpoint = "/a"
      algorithm = "fixed_window"
      methods = ["GET"]
      limits = ["1/minute"]
      mode = "shadow"
    """
    replay = replayed([ask("/a", method=method) for method in ("HEAD", "GET", "HEAD", "HEAD")], policy=policy)
    assert counts(replay) == {"GET /a": (3, 1), "GET /a shadow": (1, 3)}


def test_rules_that_nothing_met_have_a_row() -> None:
    tally = replayed([ask()]).tallies[("free", "/never")]
    assert (tally.allowed, tally.blocked) == (0, 0)


def test_the_limits_of_the_tier_are_decided_with_those_of_the_rule() -> None:
    # 3 in each of three minutes would be 9: the tier lets 8 an hour through, and what it blocks costs the rule nothing.
    start = AT - AT % (60 * MINUTE_US)
    replay = replayed([ask(at_us=start + minute * MINUTE_US + second) for minute in range(3) for second in range(3)])
    assert counts(replay)["/a/*"] == (8, 1)
    replay = replayed([ask("/b", at_us=start)] * 9)
    assert counts(replay) == {"(tier)": (8, 1)}


def test_where_nothing_limits_there_is_no_rule() -> None:
    assert counts(replayed([ask("/b")] * 3, tier="open")) == {"(no rule)": (3, 0)}


def test_a_rule_by_tier_counts_all_callers_together() -> None:
    replay = replayed([ask("/all", f"10.0.0.{number}") for number in range(5)], tier="open")
    assert counts(replay) == {"/all": (2, 3)}
    assert replay.label(replay.top.top(1)[0][0][0]) == "tier open"


def test_a_rule_by_ip_counts_by_ip_whatever_names_the_caller() -> None:
    requests = [ask("/login", method="POST", subject=name) for name in ("ann", "bob", "cid")]
    assert counts(replayed(requests, by_ip=False)) == {"POST /login": (1, 2)}
    assert counts(replayed([ask(subject=name) for name in ("ann", "bob", "cid")], by_ip=False))["/a/*"] == (3, 0)
    assert counts(replayed([ask("/login", "", method="POST", subject=name) for name in ("ann", "bob")], by_ip=False)) == {
        "POST /login": (2, 0)
    }


def test_requests_that_name_no_caller_are_counted_by_ip() -> None:
    replay = replayed([ask(subject="")] * 4, by_ip=False)
    assert counts(replay)["/a/*"] == (3, 1)
    assert replay.without_subject == 4


def test_methods_are_distinguished() -> None:
    assert counts(replayed([ask("/login", method="GET")] * 3)) == {"(tier)": (3, 0)}


def test_a_known_key_brings_its_own_tier_limits_and_name() -> None:
    first, second, base = (ask(key=f"demo-free-key-000{number}", ip="9.9.9.9") for number in (1, 2, 9))
    # The same path for callers with and without other limits, in both orders: what holds for one must not hold for the other.
    for requests in ([first] * 4 + [second] * 4, [second] * 4 + [first] * 4):
        replay = replayed(requests, tier="open")
        assert counts(replay)["/a/*"] == (4, 4)
        assert {replay.label(subject): blocked for (subject, _), blocked in replay.top.top(9)} == {
            "Ann": 1,
            parse_policy(POLICY).api_keys[1].id: 3,
        }
    replay = replayed([base] * 2, tier="open")
    assert (counts(replay), replay.unknown_keys) == ({"(no rule)": (2, 0)}, 2)


def test_revoked_and_expired_keys_are_rejected_in_the_time_of_the_log() -> None:
    revoked, before, after = (
        ask(key="demo-free-key-0003"),
        ask(key="demo-free-key-0004"),
        ask(key="demo-free-key-0004", at_us=AT + MINUTE_US),
    )
    replay = replayed([revoked, before, after])
    assert (counts(replay)["/a/*"], replay.refused_keys) == ((1, 0), 2)


@pytest.mark.parametrize("path", ["//a", "/a/../b", "/a;x=1", "/%61", "/a%2Fb", "http://elsewhere/", "*", "", "/\\", "/a\n"])
def test_spellings_that_the_live_door_rejects_are_counted_apart(path: str) -> None:
    replay = replayed([ask(path)] * 7)
    assert counts(replay) == {}
    assert replay.refused_count == 7
    assert len(replay.refused) == 5
    assert replay.refused[0][0] == path


def test_paths_are_matched_as_the_live_door_spells_them() -> None:
    assert counts(replayed([ask("/a/é"), ask("/a/%c3%a9"), ask("/a/%C3%A9"), ask("/a/|")]))["/a/*"] == (3, 1)


def test_addresses_are_the_clients_of_the_live_door() -> None:
    one_network = ["2001:db8::1", "2001:db8:0:0:ffff::2", "2001:DB8::3", "2001:db8::4"]
    assert counts(replayed([ask(ip=ip) for ip in one_network]))["/a/*"] == (3, 1)
    mapped = ["::ffff:10.0.0.1", "10.0.0.1", "::ffff:a00:1", "10.0.0.1"]
    assert counts(replayed([ask(ip=ip) for ip in mapped]))["/a/*"] == (3, 1)
    others = ["::ffff:10.0.0.1", "::ffff:10.0.0.2", "::ffff:10.0.0.3", "2001:db8:1::", "[x]:80", "host.example"]
    assert counts(replayed([ask(ip=ip) for ip in others]))["/a/*"] == (6, 0)


def test_late_requests_are_decided_at_the_current_time() -> None:
    late = [ask(at_us=AT), ask(at_us=AT + 10 * MINUTE_US)] + [ask(at_us=AT + 5 * MINUTE_US)] * 4
    replay = replayed(late)
    assert counts(replay)["/a/*"] == (4, 2)
    assert (replay.first_us, replay.now_us) == (AT, AT + 10 * MINUTE_US)


def test_the_worst_minute_is_the_first_with_most_blocked() -> None:
    start = AT - AT % MINUTE_US
    asked = {0: 5, 3: 9, 4: 3, 7: 9}
    replay = replayed([ask(at_us=start + minute * MINUTE_US) for minute, number in asked.items() for _ in range(number)])
    # The tier's 8 an hour leave 3, 3, 2 and 0 of them.
    assert replay.worst_minute == (start + 7 * MINUTE_US, 9)
    assert replayed([ask()]).worst_minute is None
    assert replayed([ask(at_us=0)]).first_us == 0


@pytest.mark.parametrize(
    ("policy", "tier", "words"),
    [(POLICY, "gold", "no tier 'gold'; expected one of free, open"), (POLICY, None, "--tier, one of free, open")],
)
def test_a_tier_that_is_not_clear(policy: str, tier: str | None, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        Replay(parse_policy(policy), tier, True)


def test_the_tier_where_none_is_named() -> None:
    assert counts(replayed([ask("/b")], POLICY + '[anonymous]\ntier = "open"\n', None)) == {"(no rule)": (1, 0)}
    only = POLICY[: POLICY.index('[[tiers]]\nname = "open"')]
    assert counts(replayed([ask("/b")], only, None)) == {"(tier)": (1, 0)}
    with pytest.raises(SettingsError, match="no tier"):
        Replay(Policy(tiers=()), None, True)


@given(
    st.lists(
        st.tuples(st.integers(0, 400), st.sampled_from(("1.1.1.1", "2.2.2.2", "3.3.3.3")), st.sampled_from(("/a/x", "/b", "//"))),
        max_size=120,
    )
)
def test_fixed_windows_agree_with_counting_by_hand(drawn: list[tuple[int, str, str]]) -> None:
    policy = """
[[tiers]]
name = "t"
  [[tiers.rules]]
  endpoint = "/a/*"
  algorithm = "fixed_window"
  limits = ["4/90s", "7/300s"]
  subject = "ip"
"""
    drawn.sort()
    replay = replayed([ask(path, ip, AT + second * 1_000_000) for second, ip, path in drawn], policy, None)
    passed: Counter[tuple[str, int, int]] = Counter()
    allowed = blocked = 0
    by_minute: Counter[int] = Counter()
    by_subject: Counter[str] = Counter()
    for second, ip, path in drawn:
        if path != "/a/x":
            continue
        moment = AT // 1_000_000 + second
        windows = [(ip, 90, moment // 90), (ip, 300, moment // 300)]
        if passed[windows[0]] < 4 and passed[windows[1]] < 7:
            passed.update(windows)
            allowed += 1
        else:
            blocked += 1
            by_minute[moment // 60] += 1
            by_subject[f"i:{ip}"] += 1
    tally = replay.tallies[("t", "/a/*")]
    assert (tally.allowed, tally.blocked) == (allowed, blocked)
    assert {subject: count for (subject, _), count in replay.top.top(10)} == by_subject
    assert replay.refused_count == sum(path == "//" for *_, path in drawn)
    if blocked:
        minute = max(by_minute, key=lambda each: (by_minute[each], -each))
        assert replay.worst_minute == (minute * MINUTE_US, by_minute[minute])
    steps = replay.series.steps.values()
    assert sum(step[0] for step in steps) == allowed + sum(path == "/b" for *_, path in drawn)
    assert sum(step[1] for step in steps) == blocked


@given(st.lists(st.tuples(st.integers(0, 10**9), st.booleans()), max_size=200))
def test_a_series_keeps_its_sums(drawn: list[tuple[int, bool]]) -> None:
    series = Series()
    for second, blocked in sorted(drawn):
        series.add(second * 1_000_000, blocked)
    assert sum(step[True] for step in series.steps.values()) == sum(blocked for _, blocked in drawn)
    assert sum(step[False] for step in series.steps.values()) == sum(not blocked for _, blocked in drawn)


def test_a_long_series_is_coarsened() -> None:
    series = Series()
    for minute in range(MAX_SERIES * 3):
        series.add(minute * MINUTE_US, blocked=minute % 3 == 0)
        assert len(series.steps) <= MAX_SERIES
    assert series.step_s == 300
    assert set(map(sum, series.steps.values())) == {5}


def test_no_structure_grows_with_what_clients_vary() -> None:
    replay = Replay(parse_policy(POLICY), "free", False, max_subjects=1_000)
    held = 0
    for number in range(120_000):
        name = f"{number:06}"
        replay.decide(
            ask(
                f"/a/{name}" + "x" * (300 if number % 2 else 0),
                f"2001:db8:{number % 65_536:x}::1",
                AT + number * 1_000,
                subject=name,
                key=f"demo-key-{name}",
            )
        )
        if number == 60_000:
            held = _size(replay)
    assert len(replay.counters) <= 1_000
    assert _size(replay) <= held * 1.05


def _size(replay: Replay) -> int:
    """Bytes of all containers that the replay holds, two levels deep."""
    fields = [value for value in vars(replay).values() if isinstance(value, dict | list)]
    fields += [replay.top._counts, replay.series.steps]
    return sum(sys.getsizeof(field) for field in fields) + 500 * sum(len(field) for field in fields)


CUSTOMERS = """
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/*"
  limits = ["100/year"]
[[tiers]]
name = "pro"
quotas = ["3/year"]
  [[tiers.rules]]
  endpoint = "/*"
  subject = "customer"
  algorithm = "fixed_window"
  limits = ["2/minute"]
[[customers]]
name = "acme"
tier = "pro"
[[api_keys]]
key = "demo-free-key-0005"
customer = "acme"
"""


def test_what_a_gateway_logged_of_the_caller_decides() -> None:
    known = hash_api_key("demo-free-key-0005")[:24]

    def lines(*named: tuple[str, str, str], at_us: int = AT) -> list[Request]:
        return [ask(at_us=at_us)._replace(named=each) for each in named]

    def blocked(requests: list[Request], tier: str | None = None) -> dict[tuple[str, str], int]:
        replay = replayed(requests, policy=CUSTOMERS + '[callers]\ndefault_tier = "free"\n', tier=tier)
        assert replay.without_subject == 0
        return dict(replay.top.top(10))

    # The key is the policy's, or its customer is; whatever tier was logged.
    of_acme = lines((known, "", "free"), ("0" * 24, "acme", "free"), (known, "acme", "pro"), ("", "acme", ""))
    assert blocked(of_acme) == {("c:acme", "/*"): 2}
    # The quota of the year is the customer's too.
    assert blocked(of_acme[:2] + lines((known, "", ""), ("1" * 24, "acme", ""), at_us=AT + 60_000_000)) == {("c:acme", "/*"): 1}
    # Neither: the logged tier, if there is one of that name, and keys count as one customer only where one is named.
    assert blocked(lines(*[("2" * 24, "", "pro")] * 2, *[("3" * 24, "", "pro")] * 3)) == {("k:" + "3" * 24, "/*"): 1}
    assert blocked(lines(*[("2" * 24, "other", "pro")], *[("3" * 24, "other", "pro")] * 2)) == {("c:other", "/*"): 1}
    assert blocked(lines(*[("", "", "gone")] * 5)) == {}
    # A tier that is named goes over what was logged.
    assert blocked(lines(*[("2" * 24, "other", "pro")] * 5), tier="free") == {}


def test_customers_have_limits_periods_and_attribute_values_of_their_own() -> None:
    end = AT + 120_000_000
    policy = f"""
[[tiers]]
name = "free"
[[tiers]]
name = "pro"
quotas = ["2/month"]
  [[tiers.rules]]
  endpoint = "/*"
  subject = "customer"
  algorithm = "fixed_window"
  limits = ["1/minute"]
[[customers]]
name = "acme"
tier = "pro"
match = {{ org = "acme" }}
anchor = "2023-11-16"
  [[customers.overrides]]
  rule = "/*"
  limits = ["3/minute"]
  until = "{format_timestamp(end)}"
  [[customers.overrides]]
  quotas = ["4/month"]
  until = "{format_timestamp(end)}"
[callers]
default_tier = "free"
"""

    def replay_of(*at_us: int) -> list[int]:
        replay = Replay(parse_policy(policy), None, True, attributes=("org",))
        blocked = []
        for each in at_us:
            replay.decide(ask(at_us=each)._replace(attributes=("acme",)))
            blocked.append(sum(tally.blocked for tally in replay.tallies.values()))
        return blocked

    # Three a minute and four a month, until these end.
    assert replay_of(AT, AT, AT, AT) == [0, 0, 0, 1]
    assert replay_of(AT, AT, AT, AT + 60_000_000, AT + 60_000_000) == [0, 0, 0, 0, 1]
    assert replay_of(AT, end, end, end + 60_000_000) == [0, 0, 1, 2], "one a minute and two a month"
    # The customer's month begins on the 16th.
    month = parse_timestamp("2023-11-16T00:00:00Z", "at")
    assert replay_of(AT, end, month - 1, month, month) == [0, 0, 1, 1, 2]


def test_costs_are_charged() -> None:
    policy = """
    [[tiers]]
    name = "free"
      [[tiers.rules]]
      name = "tokens"
      endpoint = "/a"
      algorithm = "fixed_window"
      limits = ["1000/day", "3 concurrent"]
      [[tiers.rules]]
      name = "log-in"
      endpoint = "/login"
      limits = ["5/minute"]
      count = "failures"
    """
    replay = replayed([ask("/a")._replace(cost=cost) for cost in (600, 500, 0, 400, 1)], policy)
    tally = replay.tallies[("free", "tokens")]
    assert (tally.allowed, tally.blocked, tally.allowed_units, tally.blocked_units) == (3, 2, 1000, 501)
    assert replay.not_applied == ["free: log-in", "free: tokens"]
