"""Reads the overrides of an API key, a customer or some subjects of a tier in a policy file, for `toml_reader`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from tidegate.policy.fields import short
from tidegate.policy.limits import Algorithm, fit_limits
from tidegate.policy.model import Tier
from tidegate.policy.overrides import Override, SubjectOverride
from tidegate.policy.rules import Rule, Subject, subject_text
from tidegate.policy.subject_overrides import MAX_OVERRIDES as MAX_SUBJECT_OVERRIDES
from tidegate.policy.subject_overrides import add_override, subject_override
from tidegate.policy.toml_lines import Path as KeyPath
from tidegate.policy.toml_tables import TableReader, nearest

MAX_OVERRIDES: Final = 1_000
"""Most overrides of one API key or customer."""

_FIELDS: Final = ("rule", "limits", "quotas", "until")
_SUBJECT_FIELDS: Final = ("rule", "subject", "limits", "until")


def read_overrides(
    reader: TableReader, table: dict[str, Any], at: KeyPath, tier: Tier | None, owner: str, counted: Collection[Subject]
) -> tuple[Override, ...]:
    """The overrides in a table: `limits` and `quotas` in place of the tier's own, and the tables `overrides`.

    Args:
        reader: of the file.
        table: of an API key or a customer.
        at: its path.
        tier: of the key or customer; None where a customer has none.
        owner: "key" or "customer", for messages.
        counted: the subjects of rules that it can override.

    Raises:
        PolicyError: with file, line and reason.
    """
    found: dict[tuple[str, bool, bool], Override] = {}
    if "limits" in table:
        limits_at = (*at, "limits")
        limits = reader.limits(table["limits"], limits_at)
        reader.placed(lambda: fit_limits(Algorithm.SLIDING_WINDOW, limits), limits_at)
        found["", False, False] = Override("", limits)
    if "quotas" in table:
        quotas = reader.quotas(table, at)
        if not quotas:
            raise reader.error("quotas is an empty list: leave it out for those of the tier", (*at, "quotas"))
        found["", True, False] = Override("", (), None, quotas)
    if found or table.get("overrides"):
        _require_tier(reader, tier, at, owner)
    # Most keys override nothing: the rules of their tier are not gone through for them.
    rules = {rule.name: rule for rule in tier.rules} if tier is not None and table.get("overrides") else {}
    for override_at, override in reader.tables(table, "overrides", at, MAX_OVERRIDES):
        reader.known(override, _FIELDS, override_at)
        quotas = reader.quotas(override, override_at)
        reader.required(override, () if quotas else ("limits",), override_at)
        rule = _rule_of(reader, override, override_at, rules, tier, owner, counted) if "rule" in override else None
        name = "" if rule is None else rule.name
        until_us = reader.moment_us(override["until"], (*override_at, "until")) if "until" in override else None
        made = [Override(name, (), until_us, quotas)] if quotas else []
        if "limits" in override:
            limits_at = (*override_at, "limits")
            limits = reader.limits(override["limits"], limits_at)
            algorithm = Algorithm.SLIDING_WINDOW if rule is None else rule.counting
            reader.placed(lambda algorithm=algorithm, limits=limits: fit_limits(algorithm, limits), limits_at)  # type: ignore[misc]
            made.append(Override(name, limits, until_us))
        for each in made:
            if each.key in found:
                raise reader.error(
                    f"{each.subject} overridden twice: remove one; beside a permanent override there may be one with 'until'",
                    (*override_at, "rule") if name else override_at,
                )
            found[each.key] = each
    return tuple(found.values())


def read_subject_overrides(
    reader: TableReader, table: dict[str, Any], at: KeyPath, tier: str, rules: Mapping[str, Rule]
) -> tuple[SubjectOverride, ...]:
    """The tables `overrides` of a tier: other limits for some subjects of its rules.

    Raises:
        PolicyError: with file, line and reason.
    """
    found: dict[tuple[str, str], SubjectOverride] = {}
    for override_at, override in reader.tables(table, "overrides", at, MAX_SUBJECT_OVERRIDES):
        reader.known(override, _SUBJECT_FIELDS, override_at)
        reader.required(override, ("rule", "subject", "limits"), override_at)
        rule = _named_rule(reader, override["rule"], override_at, rules, tier)
        limits_at = (*override_at, "limits")
        limits = reader.limits(override["limits"], limits_at)
        reader.placed(lambda rule=rule, limits=limits: fit_limits(rule.counting, limits), limits_at)  # type: ignore[misc]
        until_us = reader.moment_us(override["until"], (*override_at, "until")) if "until" in override else None
        subject_at = (*override_at, "subject")
        made = reader.placed(
            lambda rule=rule, override=override, limits=limits, until_us=until_us: subject_override(  # type: ignore[misc]
                rule, override["subject"], limits, until_us
            ),
            subject_at,
        )
        reader.placed(lambda made=made: add_override(found, made, tier), subject_at)  # type: ignore[misc]
    return tuple(found.values())


def _named_rule(reader: TableReader, name: object, at: KeyPath, rules: Mapping[str, Rule], tier: str) -> Rule:
    rule = rules.get(name) if isinstance(name, str) else None
    if rule is None:
        raise reader.error(f"tier {tier!r} has no rule {short(name)}{nearest(name, rules)}", (*at, "rule"))
    return rule


def _require_tier(reader: TableReader, tier: Tier | None, at: KeyPath, owner: str) -> None:
    if tier is None:
        raise reader.error(f"the {owner} has overrides but no tier whose limits they could replace: give it a 'tier'", at)


def _rule_of(
    reader: TableReader,
    override: dict[str, Any],
    at: KeyPath,
    rules: dict[str, Rule],
    tier: Tier | None,
    owner: str,
    counted: Collection[Subject],
) -> Rule:
    assert tier is not None
    rule = _named_rule(reader, override["rule"], at, rules, tier.name)
    if rule.subject not in counted:
        by = "API key" if owner == "key" else "customer or API key"
        raise reader.error(
            f"rule {rule.name!r} counts by {subject_text(rule)}, not by {by}: a {owner} cannot have limits of its own there",
            (*at, "rule"),
        )
    return rule
