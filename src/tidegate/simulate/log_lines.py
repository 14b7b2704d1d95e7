"""The lines of logs: from files, gzip or standard input, with bounded memory whatever they hold."""

from __future__ import annotations

import gzip
import io
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final, cast

from tidegate.errors import TidegateError

MAX_LINE: Final = 64 * 1024
_GZIP_MAGIC: Final = b"\x1f\x8b"


class LogError(TidegateError):
    """A log cannot be read at all."""

    code = "LOG_UNREADABLE"
    status = 400


def log_size(source: str) -> int | None:
    """Bytes of a log, before it is opened.

    Args:
        source: path, or `-` for standard input.

    Returns:
        The size; None where nobody knows: standard input, pipes.

    Raises:
        LogError: if it is not there.
    """
    if source == "-":
        return None
    try:
        status = Path(source).stat()
    except OSError as error:
        raise _unreadable(source, error) from None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


class LogLines:
    """One log's lines. It is closed by leaving a `with` statement.

    Args:
        source: path, or `-` for standard input; gzip is known by its first bytes.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.broken: str | None = None
        """Why the log ended early: a gzip stream that is cut off or damaged."""
        self._raw = self._open()
        start = cast("io.BufferedReader", self._raw).peek(2)[:2]
        packed = start == _GZIP_MAGIC
        stream: IO[bytes] = cast("IO[bytes]", gzip.GzipFile(fileobj=self._raw)) if packed else self._raw
        # A byte that is no UTF-8 stands as \xNN: hostile bytes stay visible and harmless.
        self._text = io.TextIOWrapper(stream, encoding="utf-8", errors="backslashreplace", newline="\n")

    def position(self) -> int:
        """Bytes of the file that were read."""
        try:
            return self._raw.tell()
        except OSError:
            return 0  # a pipe has no position

    def __iter__(self) -> Iterator[str]:
        """The lines with their ends; one longer than 64 KB is cut there, and what follows of it is left out."""
        read: Callable[[int], str] = self._text.readline
        try:
            while line := read(MAX_LINE):
                if line[-1] != "\n" and len(line) == MAX_LINE:
                    while (rest := read(MAX_LINE)) and rest[-1] != "\n":
                        pass
                # A byte order mark at the beginning is no part of the first line.
                yield line if line[0] != "\ufeff" else line[1:]
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            self.broken = f"{self.source}: the gzip stream ends early or is damaged ({error}): what was read so far counts"
        except OSError as error:
            raise LogError(f"{self.source} cannot be read: {error.strerror or error}") from None

    def __enter__(self) -> LogLines:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file; standard input stays open."""
        if self.source != "-":
            self._text.close()
            self._raw.close()
        else:
            self._text.detach()

    def _open(self) -> IO[bytes]:
        if self.source == "-":
            if sys.stdin is None:
                raise LogError("standard input is closed: pipe a log into it, or give a file")
            return sys.stdin.buffer
        try:
            return Path(self.source).open("rb")
        except OSError as error:
            raise _unreadable(self.source, error) from None


def _unreadable(source: str, error: OSError) -> LogError:
    return LogError(f"{source} cannot be read: {error.strerror or error}: give an access log, or - for standard input")
