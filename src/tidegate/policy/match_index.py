"""Attributes → what asks for them, found without going through all of it.

Things that name the same attributes with literal values are found by one dictionary look-up of those values; values with `*` by
their literal beginning and end. So a thousand rules for a thousand users cost about what one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeAlias, TypeVar

from tidegate.policy.globs import Glob, GlobIndex

_T = TypeVar("_T")
_Key: TypeAlias = str | tuple[str | None, ...] | None
_Conditions: TypeAlias = tuple[tuple[str, Callable[[str], bool]], ...]


def entries_hold(entries: Iterable[tuple[str, str]], attributes: Mapping[str, str]) -> bool:
    """Whether attributes match all entries of one rule; of many rules, `MatchIndex` finds those faster.

    Args:
        entries: names and patterns.
    """
    return all((value := attributes.get(name)) is not None and Glob(pattern).matches(value) for name, pattern in entries)


class MatchIndex(Generic[_T]):
    """Things with entries (attribute and pattern) that must all hold."""

    __slots__ = ("_groups",)

    def __init__(self) -> None:
        # Names whose values are literal → those values → things. Few sets of names are different, however many things there are.
        self._groups: dict[tuple[str, ...], dict[_Key, _Group[_T]]] = {}

    def __bool__(self) -> bool:
        """Whether there is anything to find."""
        return bool(self._groups)

    def add(self, entries: Iterable[tuple[str, str]], thing: _T) -> None:
        """Add a thing.

        Args:
            entries: names and patterns; each name once.
            thing: to be found.
        """
        ordered = sorted(entries)
        literal = [entry for entry in ordered if "*" not in entry[1]]
        globs = [entry for entry in ordered if "*" in entry[1]]
        by_values = self._groups.setdefault(tuple(name for name, _ in literal), {})
        values: _Key = literal[0][1] if len(literal) == 1 else tuple(value for _, value in literal)
        group = by_values.get(values)
        if group is None:
            group = by_values[values] = _Group()
        group.add(globs, thing)

    def find(self, attributes: Mapping[str, str]) -> list[_T]:
        """All things whose entries hold, in no particular order.

        Args:
            attributes: values by name; not empty.

        Returns:
            Each thing once. Costs about 0.3 µs for each different set of names, however many things have it.
        """
        found: list[_T] = []
        for names, by_values in self._groups.items():
            # One value is its own key: a tuple around it would cost as much as the look-up.
            key = attributes.get(names[0]) if len(names) == 1 else tuple([attributes.get(name) for name in names])
            group = by_values.get(key)
            if group is not None:
                found += group.literal
                if group.globs:
                    group.add_matching(attributes, found)
        return found


class _Group(Generic[_T]):
    """Things with the same literal entries."""

    __slots__ = ("globs", "literal")

    def __init__(self) -> None:
        self.literal: list[_T] = []
        # Attribute → things with a pattern for it, and the conditions that are left to be checked.
        self.globs: dict[str, GlobIndex[tuple[_Conditions, _T]]] = {}

    def add(self, globs: list[tuple[str, str]], thing: _T) -> None:
        if not globs:
            self.literal.append(thing)
            return
        # By the pattern with the most literal text at its ends: few values have it.
        name, pattern = max(globs, key=lambda entry: len(entry[1].split("*")[0]) + len(entry[1].split("*")[-1]))
        conditions = tuple((other, Glob(each).matches) for other, each in globs if other != name or each.count("*") > 1)
        parts = pattern.split("*")
        self.globs.setdefault(name, GlobIndex()).add(parts[0], parts[-1], (conditions, thing))

    def add_matching(self, attributes: Mapping[str, str], found: list[_T]) -> None:
        """Add the things whose patterns match to those found."""
        for name, index in self.globs.items():
            value = attributes.get(name)
            if value is None:
                continue
            for conditions, thing in index.candidates(value):
                for other, matches in conditions:
                    sent = attributes.get(other)
                    if sent is None or not matches(sent):
                        break
                else:
                    found.append(thing)
