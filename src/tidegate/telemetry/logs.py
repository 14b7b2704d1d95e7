"""Logs: one JSON line per event in Elastic Common Schema, or plain text for a terminal.

All modules use `logging`; this module sets the format for a server process. A separate thread writes the lines, so that a blocked
reader of the pipe never blocks a check. Lines beyond the queue are dropped and counted. A line has at most 4,096 bytes, so that
workers sharing a pipe never write into each other's lines (PIPE_BUF, pipe(7)).

Any record may contain text from clients. So control characters are escaped in every record (no forged lines, no terminal control
sequences), and the lines that unauthenticated clients can cause are rate limited.
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
"""Maximum number of queued lines: up to 40 MB, usually 4 MB."""
CLOSE_TIMEOUT_S: Final = 2.0

_SECRETS: Final = re.compile(
    # API keys and tokens of Tidegate, passwords in URLs, credentials in headers. Possessive, to avoid quadratic time.
    r"\btga?_[0-9A-Za-z]{20,}|(?<=://)[^/\s\"'@:]*+:[^/\s\"'@]++(?=@)|(?i:(?<=bearer )|(?<=basic ))[\w.~+/=-]{8,}"
)
HIDDEN: Final = "***"
# Control characters, line ends and bidirectional controls: they can make a text look like other lines or other words.
_UNSAFE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_STACK_PREFIX: Final = "  | "
"""Prefix of each stack line in the text format, so that none of them looks like a record."""
UNAUTHENTICATED: Final = "unauthenticated"
"""Name of the attribute (`extra`) that marks records which clients can cause without a token."""
MAX_REPEATED: Final = 30
"""Lines per minute that unauthenticated clients can cause in total; also the lines per minute of one unhandled exception."""
_REPEATS_S: Final = 60.0
_MAX_KINDS: Final = 1_000
# They log each statement with its parameters, or each read of a socket.
_VERBOSE_LOGGERS: Final = (
    "alembic",
    "aiosqlite",
    "sqlalchemy",
    "asyncio",
    "psycopg",
    "httpx",
    "httpcore",
    "urllib3",
    "opentelemetry",
)


class LineWriter:
    """Writes lines to a file descriptor in a separate thread.

    Args:
        descriptor: the file descriptor.
        max_waiting: capacity of the queue in lines, 1 or more.

    Attributes:
        dropped: lines lost because the queue was full or the write failed.
    """

    def __init__(self, descriptor: int, max_waiting: int = MAX_WAITING) -> None:
        self.dropped = 0
        self._descriptor = descriptor
        self._lines: queue.Queue[bytes | None] = queue.Queue(max_waiting)
        # A daemon thread: a blocked reader must not prevent the process from exiting.
        self._thread = threading.Thread(target=self._run, name="log writer", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Queue a line, including its line end; never blocks."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Write the queued lines and stop the thread, within `timeout_s`."""
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
                        # Another process that shares the terminal or pipe may have set it to non-blocking.
                        time.sleep(0.01)
            except OSError:
                # The reader is gone: the metric is the only place left to report it.
                self.dropped += 1


class _RepeatLimit(logging.Filter):
    """Passes a limited number of lines of one kind per minute; the first line after that reports how many were suppressed.

    Attributes:
        suppressed: total number of suppressed lines.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.suppressed = 0
        self._clock = clock
        self._kinds: dict[object, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter.filter`."""
        kind: object
        if getattr(record, UNAUTHENTICATED, False):
            kind = UNAUTHENTICATED
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


class _LineHandler(logging.Handler):
    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self.writer = writer
        self.repeats = _RepeatLimit()
        self.addFilter(self.repeats)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:  # noqa: BLE001
            # A record that cannot be formatted must not fail its request, nor be printed unescaped.
            message, kind = "a log record could not be formatted: %s", type(error).__name__
            line = self.format(
                logging.LogRecord(record.name, logging.ERROR, record.pathname, record.lineno, message, (kind,), None)
            )
        self.writer.write(line.encode(errors="backslashreplace") + b"\n")


class _Text(logging.Formatter):
    """One line per record; the lines of a stack get a prefix, so that they cannot be taken for records."""

    def format(self, record: logging.LogRecord) -> str:
        record.asctime = self.formatTime(record)
        message = _SECRETS.sub(HIDDEN, record.getMessage())
        stack = _SECRETS.sub(HIDDEN, self.formatException(record.exc_info)) if record.exc_info else ""
        # As in `_line`: escapes are longer than the characters they replace.
        for share in (1, 8):
            record.message = escaped(_shortened(message, _MAX_LENGTHS["event"] // share))
            text = self.formatMessage(record)
            if stack:
                shorter = _shortened(stack, _MAX_LENGTHS["error.stack_trace"] // share)
                text = "\n".join((text, *(_STACK_PREFIX + escaped(line) for line in shorter.split("\n"))))
            if len(text.encode(errors="backslashreplace")) < MAX_LINE_BYTES:
                return text
        record.message = "log line dropped: too long"
        return self.formatMessage(record)


def escaped(text: str) -> str:
    """The text with control characters, line ends and bidirectional controls escaped (`\\x1b`, `\\n`, `\\u202e`)."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def configure_logging(level: str, style: str = "auto", worker: int | None = None, stream: TextIO | None = None) -> LineWriter:
    """Set the format and destination of this process's log; queued lines are written at exit.

    Args:
        level: debug, info, warning or error.
        style: json, text, or auto: text if the stream is a terminal, else JSON.
        worker: number of the worker, included in each line.
        stream: standard error by default.

    Returns:
        The writer of the lines.
    """
    stream = sys.stderr if stream is None else stream
    writer = LineWriter(stream.fileno())
    handler = _LineHandler(writer)
    if style == "json" or (style == "auto" and not stream.isatty()):
        handler.setFormatter(_json_formatter(worker))
    else:
        prefix = "" if worker is None else f"worker {worker} "
        handler.setFormatter(_Text(f"%(asctime)s %(levelname)s {prefix}%(name)s: %(message)s"))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        if isinstance(old, _LineHandler):
            old.writer.close()
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in _VERBOSE_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    atexit.register(writer.close)
    return writer


def lines_dropped() -> int:
    """Log lines dropped since the start of this process."""
    return sum(each.writer.dropped for each in logging.getLogger().handlers if isinstance(each, _LineHandler))


def lines_suppressed() -> int:
    """Repeated log lines suppressed since the start of this process."""
    return sum(each.repeats.suppressed for each in logging.getLogger().handlers if isinstance(each, _LineHandler))


def _json_formatter(worker: int | None) -> logging.Formatter:
    service: dict[str, Any] = {"service.name": "tidegate", "service.version": __version__, "process.pid": os.getpid()}
    if worker is not None:
        service["service.node.name"] = f"worker-{worker}"

    def fields(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        """Add the fields of the record under their names in Elastic Common Schema."""
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
        if (exc_info := event.pop("exc_info", None)) and exc_info[1] is not None:
            event["error.type"] = exc_info[0].__name__
            event["error.message"] = str(exc_info[1])
            event["error.stack_trace"] = logging.Formatter().formatException(exc_info)
        return event

    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[fields],
        # Secrets are replaced before texts are shortened: a secret cut in two would not be recognised.
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _without_secrets, _line],
    )


_ENCODED: Final = StructlogFormatter(ensure_ascii=False)
_MAX_LENGTHS: Final = {"event": 1500, "error.message": 500, "error.stack_trace": 1500, "url.path": 500}


def _line(logger: WrappedLogger, name: str, event: EventDict) -> str:
    # Non-ASCII characters and escapes take up to six bytes each: if the line is too long, all fields are cut to an eighth.
    for share in (1, 8):
        shorter = {
            field: _shortened(value, _MAX_LENGTHS.get(field, 200) // share) if isinstance(value, str) else value
            for field, value in event.items()
        }
        line = _safe_json(str(_ENCODED(logger, name, shorter)))
        if len(line.encode(errors="backslashreplace")) < MAX_LINE_BYTES:
            return line
    replacement = {"event": "log line dropped: too long", "log.logger": event.get("log.logger")}
    return str(_ENCODED(logger, name, replacement))


def _safe_json(line: str) -> str:
    """Escape the unsafe characters that the JSON encoder does not (those beyond ASCII); the JSON value stays the same."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


def _without_secrets(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Replace API keys, tokens and passwords in every field."""
    return {field: _SECRETS.sub(HIDDEN, value) if isinstance(value, str) else value for field, value in event.items()}


def _shortened(text: str, max_length: int) -> str:
    """The text cut in the middle to `max_length` characters: the most useful parts of a stack are its ends."""
    if len(text) <= max_length:
        return text
    head = max_length // 3
    return f"{text[:head]} … {text[head - max_length + 3 :]}"
