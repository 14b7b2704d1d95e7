"""The command from end to end: real files, real processes, what is printed, what it ends with."""

from __future__ import annotations

import gzip
import json
import os
import pty
import random
import re
import resource
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cases.logs import COMBINED, COMMON, T0
from tests.moments import PATIENCE_S
from tidegate.errors import PolicyError, SettingsError, TidegateError
from tidegate.tools.charts import clean
from tidegate.tools.simulate.command import Simulation, simulate
from tidegate.tools.simulate.log_lines import MAX_LINE, LogError, LogLines
from tidegate.tools.simulate.page import render_page
from tidegate.tools.simulate.report import Report, as_json

POLICY = """
[[tiers]]
name = "public"
  [[tiers.rules]]
  endpoint = "/a*"
  algorithm = "fixed_window"
  limits = ["3/minute"]
  subject = "ip"
  [[tiers.rules]]
  endpoint = "/a*"
  algorithm = "fixed_window"
  limits = ["1/minute"]
  subject = "ip"
  mode = "shadow"
[anonymous]
tier = "public"
"""
HOSTILE = "\x1b[2J\x1b]0;owned\x07[bold red]x[/]<script>alert(1)</script>\"'&\u202e"
ENVIRONMENT = os.environ | {"COLUMNS": "200", "PYTHONUTF8": "1"}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "try.policy.toml"
    path.write_text(POLICY)
    return path


def row(second: int, ip: str = "10.0.0.1", path: str = "/a", user: str = "-") -> str:
    """A JSON line; the easiest to make hostile."""
    return json.dumps({"time": T0 + second, "ip": ip, "path": path, "user": user})


def write(directory: Path, lines: list[str], name: str = "access.log") -> str:
    path = directory / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def told(logs: list[str], policy: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    """What `--json` prints."""
    assert simulate(logs, policy, as_json_=True, **options) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def run(*arguments: str, text: bytes = b"", **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "tidegate", "simulate", *arguments]
    return subprocess.run(command, input=text, capture_output=True, timeout=60, env=ENVIRONMENT, check=False, **options)


def test_json_keeps_the_contract(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write(tmp_path, [row(0)] * 5 + ["garbage", "", row(30, "10.0.0.2"), row(31, path="/b"), row(31, path="//b")])
    found = told([log], policy, capsys)
    assert (found["lines"], found["malformed"], found["span_s"], found["refused_paths"]) == (9, 1, 31.0, 1)
    contract = [{name: each[name] for name in ("rule", "endpoint", "requests", "allowed", "blocked")} for each in found["rules"]]
    assert contract == [
        {"rule": "/a*", "endpoint": "/a*", "requests": 6, "allowed": 4, "blocked": 2},
        {"rule": "(no rule)", "endpoint": "", "requests": 1, "allowed": 1, "blocked": 0},
        {"rule": "/a* shadow", "endpoint": "/a*", "requests": 6, "allowed": 2, "blocked": 4},
    ]
    assert [each["mode"] for each in found["rules"]] == ["enforce", "none", "shadow"]
    assert found["top_blocked"] == [{"subject": "10.0.0.1", "rule": "/a*", "blocked": 2}]
    assert found["worst_minute"] == {"at": "2023-11-14T22:13:00+00:00", "blocked": 2}
    assert (found["requests"], found["allowed"], found["blocked"]) == (7, 5, 2)
    assert (found["from"], found["to"]) == ("2023-11-14T22:13:20+00:00", "2023-11-14T22:13:51+00:00")
    assert found["malformed_examples"] == [f"{log}:6: not JSON: JSON is malformed: invalid character (byte 0): garbage"]


def test_the_first_five_malformed_lines_are_shown_with_their_numbers(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["# software 1.0", "", COMMON.replace("/a ", "/b ")] + [f"junk {number}" for number in range(20)]
    found = told([write(tmp_path, lines)], policy, capsys)
    assert (found["lines"], found["malformed"], found["requests"]) == (22, 21, 1)
    assert [int(example.split(":")[1]) for example in found["malformed_examples"]] == [1, 4, 5, 6, 7]
    assert "junk 0" in found["malformed_examples"][1]


def test_the_terminal_shows_everything_and_nothing_hostile(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    log = write(tmp_path, [row(0, "-", user=HOSTILE)] * 5 + [row(1, path="/;" + HOSTILE), HOSTILE])
    assert simulate([log], policy, subject="user") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.replace("\n", "").isprintable()
    assert "5 requests from 2023-11-14T22:13:20+00:00" in shown.out
    assert re.search(r"/a\* +public +5 +3 +2 +40\.0%", shown.out)
    assert re.search(r"/a\* shadow +public +5 +1 +4 +80\.0%", shown.out)
    assert r"\x1b[2J\x1b]0;owned\x07[bold red]x[/]<script>" in shown.out
    assert "Worst minute: 2023-11-14T22:13:00+00:00, 2 blocked" in shown.out
    assert "7 lines read, 1 malformed" in shown.out
    assert "rejected with 400 because of the encoding of their paths, and not counted by any rule: 1\n" in shown.out


@given(st.text())
def test_clean_text_is_printable(text: str) -> None:
    assert clean(text).isprintable()
    assert clean(clean(text)) == clean(text)


class Page(HTMLParser):
    """What a browser would see of the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def of(self, tag: str) -> list[str]:
        return [text for inside, text in self.texts if inside == tag]


def test_the_page_holds_the_numbers_and_nothing_of_the_log_but_text(policy: Path, tmp_path: Path) -> None:
    lines = [row(60 * minute + second, "-", user=HOSTILE) for minute in range(3) for second in range(minute * 2 + 2)]
    log = write(tmp_path, [*lines, HOSTILE, row(200, path="/;" + HOSTILE)])
    html = tmp_path / "report.html"
    assert simulate([log], policy, html=html, subject="user") == 0
    text = html.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    # Nothing that runs, fetches or hides.
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "span", "b", "pre"),
        *("svg", "line", "text", "polyline", "rect", "table", "thead", "tbody", "tr", "th", "td"),
    }
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name in ("href", "src")]
    assert "url(" not in text
    assert text.replace("\n", "").isprintable()
    assert any("<script>alert(1)</script>" in cell for cell in page.of("td")), "shown as text"
    # Minutes hold 2, 4 and 6 requests, of which 3 a minute pass, and the last line, whose path is refused.
    assert {"allowed: 8", "blocked: 4"} <= set(page.of("title"))
    lines_drawn = {attributes["class"]: attributes["points"] for tag, attributes in page.tags if tag == "polyline"}
    heights = {name: [float(point.split(",")[1]) for point in (points or "").split()] for name, points in lines_drawn.items()}
    assert len(heights["allowed"]) == len(heights["blocked"]) >= 3
    assert heights["allowed"][0] > heights["allowed"][1] == min(heights["allowed"]), "more requests are higher up"
    assert heights["blocked"][0] > heights["blocked"][1] > heights["blocked"][2]
    bars = [attributes for tag, attributes in page.tags if tag == "rect"]
    assert [bar["class"] for bar in bars] == ["blocked"] * 3
    enforced, shadow, top = (float(bar["width"] or 0) for bar in bars)
    assert shadow / enforced == pytest.approx(9 / 4, rel=0.01)
    assert top == shadow
    assert {"/a*: 4", "/a* shadow: 9"} <= set(page.of("title"))
    assert page.of("td")[:7] == ["/a*", "public", "enforce", "12", "8", "4", "33.3%"]


def test_the_page_of_nothing_blocked_and_of_a_long_time(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write(tmp_path, [row(day * 86_400) for day in range(400)])
    report = told([log], policy, capsys)
    assert report["worst_minute"] == {"at": None, "blocked": 0}
    assert sum(step[1] for step in report["series"]) == 400
    assert simulate([log], policy, html=tmp_path / "report.html") == 0
    page = Page((tmp_path / "report.html").read_text())
    assert "allowed: 400" in page.of("title")
    assert "Nothing was blocked." in " ".join(page.of("p"))
    assert "requests per 4 days" in page.of("span")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(0, 900), st.sampled_from("123"), st.sampled_from(("/a", "/ab", "/b", "//"))),
        min_size=1,
        max_size=60,
    ),
    st.randoms(use_true_random=False),
)
def test_any_shuffle_within_the_window_gives_the_report_of_the_sorted_log(
    policy: Path, tmp_path: Path, drawn: list[tuple[int, str, str]], chance: random.Random
) -> None:
    drawn.sort()
    shuffled = sorted(drawn, key=lambda each: each[0] + chance.uniform(0, 119))
    reports = []
    for entries in (drawn, shuffled):
        log = write(tmp_path, [row(second, f"10.0.0.{ip}", path) for second, ip, path in entries])
        report = simulated(log, policy)
        assert report.late == 0
        # The refused paths are the same; which are shown first of those of one second is not.
        reports.append(as_json(report) | {"out_of_order": 0})
    assert reports[0] == reports[1]


def simulated(log: str, policy: Path) -> Report:
    """A report as a record."""
    from tidegate.policy.toml_reader import load_policy
    from tidegate.tools.simulate.replay import Replay
    from tidegate.tools.simulate.time_order import TimeOrder

    replay = Replay(load_policy(policy), None, True)
    simulation = Simulation(replay, TimeOrder(replay.decide, 120, 100_000))
    with LogLines(log) as lines:
        for _ in simulation.read(lines):
            pass
    return simulation.finish()


def test_late_lines_are_counted_and_decided_at_the_current_time(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write(tmp_path, [row(0), row(600), row(700), row(0), row(0), row(0), row(590)])
    found = told([log], policy, capsys, reorder="2m")
    assert (found["out_of_order"], found["late"]) == (4, 3)
    # The three late ones are decided at second 0, the last moment that was decided before them: 4 in its minute.
    assert (found["requests"], found["blocked"]) == (7, 1)
    assert told([log], policy, capsys, reorder="1h")["late"] == 0


@pytest.mark.parametrize("reorder_max", [1, 3])
def test_a_small_reorder_max_costs_order_not_requests(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reorder_max: int
) -> None:
    log = write(tmp_path, [row(second) for second in (5, 4, 3, 2, 1, 6)])
    found = told([log], policy, capsys, reorder_max=reorder_max)
    assert found["requests"] == 6
    assert found["late"] > 0


def test_formats_may_differ_between_logs(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = [
        write(tmp_path, [COMBINED], "combined.log"),
        write(tmp_path, [COMMON], "common.log"),
        write(tmp_path, [row(0)], "lines.json"),
        write(tmp_path, ["\ufefftime,ip,path", f'{T0},10.0.0.1,"/a,b"'], "table.csv"),
    ]
    found = told(logs, policy, capsys)
    assert (found["lines"], found["malformed"], found["requests"], found["blocked"]) == (4, 0, 4, 1)


def test_records_of_csv_with_line_breaks(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["time,ip,path,agent", f'{T0},10.0.0.1,/a,"two\nlines, and ""three"""', f'{T0},10.0.0.1,/a,"never closed']
    lines += [f"{T0},10.0.0.1,/a,x"] * 2 + [f'{T0},10.0.0.1,/a,"x\r\n\n"', f"{T0},nobody,/a,x"]
    found = told([write(tmp_path, lines, "table.csv")], policy, capsys)
    assert (found["lines"], found["malformed"], found["requests"], found["blocked"]) == (6, 1, 4, 1)
    (example,) = found["malformed_examples"]
    assert "table.csv:4: not CSV" in example
    (no_address,) = found["no_address_examples"]
    assert "table.csv:10:" in no_address


def test_fields_and_subjects_may_be_named(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [{"at": T0, "cf_ip": "10.0.0.1", "p": "/a", "Tenant": tenant} for tenant in ("x", "x", "y", "z")]
    log = write(tmp_path, [json.dumps(each) for each in entries])
    named = {"field": ["time=at", "ip=cf_ip", "path=p"], "log_format": "json"}
    assert told([log], policy, capsys, **named)["blocked"] == 1
    assert told([log], policy, capsys, subject="Tenant", **named)["without_subject"] == 0
    assert told([log], policy, capsys, subject="Other", **named)["without_subject"] == 4


def test_gzip_is_known_by_its_first_bytes(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "access.log.1"
    packed.write_bytes(gzip.compress((row(0) + "\n").encode()) + gzip.compress((row(1) + "\n").encode()))
    assert told([str(packed)], policy, capsys)["requests"] == 2


def test_a_gzip_stream_that_is_cut_off_counts_as_far_as_it_goes(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(3)
    whole = gzip.compress("".join(row(second, f"10.{chance.randrange(256)}.0.1") + "\n" for second in range(20_000)).encode())
    cut = tmp_path / "access.log.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    found = told([str(cut)], policy, capsys)
    assert 5_000 < found["requests"] < 15_000
    assert found["malformed"] == 0
    assert len(found["broken"]) == 1
    assert "is truncated" in found["broken"][0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no line in"),
        (b"\n\n \n", "no line in"),
        (random.Random(1).randbytes(64) + bytes(range(256)) * 50, "has a known format"),
        (gzip.compress(row(0).encode() * 2000, mtime=0)[:15], "is truncated"),
        (b"\x1f\x8b not gzip", "is truncated or damaged"),
        (b"x" * 3 * MAX_LINE, "has a known format"),
        (b'{"time": 1}\n' * 9, "all 9 lines are malformed"),
        (b"time,path,ip\n", "no line in"),
    ],
)
def test_a_log_without_a_request_is_rejected(policy: Path, tmp_path: Path, content: bytes, words: str) -> None:
    log = tmp_path / "access.log"
    log.write_bytes(content)
    with pytest.raises(LogError, match=words) as refused:
        simulate([str(log)], policy)
    assert refused.value.message.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"log_format": "xml"}, SettingsError, "--format 'xml'"),
        ({"reorder": "soon"}, SettingsError, "--reorder 'soon'"),
        ({"reorder": "-5s"}, SettingsError, "--reorder '-5s'"),
        ({"tier": "gold"}, SettingsError, "no tier 'gold'"),
        ({"field": ["colour=x"]}, SettingsError, "--field 'colour=x'"),
        ({"field": ["ip="]}, SettingsError, "--field 'ip='"),
        ({"html": Path("/nowhere/at/all.html")}, SettingsError, "directory does not exist"),
        ({"html": Path("/")}, SettingsError, "cannot be written"),
        ({"policy": Path("/nowhere.toml")}, PolicyError, "not there"),
        ({"logs": ["/nowhere.log"]}, LogError, "/nowhere.log cannot be read: No such file"),
        ({"logs": ["-", "/nowhere.log"]}, LogError, "/nowhere.log cannot be read"),
        ({"logs": ["/"]}, LogError, "/ cannot be read: Is a directory"),
    ],
)
def test_what_cannot_be_done_is_reported_in_one_sentence(
    policy: Path, tmp_path: Path, options: dict[str, Any], error: type[TidegateError], words: str
) -> None:
    arguments: dict[str, Any] = {"logs": [write(tmp_path, [row(0)])], "policy": policy} | options
    with pytest.raises(error, match=re.escape(words)):
        simulate(**arguments)


def test_lines_longer_than_any_are_cut_and_cost_no_memory(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = COMBINED.replace("Agent", "A" * 3 * MAX_LINE)
    found = told([write(tmp_path, [long, COMBINED, "x" * 5 * MAX_LINE, COMBINED])], policy, capsys)
    assert (found["lines"], found["requests"], found["malformed"]) == (4, 3, 1)


def test_standard_input_exit_codes_and_pipes(policy: Path) -> None:
    log = "".join(row(second) + "\n" for second in range(5)).encode()
    for text in (log, gzip.compress(log)):
        done = run("-", "-p", str(policy), text=text)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"5 requests" in done.stdout
        assert b"\x1b" not in done.stdout
    refused = run("-", "-p", str(policy), text=b"nothing\n")
    assert (refused.returncode, refused.stdout) == (2, b"")
    assert refused.stderr.count(b"\n") == 1
    help_text = run("--help").stdout.decode()
    assert all(option in help_text for option in ("--policy", "--subject", "--reorder", "--field", "--html", "zcat"))


def test_interrupted_it_reports_what_it_has(policy: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tidegate", "simulate", "-", "-p", str(policy), "--json"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stdin is not None
    # More than a pipe holds: when this has been written, the simulation has begun to read.
    process.stdin.write("".join(row(second) + "\n" for second in range(20_000)).encode())
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    # Its log has not ended: the signal alone ends it.
    assert process.wait(timeout=PATIENCE_S) == 130
    out, err = process.communicate()
    assert 0 < json.loads(out)["lines"] <= 20_000
    assert b"interrupted" in err


def test_a_report_is_the_same_whoever_renders_it(policy: Path, tmp_path: Path) -> None:
    log = write(tmp_path, [row(0)] * 5)
    report = simulated(log, policy)
    assert report == simulated(log, policy)
    assert render_page(report, "p", [log]) == render_page(report, "p", [log])


def test_a_pipe_is_a_log_and_many_logs_are_opened_one_at_a_time(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write(tmp_path, [row(0)])
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, most))
    try:
        assert told([log] * 300, policy, capsys)["requests"] == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = subprocess.Popen(["/bin/sh", "-c", f"exec cat '{log}' > '{fifo}'"])
    assert told([str(fifo)], policy, capsys)["requests"] == 1
    assert writer.wait(timeout=PATIENCE_S) == 0


def test_a_terminal_sees_how_far_it_is_and_a_pipe_does_not(policy: Path, tmp_path: Path) -> None:
    log = write(tmp_path, [row(second) for second in range(50_000)])
    command = [sys.executable, "-m", "tidegate", "simulate", log, "-p", str(policy), "--json"]
    try:
        ours, theirs = pty.openpty()
    except OSError as problem:
        pytest.skip(f"this machine gives no terminal: {problem}")
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=ENVIRONMENT | {"TERM": "xterm"})
        os.close(theirs)
        out, _ = process.communicate(timeout=300)
        shown = terminal.read(100_000)
    assert process.returncode == 0
    assert b"simulating" in shown
    assert json.loads(out)["requests"] == 50_000
    assert run(log, "-p", str(policy)).stderr == b""


def test_budgets_of_tokens_are_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = tmp_path / "tokens.policy.toml"
    policy.write_text("""
    [[tiers]]
    name = "public"
      [[tiers.rules]]
      name = "tokens"
      endpoint = "/chat"
      algorithm = "fixed_window"
      subject = "ip"
      limits = ["1000/day", "5 concurrent"]
    [anonymous]
    tier = "public"
    """)
    log = tmp_path / "tokens.log"
    lines = [{"time": T0 + second, "ip": "10.0.0.1", "path": "/chat"} for second in range(4)]
    costs = ({"usage": {"tokens": 700}}, {"usage": {"tokens": 400}}, {}, {"usage": {"tokens": "many"}})
    log.write_text("".join(json.dumps(line | cost) + "\n" for line, cost in zip(lines, costs, strict=True)))
    assert simulate([str(log)], policy, cost_field="usage.tokens", as_json_=True) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report["rules"]
    assert (row["allowed"], row["blocked"], row["allowed_units"], row["blocked_units"]) == (2, 1, 701, 400)
    assert (report["malformed"], report["with_costs"], report["not_simulated"]) == (1, True, ["public: tokens"])
    assert "the cost 'many' is not a whole number" in report["malformed_examples"][0]
    assert simulate([str(log)], policy, cost_field="usage.tokens") == 0
    printed = capsys.readouterr().out
    assert "units allowed" in printed
    assert "not simulated" in printed
