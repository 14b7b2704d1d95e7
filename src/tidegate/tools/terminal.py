"""What commands print: escaped, complete where nothing wraps it, and harmless when its reader has gone.

Text may come from a server, a log or a file that somebody else wrote: whatever would move the cursor, change colors or forge a
line is shown as an escape and never sent.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TextIO

import typer

from tidegate.errors import TidegateError
from tidegate.tools.charts import clean

if TYPE_CHECKING:
    from rich.console import Console

_UNLIMITED: Final = 100_000
"""Columns of an output that is no terminal: `grep`, `cut` and files get each row in one line."""


def say(text: str, *, err: bool = False) -> None:
    """Print text that may hold anything. Lines stay lines; every other control character is shown as an escape.

    What must stay in one line (a name, a server's message) is to be passed through `tidegate.tools.charts.clean` first.

    Args:
        text: one line or more.
        err: on stderr instead of stdout.
    """
    typer.echo("\n".join(map(clean, text.split("\n"))), err=err)


def json_text(text: str, encoding: str | None) -> str:
    """JSON that a terminal can show: characters that control it, or that its encoding does not have, as `\\uXXXX`.

    Args:
        text: JSON, with line breaks outside of strings only.
        encoding: of the output; None for one that can have everything.

    Returns:
        The same JSON.
    """

    def shown(character: str) -> str:
        if character == "\n" or character.isprintable():
            try:
                if encoding is not None:
                    character.encode(encoding)
                return character
            except UnicodeEncodeError:
                pass
        units = character.encode("utf-16-be", "surrogatepass")
        return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))

    return text if text.isascii() and text.replace("\n", "").isprintable() else "".join(map(shown, text))


def open_console(**options: Any) -> Console:
    """A console on stdout, as wide as the terminal; without a limit where stdout is a pipe or a file.

    Args:
        options: of `rich.console.Console`.

    Returns:
        The console.
    """
    from rich.console import Console

    console = Console(**options)
    if not console.is_terminal:
        console = Console(width=_UNLIMITED, **options)
    return console


@contextmanager
def tolerant_output() -> Iterator[None]:
    """Stdout and stderr that neither a missing reader nor a narrow encoding turns into a failure.

    A reader that has gone (`tidegate plan | head`) has what it wanted: what is written after that is dropped, and the command
    goes on to its own exit code. A character that the terminal's encoding does not have is shown as an escape.

    Raises:
        OutputError: where it cannot be written for another reason, such as a full disk.
    """
    replaced: list[tuple[str, TextIO, _DroppingFile]] = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # Only the process's own streams: a test or a program that put others in their place is to read them.
        if stream is not None and stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            raw = _DroppingFile(stream.fileno(), "wb", closefd=False)
            replaced.append((name, stream, raw))
            setattr(sys, name, _tolerant(stream, raw))
    try:
        yield
    finally:
        failed: OutputError | None = None
        for name, stream, raw in replaced:
            try:
                getattr(sys, name).flush()
            except OutputError as error:
                failed = error
            raw.given_up = True
            setattr(sys, name, stream)
        if failed is not None:
            raise failed


class OutputError(TidegateError):
    """What a command prints cannot be written."""

    code = "OUTPUT_UNWRITABLE"


class _DroppingFile(io.FileIO):
    """A file descriptor for writing; what it cannot write because the reader has gone counts as written."""

    given_up = False
    """Whether what is left in the buffers above is to be dropped: its failure was reported."""

    def write(self, data: Any) -> int:
        if not data:
            return 0  # click tries with nothing whether a stream takes bytes; a full device refuses even that
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes
        except OSError as error:
            if self.given_up:
                return memoryview(data).nbytes
            raise OutputError(f"the output cannot be written: {error.strerror or error}") from None


def _tolerant(stream: io.TextIOWrapper, raw: _DroppingFile) -> TextIO:
    # As the interpreter does it: without a buffer where PYTHONUNBUFFERED asks for that.
    unbuffered = isinstance(stream.buffer, io.RawIOBase)
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
