"""Reads the overrides of an API key or a customer in a policy file, for `toml_reader`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, Final, Protocol

from tidegate.errors import PolicyError
from tidegate.policy.limits import Algorithm, Limit, fit_limits, short
from tidegate.policy.model import Rule, Subject, Tier, subject_text
from tidegate.policy.overrides import Override
from tidegate.policy.quotas import Quota, fit_quotas
from tidegate.policy.toml_lines import Path as KeyPath

MAX_OVERRIDES: Final = 1_000
"""Most overrides of one API key or customer."""

MAX_QUOTAS: Final = 16

_FIELDS: Final = ("rule", "limits", "quotas", "until")


class TableReader(Protocol):
    """What this module needs of the reader of a policy file."""

    def tables(self, table: dict[str, Any], name: str, at: KeyPath, most: int) -> Iterable[tuple[KeyPath, dict[str, Any]]]:
        """The tables of an array, each with its path."""

    def known(self, table: dict[str, Any], fields: Iterable[str], at: KeyPath) -> None:
        """Refuse other fields."""

    def required(self, table: dict[str, Any], fields: Iterable[str], at: KeyPath) -> None:
        """Refuse a table without one of these fields."""

    def limits(self, value: object, at: KeyPath) -> tuple[Limit, ...]:
        """Read a list of limits."""

    def moment_us(self, value: object, at: KeyPath) -> int:
        """Read a time, µs since the epoch; the last part of its path names the field."""

    def placed(self, make: Callable[[], Any], at: KeyPath) -> Any:
        """Make a record; its error gets the line of the path."""

    def error(self, reason: str, at: KeyPath) -> PolicyError:
        """An error with the line of the path."""

    def nearest(self, name: object, known: Iterable[str]) -> str:
        """The end of a message: the most similar of the known names."""


def read_overrides(
    reader: TableReader, table: dict[str, Any], at: KeyPath, tier: Tier | None, owner: str, counted: Collection[Subject]
) -> tuple[Override, ...]:
    """The overrides in a table: `limits` for the tier's own limits, and the tables `overrides`.

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
    if found or table.get("overrides"):
        _require_tier(reader, tier, at, owner)
    # Most keys override nothing: the rules of their tier are not gone through for them.
    rules = {rule.name: rule for rule in tier.rules} if tier is not None and table.get("overrides") else {}
    for override_at, override in reader.tables(table, "overrides", at, MAX_OVERRIDES):
        reader.known(override, _FIELDS, override_at)
        until_us = reader.moment_us(override["until"], (*override_at, "until")) if "until" in override else None
        if "quotas" in override:
            made = _of_quotas(reader, override, override_at, until_us)
        else:
            reader.required(override, ("limits",), override_at)
            rule = _rule_of(reader, override, override_at, rules, tier, owner, counted) if "rule" in override else None
            limits_at = (*override_at, "limits")
            limits = reader.limits(override["limits"], limits_at)
            algorithm = Algorithm.SLIDING_WINDOW if rule is None else rule.algorithm
            reader.placed(lambda algorithm=algorithm, limits=limits: fit_limits(algorithm, limits), limits_at)  # type: ignore[misc]
            made = Override("" if rule is None else rule.name, limits, until_us)
        if made.slot in found:
            raise reader.error(
                f"{made.what} overridden twice: remove one; beside a permanent override there may be one with 'until'",
                (*override_at, "rule") if made.rule else override_at,
            )
        found[made.slot] = made
    return tuple(found.values())


def _of_quotas(reader: TableReader, override: dict[str, Any], at: KeyPath, until_us: int | None) -> Override:
    quotas_at = (*at, "quotas")
    for field in ("rule", "limits"):
        if field in override:
            raise reader.error(f"an override of quotas is for the tier's quotas alone: leave {field!r} out", (*at, field))
    value = override["quotas"]
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_QUOTAS or not all(isinstance(each, str) for each in value):
        raise reader.error('quotas must be a list such as ["150000/month"]', quotas_at)
    quotas: tuple[Quota, ...] = reader.placed(lambda: fit_quotas(value), quotas_at)
    return Override("", (), until_us, quotas)


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
    rule = rules.get(override["rule"]) if isinstance(override["rule"], str) else None
    rule_at = (*at, "rule")
    if rule is None:
        nearest = reader.nearest(override["rule"], rules)
        raise reader.error(f"tier {tier.name!r} has no rule {short(override['rule'])}{nearest}", rule_at)
    if rule.subject not in counted:
        by = "API key" if owner == "key" else "customer or API key"
        raise reader.error(
            f"rule {rule.name!r} counts by {subject_text(rule)}, not by {by}: a {owner} cannot have limits of its own there",
            rule_at,
        )
    return rule
