"""The line of each key in a TOML text: `tomllib` returns values without positions, and a refused policy must name its line."""

from __future__ import annotations

import re
from typing import Final, TypeAlias

Path: TypeAlias = tuple[str | int, ...]

_KEY_PART: Final = re.compile(r"""\s*(?:([A-Za-z0-9_-]+)|"((?:[^"\\]|\\.)*)"|'([^']*)')\s*""")

MAX_KEY_PARTS: Final = 8
"""Most parts of one dotted key. `tomllib` takes time and memory that grow with their square."""

# Atomic groups, not a possessive `(?:...)*+`: that one matches wrongly before Python 3.11.5 (python/cpython#106052).
_QUOTED: Final = r"""(?:"(?>(?:[^"\\\n]++|\\[^\n])*)"|'[^'\n]*+')"""
_TEXT: Final = r"""(?:"{3}(?>(?:[^"\\]++|\\.|"(?!""))*)|'{3}(?>(?:[^']++|'(?!''))*))"""
_KEY: Final = rf"(?:[A-Za-z0-9_-]++|{_QUOTED})[ \t]*+\.[ \t]*+"
# A key that is too deep is tried wherever one may begin. Strings, comments and words are stepped over, and a string without an
# end ends the search: so no part of a text is walked again and again.
_DEEP_KEY: Final = re.compile(
    rf"""(?P<deep>(?:{_KEY}){{{MAX_KEY_PARTS}}})|{_TEXT}(?:"{{3,5}}|'{{3,5}}|(?P<open>))"""
    rf"""|{_QUOTED}|\#[^\n]*+|[A-Za-z0-9_-]++|(?P<odd>["'])""",
    re.DOTALL,
)
_STRING: Final = re.compile(rf"""{_TEXT}(?:"{{3,5}}|'{{3,5}})|{_QUOTED}""", re.DOTALL)


class LineIndex:
    """The 1-based line of every table and key of a TOML text that `tomllib` has accepted."""

    def __init__(self, text: str) -> None:
        self._lines: dict[Path, int] = {(): 1}
        self._counts: dict[Path, int] = {}
        table: Path = ()
        for line, statement in _statements(text):
            if statement.startswith("["):
                table = self._open_table(statement, line)
            else:
                for depth in range(1, len(parts := _key(statement)[0]) + 1):
                    self._lines.setdefault(table + parts[:depth], line)

    def line(self, path: Path) -> int:
        """The line of a key or table, or of the nearest thing around it that has one.

        Args:
            path: keys, and indices into arrays of tables.

        Returns:
            1 or more.
        """
        while path not in self._lines:
            path = path[:-1]
        return self._lines[path]

    def _open_table(self, statement: str, line: int) -> Path:
        array = statement.startswith("[[")
        parts, _ = _key(statement.lstrip("["))
        path: Path = ()
        for number, part in enumerate(parts):
            path = (*path, part)
            last = number == len(parts) - 1
            if last and array:
                self._counts[path] = self._counts.get(path, -1) + 1
            # A header names the newest element of each array on its way.
            if path in self._counts:
                self._lines.setdefault(path, line)
                path = (*path, self._counts[path])
        self._lines.setdefault(path, line)
        return path


def line_of_deep_key(text: str) -> int | None:
    """Find a dotted key with more than `MAX_KEY_PARTS` parts, before `tomllib` reads the text; takes time in proportion to it.

    Args:
        text: TOML, or anything.

    Returns:
        The 1-based line of the first such key; None where there is none before a string without an end, which TOML refuses.
    """
    # A key is in one line, and few texts have a line with so many dots: only those are examined.
    if all(line.count(".") < MAX_KEY_PARTS for line in text.split("\n")):
        return None
    for found in _DEEP_KEY.finditer(text):
        if found["deep"] is not None:
            return text.count("\n", 0, found.start()) + 1
        if found.lastgroup is not None:
            return None
    return None


def _statements(text: str) -> list[tuple[int, str]]:
    """The beginnings of all statements with their lines: the text at the start of a line outside any string or bracket."""
    found: list[tuple[int, str]] = []
    at, line, depth, fresh = 0, 1, 0, True
    while at < len(text):
        character = text[at]
        if character == "\n":
            line += 1
            at += 1
            fresh = depth == 0
        elif character == "#":
            at = _end_of_line(text, at)
        elif fresh and not character.isspace():
            fresh = False
            found.append((line, text[at : _end_of_line(text, at)]))
            if character == "[":
                at = _end_of_line(text, at)
        elif character in "\"'" and (string := _STRING.match(text, at)):
            line += string.group().count("\n")
            at = string.end()
        else:
            depth += (character in "[{") - (character in "]}")
            at += 1
    return found


def _end_of_line(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def _key(statement: str) -> tuple[tuple[str, ...], int]:
    """The parts of the dotted key that a statement begins with, and where it ends."""
    parts: list[str] = []
    at = 0
    while match := _KEY_PART.match(statement, at):
        parts.append(match.group(1) or match.group(2) or match.group(3) or "")
        at = match.end()
        if statement[at : at + 1] != ".":
            break
        at += 1
    return tuple(parts), at
