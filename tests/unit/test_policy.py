"""Limits, rules, tiers and keys: what is understood, and what is refused with which words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import PolicyError
from tidegate.policy.key_format import BASE62, hash_api_key, is_mistyped, is_possible_key, make_api_key, parse_key_digest
from tidegate.policy.limits import MAX_AMOUNT, Algorithm, Limit, LimitSet, fit_limits
from tidegate.policy.model import Tier
from tidegate.policy.rules import Rule

DAY = 86_400_000_000


@pytest.mark.parametrize(
    ("text", "amount", "window_us", "month", "burst"),
    [
        ("100/minute", 100, 60_000_000, False, None),
        ("1/second", 1, 1_000_000, False, None),
        ("5 / hour", 5, 3_600_000_000, False, None),
        ("20000/day", 20_000, DAY, False, None),
        ("1_000_000/day", 1_000_000, DAY, False, None),
        ("7/month", 7, 31 * DAY, True, None),
        ("30/90s", 30, 90_000_000, False, None),
        ("30/15m", 30, 900_000_000, False, None),
        ("30/2hours", 30, 7_200_000_000, False, None),
        ("30/7d", 30, 7 * DAY, False, None),
        ("100/minute burst 20", 100, 60_000_000, False, 20),
        ("100/MINUTE", 100, 60_000_000, False, None),
        ("500/week", 500, 7 * DAY, False, None),
        ("500/2weeks", 500, 14 * DAY, False, None),
        ("100 per minute", 100, 60_000_000, False, None),
        ("100 per 15 minutes", 100, 900_000_000, False, None),
        ("100 Per Minute Burst 20", 100, 60_000_000, False, 20),
        ("7 per month", 7, 31 * DAY, True, None),
        ("9/year", 9, 366 * DAY, False, None),
    ],
)
def test_limits_that_are_understood(text: str, amount: int, window_us: int, month: bool, burst: int | None) -> None:
    limit = Limit.parse(text)
    assert (limit.amount, limit.window_us, limit.calendar_month, limit.burst) == (amount, window_us, month, burst)
    assert Limit.parse(limit.text) == limit
    assert limit.calendar_year == text.endswith("year")


def test_a_year_and_366_days_are_two_windows() -> None:
    year, days = Limit.parse("9/year"), Limit.parse("9/366d")
    assert (year.text, days.text) == ("9/year", "9/366d")
    assert year.window_name != days.window_name
    assert len(LimitSet("r", Algorithm.FIXED_WINDOW, [year, days, Limit.parse("9/month")]).limits) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "100/minute"),
        ("100", "100/minute"),
        ("100/", "100/minute"),
        ("/minute", "100/minute"),
        ("-5/minute", "100/minute"),
        ("1.5/minute", "100/minute"),
        ("٣/minute", "100/minute"),
        ("100/minute burst", "100/minute"),
        ("1/s" + " " * 100, "100/minute"),
        (7, "7"),
        (None, "None"),
        ("0/minute", "1 to 1000000000"),
        ("1000000001/minute", "1 to 1000000000"),
        ("_/minute", "1 to 1000000000"),
        ("5/minute burst 0", "burst"),
        ("5/fortnight", "fortnight"),
        ("5/0s", "1 second"),
        ("5/367d", "366 days"),
        ("5/2month", "calendar month"),
        ("5/2years", "calendar year"),
        ("5 perminute", "100/minute"),
        ("5per minute", "100/minute"),
        ("5/53weeks", "366 days"),
    ],
)
def test_limits_that_are_rejected(text: Any, said: str) -> None:
    with pytest.raises(PolicyError) as refused:
        Limit.parse(text)
    assert said in refused.value.reason


@given(
    amount=st.integers(1, MAX_AMOUNT),
    window=st.one_of(st.integers(1, 366 * 86_400).map(lambda s: f"{s}s"), st.sampled_from(["month", "day", "3h", "7m"])),
    burst=st.none() | st.integers(1, MAX_AMOUNT),
)
def test_a_limit_is_read_as_it_is_written(amount: int, window: str, burst: int | None) -> None:
    limit = Limit.parse(f"{amount}/{window}" + ("" if burst is None else f" burst {burst}"))
    assert Limit.parse(limit.text) == limit
    assert Limit.parse(str(limit)) == limit


def test_limits_are_fitted_to_their_algorithm() -> None:
    assert fit_limits(Algorithm.TOKEN_BUCKET, [Limit.parse("5/s")])[0].capacity == 5
    assert fit_limits(Algorithm.LEAKY_BUCKET, [Limit.parse("5/s")])[0].capacity == 1
    assert fit_limits(Algorithm.LEAKY_BUCKET, [Limit.parse("5/s burst 3")])[0].capacity == 3
    assert [each.text for each in fit_limits(Algorithm.FIXED_WINDOW, [Limit.parse("9/day"), Limit.parse("1/s")])] == [
        "1/second",
        "9/day",
    ]


@pytest.mark.parametrize(
    ("algorithm", "texts", "said"),
    [
        (Algorithm.SLIDING_WINDOW, ["5/s burst 2"], "burst"),
        (Algorithm.SLIDING_LOG, ["100001/s"], "100000"),
        (Algorithm.FIXED_WINDOW, ["5/minute", "6/60s"], "same window"),
        (Algorithm.FIXED_WINDOW, [], "1 to 16"),
        (Algorithm.FIXED_WINDOW, [f"1/{n}s" for n in range(1, 18)], "1 to 16"),
        (Algorithm.TOKEN_BUCKET, ["999999937/month"], "rounder"),
    ],
)
def test_limits_that_do_not_fit(algorithm: Algorithm, texts: list[str], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        LimitSet("x", algorithm, [Limit.parse(text) for text in texts])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"endpoint": "api"}, "begin with '/'"),
        ({"endpoint": None}, "begin with '/'"),
        ({"endpoint": "/a" * 600}, "1024"),
        ({"endpoint": "/x{id}"}, "one whole segment"),
        ({"endpoint": "/{i d}"}, "one whole segment"),
        ({"endpoint": "/a//b"}, "//"),
        ({"endpoint": "/a/../b"}, "dot"),
        ({"endpoint": "/%61"}, "'a'"),
        ({"endpoint": "/caf%c3%a9"}, "/caf%C3%A9"),
        ({"endpoint": "/a?b=1"}, "query"),
        ({"methods": ["G T"]}, "'G T'"),
        ({"methods": [1]}, "1"),
        ({"algorithm": "gcra"}, "sliding_window"),
        ({"subject": "User"}, "api_key, ip, tier"),
        ({"mode": "dry"}, "shadow"),
        ({"on_failure": "open"}, "local, allow, deny"),
        ({"priority": 1.5}, "1.5"),
        ({"priority": True}, "True"),
        ({"priority": 10**9}, "1000000"),
        ({"name": "a\nb"}, "printable"),
        ({"limits": ["5/x"]}, "'x'"),
        ({"limits": []}, "1 to 16"),
    ],
)
def test_rules_that_are_rejected(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError) as refused:
        Rule.make(**{"endpoint": "/x", "limits": ["5/s"], **fields})
    assert said in refused.value.reason


def test_names_of_rules() -> None:
    assert Rule.make("/x", ["1/s"]).name == "/x"
    assert Rule.make("/x", ["1/s"], ["post", "GET", "get"]).name == "GET,POST /x"
    assert Rule.make("/x", ["1/s"], mode="shadow").name == "/x shadow"
    assert Rule.make("/x", ["1/s"], name="mine").name == "mine"


@pytest.mark.parametrize("name", ["", "a b", "a:b", "ä", "x" * 65, "-a", 5, None])
def test_tier_names_that_are_rejected(name: Any) -> None:
    with pytest.raises(PolicyError, match="tier name"):
        Tier.make(name)


def test_two_rules_of_one_name_are_rejected() -> None:
    with pytest.raises(PolicyError, match="two rules named '/x'"):
        Tier.make("t", [Rule.make("/x", ["1/s"]), Rule.make("/x", ["2/s"])])


def test_made_keys() -> None:
    keys = {make_api_key() for _ in range(200)}
    assert len(keys) == 200
    for key in keys:
        assert len(key) == 41
        assert key.startswith("tg_")
        assert set(key[3:]) <= set(BASE62)
        assert is_possible_key(key)


@given(place=st.integers(3, 40), to=st.sampled_from(BASE62))
def test_every_single_wrong_character_is_noticed(place: int, to: str) -> None:
    key = make_api_key()
    wrong = key[:place] + to + key[place + 1 :]
    assert is_mistyped(wrong) == (wrong != key)


@given(place=st.integers(3, 39))
def test_every_swap_of_neighbours_is_noticed(place: int) -> None:
    key = make_api_key()
    swapped = key[:place] + key[place + 1] + key[place] + key[place + 2 :]
    assert is_mistyped(swapped) == (swapped != key)


@pytest.mark.parametrize("key", ["tg_", "tg_short", "tg_" + "a" * 38, "tg_" + "a" * 39, "tg_" + "-" * 38])
def test_what_only_looks_like_ours_is_mistyped(key: str) -> None:
    assert is_mistyped(key)
    assert not is_possible_key(key)


@pytest.mark.parametrize(
    ("key", "possible"),
    [
        ("a" * 16, True),
        ("!" + "a" * 510 + "~", True),
        ("sk.live/AbC+1==", True),
        ("a", True),
        ("", False),
        ("a" * 513, False),
        ("ä" * 20, False),
        ("a b" * 8, False),
        ("a" * 16 + "\n", False),
        ("\x7f" * 16, False),
    ],
)
def test_forms_of_keys_of_any_service(key: str, possible: bool) -> None:
    assert is_possible_key(key) == possible
    if len(key) >= 16 and possible:
        assert parse_key_digest(key) == hash_api_key(key)
    else:
        with pytest.raises(PolicyError, match="16 to 512 visible ASCII"):
            parse_key_digest(key)


def test_digests() -> None:
    assert parse_key_digest("demo-free-key-0001") == hash_api_key("demo-free-key-0001")
    assert parse_key_digest(sha256="AB" * 32) == "ab" * 32
    for given_key, digest in (
        (None, None),
        ("a" * 16, "ab" * 32),
        ("short", None),
        (None, "abc"),
        (None, 5),
        ("tg_" + "a" * 38, None),
    ):
        with pytest.raises(PolicyError) as refused:
            parse_key_digest(given_key, digest)
        assert "a" * 16 not in refused.value.reason, "a key is never repeated"


def test_a_rule_whose_name_would_be_too_long_needs_one() -> None:
    longest = "/" + "a" * 255
    assert Rule.make(longest, ["1/s"]).name == longest
    for endpoint, methods, mode in ((longest + "a", (), "enforce"), (longest, ("GET",), "enforce"), (longest, (), "shadow")):
        with pytest.raises(PolicyError, match=r"^endpoint .* needs a 'name' for its rule: .* has 2\d\d characters"):
            Rule.make(endpoint, ["1/s"], methods, mode=mode)
        assert Rule.make(endpoint, ["1/s"], methods, mode=mode, name="given").name == "given"


def test_the_default_name_is_reported_whatever_a_rule_is_called() -> None:
    named = Rule.make("/x", ["1/s"], ["post", "get"], mode="shadow", name="given")
    assert (named.name, named.default_name) == ("given", "GET,POST /x shadow")
    assert Rule.make("/x", ["1/s"]).default_name == Rule.make("/x", ["1/s"]).name == "/x"
