"""Rules that can never answer, because a preferred one takes every request first."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from tidegate.policy.globs import endpoint_matcher
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.policy.matching import CompiledRule, counted_methods
from tidegate.policy.model import Mode, Rule

_PIECES = re.compile(r"\*+|\{[^}]*\}|.", re.DOTALL)
_STAR = "*"
_SEGMENT = "{}"
_MAX_HIDDEN = 10
# The order in which rules are preferred does not look at their limits.
_ANY_LIMITS = LimitSet("any", Algorithm.FIXED_WINDOW, [Limit.parse("1/s")])


def covers(wider: str, pattern: str) -> bool:
    """Whether one endpoint pattern matches every path that another one does.

    All patterns are read as sets of states, one bit for each place in `wider`, so the cost is that of the product of both
    lengths, whatever they say. Where it is not sure (`/a/*` and `/a/{x}*` in some spellings) the answer is False.

    Args:
        wider: the pattern that may match more.
        pattern: the other one.

    Returns:
        True if `wider` surely matches all of it.
    """
    places = _pieces(wider)
    stars = segments = 0
    literals: dict[str, int] = {}
    for at, piece in enumerate(places):
        if piece == _STAR:
            stars |= 1 << at
        elif piece == _SEGMENT:
            segments |= 1 << at
        else:
            literals[piece] = literals.get(piece, 0) | 1 << at
    states = _past_stars(1, stars)
    for piece in _pieces(pattern):
        following = states & stars
        if piece != _STAR:
            following |= (states & literals.get(piece, 0)) << 1
            if piece != "/":
                # A segment takes one piece or more: a place behind it may stay where it is.
                following |= (states & segments) << 1 | (states & segments << 1)
        states = _past_stars(following, stars)
        if not states:
            return False
    return bool(states >> len(places) & 1)


def shadow_warnings(tier: str, rule_id: int, rows: Iterable[Mapping[Any, Any]]) -> list[str]:
    """What a rule that was just made or changed does to the others of its tier, and they to it.

    Args:
        tier: the tier's name.
        rule_id: of the rule in question.
        rows: all rules of the tier, of `rate_limit_rules`, in order.

    Returns:
        One sentence each: the rule never answers, or another one never does any more.
    """
    ordered = [(order, row) for order, row in enumerate(rows) if row["mode"] == Mode.ENFORCE.value]
    found = next(((order, row) for order, row in ordered if row["id"] == rule_id), None)
    if found is None:
        return []  # a shadow rule is asked beside all others, and takes nothing from them
    order, row = found
    own = _rank_of(order, row)
    heads = {each["endpoint_pattern"] for _, each in ordered if "HEAD" in each["methods"]}
    hidden_by: Mapping[Any, Any] | None = None
    hidden: list[Mapping[Any, Any]] = []
    for place, other in ordered:
        if other is row:
            continue
        if _rank_of(place, other) < own:
            if hidden_by is None and _hides(other, row, heads):
                hidden_by = other
        elif len(hidden) < _MAX_HIDDEN and _hides(row, other, heads):
            hidden.append(other)
    warnings = []
    if hidden_by is not None:
        warnings.append(
            f"tier {tier!r}: rule {row['name']!r} never answers: {hidden_by['name']!r} is preferred and takes all its requests; "
            "give it a higher priority"
        )
    warnings.extend(
        f"tier {tier!r}: rule {other['name']!r} never answers any more: {row['name']!r} is preferred and takes all its requests"
        for other in hidden
    )
    return warnings


def _hides(other: Mapping[Any, Any], row: Mapping[Any, Any], heads: Collection[str]) -> bool:
    if not _covers_methods(_methods(other, heads), _methods(row, heads)):
        return False
    wider, pattern = other["endpoint_pattern"], row["endpoint_pattern"]
    # A pattern's own text is one of the paths that it matches, and a cheap test that nearly all pairs fail.
    return endpoint_matcher(wider)(pattern) and covers(wider, pattern)


def _methods(row: Mapping[Any, Any], heads: Collection[str]) -> frozenset[str] | None:
    return counted_methods(row["methods"], row["endpoint_pattern"] in heads)


def _covers_methods(wider: frozenset[str] | None, methods: frozenset[str] | None) -> bool:
    return wider is None or (methods is not None and methods <= wider)


def _rank_of(order: int, row: Mapping[Any, Any]) -> tuple[int, ...]:
    rule = Rule(row["endpoint_pattern"], (), tuple(row["methods"]), priority=row["priority"], name=row["name"])
    return CompiledRule(rule, _ANY_LIMITS, order).rank


def _pieces(pattern: str) -> list[str]:
    return [_STAR if each[0] == "*" else _SEGMENT if each[0] == "{" else each for each in _PIECES.findall(pattern)]


def _past_stars(states: int, stars: int) -> int:
    # Runs of stars are one piece, so one step passes each.
    return states | (states & stars) << 1
