"""Records of CSV logs whose quoted fields contain line breaks."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from tidegate.tools.simulate.log_csv import csv_records
from tidegate.tools.simulate.log_lines import MAX_ELEMENT

X = "x" * 60
TEXTS = st.text(st.sampled_from(['"', "\n", ",", "a", " "]), max_size=8)


@given(st.lists(st.lists(TEXTS, min_size=3, max_size=3), max_size=8), st.sampled_from(["\n", "\r\n"]))
def test_what_a_writer_writes_is_read(rows: list[list[str]], end: str) -> None:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator=end).writerows(rows)
    records = list(csv_records(iter(lines_of(file.getvalue())), 3))
    assert [next(csv.reader([record], strict=True)) for record in records] == rows


@given(st.lists(st.text(st.sampled_from(['"', ",", "a"]), max_size=8)))
def test_any_lines_come_out_once_in_order(lines: list[str]) -> None:
    text = "".join(line + "\n" for line in lines)
    assert "".join(csv_records(iter(lines_of(text)), 3)) == text


def lines_of(text: str) -> list[str]:
    return io.StringIO(text, newline="\n").readlines()


def test_an_open_quote_costs_its_own_record_only() -> None:
    good, multiline = "a,b,c\n", ['a,"b\n', 'b",c\n']
    lines = ['a,"b\n', good, good, *multiline, good, 'a,"b\n', good]
    assert list(csv_records(iter(lines), 3)) == ['a,"b\n', good, good, "".join(multiline), good, 'a,"b\n', good]


def test_a_stray_quote_in_a_field_joins_nothing() -> None:
    lines = ['a,5" disk,c\n', "a,b,c\n"] * 3
    assert list(csv_records(iter(lines), 3)) == lines


def test_memory_and_work_are_bounded() -> None:
    """Each line ends within a quote that it opened, and closes the one before: joined or not they are no records."""
    read = 0

    def lines(line: str) -> Iterator[str]:
        nonlocal read
        while read < 20_000:
            read += 1
            yield line

    for line in (f'{X}",y,"z\n', f'{X},"y\n', f'{X},y,"\n', f"{X},y\n"):
        for opener in ("", 'a,"b\n'):
            read = 0
            came = 0
            source = lines(line)
            for record in csv_records(chain(opener, source), 3):
                came += record.count("\n")
                assert (read - came) * len(line) <= MAX_ELEMENT + 2 * len(line) + 2
            assert came == 20_000 + bool(opener)


def chain(opener: str, lines: Iterator[str]) -> Iterator[str]:
    if opener:
        yield opener
    yield from lines
