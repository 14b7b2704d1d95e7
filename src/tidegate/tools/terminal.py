"""Output of commands: escaped, not wrapped unless it goes to a terminal, and without errors if the reader closes the pipe.

Text from servers, logs and files is untrusted: characters that would move the cursor, change colors or forge a line are replaced
by escapes.
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
"""Columns if the output is not a terminal: pipes and files get each row on one line."""


def say(text: str, *, err: bool = False) -> None:
    """Print untrusted text of one or more lines. Every control character except line breaks is replaced by an escape.

    Text that must stay on one line (a name, a server's message) must be passed through `tidegate.tools.charts.clean` first.
    """
    typer.echo("\n".join(map(clean, text.split("\n"))), err=err)


def json_text(text: str, encoding: str | None) -> str:
    """Make JSON safe for a terminal: control characters and those that its encoding does not contain become `\\uXXXX`.

    Args:
        text: JSON, with line breaks outside of strings only.
        encoding: of the output; None if it can encode every character.
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
    """A `rich` console on stdout with these options, as wide as the terminal; not limited if stdout is a pipe or a file."""
    from rich.console import Console

    console = Console(**options)
    if not console.is_terminal:
        console = Console(width=_UNLIMITED, **options)
    return console


@contextmanager
def tolerant_output() -> Iterator[None]:
    """Stdout and stderr on which a closed pipe or a limited encoding is not an error.

    If the reader has closed the pipe (`tidegate plan | head`), further output is dropped and the command ends with its own exit
    code. Characters that the terminal's encoding does not contain are replaced by escapes.

    Raises:
        OutputError: if writing fails for another reason, such as a full disk.
    """
    replaced: list[tuple[str, TextIO, _DroppingFile]] = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # Only the process's own streams: tests and programs that replaced them must receive the output.
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
            raw.drops_output = True
            setattr(sys, name, stream)
        if failed is not None:
            raise failed


class OutputError(TidegateError):
    """The output of a command cannot be written."""

    code = "OUTPUT_UNWRITABLE"


class _DroppingFile(io.FileIO):
    """A file descriptor for writing; data that cannot be written because the pipe is closed counts as written."""

    drops_output = False
    """Whether data left in the buffers above is dropped, because the failure was already reported."""

    def write(self, data: Any) -> int:
        if not data:
            return 0  # click writes b"" to test whether a stream accepts bytes; a full device refuses even that
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes
        except OSError as error:
            if self.drops_output:
                return memoryview(data).nbytes
            raise OutputError(f"the output cannot be written: {error.strerror or error}") from None


def _tolerant(stream: io.TextIOWrapper, raw: _DroppingFile) -> TextIO:
    # As the interpreter does: without a buffer if PYTHONUNBUFFERED is set.
    unbuffered = isinstance(stream.buffer, io.RawIOBase)
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
