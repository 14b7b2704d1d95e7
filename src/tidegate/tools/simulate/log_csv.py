"""Records of CSV logs: a quoted field may contain line breaks. Memory is bounded whatever the log contains."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from tidegate.tools.simulate.log_lines import MAX_ELEMENT


def csv_records(lines: Iterator[str], columns: int) -> Iterator[str]:
    """The records of a CSV log, each as text with its line breaks.

    A quote that is never closed costs its own record, not those after it: if the joined lines are not a record, or have more than
    `MAX_ELEMENT` characters, each of them is returned by itself. Only where a later field begins with a line break do they make a
    record nonetheless. Each line is parsed at most three times.

    Args:
        lines: those after the header, with their line ends.
        columns: how many a record has.
    """
    opener: str | None = None
    while (line := opener if opener is not None else next(lines, None)) is not None:
        opener = None
        # A writer of CSV writes an even number of quotes per record. A line with a stray one may be complete all the same.
        if _is_even(line) or _is_record(line, columns):
            yield line
            continue
        pieces = [line]
        length = len(line)
        while length <= MAX_ELEMENT and (piece := next(lines, None)) is not None:
            pieces.append(piece)
            length += len(piece)
            if not _is_even(piece):
                break
        joined = "".join(pieces)
        if length <= MAX_ELEMENT and _is_record(joined, columns):
            yield joined
            continue
        if len(pieces) > 1 and not _is_even(pieces[-1]):
            opener = pieces.pop()
        yield from pieces


def _is_even(line: str) -> bool:
    return line.count('"') % 2 == 0


def _is_record(text: str, columns: int) -> bool:
    try:
        return len(next(csv.reader([text], strict=True), [])) == columns
    except csv.Error:
        return False
