"""Method + path → rules, compiled once per tier.

One index serves rules that enforce, another those that only watch. A literal path is one dictionary look-up; patterns of segments
(`{id}`) stand in a trie; patterns with `*` are found by their literal beginning and end, so that a thousand rules cost about
what ten do. Nothing is remembered per path: an attacker who varies paths grows nothing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeAlias

import msgspec

from tidegate.policy.descriptors import entries_subject, entry_matches
from tidegate.policy.globs import GlobIndex, endpoint_matcher
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.policy.model import Mode, Override, Rule, Subject, Tier

_Rank: TypeAlias = tuple[int, ...]


class CompiledRule:
    """A rule ready to be matched and counted.

    Args:
        rule: the rule.
        limits: its limits, ready to be counted.
        order: its place in the tier, the last tie-break.
        head_is_named: whether a rule of the same endpoint and mode names HEAD; see `counted_methods`.
    """

    __slots__ = ("limits", "methods", "rank", "rule", "subject")

    def __init__(self, rule: Rule, limits: LimitSet, order: int, head_is_named: bool = False) -> None:
        self.rule = rule
        self.limits = limits
        self.subject = rule.subject
        self.methods = counted_methods(rule.methods, head_is_named)
        self.rank = rule_rank(rule, order)

    def __repr__(self) -> str:
        return f"CompiledRule({self.rule.name!r})"


class DescriptorRule:
    """A rule for descriptors. It matches those that have all its entries, and may have more.

    Preferred is the highest priority, then the one with the most entries, then with the fewest `*`, then the first.

    Args:
        compiled: the rule, ready to be counted.
    """

    __slots__ = ("compiled", "entries", "rank")

    def __init__(self, compiled: CompiledRule) -> None:
        self.compiled = compiled
        self.entries = compiled.rule.descriptor
        stars = sum(value.endswith("*") for _, value in self.entries)
        self.rank = (-compiled.rule.priority, -len(self.entries), stars, compiled.rank[-1])

    def matches(self, entries: Mapping[str, str]) -> bool:
        """Whether it is for a descriptor.

        Args:
            entries: values of the descriptor by key.
        """
        for key, pattern in self.entries:
            value = entries.get(key)
            if value is None or not entry_matches(pattern, value):
                return False
        return True

    def subject(self, entries: Mapping[str, str], caller: str) -> str:
        """Whom it counts: the values of its entries, and the API key that came, unless it counts the whole tier as one.

        Args:
            entries: values of the descriptor by key.
            caller: subject of whoever asks: `k:…` with a key, empty without.
        """
        counted = [(key, entries[key]) for key, _ in self.entries]
        return entries_subject(counted, caller.removeprefix("k:") if self.compiled.subject is Subject.API_KEY else "")


class CompiledTier:
    """A tier ready to be asked.

    Args:
        tier: the tier.
        overrides: other limits for one key; rules that they do not name keep their own.

    Attributes:
        has_shadow_rules: whether `shadow_rules` can give any.
    """

    __slots__ = ("_described", "_enforced", "_watched", "has_shadow_rules", "limits", "rules", "tier")

    def __init__(self, tier: Tier, overrides: Iterable[Override] = ()) -> None:
        self.tier = tier
        other = {override.rule: override.limits for override in overrides}
        tier_limits = other.get("", tier.limits)
        self.limits: LimitSet | None = None
        suffix = ""
        if tier_limits:
            labelled = [msgspec.structs.replace(limit, label=f"tier {limit.text}") for limit in tier_limits]
            self.limits = LimitSet(tier.name, Algorithm.SLIDING_WINDOW, labelled, tier=tier.name)
            suffix = ", " + self.limits.quotas
        heads = {(rule.endpoint, rule.mode) for rule in tier.rules if "HEAD" in rule.methods}
        compiled = [
            CompiledRule(
                rule,
                _limit_set(tier, rule, other.get(rule.name, rule.limits), suffix),
                order,
                (rule.endpoint, rule.mode) in heads,
            )
            for order, rule in enumerate(tier.rules)
        ]
        # What is preferred first: the highest priority, then the most specific pattern.
        self.rules = tuple(sorted((each for each in compiled if not each.rule.descriptor), key=lambda each: each.rank))
        described = (DescriptorRule(each) for each in compiled if each.rule.descriptor)
        self._described = tuple(sorted(described, key=lambda each: each.rank))
        self._enforced = _Index(each for each in self.rules if each.rule.mode is Mode.ENFORCE)
        self._watched = _Index(each for each in self.rules if each.rule.mode is Mode.SHADOW)
        self.has_shadow_rules = bool(self._watched)

    def match(self, method: str, path: str) -> CompiledRule | None:
        """The one rule that answers.

        Args:
            method: upper-case HTTP method.
            path: canonical path.

        Returns:
            The enforcing rule of the highest priority, then of the most specific pattern; None where none matches. Costs about
            0.3 µs for a literal, 1 to 4 µs for a pattern among 1,000.
        """
        return self._enforced.best(method, path)

    def match_entries(self, entries: Mapping[str, str]) -> tuple[DescriptorRule, ...]:
        """All rules for descriptors that match, the one that answers first: see `DescriptorRule`.

        Args:
            entries: values of the descriptor by key.

        Returns:
            The rules, shadow rules too. Costs about 0.1 µs for each rule for descriptors that the tier has.
        """
        return tuple(each for each in self._described if each.matches(entries))

    def shadow_rules(self, method: str, path: str) -> tuple[CompiledRule, ...]:
        """All shadow rules that match, in no particular order.

        Args:
            method: upper-case HTTP method.
            path: canonical path.

        Returns:
            The rules.
        """
        return self._watched.every(method, path) if self.has_shadow_rules else ()


def _limit_set(tier: Tier, rule: Rule, limits: tuple[Limit, ...], suffix: str) -> LimitSet:
    # A tier's name holds no ':', so 'tier:rule' cannot be read two ways, nor equal a tier's own counter 'tier'.
    made = LimitSet(f"{tier.name}:{rule.name}", rule.algorithm, limits, rule.on_failure, rule=rule.name, tier=tier.name)
    made.quotas += suffix
    return made


def rule_rank(rule: Rule, order: int) -> _Rank:
    """The sort key of a rule, preferred ones first: higher priority, no `*`, no `{…}`, more literal characters, fewer wildcards,
    named methods, order in the tier.
    """
    parameters = len(re.findall(r"\{[^}]*\}", rule.endpoint))
    stars = rule.endpoint.count("*")
    literal = len(re.sub(r"\{[^}]*\}|\*", "", rule.endpoint))
    return (-rule.priority, int(stars > 0), int(parameters > 0), -literal, stars, parameters, int(not rule.methods), order)


_Candidate: TypeAlias = tuple[CompiledRule, Callable[[str], bool] | None]


class _Node:
    """A place in the trie of segment patterns."""

    __slots__ = ("literal", "parameter", "rules")

    def __init__(self) -> None:
        self.literal: dict[str, _Node] = {}
        self.parameter: _Node | None = None
        self.rules: list[_Candidate] = []


class _Index:
    """All rules of one kind, found by path."""

    __slots__ = ("_first_pattern", "_literal", "_roots", "_stars")

    def __init__(self, rules: Iterable[CompiledRule]) -> None:
        self._literal: dict[str, tuple[CompiledRule, ...]] = {}
        # number of segments → trie of the patterns that have so many
        self._roots: dict[int, _Node] = {}
        self._stars: GlobIndex[_Candidate] = GlobIndex()
        patterns = []
        for rule in sorted(rules, key=lambda each: each.rank):
            endpoint = rule.rule.endpoint
            if "*" in endpoint:
                self._add_star(rule)
                patterns.append(rule)
            elif "{" in endpoint:
                self._add_segments(rule)
                patterns.append(rule)
            else:
                self._literal[endpoint] = (*self._literal.get(endpoint, ()), rule)
        self._first_pattern: _Rank | None = min((rule.rank for rule in patterns), default=None)

    def __bool__(self) -> bool:
        return bool(self._literal or self._roots or self._stars)

    def best(self, method: str, path: str) -> CompiledRule | None:
        found: CompiledRule | None = None
        for rule in self._literal.get(path, ()):
            if rule.methods is None or method in rule.methods:
                found = rule
                break
        if self._first_pattern is None or (found is not None and found.rank < self._first_pattern):
            return found
        candidates = self._candidates(path) if self._roots else self._stars.candidates(path)
        for rule, matches in candidates:
            if (
                (found is None or rule.rank < found.rank)
                and (rule.methods is None or method in rule.methods)
                and (matches is None or matches(path))
            ):
                found = rule
        return found

    def every(self, method: str, path: str) -> tuple[CompiledRule, ...]:
        literal = (rule for rule in self._literal.get(path, ()) if rule.methods is None or method in rule.methods)
        patterns = (
            rule
            for rule, matches in self._candidates(path)
            if (rule.methods is None or method in rule.methods) and (matches is None or matches(path))
        )
        return (*literal, *patterns)

    def _candidates(self, path: str) -> Iterable[_Candidate]:
        """Rules whose pattern may match, each at most once, with what decides it; None where it does match."""
        stars = self._stars.candidates(path)
        root = self._roots.get(path.count("/")) if self._roots else None
        return stars if root is None else itertools.chain(stars, _walk(root, path.split("/")))

    def _add_star(self, rule: CompiledRule) -> None:
        endpoint = rule.rule.endpoint
        beginning = re.split(r"[*{]", endpoint, maxsplit=1)[0]
        end = re.split(r"[*}]", endpoint)[-1]
        matches = None if endpoint == f"{beginning}*{end}" else endpoint_matcher(endpoint)
        self._stars.add(beginning, end, (rule, matches))

    def _add_segments(self, rule: CompiledRule) -> None:
        segments = rule.rule.endpoint.split("/")[1:]
        node = self._roots.setdefault(len(segments), _Node())
        for segment in segments:
            if segment.startswith("{"):
                node.parameter = node.parameter or _Node()
                node = node.parameter
            else:
                node = node.literal.setdefault(segment, _Node())
        node.rules.append((rule, None))


def _walk(root: _Node, segments: list[str]) -> Iterator[_Candidate]:
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
        yield from node.rules


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


def counted_by(kind: Subject, has_key: bool) -> Subject:
    """Whom a rule really counts: a caller without an API key is counted by ip where a key would be.

    Args:
        kind: whom the rule counts.
        has_key: whether the caller brings a key.

    Returns:
        The kind that holds for this caller.
    """
    return Subject.IP if kind is Subject.API_KEY and not has_key else kind


def subject_of(kind: Subject, caller: str, ip: str | None, tier: str) -> str | None:
    """The subject that a rule counts, in a form that no two kinds share.

    Args:
        kind: whom the rule counts.
        caller: subject of whoever asks: `k:…` with a key, `i:…` without.
        ip: client address, already cut to what counts as one client, or None.
        tier: name of the tier.

    Returns:
        The subject; None where the rule counts by ip and none is known.
    """
    if kind is Subject.API_KEY:
        return caller
    if kind is Subject.IP:
        return None if ip is None else f"i:{ip}"
    return f"t:{tier}"
