"""Logs: one JSON line an event in Elastic Common Schema, or plain text for a terminal.

The modules log through `logging`, as a library must; here a server decides what a line looks like. Lines are written by a
thread of their own: a reader of the pipe that hangs must not stop a check. What it cannot take is dropped and counted, and a line
is cut to 4,096 bytes, so that several workers that share a pipe never write into each other's lines (PIPE_BUF, pipe(7)).

What clients send may be part of any record. So every record, whoever made it and in whichever format, is written without control
characters (a line cannot be forged, a terminal not be steered), and what strangers can repeat at will is bounded.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import structlog
from ecs_logging import StructlogFormatter
from structlog.typing import EventDict, WrappedLogger

from tidegate._version import __version__
from tidegate.telemetry.requests import current

FORMATS: Final = ("auto", "json", "text")
MAX_LINE_BYTES: Final = 4096
MAX_WAITING: Final = 10_000
"""Most lines that wait for the reader of the log: 40 MB at most, usually 4."""
CLOSE_TIMEOUT_S: Final = 2.0

_SECRETS: Final = re.compile(
    # Keys and tokens of ours, passwords in URLs, credentials in headers. Possessive, so that no text takes quadratic time.
    r"\btga?_[0-9A-Za-z]{20,}|(?<=://)[^/\s\"'@:]*+:[^/\s\"'@]++(?=@)|(?i:(?<=bearer )|(?<=basic ))[\w.~+/=-]{8,}"
)
HIDDEN: Final = "***"
# Controls, ends of lines and changes of direction: a text with them looks like other lines, or other words, than were written.
_UNSAFE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_CONTINUED: Final = "  | "
"""What begins each line of a stack in the text format, so that none of them looks like a record."""
BY_STRANGER: Final = "by_stranger"
"""Name of the attribute (`extra`) of records that anybody can cause without a token."""
MAX_REPEATED: Final = 30
"""Lines a minute that strangers can cause, all together; also those of one unhandled exception."""
_REPEATS_S: Final = 60.0
_MAX_KINDS: Final = 1_000
# They tell each statement, with its parameters, or each read of a socket.
_CHATTY: Final = ("alembic", "aiosqlite", "sqlalchemy", "asyncio", "psycopg", "httpx", "httpcore", "urllib3", "opentelemetry")


class LineWriter:
    """Writes lines to a file descriptor from a thread of its own.

    Args:
        descriptor: where to.
        most_waiting: lines kept while the reader is slow, 1 or more.

    Attributes:
        dropped: lines that were not taken, or could not be written.
    """

    def __init__(self, descriptor: int, most_waiting: int = MAX_WAITING) -> None:
        self.dropped = 0
        self._descriptor = descriptor
        self._lines: queue.Queue[bytes | None] = queue.Queue(most_waiting)
        # A daemon: a reader that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="log writer", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Hand over a line; never waits.

        Args:
            line: with its end.
        """
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Write what waits, and end.

        Args:
            timeout_s: how long at most, s.
        """
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=timeout_s)
        self._thread.join(max(deadline - time.monotonic(), 0))

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                while line:
                    try:
                        line = line[os.write(self._descriptor, line) :]
                    except BlockingIOError:
                        # Whoever shares the terminal or pipe may have made it non-blocking.
                        time.sleep(0.01)
            except OSError:
                # Nobody reads any more: there is no place left to say so but the metric.
                self.dropped += 1


class _Repeats(logging.Filter):
    """Lets a bounded number of lines of one kind pass each minute, and says in the next minute how many were left out.

    Attributes:
        suppressed: lines left out so far.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.suppressed = 0
        self._clock = clock
        self._kinds: dict[object, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter.filter`."""
        kind: object
        if getattr(record, BY_STRANGER, False):
            kind = BY_STRANGER
        elif record.exc_info:
            kind = (record.name, record.msg)
        else:
            return True
        now = self._clock()
        started, count = self._kinds.get(kind, (now, 0))
        if now - started >= _REPEATS_S:
            if count > MAX_REPEATED:
                record.msg = f"{record.msg} ({count - MAX_REPEATED} more lines like this were suppressed)"
            started, count = now, 0
        if len(self._kinds) >= _MAX_KINDS and kind not in self._kinds:
            self._kinds.clear()
        self._kinds[kind] = started, count + 1
        if count < MAX_REPEATED:
            return True
        self.suppressed += 1
        return False


class _ToWriter(logging.Handler):
    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self.writer = writer
        self.repeats = _Repeats()
        self.addFilter(self.repeats)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:  # noqa: BLE001
            # A line that cannot be made must not fail the request that it is about, nor be printed as it is.
            said, kind = "a log record could not be formatted: %s", type(error).__name__
            line = self.format(logging.LogRecord(record.name, logging.ERROR, record.pathname, record.lineno, said, (kind,), None))
        self.writer.write(line.encode(errors="backslashreplace") + b"\n")


class _Text(logging.Formatter):
    """A record in a line; the lines of a stack are marked, so that no record can be forged in one."""

    def format(self, record: logging.LogRecord) -> str:
        record.asctime = self.formatTime(record)
        message = _SECRETS.sub(HIDDEN, record.getMessage())
        stack = _SECRETS.sub(HIDDEN, self.formatException(record.exc_info)) if record.exc_info else ""
        # As in `_line`: escapes take more room than what they stand for.
        for share in (1, 8):
            record.message = escaped(_shortened(message, _MOST["event"] // share))
            text = self.formatMessage(record)
            if stack:
                shorter = _shortened(stack, _MOST["error.stack_trace"] // share)
                text = "\n".join((text, *(_CONTINUED + escaped(line) for line in shorter.split("\n"))))
            if len(text.encode(errors="backslashreplace")) < MAX_LINE_BYTES:
                return text
        record.message = "log line dropped: too long"
        return self.formatMessage(record)


def escaped(text: str) -> str:
    """A text of one line, in which nothing steers a terminal.

    Args:
        text: any.

    Returns:
        The text with escapes (`\\x1b`, `\\n`, `\\u202e`) for control characters, ends of lines and changes of direction.
    """
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def configure_logging(level: str, style: str = "auto", worker: int | None = None, stream: TextIO | None = None) -> LineWriter:
    """Decide for this process what its log lines look like and where they go; what waits is written at its end.

    Args:
        level: debug, info, warning or error.
        style: json, text, or auto: text where the stream is a terminal, else JSON.
        worker: number of the worker, told in each line.
        stream: standard error where not given.

    Returns:
        What writes the lines.
    """
    stream = sys.stderr if stream is None else stream
    writer = LineWriter(stream.fileno())
    handler = _ToWriter(writer)
    if style == "json" or (style == "auto" and not stream.isatty()):
        handler.setFormatter(_json_formatter(worker))
    else:
        seat = "" if worker is None else f"worker {worker} "
        handler.setFormatter(_Text(f"%(asctime)s %(levelname)s {seat}%(name)s: %(message)s"))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        if isinstance(old, _ToWriter):
            old.writer.close()
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    atexit.register(writer.close)
    return writer


def lines_dropped() -> int:
    """Log lines that nobody took, since the start of this process."""
    return sum(each.writer.dropped for each in logging.getLogger().handlers if isinstance(each, _ToWriter))


def lines_suppressed() -> int:
    """Log lines left out because many of their kind came, since the start of this process."""
    return sum(each.repeats.suppressed for each in logging.getLogger().handlers if isinstance(each, _ToWriter))


def _json_formatter(worker: int | None) -> logging.Formatter:
    service: dict[str, Any] = {"service.name": "tidegate", "service.version": __version__, "process.pid": os.getpid()}
    if worker is not None:
        service["service.node.name"] = f"worker-{worker}"

    def fields(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        """What Elastic Common Schema calls what a record has."""
        record: logging.LogRecord = event["_record"]
        event["@timestamp"] = (
            datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        )
        event["log.logger"] = record.name
        event["event.dataset"] = "tidegate.log"
        event.update(service)
        request = current()
        if request is not None:
            event["http.request.id"] = request.id
            if (parent := request.parent) is not None:
                event["trace.id"] = parent.trace_id
            if request.check is not None:
                event["url.path"] = request.check.path
        event.update(getattr(record, "ecs", {}))
        if (fault := event.pop("exc_info", None)) and fault[1] is not None:
            event["error.type"] = fault[0].__name__
            event["error.message"] = str(fault[1])
            event["error.stack_trace"] = logging.Formatter().formatException(fault)
        return event

    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[fields],
        # Secrets before the cutting: what is left of one that was cut in two would not be known for what it is.
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _without_secrets, _line],
    )


_ENCODED: Final = StructlogFormatter(ensure_ascii=False)
_MOST: Final = {"event": 1500, "error.message": 500, "error.stack_trace": 1500, "url.path": 500}


def _line(logger: WrappedLogger, name: str, event: EventDict) -> str:
    # Characters beyond ASCII and escapes take up to six bytes each: where the usual lengths are too much, few of each are left.
    for share in (1, 8):
        shorter = {
            field: _shortened(value, _MOST.get(field, 200) // share) if isinstance(value, str) else value
            for field, value in event.items()
        }
        line = _safe_json(str(_ENCODED(logger, name, shorter)))
        if len(line.encode(errors="backslashreplace")) < MAX_LINE_BYTES:
            return line
    told = {"event": "log line dropped: too long", "log.logger": event.get("log.logger")}
    return str(_ENCODED(logger, name, told))


def _safe_json(line: str) -> str:
    """JSON says the same with these characters escaped; the encoder leaves those beyond ASCII as they are."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


def _without_secrets(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """The last to look: no key, token or password may pass, wherever a text came from."""
    return {field: _SECRETS.sub(HIDDEN, value) if isinstance(value, str) else value for field, value in event.items()}


def _shortened(text: str, most: int) -> str:
    """A text with its middle left out, if it is longer than `most` characters: of a stack, both ends tell most."""
    if len(text) <= most:
        return text
    head = most // 3
    return f"{text[:head]} … {text[head - most + 3 :]}"
