"""What a log line is, what never is in one, and who waits for whom."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cpu_time import assert_growth_below, cpu_s
from tidegate.admin.tokens import TOKEN_PREFIX
from tidegate.doors.client_address import TrustedProxies
from tidegate.telemetry.logs import (
    HIDDEN,
    MAX_LINE_BYTES,
    MAX_REPEATED,
    UNAUTHENTICATED,
    LineWriter,
    _RepeatLimit,
    configure_logging,
    lines_dropped,
    lines_suppressed,
)
from tidegate.telemetry.requests import CURRENT, Request

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
logger = logging.getLogger("tidegate.test")


@pytest.fixture
def root() -> Iterator[None]:
    """The process's own logging, put back afterwards."""
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    yield
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)


class Pipe:
    """A pipe whose writing end stands in for standard error."""

    def __init__(self, terminal: bool = False) -> None:
        self.reading, writing = os.pipe()
        self.stream = os.fdopen(writing, "w")
        self._terminal = terminal
        self.stream.isatty = lambda: terminal  # type: ignore[method-assign]

    def lines(self, writer: LineWriter) -> list[str]:
        writer.close()
        self.stream.close()
        with os.fdopen(self.reading, encoding="utf-8") as reader:
            return reader.read().splitlines()


def written(act: Callable[[], object], style: str = "json", level: str = "info", worker: int | None = None) -> list[str]:
    pipe = Pipe()
    writer = configure_logging(level, style, worker, pipe.stream)
    act()
    return pipe.lines(writer)


def parsed(act: Callable[[], object], **options: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written(act, **options)]


pytestmark = pytest.mark.usefixtures("root")


def test_a_line_is_json_in_elastic_common_schema() -> None:
    (line,) = parsed(lambda: logger.warning("shard %s is away", "a:1", extra={"ecs": {"tidegate.shard": "a:1"}}), worker=3)
    assert line["message"] == "shard a:1 is away"
    assert line["log.level"] == "warning"
    assert line["ecs.version"]
    assert line["log"]["logger"] == "tidegate.test"
    assert line["service"]["name"] == "tidegate"
    assert line["service"]["node"]["name"] == "worker-3"
    assert line["process"]["pid"] == os.getpid()
    assert line["tidegate"]["shard"] == "a:1"
    assert line["event"]["dataset"] == "tidegate.log"
    assert line["@timestamp"].endswith("Z")
    assert "http" not in line


def test_a_fault_is_reported_with_its_stack() -> None:
    def fail() -> None:
        try:
            {}["no such"]
        except KeyError:
            logger.exception("it failed")

    (line,) = parsed(fail)
    assert line["error"]["type"] == "KeyError"
    assert line["error"]["message"] == "'no such'"
    assert "test_logs.py" in line["error"]["stack_trace"]


def test_lines_of_a_request_carry_its_id_and_trace() -> None:
    def log() -> None:
        token = CURRENT.set(request)
        try:
            logger.info("within")
            request.over = True
            logger.info("after")
        finally:
            CURRENT.reset(token)

    request = Request({"x-request-id": "req-7", "traceparent": TRACEPARENT})
    within, after = parsed(log)
    assert within["http"]["request"]["id"] == "req-7"
    assert within["trace"]["id"] == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert "http" not in after, "a task that lives on is not of that request any more"


@pytest.mark.parametrize("came", [None, "", "two words", "ü", "x" * 129, "a\r\nb"])
def test_an_id_that_is_none_is_replaced(came: str | None) -> None:
    request = Request({} if came is None else {"x-request-id": came})
    assert len(request.id) == 32
    assert request.id == request.id


@pytest.mark.parametrize(
    ("came", "recorded"),
    [
        (TRACEPARENT, True),
        (TRACEPARENT[:-2] + "00", False),
        ("cc" + TRACEPARENT[2:] + "-what-comes-later", True),
        ("00" + TRACEPARENT[2:] + "-more", None),
        ("ff" + TRACEPARENT[2:], None),
        (TRACEPARENT.upper(), None),
        ("00-" + "0" * 32 + "-00f067aa0ba902b7-01", None),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01", None),
        ("", None),
        ("garbage", None),
    ],
)
def test_traceparent(came: str, recorded: bool | None) -> None:
    parent = Request({"traceparent": came}).parent
    assert (None if parent is None else parent.recorded) is recorded


@given(st.text())
def test_no_traceparent_is_too_odd(came: str) -> None:
    parent = Request({"traceparent": came}).parent
    assert parent is None or came.strip().split("-")[1] == parent.trace_id


KEY = "tg_EhU1wGYuRDndsMwbfbdtLr2FSl7Gv98L1h1h2A"
TOKEN = TOKEN_PREFIX + "a1" * 20
SECRETS = [
    (f"the key {KEY} is unknown", KEY),
    (f"GET /x?api_key={KEY}&a=b", KEY),
    (f"Authorization: Bearer {TOKEN}", TOKEN),
    ("authorization: bearer 0123456789abcdef0123", "0123456789abcdef0123"),
    ("cannot reach postgresql://tidegate:hunter2@db1,db2/tidegate", "hunter2"),
    ("cannot reach redis://:hunter2@10.0.0.1:6379/0", "hunter2"),
    ("cannot reach redis://tidegate:hun:ter2@10.0.0.1:6379/0", "hun:ter2"),
]


def test_only_the_traceparent_of_a_trusted_peer_is_read() -> None:
    for peer, read in (("10.0.0.1", True), ("203.0.113.9", False), ("", False)):
        request = Request({"traceparent": TRACEPARENT}, peer=peer, trusts=TrustedProxies(["10.0.0.0/8"]).trusts)
        assert (request.parent is not None) is read


@pytest.mark.parametrize("style", ["json", "text"])
@pytest.mark.parametrize(("text", "secret"), SECRETS)
def test_secrets_are_hidden_wherever_they_come_from(style: str, text: str, secret: str) -> None:
    def log() -> None:
        logger.error("%s", text)
        logger.error("told beside", extra={"ecs": {"url.path": text}})
        try:
            raise ValueError(text)
        except ValueError:
            logger.exception("failed")

    told = "\n".join(written(log, style=style))
    assert secret not in told
    assert HIDDEN in told


def test_looking_for_secrets_takes_time_in_proportion() -> None:
    def cost_s(colons: int) -> float:
        return cpu_s(lambda: written(lambda: logger.error("%s", "://" + ":" * colons)))

    assert_growth_below(1_000, cost_s, 8_000, 800_000)  # 100 times as much; by pairs 10,000


@pytest.mark.parametrize("character", ["x", "ü", "\x00", '"', "😀", "\udc80"])
def test_a_line_is_never_longer_than_a_pipe_takes_whole(character: str) -> None:
    def log() -> None:
        logger.error("%s", character * 20_000)
        try:
            raise ValueError(character * 20_000)
        except ValueError:
            logger.exception("%s", character * 5_000, extra={"ecs": {"url.path": character * 9_000, "x.y": character * 9_000}})

    lines = written(log)
    assert len(lines) == 2
    for line in lines:
        assert len(line.encode()) < MAX_LINE_BYTES
        assert json.loads(line)["log"]["logger"] == "tidegate.test"


FORGED = "2026-11-30 02:00:00,000 INFO tidegate.test: forged"
UNSAFE = (
    "\n",
    "\r",
    "\r\n",
    "\x0b",
    "\x0c",
    "\x1b[2K\x1b[1A",
    "\x1b]0;t\x07",
    "\x85",
    "\x9b2J",
    "\u2028",
    "\u2029",
    "\u202e",
    "\u2066",
    "\x7f",
    "\0",
)


@pytest.mark.parametrize("style", ["json", "text"])
@pytest.mark.parametrize("unsafe", UNSAFE)
def test_no_record_forges_a_line_or_steers_a_terminal(style: str, unsafe: str) -> None:
    text = f"/a{unsafe}{FORGED}"

    def log() -> None:
        logger.info("%s answered", text)
        logger.info("beside", extra={"ecs": {"url.path": text}})
        try:
            raise ValueError(text)
        except ValueError:
            logger.exception("it failed at %s", text)
        logging.getLogger("of.another.library").warning(text)

    pipe = Pipe()
    writer = configure_logging("info", style, None, pipe.stream)
    log()
    writer.close()
    pipe.stream.close()
    with os.fdopen(pipe.reading, "rb") as reader:
        raw = reader.read().decode()
    assert [character for character in raw if character != "\n" and not character.isprintable()] == []
    records = [line for line in raw.split("\n")[:-1] if not line.startswith("  | ")]
    assert len(records) == 4
    assert not any(line.startswith("2026-11-30 02:00:00") for line in raw.split("\n"))
    if style == "json":
        assert json.loads(records[1])["url"]["path"] == text  # the same value, written otherwise
        assert FORGED in json.loads(records[2])["error"]["message"]


def test_a_record_in_text_is_never_longer_than_a_pipe_takes_whole() -> None:
    def log() -> None:
        for character in ("x", "\x1b", "😀", "\udc80"):
            logger.error("%s", character * 20_000)
            try:
                raise ValueError("\n" * 20_000)
            except ValueError:
                logger.exception("%s", character * 20_000)

    lines = written(log, style="text")
    records: list[str] = []
    for line in lines:
        if line.startswith("  | "):
            records[-1] += "\n" + line
        else:
            records.append(line)
    assert len(records) == 8
    assert max(len(record.encode()) for record in records) < MAX_LINE_BYTES


@pytest.mark.parametrize("style", ["json", "text"])
def test_a_record_that_cannot_be_formatted_is_not_printed_as_it_is(style: str, capfd: pytest.CaptureFixture[str]) -> None:
    (line,) = written(lambda: logger.info("%d", f"a\n{FORGED}"), style=style)
    assert "could not be formatted: TypeError" in line
    assert style == "text" or json.loads(line)["log.level"] == "error"
    assert capfd.readouterr().err == ""


def test_the_log_rate_of_unauthenticated_requests_is_limited_and_counted() -> None:
    def log() -> None:
        for number in range(100):
            logger.info("%s %d", "by a stranger", number, extra={UNAUTHENTICATED: True})
            logger.info("by an operator %d", number)

    lines = written(log)
    assert sum("by a stranger" in line for line in lines) == MAX_REPEATED
    assert sum("by an operator" in line for line in lines) == 100
    assert lines_suppressed() == 100 - MAX_REPEATED


def test_a_repeated_error_is_limited_and_summarized_later() -> None:
    now = 0.0
    repeats = _RepeatLimit(lambda: now)
    kind = (ValueError, ValueError("x"), None)

    def record() -> logging.LogRecord:
        return logging.LogRecord("tidegate.test", logging.ERROR, "f", 1, "it failed at %s", ("x",), kind)

    assert [repeats.filter(record()) for _ in range(MAX_REPEATED + 5)] == [True] * MAX_REPEATED + [False] * 5
    assert repeats.filter(logging.LogRecord("tidegate.test", logging.ERROR, "f", 1, "another", (), kind))
    now = 61.0
    later = record()
    assert repeats.filter(later)
    assert later.getMessage() == "it failed at x (5 more lines like this were suppressed)"


def test_text_for_a_terminal_and_json_for_a_pipe() -> None:
    for terminal, is_json in ((True, False), (False, True)):
        pipe = Pipe(terminal)
        writer = configure_logging("info", "auto", None, pipe.stream)
        logger.info("hello")
        (line,) = pipe.lines(writer)
        assert line.startswith("{") is is_json
        assert "hello" in line


def test_nothing_below_the_level_is_logged_and_other_libraries_never() -> None:
    def log() -> None:
        logger.debug("quiet")
        logging.getLogger("aiosqlite").debug("with parameters")

    assert written(log) == []
    assert [json.loads(line)["message"] for line in written(log, level="debug")] == ["quiet"]


def test_a_reader_that_hangs_stops_nobody_and_what_it_misses_is_counted() -> None:
    reading, writing = os.pipe()
    writer = LineWriter(writing, max_waiting=100)
    line = b"x" * 1023 + b"\n"
    before = threading.active_count()
    for _ in range(
        1000
    ):  # a pipe holds 64 kB, the queue 100 lines: the others find no room, and whoever waited would wait for ever
        writer.write(line)
    assert writer.dropped >= 1000 - 64 - 100 - 1
    writer.close(timeout_s=0.2)
    read = 0
    while read < (1000 - writer.dropped) * len(line):
        read += len(os.read(reading, 65_536))
    assert read == (1000 - writer.dropped) * len(line), "what was taken is whole"
    assert threading.active_count() <= before
    os.close(reading)
    os.close(writing)


def test_a_reader_that_is_gone_is_counted() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    writer = LineWriter(writing)
    writer.write(b"nobody\n")
    writer.close()
    assert writer.dropped == 1
    os.close(writing)


def test_what_is_dropped_is_a_metric() -> None:
    pipe = Pipe()
    writer = configure_logging("info", "json", None, pipe.stream)
    assert lines_dropped() == 0
    writer.dropped = 3
    assert lines_dropped() == 3
    pipe.lines(writer)
