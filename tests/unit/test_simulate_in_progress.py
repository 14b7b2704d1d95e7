"""Limits of requests in progress, replayed from logs that say how long requests took."""

from __future__ import annotations

import heapq
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import SettingsError
from tidegate.policy.toml_reader import parse_policy
from tidegate.tools.simulate.command import simulate
from tidegate.tools.simulate.log_durations import UNKNOWN, Durations
from tidegate.tools.simulate.log_formats import Request, csv_columns, parser_of
from tidegate.tools.simulate.log_times import Malformed
from tidegate.tools.simulate.replay import Replay

T0_US = 1_700_000_000_000_000
SECOND_US = 1_000_000
POLICY = """
[[tiers]]
name = "public"
  [[tiers.rules]]
  name = "chat"
  endpoint = "/chat"
  subject = "ip"
  limits = ["2 concurrent"]
  [[tiers.rules]]
  name = "both"
  endpoint = "/both"
  subject = "ip"
  algorithm = "fixed_window"
  limits = ["3/day", "2 concurrent"]
  [[tiers.rules]]
  name = "watched"
  endpoint = "/both"
  subject = "ip"
  limits = ["1 concurrent"]
  mode = "shadow"
  [[tiers.rules]]
  name = "log-in"
  endpoint = "/login"
  limits = ["5/minute"]
  count = "failures"
[anonymous]
tier = "public"
"""
NGINX = '{"msec":"1700000010.500","remote_addr":"203.0.113.7","request_method":"GET","request_uri":"/chat","request_time":%s}'
ENVOY = '[2023-11-14T22:13:20.000Z] "GET /chat HTTP/1.1" 200 - 0 12 %s 2 "203.0.113.7" "curl/8" "d3b0" "a.example" "10.0.0.9:80"'
HAPROXY = (
    "Nov 14 22:13:20 lb haproxy[8]: 203.0.113.7:51334 [14/Nov/2023:22:13:20.000] http-in api/s1 0/0/1/2/%s 200 12 "
    '- - ---- 1/1/0/0/0 0/0 "GET /chat HTTP/1.1"'
)
ALB = (
    "https 2023-11-14T22:13:22.000000Z app/lb/50dc 203.0.113.7:51334 10.0.0.9:80 %s 200 200 34 12 "
    '"GET https://example.com:443/chat HTTP/1.1" "curl/8" ECDHE TLSv1.2'
)


def asked(start_us: int, duration_us: int, ip: str = "203.0.113.7", path: str = "/chat") -> Request:
    return Request(T0_US + start_us, ip, "GET", path, ip, "", duration_us=duration_us)


def replayed(requests: list[Request], **options: Any) -> Replay:
    replay = Replay(parse_policy(POLICY), None, True, **{"durations": True} | options)
    for request in requests:
        replay.decide(request)
    replay.finish()
    return replay


@given(
    st.lists(
        st.tuples(
            st.integers(0, 20_000_000),
            st.one_of(st.integers(0, 8_000_000), st.just(SECOND_US)),
            st.sampled_from(["203.0.113.7", "203.0.113.8"]),
        ),
        max_size=60,
    )
)
def test_no_more_are_in_progress_than_the_limit_and_none_is_denied_in_vain(wanted: list[tuple[int, int, str]]) -> None:
    requests = sorted(asked(*each) for each in wanted)
    allowed, ends = 0, dict[str, list[int]]()
    for request in requests:
        own = ends.setdefault(request.ip, [])
        while own and own[0] <= request.at_us:
            heapq.heappop(own)
        if len(own) < 2:
            heapq.heappush(own, request.at_us + request.duration_us)
            allowed += 1
    tally = replayed(requests).tallies[("public", "chat")]
    blocked = len(requests) - allowed
    assert (tally.allowed, tally.blocked, tally.blocked_in_progress) == (allowed, blocked, blocked)


def test_slots_and_other_limits_are_decided_together() -> None:
    # The third finds no slot and so consumes nothing of the day; of the others after it the last one is the fourth.
    starts = (0, 1, 2, 12, 13)
    replay = replayed([asked(start * SECOND_US, 10 * SECOND_US, path="/both") for start in starts])
    both, watched = replay.tallies[("public", "both")], replay.tallies[("public", "watched")]
    assert (both.allowed, both.blocked, both.blocked_in_progress) == (3, 2, 1)
    assert (watched.allowed, watched.blocked, watched.blocked_in_progress) == (2, 3, 3)


def test_without_a_duration_a_request_takes_no_slot() -> None:
    replay = replayed([asked(0, 5 * SECOND_US), asked(0, UNKNOWN), asked(1, 5 * SECOND_US), asked(2, UNKNOWN)])
    tally = replay.tallies[("public", "chat")]
    assert (tally.allowed, tally.blocked, replay.without_duration) == (3, 1, 2)
    assert replay.not_applied == ["public: log-in"]
    # Counted once, also where a shadow rule needs it too.
    assert replayed([asked(0, UNKNOWN, path="/both"), asked(0, UNKNOWN, path="/login")]).without_duration == 1
    plain = replayed([asked(0, 5 * SECOND_US)] * 5, durations=False)
    assert plain.tallies[("public", "chat")].allowed == 5
    assert plain.not_applied == ["public: both", "public: chat", "public: log-in", "public: watched"]


def test_the_number_of_requests_in_progress_is_bounded() -> None:
    many = [asked(number, 3_600 * SECOND_US, f"10.0.{number // 256}.{number % 256}") for number in range(1_000)]
    replay = replayed(many, max_subjects=300)
    assert replay.in_progress is not None
    assert replay.in_progress.ended_early == 700
    assert replay.counters.open_holds == 300


@pytest.mark.parametrize(
    ("log_format", "line", "field", "options", "starts_us", "lasts_us"),
    [
        ("json", NGINX % '"4.250"', "request_time", {}, 6_250_000, 4_250_000),
        ("json", NGINX % "4250", "request_time", {"unit": "ms"}, 6_250_000, 4_250_000),
        ("json", NGINX % '"4.250"', "request_time", {"logged_at": "start"}, 10_500_000, 4_250_000),
        ("json", NGINX % '"-"', "request_time", {}, 10_500_000, UNKNOWN),
        ("json", '{"StartUTC":1700000001,"ClientHost":"203.0.113.7","RequestPath":"/chat","Duration":1500000000}', "Duration",
         {"unit": "ns"}, 1_000_000, 1_500_000),
        ("csv", "1700000002,203.0.113.7,/chat,1500000", "took", {"unit": "us"}, 500_000, 1_500_000),
        ("envoy", ENVOY % "1500", "duration", {}, 0, 1_500_000),
        ("envoy", ENVOY % "-", "Duration", {}, 0, UNKNOWN),
        ("haproxy", HAPROXY % "1500", "duration", {}, 0, 1_500_000),
        ("haproxy", HAPROXY % "+30", "duration", {}, 0, 30_000),
        ("haproxy", HAPROXY % "-1", "duration", {}, 0, UNKNOWN),
        ("alb", ALB % "0.001 1.498 0.001", "duration", {}, 500_000, 1_500_000),
        ("alb", ALB % "-1 -1 -1", "duration", {}, 2_000_000, UNKNOWN),
        ("json", json.dumps({"log": ENVOY % "1500"}), "duration", {}, 0, 1_500_000),
    ],
)  # fmt: skip
def test_durations_of_logs(
    log_format: str, line: str, field: str, options: dict[str, str], starts_us: int, lasts_us: int
) -> None:
    header = csv_columns("time,ip,path,took") if log_format == "csv" else ()
    request = parser_of(log_format, "ip", None, header=header, durations=Durations(field, **options))(line)
    assert (request.at_us - T0_US, request.duration_us) == (starts_us, lasts_us)


@pytest.mark.parametrize("value", ["-0.1", '"-1"', '"1e3"', '"0.1, 0.2"', "[]", "true", "604801", f'"{"9" * 5000}"', '"\u00b2"'])
def test_what_is_no_duration(value: str) -> None:
    with pytest.raises(Malformed, match=r"the duration .* is not a number of s from 0 to 604,800"):
        parser_of("json", "ip", None, durations=Durations("request_time"))(NGINX % value)


def test_logs_without_durations_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"format combined has no field 'request_time' .* --duration-field duration for"):
        parser_of("combined", "ip", None, durations=Durations("request_time"))
    with pytest.raises(SettingsError, match="no column took"):
        parser_of("csv", "ip", None, header=csv_columns("time,ip,path"), durations=Durations("took"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy, log = tmp_path / "p.toml", tmp_path / "access.log"
    policy.write_text(POLICY)
    # Four end at the same time; one has no duration.
    log.write_text("\n".join(NGINX % duration for duration in ("4", "3", "2", "1", '""')))
    assert simulate([str(log)], policy, duration_field="request_time", as_json_=True) == 0
    report = json.loads(capsys.readouterr().out)
    row = next(each for each in report["rules"] if each["rule"] == "chat")
    assert (row["allowed"], row["blocked"], row["blocked_in_progress"]) == (3, 2, 2)
    assert (report["with_durations"], report["without_duration"], report["not_simulated"]) == (True, 1, ["public: log-in"])
    assert simulate([str(log)], policy, duration_field="request_time") == 0
    printed = capsys.readouterr().out
    assert "no free slot" in printed
    assert "1 requests have no duration" in printed
    assert "not simulated, because a log does not say how requests ended: limits of failures" in printed
    assert simulate([str(log)], policy) == 0
    assert "does not say how long requests took (--duration-field)" in capsys.readouterr().out
    # No line has the field: a clear note, and no limit in silence.
    assert simulate([str(log)], policy, duration_field="tooke") == 0
    assert "5 requests have no duration" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"duration_field": "request_time", "duration_unit": "m"},
            "--duration-unit 'm' is not valid; expected one of s, ms, us, ns",
        ),
        ({"duration_field": "request_time", "logged_at": "begin"}, "--logged-at 'begin' is not valid"),
        ({"duration_unit": "ms"}, "need --duration-field"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, str], message: str) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text(POLICY)
    with pytest.raises(SettingsError, match=message):
        simulate(["-"], policy, **options)  # type: ignore[arg-type]
