"""Logs as people have them: with what shippers put around them, behind proxies, compressed, of other software."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import importlib
import json
import lzma
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cases.logs import AT, COMBINED, T0
from tests.cpu_time import assert_growth_below, cpu_s
from tidegate.errors import SettingsError
from tidegate.tools.simulate.command import simulate
from tidegate.tools.simulate.log_clients import Clients, address_of
from tidegate.tools.simulate.log_formats import FORMATS, Directive, Request, csv_columns, detect, parser_of
from tidegate.tools.simulate.log_lines import MAX_ELEMENT, LogError, LogLines
from tidegate.tools.simulate.log_times import Malformed, timestamp_us

ROOT = Path(__file__).parents[2]
ZONE = "14/Nov/2023:22:13:20 +0000"
REST = f'[{ZONE}] "GET /a/b HTTP/1.1" 200 12 "-" "curl/8"'
POLICY = """
[[tiers]]
name = "public"
  [[tiers.rules]]
  endpoint = "/a*"
  algorithm = "fixed_window"
  limits = ["3/minute"]
  subject = "ip"
[anonymous]
tier = "public"
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "try.policy.toml"
    path.write_text(POLICY)
    return path


def read(lines: list[str], **options: Any) -> list[Any]:
    """The requests of a log's lines, its format recognized by the first that tells one."""
    name = next(found for found in map(detect, lines) if found)
    parse = parser_of(name, **({"subject": "ip", "key_field": None} | options), header=csv_columns(lines[0]))
    return [request for request in (attempt(parse, line) for line in lines) if request is not None]


def attempt(parse: Any, line: str) -> Any:
    try:
        return parse(line)
    except Directive:
        return None


def samples() -> list[tuple[str, str, list[str]]]:
    """The table of formats in docs/simulate.md: software, format, lines of the sample."""
    text = (ROOT / "docs" / "simulate.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| ([^|]+) \| `([a-z0-9]+)` \| (`.+`) \|$", text, re.MULTILINE)
    return [
        (software, name, [line.strip("`").replace("⇥", "\t").replace("¦", "|") for line in sample.split("<br>")])
        for software, name, sample in found
    ]


@pytest.mark.parametrize("sample", samples(), ids=lambda sample: sample[0])
def test_every_sample_of_the_documentation_is_read(sample: tuple[str, str, list[str]], policy: Path, tmp_path: Path) -> None:
    _, name, lines = sample
    log = tmp_path / "access.log"
    log.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with LogLines(str(log)) as opened:
        read_lines = list(opened)
    assert next(found for found in map(detect, read_lines) if found) == name
    parse = parser_of(name, "ip", None, header=csv_columns(read_lines[0]))
    requests = [request for request in (attempt(parse, line) for line in read_lines[1 if name == "csv" else 0 :]) if request]
    assert requests
    for request in requests:
        assert (request.ip, request.method, request.path) == ("203.0.113.7", "GET", "/a/b")
        assert AT <= request.at_us < AT + 1_000_000
    # And by the command, which recognizes it by itself.
    assert simulate([str(log)], policy, as_json_=True) == 0


def test_the_documentation_has_a_sample_of_every_format() -> None:
    assert {name for _, name, _ in samples()} == set(FORMATS)
    assert len(samples()) >= 20


@pytest.mark.parametrize(
    "line",
    [
        f"10.0.0.1 - - {REST}",
        f"www.example.com:443 10.0.0.1 - - {REST}",
        f"192.0.2.80:443 10.0.0.1 - - {REST}",
        f"10.0.0.1:51334 - - {REST}",
        f"10.0.0.1 - {REST}",
        f"10.0.0.1, 127.0.0.1 - - {REST}",
        f"8.8.8.8, 10.0.0.1 - - {REST}",
        f"8.8.8.8,10.0.0.1,127.0.0.1 - - {REST}",
        f'"8.8.8.8, 10.0.0.1" 127.0.0.1 - - {REST}',
        f"- 10.0.0.1 - - {REST}",
        f"unknown, 10.0.0.1 - - {REST}",
        f"::ffff:10.0.0.1 - - {REST}",
        # A user's name is what the client sent: an address in it is not the client's.
        f"10.0.0.1 - 9.9.9.9 {REST}",
        f"10.0.0.1 - x 9.9.9.9 - y {REST}",
        f"Nov 14 22:13:20 web1 nginx: 10.0.0.1 - - {REST}",
        f"<134>Nov  4 22:13:20 192.0.2.5 nginx[123]: 10.0.0.1 - - {REST}",
        f"<134>1 2023-11-14T22:13:20.003Z 192.0.2.5 nginx 812 - - 10.0.0.1 - - {REST}",
        f'<134>1 2023-11-14T22:13:20.003Z web1 nginx 812 ID47 [a@1 b="c"] 10.0.0.1 - - {REST}',
        f"2023-11-14T22:13:20.123456+01:00 web1 nginx[7]: 10.0.0.1 - - {REST}",
        f"2023-11-14T22:13:20.123456789Z stdout F 10.0.0.1 - - {REST}",
        f"web-1  | 10.0.0.1 - - {REST}",
        json.dumps(f"10.0.0.1 - - {REST}"),
        '"' + f"10.0.0.1 - - {REST}".replace('"', '""') + '"',
        json.dumps({"log": f"10.0.0.1 - - {REST}\n", "stream": "stdout", "time": "2023-11-14T22:13:21Z"}),
        json.dumps({"MESSAGE": f"10.0.0.1 - - {REST}", "_HOSTNAME": "web1"}),
        json.dumps({"log": json.dumps({"time": T0, "remote_addr": "10.0.0.1", "uri": "/a/b"}), "kubernetes": {"host": "n1"}}),
        '2023-11-14T22:13:20.1Z stdout F {"time":1700000000,"remote_addr":"10.0.0.1:443","uri":"/a/b"}',
        json.dumps({"time": T0, "host": "api.example.com", "x_forwarded_for": "8.8.8.8, 10.0.0.1", "path": "/a/b"}),
        json.dumps({"time": T0, "RemoteAddr": "x", "IP": "10.0.0.1", "Path": "https://api.example.com/a/b?c"}),
        json.dumps({"time": T0, "ip": "10.0.0.1", "path": "http://api.example.com:80/a/b"}),
        f"10.0.0.1 - - {REST.replace(' +0000', '.000 +0000')}",
        f"10.0.0.1 - - {REST.replace(ZONE, '2023-11-14T22:13:20+00:00')}",
        f"10.0.0.1 - - {REST.replace(ZONE, '2023-11-14T23:13:20.000+01:00')}",
        f"10.0.0.1 - - {REST.replace(ZONE, '1700000000.000')}",
        f"10.0.0.1 - - {REST.replace('/a/b', 'http://www.example.com/a/b?c')}",
    ],
)
def test_the_client_is_found_whatever_stands_around_it(line: str) -> None:
    (request,) = read([line])
    assert request == Request(AT, "10.0.0.1", "GET", "/a/b", "10.0.0.1", "")


@pytest.mark.parametrize(
    ("text", "trusted", "client"),
    [
        ("203.0.113.7, 10.0.0.2, 10.0.0.3", ["10.0.0.0/8"], "203.0.113.7"),
        ("203.0.113.7, 10.0.0.2, 10.0.0.3", [], "10.0.0.3"),
        ("9.9.9.9, 203.0.113.7, 10.0.0.2", ["10.0.0.0/8"], "203.0.113.7"),
        ("10.0.0.1, 10.0.0.2", ["10.0.0.0/8"], "10.0.0.1"),
        ("203.0.113.7, unknown", [], ""),
        ("unknown, 203.0.113.7", [], "203.0.113.7"),
        ("[2001:DB8::1]:443", [], "2001:db8::1"),
        ("2001:db8:0::1", [], "2001:db8::1"),
        ("fe80::1%eth0", [], "fe80::1"),
        ("203.0.113.7:", [], ""),
        ("203.0.113.7:http", [], ""),
        ("203.0.113.xxx", [], ""),
        ("example.com:443", [], ""),
        ("", [], ""),
        ("-", [], ""),
        (",", [], ""),
    ],
)
def test_a_chain_is_one_client(text: str, trusted: list[str], client: str) -> None:
    clients = Clients([*trusted, "127.0.0.0/8"])
    assert clients(text) == client
    assert clients(text) == client, "remembered"


@given(st.text(max_size=60))
def test_whatever_stands_there_is_an_address_or_nothing(text: str) -> None:
    for found in (address_of(text), Clients(["10.0.0.0/8", "::/8"])(text)):
        assert found == "" or address_of(found) == found


def test_clients_are_remembered_up_to_a_bound() -> None:
    clients = Clients()
    for number in range(70_000):
        clients(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    clients("x" * 100_000)
    assert len(clients._cache) <= 65_536
    assert max(map(len, clients._cache)) <= 256


def test_networks_must_be_networks(policy: Path, tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text(COMBINED)
    with pytest.raises(SettingsError, match=r"--trusted-proxies '10\.0\.0\.0/99' is not a valid address"):
        simulate([str(log)], policy, trusted_proxies=["10.0.0.0/8,10.0.0.0/99"])


def test_ports_and_chains_count_as_one_client(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "a.log"
    lines = [f"example.com:443 203.0.113.7, 10.0.0.{hop} 10.0.1.{hop}:{40_000 + hop} - - {REST}" for hop in range(5)]
    log.write_text("\n".join(lines))
    assert simulate([str(log)], policy, as_json_=True, trusted_proxies=["10.0.0.0/8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["top_blocked"] == [{"subject": "203.0.113.7", "rule": "/a*", "blocked": 2}]
    assert found["untrusted_chains"] == 0
    # Five peers, none of which is known as a proxy: that is said.
    assert simulate([str(log)], policy, as_json_=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["blocked"], found["untrusted_chains"]) == (0, 5)
    assert simulate([str(log)], policy) == 0
    assert "5 lines have a chain of addresses" in capsys.readouterr().out


def test_a_log_of_host_names_is_rejected_with_its_share(policy: Path, tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("\n".join([f"www.example.com - - {REST}"] * 6 + [f"10.0.0.1 - - {REST}"] * 2))
    with pytest.raises(LogError, match=r"75% of 8 lines have a client that is not an IPv4 or IPv6 address.*'www\.example\.com'"):
        simulate([str(log)], policy)


def test_a_few_lines_without_an_address_are_counted(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "a.log"
    log.write_text("\n".join([f"www.example.com - - {REST}"] * 2 + [f"10.0.0.1 - - {REST}"] * 6))
    assert simulate([str(log)], policy, as_json_=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["lines"], found["malformed"], found["no_address"], found["requests"]) == (8, 0, 2, 6)
    assert "'www.example.com'" in found["no_address_examples"][0]
    assert simulate([str(log)], policy) == 0
    assert "2 lines have a client that is not an address" in capsys.readouterr().out


def test_names_of_fields_are_read_in_any_case(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "a.log"
    entries = [{"At": T0, "Net": {"PeerIP": "10.0.0.1"}, "Req": {"Uri": "/a"}, "Tenant": tenant} for tenant in "xxyz"]
    log.write_text("\n".join(map(json.dumps, entries)))
    named = {"field": ["TIME=at", "ip=net.peerip", "path=REQ.URI"], "log_format": "json", "as_json_": True}
    assert simulate([str(log)], policy, **named) == 0
    assert json.loads(capsys.readouterr().out)["blocked"] == 1
    assert simulate([str(log)], policy, subject="TENANT", **named) == 0
    assert json.loads(capsys.readouterr().out)["without_subject"] == 0


def test_w3c_fields_may_change_within_a_log() -> None:
    lines = [
        "#Software: Microsoft Internet Information Services 10.0",
        "#Version: 1.0",
        "#Date: 2023-11-14 22:13:20",
        "#Fields: date time cs-method cs-uri-stem c-ip",
        "2023-11-14 22:13:20 GET /a 10.0.0.1",
        "#Date: 2023-11-14 22:13:21",
        "#Fields: time c-ip cs-method cs-uri-stem cs-username",
        "22:13:21 10.0.0.2 POST /b ann",
    ]
    assert [(each.at_us - AT, each.ip, each.method, each.path) for each in read(lines)] == [
        (0, "10.0.0.1", "GET", "/a"),
        (1_000_000, "10.0.0.2", "POST", "/b"),
    ]
    with pytest.raises(SettingsError, match="no column tenant"):
        read(lines, subject="tenant")


COMPRESSIONS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}
if sys.version_info >= (3, 14):
    COMPRESSIONS["zstd"] = importlib.import_module("compression.zstd").compress


@pytest.mark.parametrize("compress", COMPRESSIONS.values(), ids=COMPRESSIONS)
def test_compressed_logs_are_known_by_their_first_bytes(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], compress: Any
) -> None:
    log = tmp_path / "access.log.1"
    packed = compress("\n".join([COMBINED] * 3000).encode())
    log.write_bytes(packed)
    assert simulate([str(log)], policy, as_json_=True) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 3000
    # Cut off, or damaged, it counts as far as it goes.
    for damaged in (packed[:-12], packed[: len(packed) // 2] + b"\x00" * 20 + packed[len(packed) // 2 + 20 :]):
        log.write_bytes(damaged)
        with LogLines(str(log)) as lines:
            found = list(lines)
            # bzip2, xz and zstd check whole blocks: nothing of a damaged one is handed out.
            assert found[:1] == [COMBINED + "\n"] or compress is not gzip.compress
        assert "is truncated or damaged" in (lines.broken or "")


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python reads zstd from 3.14 on")
def test_a_log_that_cannot_be_read_here_reports_how(policy: Path, tmp_path: Path) -> None:
    log = tmp_path / "access.log.zst"
    log.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    with pytest.raises(LogError, match="zstdcat LOG"):
        simulate([str(log)], policy)


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_element_by_element(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], indent: int | None
) -> None:
    entries = [{"time": T0, "ip": "10.0.0.1", "path": "/a", "note": 'x"]}{[\\' * (number % 50)} for number in range(3000)]
    log = tmp_path / "log.json"
    text = json.dumps(entries, indent=indent)
    log.write_text(text)
    assert simulate([str(log)], policy, as_json_=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["lines"], found["malformed"], found["blocked"], found["broken"]) == (3000, 0, 2997, [])
    log.write_text(text[: len(text) // 2])
    assert simulate([str(log)], policy, as_json_=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert 1000 < found["requests"] < 2000
    assert "the JSON array is truncated" in found["broken"][0]


def test_objects_over_several_lines_are_read_one_by_one(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = ["}{", '"}\n{"', "} \\", {"a": {}}, [{}, {"b": [{}]}], "x" * 100_000]
    entries = [{"time": T0, "ip": "10.0.0.1", "path": "/a", "note": notes[number % len(notes)]} for number in range(30)]
    log = tmp_path / "log.json"
    texts = [json.dumps(entry, indent=number % 4) for number, entry in enumerate(entries)]
    log.write_text("\ufeff\n" + "\n\n".join(texts).replace("\n", "\r\n"), newline="")
    assert simulate([str(log)], policy, as_json_=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["lines"], found["malformed"], found["blocked"], found["broken"]) == (30, 0, 27, [])
    # A damaged object is one malformed record; those before and after it are read.
    for damaged in (texts[0][:-3] + "}", texts[0].replace('"/a"', '"/a'), texts[0].replace("{", "{" * 70_000)):
        log.write_text("\n".join([texts[1], damaged, *texts[2:]]))
        assert simulate([str(log)], policy, as_json_=True) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["lines"], found["malformed"], found["blocked"]) == (30, 1, 26)


@pytest.mark.parametrize("text", ["{\n" * 300_000, "{\n" + '"a":{}\n' * 100_000, "{\n" + "x" * 1_000_000, "{\n"])
def test_an_object_over_several_lines_takes_bounded_memory(tmp_path: Path, text: str) -> None:
    log = tmp_path / "log.json"
    log.write_text(text + "\n{}\n")
    with LogLines(str(log)) as lines:
        assert max(map(len, lines)) <= MAX_ELEMENT


@pytest.mark.parametrize("text", ["[" * 200_000, "[{" * 50_000, '[{"a":"' + "x" * 600_000 + '"}]', "[\n", '[{"a":1}', "[{]"])
def test_an_array_that_is_none_ends(tmp_path: Path, text: str) -> None:
    log = tmp_path / "log.json"
    log.write_text(text)
    with LogLines(str(log)) as lines:
        assert sum(map(len, lines)) <= len(text)


@pytest.mark.parametrize(
    "line",
    [
        "[" * 65_000,
        '[xxxxxxxxxxxxxxxxxxxxxxxx] "' * 2_300,
        f"{'10.0.0.1, ' * 6_000}- - {REST}",
        f"{'a' * 60_000} - - {REST}",
        "1:1 [" * 13_000,
        '"a" ' * 16_000,
        f'[2023-11-14T22:13:20.000Z] "GET / HTTP/1.1" 200 {"- " * 10_000}{chr(34) * 30_000}',
        '"' + "\\" * 65_000 + '"',
    ],
)
def test_no_line_costs_more_than_its_length(line: str) -> None:
    """What 16 times the length costs is about 16 times as much; a square would be 256 times."""

    def work(text: str) -> None:
        detect(text)
        for name in FORMATS:
            parse = parser_of(name, "ip", None, header=["time", "ip", "path"])
            with contextlib.suppress(Malformed, Directive):
                parse(text)

    assert_growth_below(80, lambda size: max(cpu_s(lambda: work(line[:size])), 0.001), len(line) // 16, len(line))


@pytest.mark.parametrize(
    "agent", ["curl/8", 'a "b" c', '" "9.9.9.9" "x', '" 1 2 3 9.9.9.9:1 5 6', '9.9.9.9" "', "", "9.9.9.9 - - [", "\\"]
)
def test_no_header_changes_the_client_of_envoy_s_lines(agent: str) -> None:
    start = '[2023-11-14T22:13:20.000Z] "GET /a/b HTTP/1.1" 200 - '
    default = f'{start}0 12 3 2 "203.0.113.7" "{agent}" "d3b0" "{agent}" "10.0.0.9:80"'
    istio = (
        f'{start}via_upstream - "-" 0 12 3 2 "9.9.9.9" "{agent}" "d3b0" "{agent}" "10.0.0.9:80" '
        "inbound|80|| 127.0.0.6:4 10.0.0.9:80 203.0.113.7:51334 - default"
    )
    for line in (default, istio):
        assert read([line]) == [Request(AT, "203.0.113.7", "GET", "/a/b", "203.0.113.7", "")]


def test_times_of_every_kind() -> None:
    for text in (
        "14/Nov/2023:22:13:20.250 +0000",
        "14/Nov/2023:23:13:20,250 +0100",
        "2023-11-14T22:13:20.250Z",
        "2023-11-14 22:13:20.250 UTC",
        "2023-11-14T23:13:20.250000000+01:00",
        "1700000000.250",
    ):
        assert timestamp_us(text) == AT + 250_000, text
