"""Lines of logs: from files or standard input, compressed or not, in bounded memory for any content.

The elements of a log that is one JSON array are returned as lines, and so are JSON objects over several lines.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import json
import lzma
import re
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Final, cast

from tidegate.errors import TidegateError

MAX_LINE: Final = 64 * 1024
MAX_ELEMENT: Final = 4 * MAX_LINE
"""Maximum characters of an element of a JSON array, and of a JSON object over several lines."""
_ARRAY: Final = re.compile(r"\s*\[\s*(?:\{|$)")
_BETWEEN: Final = re.compile(r"[\s,]*")


def _gzip(raw: IO[bytes]) -> IO[bytes]:
    return cast("IO[bytes]", gzip.GzipFile(fileobj=raw))


def _bzip2(raw: IO[bytes]) -> IO[bytes]:
    return cast("IO[bytes]", bz2.BZ2File(raw))


def _xz(raw: IO[bytes]) -> IO[bytes]:
    return cast("IO[bytes]", lzma.LZMAFile(raw))


def _zstd(raw: IO[bytes]) -> IO[bytes]:
    try:
        # Part of Python from 3.14 on.
        zstd = importlib.import_module("compression.zstd")
    except ModuleNotFoundError:
        raise LogError(
            f"zstd compression is not supported by Python {sys.version_info[0]}.{sys.version_info[1]}; "
            "use a pipe: zstdcat LOG | tidegate simulate - --policy FILE"
        ) from None
    return cast("IO[bytes]", zstd.ZstdFile(raw))


_COMPRESSIONS: Final[Mapping[bytes, tuple[str, Callable[[IO[bytes]], IO[bytes]]]]] = {
    b"\x1f\x8b": ("gzip", _gzip),
    b"BZh": ("bzip2", _bzip2),
    b"\xfd7zXZ\x00": ("xz", _xz),
    b"\x28\xb5\x2f\xfd": ("zstd", _zstd),
}
"""By their first bytes."""


class LogError(TidegateError):
    """A log cannot be read at all."""

    code = "LOG_UNREADABLE"
    status = 400


def log_size(source: str) -> int | None:
    """Bytes of a log file; None if unknown: for `-` (standard input) and pipes.

    Raises:
        LogError: if the file does not exist.
    """
    if source == "-":
        return None
    try:
        status = Path(source).stat()
    except OSError as error:
        raise _unreadable(source, error) from None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


class LogLines:
    """The lines of one log; use it in a `with` statement.

    Args:
        source: path, or `-` for standard input; the compression is detected from the first bytes.

    Raises:
        LogError: if it cannot be opened, or its compression is not supported.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.broken: str | None = None
        """Why the log ended early: a truncated or damaged compressed stream or array."""
        self._raw = self._open()
        self._compression = ""
        self._damage: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
        stream = self._raw
        start = cast("io.BufferedReader", self._raw).peek(6)
        for magic, (name, decompress) in _COMPRESSIONS.items():
            if start.startswith(magic):
                self._compression = name
                try:
                    stream = decompress(self._raw)
                except LogError as error:
                    if source != "-":
                        self._raw.close()
                    raise LogError(f"{source} cannot be read: {error.message}") from None
                if name == "zstd":
                    self._damage += (importlib.import_module("compression.zstd").ZstdError,)
        # Bytes that are not UTF-8 become \xNN: hostile bytes stay visible and harmless.
        self._text = io.TextIOWrapper(stream, encoding="utf-8", errors="backslashreplace", newline="\n")

    def position(self) -> int:
        """Bytes of the file read so far."""
        try:
            return self._raw.tell()
        except OSError:
            return 0  # a pipe has no position

    def __iter__(self) -> Iterator[str]:
        """The lines with their line ends; a line is truncated to 64 KB."""
        try:
            yield from self._lines()
        except self._damage as error:
            self._break(error)
        except OSError as error:
            if self._compression and error.errno is None:  # bzip2's "Invalid data stream", which has no class of its own
                self._break(error)
            else:
                raise LogError(f"{self.source} cannot be read: {error.strerror or error}") from None

    def _lines(self) -> Iterator[str]:
        read: Callable[[int], str] = self._text.readline
        first = True
        while line := read(MAX_LINE):
            # A byte order mark is not part of the first line.
            if line[0] == "\ufeff":
                line = line[1:]
            if first and line.strip():
                first = False
                if _ARRAY.match(line):
                    yield from self._elements(line)
                    return
                if line.lstrip()[0] == "{" and line[-1] == "\n" and line.rstrip()[-1] != "}":
                    yield from self._objects(line)
                    return
            if line and line[-1] != "\n" and len(line) >= MAX_LINE - 1:
                while (rest := read(MAX_LINE)) and rest[-1] != "\n":
                    pass
            yield line

    def _elements(self, buffer: str) -> Iterator[str]:
        """The elements of a JSON array that begins in `buffer`, each as text."""
        decode = json.JSONDecoder().raw_decode
        at = buffer.index("[") + 1
        ended = False
        while True:
            at = cast("re.Match[str]", _BETWEEN.match(buffer, at)).end()
            if buffer[at : at + 1] == "]":
                return
            try:
                end = decode(buffer, at)[1] if at < len(buffer) else 0
            except (ValueError, RecursionError):
                end = 0
            if end:
                yield buffer[at:end]
                at = end
                continue
            if ended or len(buffer) - at > MAX_ELEMENT:
                self.broken = (
                    f"{self.source}: the JSON array is truncated, damaged, or has an element of more than {MAX_ELEMENT:,} "
                    "characters: only the elements before are included"
                )
                return
            more = self._text.read(MAX_LINE)
            ended = not more
            buffer, at = buffer[at:] + more, 0

    def _objects(self, line: str) -> Iterator[str]:
        """The JSON objects of a log that writes each over several lines, as `jq` does, each as text.

        A line that begins with `{` after one that ends with `}` begins an object: within JSON a comma separates the two, and
        strings contain no line breaks. A damaged object therefore costs no more than itself, and takes no other one with it. An
        object is truncated to `MAX_ELEMENT`.
        """
        pieces: list[str] = []
        length = 0
        is_complete = False
        while line:
            text = line.strip()
            if is_complete and text[:1] == "{":
                yield "".join(pieces)
                pieces, length = [], 0
            if text:
                is_complete = text[-1] == "}"
            if length < MAX_ELEMENT:
                pieces.append(line[: MAX_ELEMENT - length])
                length += len(line)
            line = self._text.readline(MAX_LINE)
        yield "".join(pieces)

    def _break(self, error: Exception) -> None:
        self.broken = (
            f"{self.source}: the {self._compression} stream is truncated or damaged ({error}): only the lines before are included"
        )

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
