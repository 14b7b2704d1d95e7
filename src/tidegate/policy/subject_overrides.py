"""Other limits for some subjects of a rule that counts by attributes: `[[tiers.overrides]]` of a policy.

An override of the exact subject takes precedence over one that leaves values open, whatever their order in the policy. The
counter of a subject does not depend on its override: consumption is kept when one is added, changed or removed, or ends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from tidegate.errors import PolicyError
from tidegate.policy.attributes import MAX_VALUE
from tidegate.policy.descriptors import entries_subject, entries_text
from tidegate.policy.fields import short
from tidegate.policy.limits import Limit, LimitSet, fit_limits
from tidegate.policy.match_index import MatchIndex
from tidegate.policy.model import Tier
from tidegate.policy.overrides import SubjectOverride
from tidegate.policy.rules import Rule, Subject, subject_text
from tidegate.timestamps import now_us

MAX_OVERRIDES: Final = 10_000
"""Maximum number of overrides of one tier: all of them are loaded with it."""
MAX_PATTERNS: Final = 100
"""Maximum number of overrides with `*` of one tier: a check may be compared with each, at 0.5 µs where values are long."""

_NOT_NAMED: Final = ("api_key", "ip")


def subject_override(rule: Rule, subject: object, limits: Iterable[Limit | str], until_us: int | None = None) -> SubjectOverride:
    """Validate an override.

    Args:
        rule: whose limits it replaces.
        subject: values by attribute; `*` in a value matches any run of characters, an attribute that is left out any value.
        limits: limits or their texts.
        until_us: µs since the epoch (UTC) from which it no longer applies; None for never.

    Raises:
        PolicyError: naming what is wrong and the remedy.
    """
    names = _names_of(rule)
    if not isinstance(subject, Mapping) or not subject:
        example = f'{{ {names[0]} = "42" }}'
        raise PolicyError(f"subject {short(subject)} is not a table with a value: write subject = {example}")
    for name, value in subject.items():
        if name not in names:
            raise PolicyError(
                f"subject names {short(name)}, which rule {rule.name!r} does not count by: it counts by {', '.join(names)}"
            )
        if not isinstance(value, str) or not 1 <= len(value) <= MAX_VALUE or not value.isprintable():
            raise PolicyError(
                f"subject has the value {short(value)} for {name!r}: it must be 1 to {MAX_VALUE} printable characters, in quotes"
            )
    parsed = tuple(limit if isinstance(limit, Limit) else Limit.parse(limit) for limit in limits)
    fit_limits(rule.counting, parsed)
    return SubjectOverride(rule.name, tuple(sorted(subject.items())), parsed, until_us)


def _names_of(rule: Rule) -> tuple[str, ...]:
    """The attributes that overrides of a rule can name.

    Raises:
        PolicyError: if it can have none.
    """
    if rule.subject is not Subject.ATTRIBUTES:
        raise PolicyError(
            f"rule {rule.name!r} counts by {subject_text(rule)}, not by an attribute: only a rule that counts by attributes "
            "can have other limits for some of their values"
        )
    names = tuple(part for part in rule.subject_parts if part not in _NOT_NAMED)
    if not names:
        raise PolicyError(f"rule {rule.name!r} counts by {subject_text(rule)}: it has no attribute that an override could name")
    if not rule.limits:
        raise PolicyError(f"rule {rule.name!r} has no limits that an override could replace: give it 'limits'")
    return names


class OverrideFit:
    """Which overrides can apply to the rules of a tier, which may have changed since they were written."""

    __slots__ = ("_fits", "_names", "_rules")

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules = {rule.name: rule for rule in rules}
        self._names: dict[str, frozenset[str]] = {}
        # Thousands of overrides have a few different limits.
        self._fits: dict[tuple[str, tuple[Limit, ...]], bool] = {}

    def holds(self, override: SubjectOverride) -> bool:
        """Whether its rule is there, counts by its attributes, and takes its limits. Costs about 1 µs."""
        rule = self._rules.get(override.rule)
        if rule is None:
            return False
        names = self._names.get(rule.name)
        if names is None:
            try:
                names = frozenset(_names_of(rule))
            except PolicyError:
                names = frozenset()
            self._names[rule.name] = names
        if any(name not in names for name, _ in override.subject):
            return False
        known = (rule.name, override.limits)
        found = self._fits.get(known)
        if found is None:
            try:
                fit_limits(rule.counting, override.limits)
                found = True
            except PolicyError:
                found = False
            self._fits[known] = found
        return found


def add_override(found: dict[tuple[str, str], SubjectOverride], override: SubjectOverride, tier: str) -> None:
    """Add an override to those of a tier.

    Args:
        found: by `SubjectOverride.key`.
        override: to be added.
        tier: its name, for messages.

    Raises:
        PolicyError: if there is one of the same rule and subject, or there are too many.
    """
    if override.key in found:
        raise PolicyError(
            f"rule {override.rule!r} has two overrides for the subject {short(override.subject_text)}: remove one of them"
        )
    found[override.key] = override
    patterns = sum(each.has_pattern for each in found.values()) if override.has_pattern else 0
    require_few(len(found), patterns, tier)


def require_few(count: int, patterns: int, tier: str) -> None:
    """Refuse more overrides than a tier can have.

    Args:
        count: how many it would have.
        patterns: how many of them have a `*`.
        tier: its name, for messages.

    Raises:
        PolicyError: naming the bound and the remedy.
    """
    if count > MAX_OVERRIDES:
        raise PolicyError(
            f"tier {tier!r} has {count} overrides for subjects: at most {MAX_OVERRIDES} are kept; give those of one plan a "
            "rule with 'match', or a tier of their own"
        )
    if patterns > MAX_PATTERNS:
        raise PolicyError(f"tier {tier!r} has {patterns} overrides with '*': at most {MAX_PATTERNS} are kept; remove some first")


def override_id(rule: str, subject: Mapping[str, str]) -> str:
    """The id of an override in its tier, in the admin API: 24 hex digits, the same whenever it is written again.

    Args:
        subject: values by attribute.
    """
    text = f"{rule}\0{entries_text(sorted(subject.items()))}"
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=12).hexdigest()


class RuleOverrides:
    """The overrides of one rule, found by subject."""

    __slots__ = ("_exact", "_open")

    def __init__(self, rule: Rule, overrides: Iterable[SubjectOverride]) -> None:
        self._exact: dict[str, SubjectOverride] = {}
        self._open: MatchIndex[SubjectOverride] | None = None
        for each in overrides:
            if len(each.subject) == len(rule.subject_parts) and not each.has_pattern:
                self._exact[entries_subject(each.subject, prefix="a:")] = each
                continue
            if self._open is None:
                self._open = MatchIndex()
            self._open.add(each.subject, each)

    def find(self, counted: str, attributes: Mapping[str, str]) -> SubjectOverride | None:
        """The override of a subject that has not ended.

        Args:
            counted: the subject that the rule counts, `a:…` or its digest.

        Returns:
            The override of exactly this subject, else the one with the most attributes, then with the fewest `*`, then with the
            most literal characters; None where there is none. Costs about 0.2 µs where no override leaves a value open.
        """
        exact = self._exact.get(counted)
        if exact is not None and (exact.until_us is None or exact.until_us > now_us()):
            return exact
        # A check without one of the attributes is counted by its address.
        if self._open is None or counted.startswith("i:") or not attributes:
            return None
        found = self._open.find(attributes)
        if len(found) > 1:
            found.sort(key=_rank)
        return next((each for each in found if each.until_us is None or each.until_us > now_us()), None)


def _rank(override: SubjectOverride) -> tuple[int, int, int, str]:
    stars = sum(value.count("*") for _, value in override.subject)
    literal = sum(len(value) for _, value in override.subject) - stars
    return -len(override.subject), stars, -literal, override.subject_text


def index_overrides(tier: Tier) -> dict[str, RuleOverrides]:
    """The overrides of a tier by the name of their rule; those that no longer fit their rule are left out.

    Costs about 5 µs for each override.
    """
    if not tier.overrides:
        return {}
    rules = {rule.name: rule for rule in tier.rules}
    fit = OverrideFit(tier.rules)
    by_rule: dict[str, list[SubjectOverride]] = {}
    for each in tier.overrides:
        if fit.holds(each):
            by_rule.setdefault(each.rule, []).append(each)
    return {name: RuleOverrides(rules[name], found) for name, found in by_rule.items()}


class OverriddenLimits:
    """The limits of the subjects of one rule that have an override, each made when it is first needed.

    Args:
        overrides: of the rule.
        make: makes limits that count as those of the rule do.
    """

    __slots__ = ("_made", "_make", "_overrides")

    def __init__(self, overrides: RuleOverrides, make: Callable[[tuple[Limit, ...]], LimitSet]) -> None:
        self._overrides = overrides
        self._make = make
        # Stores remember what they prepared for each set, so that one is made once. By the identity of an override, which the
        # index keeps; as many as there are overrides.
        self._made: dict[int, LimitSet] = {}

    def of(self, counted: str, attributes: Mapping[str, str], default: LimitSet) -> LimitSet:
        """The limits of a subject.

        Args:
            counted: the subject that the rule counts.
            default: of subjects without an override.
        """
        found = self._overrides.find(counted, attributes)
        if found is None:
            return default
        made = self._made.get(id(found))
        if made is None:
            made = self._made[id(found)] = self._make(found.limits)
        return made
