"""Limit headers of Tidegate and of others, and anything else that may stand there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import MOMENT_US
from tidegate.client import LimitHeaders, Quota, read_limit_headers
from tidegate.decision import Decision
from tidegate.doors.responses import limit_headers, raw_limit_headers
from tidegate.policy.limits import Algorithm, Limit, LimitSet, OnFailure

NOW_S = 1_700_000_000.0
NAMES = ("ratelimit", "ratelimit-policy", "retry-after", "x-ratelimit-limit", "x-ratelimit-reset", "ratelimit-remaining")

CASES: dict[str, tuple[list[tuple[str, str]], LimitHeaders]] = {
    "none": ([("content-type", "text/plain")], LimitHeaders()),
    "the draft's tenth version": (
        [("RateLimit-Policy", '"burst";q=100;w=60, "daily";q=1000;w=86400'), ("RateLimit", '"burst";r=7;t=41')],
        LimitHeaders(100, 7, 41.0, None, (Quota("burst", 100, 60, 7, 41.0), Quota("daily", 1000, 86400))),
    ),
    "of two, the one with the least left": (
        [("RateLimit-Policy", '"a";q=100;w=60,"b";q=9;w=1'), ("RateLimit", '"a";r=50;t=41, "b";r=3;t=1')],
        LimitHeaders(9, 3, 1.0, None, (Quota("a", 100, 60, 50, 41.0), Quota("b", 9, 1, 3, 1.0))),
    ),
    "two fields of one name": (
        [("RateLimit-Policy", '"a";q=5;w=60'), ("RateLimit-Policy", '"b";q=9;w=1'), ("RateLimit", '"a";r=5')],
        LimitHeaders(5, 5, None, None, (Quota("a", 5, 60, 5), Quota("b", 9, 1))),
    ),
    "a name with a comma, a semicolon and a quote": (
        [("RateLimit-Policy", r'"a, \"b\"; c";q=5;w=60;qu="requests"'), ("RateLimit", r'"a, \"b\"; c";r=4;t=3;pk=:YQ==:')],
        LimitHeaders(5, 4, 3.0, None, (Quota('a, "b"; c', 5, 60, 4, 3.0),)),
    ),
    "an earlier draft": (
        [("RateLimit", "limit=100, remaining=50, reset=5"), ("RateLimit-Policy", "100;w=10")],
        LimitHeaders(100, 50, 5.0, None, (Quota("100", 100, 10),)),
    ),
    "the first drafts": (
        [("RateLimit-Limit", "100, 100;w=60"), ("RateLimit-Remaining", "7"), ("RateLimit-Reset", "12")],
        LimitHeaders(100, 7, 12.0),
    ),
    "reset in unix seconds": ([("X-RateLimit-Reset", "1700000030"), ("X-RateLimit-Remaining", "0")], LimitHeaders(None, 0, 30.0)),
    "reset in unix milliseconds": ([("X-RateLimit-Reset", "1700000030500")], LimitHeaders(None, None, 30.5)),
    "reset in seconds, another spelling": (
        [("X-Rate-Limit-Limit", "10"), ("X-Rate-Limit-Reset", "3.5")],
        LimitHeaders(10, None, 3.5),
    ),
    "a reset that is past": ([("x-ratelimit-reset", "1699999999")], LimitHeaders(None, None, 0.0)),
    "retry in seconds": ([("Retry-After", " 120 ")], LimitHeaders(retry_after=120.0)),
    "retry at a date": ([("Retry-After", "Tue, 14 Nov 2023 22:13:30 GMT")], LimitHeaders(retry_after=10.0)),
    "retry at a date that is past": ([("retry-after", "Tue, 14 Nov 2023 22:13:10 GMT")], LimitHeaders(retry_after=0.0)),
    "numbers that are none": (
        [("X-RateLimit-Limit", "-5"), ("X-RateLimit-Remaining", "many"), ("X-RateLimit-Reset", "1e3"), ("Retry-After", "soon")],
        LimitHeaders(),
    ),
    "what is broken off": ([("RateLimit", '"a;r=5'), ("RateLimit-Policy", ',;,"b";q')], LimitHeaders(quotas=(Quota("b"),))),
}


@pytest.mark.parametrize("name", CASES)
def test_headers(name: str) -> None:
    headers, expected = CASES[name]
    assert read_limit_headers(headers, NOW_S) == expected


def test_a_mapping_will_do() -> None:
    assert read_limit_headers({"Retry-After": "3"}).retry_after == 3.0


def test_what_tidegate_writes_is_read_back() -> None:
    texts = ("100/minute", "5000/day")
    limits = LimitSet("r", Algorithm.SLIDING_WINDOW, [Limit.parse(text) for text in texts], OnFailure.LOCAL, rule="r")
    denial = Decision(False, Limit.parse("100/minute"), 0, 41_200_000, 3_000_001, MOMENT_US, limits)
    told = read_limit_headers(limit_headers(denial), NOW_S)
    assert (told.limit, told.remaining, told.reset_after, told.retry_after) == (100, 0, 42.0, 4.0)
    assert told.quotas == (Quota("100/minute", 100, 60, 0, 42.0), Quota("5000/day", 5000, 86400))


@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.text(max_size=80) | st.text('";,=\\ rtqw0123456789', max_size=80)), max_size=8)
)
def test_nothing_in_headers_is_an_error(headers: list[tuple[str, str]]) -> None:
    told = read_limit_headers(headers, NOW_S)
    for number in (told.limit, told.remaining, told.reset_after, told.retry_after):
        assert number is None or number >= 0


@given(st.text(), st.integers(0, 10**9), st.integers(1, 10**6), st.integers(0, 10**9), st.integers(0, 10**6))
def test_any_name_comes_back(name: str, amount: int, window_s: int, remaining: int, reset: int) -> None:
    quoted = '"' + name.replace("\\", r"\\").replace('"', r"\"") + '"'
    headers = [("ratelimit-policy", f"{quoted};q={amount};w={window_s}"), ("ratelimit", f"{quoted};r={remaining};t={reset}")]
    assert read_limit_headers(headers).quotas == (Quota(name, amount, window_s, remaining, float(reset)),)


def test_headers_as_bytes_are_the_same() -> None:
    """Also where one limit binds after the other, and for a denial."""
    limits = LimitSet("100% of it", Algorithm.SLIDING_WINDOW, [Limit(9, 1_000_000), Limit(100, 60_000_000)])
    first, second = limits.limits
    denied = Decision(False, second, 0, 59_000_001, 1, MOMENT_US, limits)
    for decision in (
        Decision(True, first, 3, 1, 0, MOMENT_US, limits),
        denied,
        Decision(True, first, 2, 0, 0, MOMENT_US, limits),
    ):
        assert [(name.decode(), value.decode()) for name, value in raw_limit_headers(decision)] == limit_headers(decision)
    assert ("retry-after", "1") in limit_headers(denied)
    assert ("x-ratelimit-limit", "100") in limit_headers(denied)
    assert raw_limit_headers(Decision(True)) == limit_headers(Decision(True)) == []


def test_no_limit_ends_a_header() -> None:
    limits = LimitSet("broken", Algorithm.FIXED_WINDOW, [Limit(9, 1_000_000)], quotas="a\r\nset-cookie: b")
    decision = Decision(True, limits.limits[0], 3, 1, 0, MOMENT_US, limits)
    for headers in (limit_headers, raw_limit_headers):
        with pytest.raises(ValueError, match="line break"):
            headers(decision)
