"""Which rules of a tier can never answer, because a preferred rule matches every request that they match."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from tidegate.policy.globs import endpoint_matcher
from tidegate.policy.matching import counted_methods, rule_rank
from tidegate.policy.rules import Mode, Rule

MAX_WIDER: Final = 64
"""Each rule is compared with at most this many preferred patterns of its tier, so the cost is linear in the number of rules."""
MAX_METHOD_SETS: Final = 256
"""Of the rules for one endpoint, at most this many with different methods or matches are compared."""
MAX_WARNINGS: Final = 10

_PIECES: Final = re.compile(r"\*+|\{[^}]*\}|.", re.DOTALL)
_STAR: Final = "*"
_SEGMENT: Final = "{}"


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


class _Candidate:
    """An enforcing rule with what decides whether it covers another one."""

    __slots__ = ("_matches", "entries", "methods", "rule")

    def __init__(self, rule: Rule, methods: frozenset[str] | None) -> None:
        self.rule = rule
        self.methods = methods
        self.entries = rule.required_entries
        self._matches: Callable[[str], bool] | None = None

    def covers(self, other: _Candidate) -> bool:
        """Whether it matches every request that the other one matches."""
        if self.methods is not None and (other.methods is None or not other.methods <= self.methods):
            return False
        if self.entries and not _all_hold(self.entries, other.entries):
            return False
        wider, pattern = self.rule.endpoint, other.rule.endpoint
        if wider == pattern:
            return True
        if not wider.startswith("/"):
            return False  # descriptors have an order of their own
        self._matches = self._matches or endpoint_matcher(wider)
        # A pattern's own text is one of the paths that it matches, and a cheap test that nearly all pairs fail.
        return self._matches(pattern) and covers(wider, pattern)


def unreachable_rules(rules: Sequence[Rule]) -> dict[str, str]:
    """The rules of a tier that never answer. Shadow rules are evaluated beside all others, so they are not considered.

    Args:
        rules: all rules of the tier, in order.

    Returns:
        Names of rules that never answer → the name of a preferred rule that matches all their requests. The work is linear in the
        number of rules; beyond `MAX_WIDER` and `MAX_METHOD_SETS` some are not found.
    """
    found: dict[str, str] = {}
    wider: list[_Candidate] = []
    by_endpoint: dict[str, dict[tuple[object, object], _Candidate]] = {}
    for candidate in _preferred_first(rules):
        same = by_endpoint.setdefault(candidate.rule.endpoint, {})
        own = (candidate.methods, candidate.entries)
        preferred = same.get(own) or same.get((None, candidate.entries)) or same.get((None, ()))
        preferred = preferred or next((each for each in (*same.values(), *wider) if each.covers(candidate)), None)
        if preferred is not None:
            found[candidate.rule.name] = preferred.rule.name
            continue
        if len(same) < MAX_METHOD_SETS:
            same[own] = candidate
        if len(wider) < MAX_WIDER and ("*" in candidate.rule.endpoint or "{" in candidate.rule.endpoint):
            wider.append(candidate)
    return found


def coverage_warnings(tier: str, rules: Sequence[Rule], changed: str) -> list[str]:
    """Warnings about a rule that was just made or changed: it never answers, or others of its tier do not because of it.

    Args:
        tier: the tier's name.
        rules: all rules of the tier, in order.
        changed: the rule's name.

    Returns:
        One sentence each, at most 1 + `MAX_WARNINGS`.
    """
    preferred_by: str | None = None
    covered: list[str] = []
    own = next((each for each in _preferred_first(rules) if each.rule.name == changed), None)
    if own is None:
        return []
    preferred = True
    for candidate in _preferred_first(rules):
        if candidate.rule.name == changed:
            preferred = False
        elif preferred:
            if preferred_by is None and candidate.covers(own):
                preferred_by = candidate.rule.name
        elif len(covered) < MAX_WARNINGS and own.covers(candidate):
            covered.append(candidate.rule.name)
    warnings = [] if preferred_by is None else [unreachable_warning(tier, changed, preferred_by)]
    return warnings + [unreachable_warning(tier, name, changed) for name in covered]


def unreachable_warning(tier: str, rule: str, preferred: str) -> str:
    """The sentence for a rule that never answers."""
    return (
        f"tier {tier!r}: rule {rule!r} never answers: {preferred!r} is preferred and matches all its requests; "
        "remove it or give it a higher priority"
    )


def _preferred_first(rules: Sequence[Rule]) -> Iterator[_Candidate]:
    heads = {(rule.endpoint, rule.match) for rule in rules if rule.mode is not Mode.SHADOW and "HEAD" in rule.methods}
    ranked = sorted((rule_rank(rule, order), rule) for order, rule in enumerate(rules) if rule.mode is not Mode.SHADOW)
    for _, rule in ranked:
        yield _Candidate(rule, counted_methods(rule.methods, (rule.endpoint, rule.match) in heads))


def _all_hold(entries: tuple[tuple[str, str], ...], given: tuple[tuple[str, str], ...]) -> bool:
    """Whether a check that matches the given entries surely matches the others."""
    patterns = dict(given)
    for name, wider in entries:
        pattern = patterns.get(name)
        if pattern is None or (pattern != wider and ("{" in wider + pattern or not covers(wider, pattern))):
            return False
    return True


def _pieces(pattern: str) -> list[str]:
    return [_STAR if each[0] == "*" else _SEGMENT if each[0] == "{" else each for each in _PIECES.findall(pattern)]


def _past_stars(states: int, stars: int) -> int:
    # Runs of stars are one piece, so one step passes each.
    return states | (states & stars) << 1
