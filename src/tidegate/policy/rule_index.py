"""Method + path → compiled rules.

A literal path is one dictionary look-up; patterns of segments (`{id}`) are in a trie; patterns with `*` are found by their
literal beginning and end, so that a thousand rules cost about what ten do. A few simple rules are one regular expression.
Nothing is remembered per path: an attacker who varies
paths grows nothing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final, Generic, TypeAlias, TypeVar

from tidegate.policy.attributes import NO_ATTRIBUTES
from tidegate.policy.globs import GlobIndex, endpoint_matcher
from tidegate.policy.limits import LimitSet
from tidegate.policy.match_index import MatchIndex
from tidegate.policy.periods import DEFAULT_ANCHOR, PeriodAnchor
from tidegate.policy.quotas import CompiledQuotas
from tidegate.policy.rules import Rule
from tidegate.policy.subject_overrides import OverriddenLimits

_Rank: TypeAlias = tuple[int, ...]
_T = TypeVar("_T")
_FEW: Final = 8
"""Up to so many rules are tried by one expression: about 20 ns each."""


class CompiledRule:
    """A rule ready to be matched and counted.

    Args:
        limits: its limits, ready to be counted.
        order: its place in the tier, the last tie-break.
        head_is_named: whether a rule of the same endpoint, match and mode names HEAD; see `counted_methods`.
        quotas: its quotas; None where it has none.
        overrides: other limits for some of its subjects; None where there are none.
        slots: its limit of requests in progress; None where it has none.

    Attributes:
        action: what it does in place of counting; None where it counts.
        limited: whether it has limits per window; else `limits` are its quotas, for the default anchor, or its slots.
    """

    __slots__ = ("action", "limited", "limits", "methods", "overrides", "parts", "quotas", "rank", "rule", "slots", "subject")

    def __init__(
        self,
        rule: Rule,
        limits: LimitSet | None,
        order: int,
        head_is_named: bool = False,
        quotas: CompiledQuotas | None = None,
        overrides: OverriddenLimits | None = None,
        slots: LimitSet | None = None,
    ) -> None:
        self.rule = rule
        self.overrides = overrides
        self.quotas = quotas
        self.action = rule.action
        self.limited = limits is not None and rule.action is None
        self.slots = slots
        if limits is None:
            limits = slots if quotas is None else quotas.of(DEFAULT_ANCHOR)
            assert limits is not None, "a rule has limits, quotas or slots"
        self.limits = limits
        self.subject = rule.subject
        # In one order, whatever that of the policy: it may change without a new counter.
        self.parts = tuple(sorted(rule.subject_parts))
        self.methods = counted_methods(rule.methods, head_is_named)
        self.rank = rule_rank(rule, order)

    def limits_of(self, subject: str, attributes: Mapping[str, str]) -> LimitSet:
        """The limits of a subject, which an override may replace."""
        return self.limits if self.overrides is None else self.overrides.of(subject, attributes, self.limits)

    def counters(
        self, subject: str, anchor: PeriodAnchor = DEFAULT_ANCHOR, attributes: Mapping[str, str] = NO_ATTRIBUTES
    ) -> tuple[tuple[LimitSet, str], ...]:
        """Its limits and its quotas, where both count one subject.

        Args:
            subject: whom they count.
            anchor: when the periods of its quotas begin.
            attributes: of the check; an override may replace the limits of their values.

        Returns:
            Pairs of limits and subject, as in a charge.
        """
        if self.action is not None:
            return ()
        if self.quotas is None and self.slots is None:
            return ((self.limits_of(subject, attributes), subject),)
        own = [(self.limits_of(subject, attributes), subject)] if self.limited else []
        if self.quotas is not None:
            own.append((self.quotas.of(anchor), subject))
        if self.slots is not None:
            own.append((self.slots, subject))
        return tuple(own)

    def __repr__(self) -> str:
        return f"CompiledRule({self.rule.name!r})"


class _PathPatterns(Generic[_T]):
    """Things found by the pattern of their paths."""

    __slots__ = ("_roots", "_stars")

    def __init__(self) -> None:
        # number of segments → trie of the patterns that have so many
        self._roots: dict[int, _Node[_T]] = {}
        self._stars: GlobIndex[tuple[_T, Callable[[str], bool] | None]] = GlobIndex()

    def __bool__(self) -> bool:
        return bool(self._roots or self._stars)

    def add(self, endpoint: str, thing: _T) -> None:
        if "*" in endpoint:
            beginning = re.split(r"[*{]", endpoint, maxsplit=1)[0]
            end = re.split(r"[*}]", endpoint)[-1]
            matches = None if endpoint == f"{beginning}*{end}" else endpoint_matcher(endpoint)
            self._stars.add(beginning, end, (thing, matches))
            return
        segments = endpoint.split("/")[1:]
        node = self._roots.setdefault(len(segments), _Node())
        for segment in segments:
            if segment.startswith("{"):
                node.parameter = node.parameter or _Node()
                node = node.parameter
            else:
                node = node.literal.setdefault(segment, _Node())
        node.things.append((thing, None))

    def candidates(self, path: str) -> Iterable[tuple[_T, Callable[[str], bool] | None]]:
        """Things whose pattern may match, each at most once, with what decides it; None where it does match."""
        stars = self._stars.candidates(path)
        root = self._roots.get(path.count("/")) if self._roots else None
        return stars if root is None else itertools.chain(stars, _walk(root, path.split("/")))

    def finder(self) -> Callable[[str], Iterable[tuple[_T, Callable[[str], bool] | None]]]:
        """What does as `candidates`, for as long as nothing is added: without a call of its own where `*` are the only signs."""
        return self.candidates if self._roots else self._stars.candidates


class _Node(Generic[_T]):
    """A place in the trie of segment patterns."""

    __slots__ = ("literal", "parameter", "things")

    def __init__(self) -> None:
        self.literal: dict[str, _Node[_T]] = {}
        self.parameter: _Node[_T] | None = None
        self.things: list[tuple[_T, None]] = []


class RuleIndex:
    """All rules of one kind that name no attributes, found by path."""

    __slots__ = ("_candidates", "_few", "_first_pattern", "_literal", "_patterns")

    def __init__(self, rules: Iterable[CompiledRule]) -> None:
        self._literal: dict[str, tuple[CompiledRule, ...]] = {}
        self._patterns: _PathPatterns[CompiledRule] = _PathPatterns()
        patterns = []
        for rule in sorted(rules, key=lambda each: each.rank):
            endpoint = rule.rule.endpoint
            if _is_pattern(endpoint):
                self._patterns.add(endpoint, rule)
                patterns.append(rule)
            else:
                self._literal[endpoint] = (*self._literal.get(endpoint, ()), rule)
        self._first_pattern: _Rank | None = min((rule.rank for rule in patterns), default=None)
        self._candidates = self._patterns.finder()
        self._few = _matcher_of_few(sorted((*itertools.chain(*self._literal.values()), *patterns), key=lambda each: each.rank))

    def __bool__(self) -> bool:
        return bool(self._literal or self._patterns)

    def best(self, method: str, path: str) -> CompiledRule | None:
        """The preferred rule that matches; None where none does."""
        if self._few is not None:
            match, ranked = self._few
            matched = match(path)
            return None if matched is None else ranked[matched.lastindex or 0]
        found: CompiledRule | None = None
        if path in self._literal:
            for rule in self._literal[path]:
                if rule.methods is None or method in rule.methods:
                    found = rule
                    break
        if self._first_pattern is None or (found is not None and found.rank < self._first_pattern):
            return found
        for rule, matches in self._candidates(path):
            if (
                (rule.methods is None or method in rule.methods)
                and (found is None or rule.rank < found.rank)
                and (matches is None or matches(path))
            ):
                found = rule
        return found

    def every(self, method: str, path: str) -> tuple[CompiledRule, ...]:
        """All rules that match."""
        literal = (rule for rule in self._literal.get(path, ()) if rule.methods is None or method in rule.methods)
        patterns = (
            rule
            for rule, matches in self._patterns.candidates(path)
            if (rule.methods is None or method in rule.methods) and (matches is None or matches(path))
        )
        return (*literal, *patterns)


def _matcher_of_few(
    rules: Sequence[CompiledRule],
) -> tuple[Callable[[str], re.Match[str] | None], tuple[CompiledRule, ...]] | None:
    """One expression for a few rules, the preferred one first, and the rules by the group that matched.

    None where there are many, one names methods, or a pattern has another sign than one `*` at its end: such an expression needs
    no backtracking, whatever the path.
    """
    endpoints = [rule.rule.endpoint for rule in rules]
    if not 0 < len(rules) <= _FEW or any(rule.methods is not None for rule in rules):
        return None
    if any(_is_pattern(each[:-1]) or each.endswith("}") for each in endpoints):
        return None
    parts = [f"({re.escape(each[:-1])})" if each.endswith("*") else f"({re.escape(each)}\\Z)" for each in endpoints]
    return re.compile("|".join(parts)).match, (rules[0], *rules)


class AttributeRuleIndex:
    """All rules of one kind that name attributes: found by path, and among those of one endpoint by attributes."""

    __slots__ = ("_literal", "_patterns")

    def __init__(self, rules: Iterable[CompiledRule]) -> None:
        self._literal: dict[str, MatchIndex[CompiledRule]] = {}
        self._patterns: _PathPatterns[MatchIndex[CompiledRule]] = _PathPatterns()
        of_endpoint: dict[str, MatchIndex[CompiledRule]] = {}
        for rule in rules:
            endpoint = rule.rule.endpoint
            index = of_endpoint.get(endpoint)
            if index is None:
                index = of_endpoint[endpoint] = MatchIndex()
                if _is_pattern(endpoint):
                    self._patterns.add(endpoint, index)
                else:
                    self._literal[endpoint] = index
            index.add(rule.rule.required_entries, rule)

    @classmethod
    def of(cls, rules: Iterable[CompiledRule]) -> AttributeRuleIndex | None:
        """An index of rules; None where there are none."""
        index = cls(rules)
        return index if index._literal or index._patterns else None

    def best(self, method: str, path: str, attributes: Mapping[str, str], found: CompiledRule | None) -> CompiledRule | None:
        """The preferred one of a rule that was found by path alone and those of this index that match."""
        for rule in self._find(path, attributes):
            if (found is None or rule.rank < found.rank) and (rule.methods is None or method in rule.methods):
                found = rule
        return found

    def every(self, method: str, path: str, attributes: Mapping[str, str]) -> tuple[CompiledRule, ...]:
        """All rules that match."""
        return tuple(rule for rule in self._find(path, attributes) if rule.methods is None or method in rule.methods)

    def _find(self, path: str, attributes: Mapping[str, str]) -> list[CompiledRule]:
        """The rules whose endpoint and attributes match."""
        literal = self._literal.get(path)
        found = [] if literal is None else literal.find(attributes)
        for index, matches in self._patterns.candidates(path):
            if matches is None or matches(path):
                found += index.find(attributes)
        return found


def _is_pattern(endpoint: str) -> bool:
    return "*" in endpoint or "{" in endpoint


def _walk(root: _Node[_T], segments: list[str]) -> Iterator[tuple[_T, None]]:
    """Level by level, so that each node is looked at once: the work is bounded by the trie, whatever the path."""
    nodes = [root]
    for segment in segments[1:]:
        following = []
        for node in nodes:
            literal = node.literal.get(segment)
            if literal is not None:
                following.append(literal)
            if node.parameter is not None and segment:
                following.append(node.parameter)
        if not following:
            return
        nodes = following
    for node in nodes:
        yield from node.things


def rule_rank(rule: Rule, order: int) -> _Rank:
    """The sort key of a rule, preferred ones first: higher priority, no `*`, no `{…}`, more literal characters, fewer wildcards,
    named methods, more entries in its match, fewer `*` in those, order in the tier.
    """
    parameters = len(re.findall(r"\{[^}]*\}", rule.endpoint))
    stars = rule.endpoint.count("*")
    literal = len(re.sub(r"\{[^}]*\}|\*", "", rule.endpoint))
    return (
        -rule.priority,
        int(stars > 0),
        int(parameters > 0),
        -literal,
        stars,
        parameters,
        int(not rule.methods),
        -len(rule.match),
        sum(pattern.count("*") for _, pattern in rule.match),
        order,
    )


def counted_methods(methods: Collection[str], head_is_named: bool) -> frozenset[str] | None:
    """The methods that a rule counts. HEAD is answered as GET is (RFC 9110, 9.3.2), so it costs the service the same.

    Args:
        methods: that the rule names; empty for all.
        head_is_named: whether a rule of the same tier, endpoint and mode names HEAD: then HEAD is that rule's.

    Returns:
        The methods, HEAD with GET; None for all.
    """
    if not methods:
        return None
    return frozenset(methods) | {"HEAD"} if "GET" in methods and not head_is_named else frozenset(methods)
