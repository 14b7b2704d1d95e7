"""Lines of logs → requests."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.cases.logs import AT, COMBINED, COMMON, CSV_HEADER, LINES, MALFORMED, Line
from tests.cpu_time import assert_cpu_below
from tidegate.errors import SettingsError
from tidegate.policy.paths import MAX_PATH_BYTES
from tidegate.tools.simulate.log_formats import FORMATS, Directive, NoAddress, Request, csv_columns, detect, parser_of
from tidegate.tools.simulate.log_times import Malformed, timestamp_us


@pytest.mark.parametrize("case", LINES, ids=lambda case: case.title)
def test_a_line_is_read(case: Line) -> None:
    options = {"subject": "ip", "key_field": None} | case.options
    parse = parser_of(case.log_format, **options, header=csv_columns(case.header))
    expected = Request(case.at_us, case.ip, case.method, case.path, case.subject, case.api_key)
    for end in ("", "\n", "\r\n"):
        assert parse(case.line + end) == expected
    assert detect(case.header or case.line) in ({case.log_format} if not case.options.get("fields") else {"json", None})


@pytest.mark.parametrize(("log_format", "line", "reason"), MALFORMED)
def test_a_malformed_line_gives_the_reason(log_format: str, line: str, reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        parser_of(log_format, "ip", None, header=csv_columns(CSV_HEADER))(line)


@pytest.mark.parametrize(
    "line", ["", "hello", "a,b", "time,agent", "{", '{"a":', "[1]", '"', 'a,"', "\x00\x01,\r,x", "{" * 50_000]
)
def test_a_line_that_reports_no_format(line: str) -> None:
    assert detect(line) is None


@pytest.mark.parametrize(
    ("log_format", "options", "words"),
    [
        ("combined", {"subject": "tenant"}, "no field 'tenant'"),
        ("common", {"key_field": "cookie"}, "no field 'cookie'"),
        ("csv", {"subject": "tenant"}, "no column tenant"),
        ("csv", {"key_field": "cookie"}, "no column cookie"),
        ("csv", {"fields": {"ip": "cf_ip"}}, "no column cf_ip"),
    ],
)
def test_a_field_that_the_log_cannot_have(log_format: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        parser_of(log_format, **({"subject": "ip", "key_field": None} | options), header=csv_columns(CSV_HEADER))  # type: ignore[arg-type]


@given(st.text(max_size=300))
@example('\ufeff{"a":"\\ud800"}')
@example("\\x" * 100)
@example(COMBINED[:-1])
def test_no_line_does_more_than_be_malformed(line: str) -> None:
    detect(line)
    for log_format in FORMATS:
        try:
            request = parser_of(log_format, "ip", None, header=csv_columns(CSV_HEADER))(line)
        except (Malformed, Directive):
            continue
        assert request.at_us >= 0


@given(
    st.datetimes(datetime.datetime(1970, 1, 2), datetime.datetime(9999, 12, 30)),
    st.integers(-14 * 60, 14 * 60),
    st.from_regex(r"/[A-Za-z0-9%._~/-]{0,40}", fullmatch=True),
    st.from_regex(r"[^ \\\"\n\r?]{0,20}", fullmatch=True),
    st.sampled_from(("-", "ann", "ann lee", "o'neil")),
)
def test_a_combined_line_reports_what_went_into_it(
    moment: datetime.datetime, offset_min: int, path: str, query: str, user: str
) -> None:
    moment = moment.replace(microsecond=0, tzinfo=datetime.UTC)
    local = moment + datetime.timedelta(minutes=offset_min)
    if local.year > 9999 or local.year < 1970:
        return
    zone = f"{'-' if offset_min < 0 else '+'}{abs(offset_min) // 60:02}{abs(offset_min) % 60:02}"
    written = f"{local.day:02}/{local:%b}/{local.year:04}:{local:%H:%M:%S} {zone}"
    line = f'10.0.0.1 - {user} [{written}] "GET {path}?{query} HTTP/1.1" 200 1 "-" "-"'
    request = parser_of("combined", "user", None)(line)
    assert request.at_us == int(moment.timestamp()) * 1_000_000
    assert (request.ip, request.method, request.path) == ("10.0.0.1", "GET", path)
    assert request.subject == ("" if user == "-" else user)


def test_the_timezone_of_the_machine_plays_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    # In New York clocks went from 02:00 to 03:00 on that day: 02:30 is no local time there.
    line = COMMON.replace("14/Nov/2023:22:13:20", "12/Mar/2023:02:30:00")
    expected = 1_678_588_200_000_000
    try:
        for zone in ("UTC", "America/New_York", "Asia/Kathmandu"):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            assert parser_of("common", "ip", None)(line).at_us == expected
            assert timestamp_us("2023-03-12T02:30:00") == expected
            assert timestamp_us("2023-03-12 02:30:00.000") == expected
    finally:
        monkeypatch.undo()
        time.tzset()


def test_the_hour_that_comes_twice_is_distinguished_by_its_offset() -> None:
    summer = COMMON.replace("14/Nov/2023:22:13:20 +0000", "29/Oct/2023:02:30:00 +0200")
    winter = COMMON.replace("14/Nov/2023:22:13:20 +0000", "29/Oct/2023:02:30:00 +0100")
    parse = parser_of("common", "ip", None)
    assert parse(winter).at_us - parse(summer).at_us == 3_600_000_000


@pytest.mark.parametrize("path", ["/" + "a" * 50_000, "/" + r"\x41" * 12_000])
def test_a_path_longer_than_any_may_be_is_cut_to_one_that_is_rejected(path: str) -> None:
    assert len(parser_of("common", "ip", None)(COMMON.replace("/a ", path + " ")).path) == MAX_PATH_BYTES + 1
    record = json.dumps({"time": 1700000000, "ip": "1.1.1.1", "path": path.replace("\\", "")})
    assert len(parser_of("json", "ip", None)(record).path) == MAX_PATH_BYTES + 1


def test_an_api_key_longer_than_any_is_none() -> None:
    parse = parser_of("json", "ip", None)
    assert parse('{"time":1700000000,"ip":"1.1.1.1","path":"/","api_key":"' + "k" * 513 + '"}').api_key == ""
    assert parse('{"time":1700000000,"ip":"1.1.1.1","path":"/","api_key":17}') == Request(
        AT, "1.1.1.1", "GET", "/", "1.1.1.1", ""
    )


@given(st.lists(st.sampled_from(["a", "/", r"\x41", r"\xc3", r"\xG1", r"\"", r"\\", r"\n", r"\é", r"\x4", "x41"]), max_size=12))
def test_escapes_of_the_log_are_taken_off_one_by_one(parts: list[str]) -> None:
    text = "".join(parts)
    expected, rest = "", text
    while rest:
        if hexadecimal := re.match(r"\\x([0-9A-Fa-f]{2})", rest):
            byte = int(hexadecimal[1], 16)
            expected += chr(byte) if byte < 0x80 else f"%{byte:02X}"
            rest = rest[4:]
        elif rest[0] == "\\" and len(rest) > 1:
            expected += {"n": "\n"}.get(rest[1], rest[1])
            rest = rest[2:]
        else:
            expected += rest[0]
            rest = rest[1:]
    line = f'203.0.113.7 - - [17/May/2015:10:05:03 +0000] "GET /{text} HTTP/1.1" 200 5'
    assert parser_of("common", "ip", None)(line).path == f"/{expected}"


HEAD = '203.0.113.7 - - [17/May/2015:10:05:03 +0000] "GET /'
K = 64 * 1024
HOSTILE = {
    "escapes": ("combined", HEAD + r"\x41" * (K // 4) + ' HTTP/1.1" 200 5 "-" "-"'),
    "quotes": ("combined", HEAD + '\\"' * (K // 2) + ' HTTP/1.1" 200 5 "-" "-"'),
    "a request that does not end": ("combined", HEAD + '\\"' * (K // 2)),
    "an agent that does not end": ("combined", HEAD + ' HTTP/1.1" 200 5 "-" "' + '\\"' * (K // 2)),
    "digits": ("combined", HEAD + ' HTTP/1.1" 200 ' + "5" * K + "x"),
    "words": ("combined", HEAD + "GET " * (K // 4) + ' HTTP/1.1" 200 5 "-" "-"'),
    "a user of many words": ("combined", "203.0.113.7 - " + "a " * (K // 2)),
    "an ident": ("combined", "203.0.113.7 " + "a" * K),
    "escapes that JSON has not": ("json", '{"time":1,"ip":"1","path":"/' + r"\x41" * (K // 4)),
    "backslashes": ("json", '{"time":1,"ip":"1","path":"' + r"\x41" + "\\\\" * (K // 2) + r"\x4"),
    "nesting": ("json", '{"time":' + "[" * K),
    "columns": ("csv", "1,1,/" + "," * K),
    "a number": ("csv", "9" * K + ",1,/"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_line_costs_more_than_its_length(name: str) -> None:
    """Each takes less than 15 ms of CPU; one that were tried again from every character on would take minutes."""
    log_format, line = HOSTILE[name]
    parse = parser_of(log_format, "agent" if log_format == "combined" else "ip", None, None, ["time", "ip", "path"])

    def work() -> None:
        detect(line)
        with contextlib.suppress(Malformed):
            parse(line)

    assert_cpu_below(1.5, work)


def test_costs() -> None:
    parse = parser_of("json", "ip", None, cost_field="usage.total_tokens")
    line = '{"time":1700000000,"ip":"1.1.1.1","path":"/","usage":{"total_tokens":%s}}'
    assert [parse(line % cost).cost for cost in ("812", "0", "3.0", '"17"', "null", '"-"')] == [812, 0, 3, 17, 1, 1]
    assert parse('{"time":1700000000,"ip":"1.1.1.1","path":"/"}').cost == 1
    for cost in ("-1", "1.5", "1000000001", '"x"', '"\u00b2"', "[]", "true", '"1e3"', f'"{"9" * 5000}"'):
        with pytest.raises(Malformed, match=r"the cost .* is not a whole number"):
            parse(line % cost)
    with pytest.raises(SettingsError, match="format combined has no costs, so no 'tokens'"):
        parser_of("combined", "ip", None, cost_field="tokens")
    with pytest.raises(SettingsError, match="the log has no column tokens"):
        parser_of("csv", "ip", None, header=csv_columns(CSV_HEADER), cost_field="tokens")
    with pytest.raises(NoAddress):
        parse('{"time":1700000000,"ip":"nowhere","path":"/","usage":{"total_tokens":1}}')
