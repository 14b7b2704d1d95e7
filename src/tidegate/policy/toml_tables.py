"""What reading any table of a policy file takes: its fields, lists and times, and errors with file and line."""

from __future__ import annotations

import datetime
import difflib
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar

from tidegate.errors import PolicyError
from tidegate.policy.limits import Limit
from tidegate.policy.quotas import Quota, fit_quotas
from tidegate.policy.toml_lines import LineIndex
from tidegate.policy.toml_lines import Path as KeyPath
from tidegate.timestamps import to_us

MAX_LIST: Final = 32
"""Most limits or methods of one list that are looked at; a rule takes 16 limits."""

# The first word of a record's error message, where it is not the field's name itself.
_FIELD_OF_WORD: Final = {"limit": "limits", "method": "methods", "rule": "name", "tier": "name", "quota": "quotas"}

_T = TypeVar("_T")


class TableReader:
    """Reads tables of one decoded file. `at` is always the path of a table or field, for its line.

    Args:
        lines: of the file's text.
        file: its path, for messages.
    """

    def __init__(self, lines: LineIndex, file: str | None) -> None:
        self._lines = lines
        self._file = file

    def tables(
        self, table: Mapping[str, Any], name: str, at: KeyPath, most: int | None = None
    ) -> Iterable[tuple[KeyPath, dict[str, Any]]]:
        """The tables of an array, each with its path; more than `most` are an error."""
        value = table.get(name, [])
        header = ".".join([*(str(part) for part in at if isinstance(part, str)), name])
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise self.error(f"{name} is a list of tables: write [[{header}]]", (*at, name))
        if most is not None and len(value) > most:
            raise self.error(f"{len(value)} tables [[{header}]]: at most {most} are taken; remove some", (*at, name, most))
        return [((*at, name, number), each) for number, each in enumerate(value)]

    def table(self, raw: Mapping[str, Any], name: str, example: str) -> dict[str, Any]:
        """A table of the top level; empty where the file has none."""
        table = raw.get(name, {})
        if not isinstance(table, dict):
            raise self.error(f"{name} is a table: write [{name}] and {example} below it", (name,))
        return table

    def known(self, table: Mapping[str, Any], known: Iterable[str], at: KeyPath) -> None:
        """Refuse other fields."""
        for field in table:
            if field not in known:
                raise self.error(f"unknown field {field[:60]!r}{nearest(field, known)}", (*at, field))

    def required(self, table: Mapping[str, Any], fields: Iterable[str], at: KeyPath) -> None:
        """Refuse a table without one of these fields."""
        for field in fields:
            if field not in table:
                raise self.error(f"{field!r} is missing here: add it", at)

    def limits(self, value: object, at: KeyPath) -> tuple[Limit, ...]:
        """Read a list of limits."""
        if not isinstance(value, list):
            raise self.error(f'limits must be a list such as ["100/minute"], not {str(value)[:40]!r}', at)
        if len(value) > MAX_LIST:
            raise self.error(f"limits has {len(value)} entries: a rule takes 1 to 16", at)
        return tuple(self.placed(lambda text=text: Limit.parse(text), at) for text in value)  # type: ignore[misc]

    def quotas(self, table: Mapping[str, Any], at: KeyPath) -> tuple[Quota, ...]:
        """Read the list of quotas of a table; none where it has none."""
        value, at = table.get("quotas", []), (*at, "quotas")
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.error(f'quotas must be a list such as ["100000/month"], not {str(value)[:40]!r}', at)
        if len(value) > MAX_LIST:
            raise self.error(f"quotas has {len(value)} entries: at most one for each period is possible", at)
        return self.placed(lambda: fit_quotas(value), at)

    def moment_us(self, value: object, at: KeyPath) -> int:
        """Read a time, µs since the epoch; the last part of its path names the field."""
        field = at[-1]
        if isinstance(value, str) and field == "until":
            value = _moment_of_text(value)
        if isinstance(value, datetime.datetime):
            if value.tzinfo is None:
                raise self.error(f"{field} {value.isoformat()} has no offset: write {value.isoformat()}Z", at)
            try:
                return to_us(value)
            except ValueError as error:
                raise self.error(f"{field} {value.isoformat()}: {error}: leave it out for one without end", at) from None
        if isinstance(value, datetime.date):
            return to_us(datetime.datetime.combine(value, datetime.time(), datetime.UTC))
        raise self.error(
            f"{field} {str(value)[:40]!r} is not a valid timestamp; use ISO 8601 with an offset and without quotes, "
            "e.g. 2030-01-31T00:00:00Z",
            at,
        )

    def placed(self, make: Callable[[], _T], at: KeyPath, table: Mapping[str, Any] | None = None) -> _T:
        """Make a record; its error gets the line of the field of `table` that it names, else that of the path."""
        try:
            return make()
        except PolicyError as error:
            word = error.reason.split(" ", 1)[0]
            field = _FIELD_OF_WORD.get(word, word)
            raise self.error(error.reason, (*at, field) if table is not None and field in table else at) from None

    def error(self, reason: str, at: KeyPath) -> PolicyError:
        """An error with the line of the path."""
        return PolicyError(reason, self._file, self._lines.line(at))


def nearest(name: object, known: Iterable[str]) -> str:
    """The end of a message: the most similar of the known names, or some of them."""
    listed = list(itertools.islice(known, 200))
    # Comparing takes time with the square of the lengths: enough of each for a slip of the pen.
    close = difflib.get_close_matches(str(name)[:64], [each for each in listed if len(each) <= 64], n=1)
    if close:
        return f": did you mean {close[0]!r}?"
    return f": there are {', '.join(listed[:20])}" if listed else ""


def _moment_of_text(text: str) -> object:
    """A date or a time in quotes; the text itself if it is neither."""
    for parse in (datetime.date.fromisoformat, datetime.datetime.fromisoformat):
        try:
            return parse(text)
        except ValueError:
            continue
    return text
