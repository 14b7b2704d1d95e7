"""Overrides of API keys and customers after a change by an operator: which stay, which are new, and whether they fit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from sqlalchemy import RowMapping, select

from tidegate.admin.models import LimitOverride
from tidegate.admin.transaction import AuditedTransaction
from tidegate.catalog.sql import rows as policy_rows
from tidegate.catalog.sql.tables import rate_limit_rules
from tidegate.errors import BadRequest, PolicyError
from tidegate.policy.limits import Algorithm, Limit, fit_limits
from tidegate.policy.overrides import Override, active_overrides
from tidegate.policy.quotas import fit_quotas
from tidegate.policy.rules import Subject
from tidegate.timestamps import now_us, parse_timestamp


class OverridesSent(Protocol):
    """A request that may change the overrides of a key or customer."""

    @property
    def limits(self) -> list[str] | None:
        """Permanent limits in place of the tier's own."""

    @property
    def overrides(self) -> Sequence[LimitOverride]:
        """All others."""

    @property
    def model_fields_set(self) -> set[str]:
        """The fields that came."""


async def overrides_after(
    transaction: AuditedTransaction,
    tier: RowMapping | None,
    current: Iterable[Mapping[str, Any]],
    request: OverridesSent,
    owner: str = "key",
    *,
    changes_tier: bool,
    counts_quotas: bool = True,
) -> tuple[Override, ...]:
    """The overrides of a key or customer after a change: those of the request, else the current ones that have not ended.

    Args:
        tier: whose limits they replace; None for a customer without a tier.
        current: as the column has them; those without a rule in the tier are dropped.
        owner: "key" or "customer".
        changes_tier: whether the tier is another one than before.
        counts_quotas: whether the quotas count this owner; those of a customer's key count the customer.

    Raises:
        PolicyError: if a limit is not valid, a rule does not exist or counts by something else, or two are for one rule.
        BadRequest: if an override ends in the past.
    """
    counted = (Subject.API_KEY.value,) if owner == "key" else (Subject.API_KEY.value, Subject.CUSTOMER.value)
    now = now_us()
    kept = active_overrides(policy_rows.overrides_of(current), now)
    limits_sent, overrides_sent = ("limits" in request.model_fields_set, "overrides" in request.model_fields_set)
    sent = [override for each in request.overrides for override in _sent_overrides(each, now)] if overrides_sent else []
    if limits_sent and request.limits:
        sent.append(Override("", fit_limits(Algorithm.SLIDING_WINDOW, [Limit.parse(text) for text in request.limits])))
    if sent and tier is None:
        raise PolicyError(f"the {owner} has no tier whose limits an override could replace: give it a tier first")
    rules = await _rules_of(transaction, tier, {each.rule for each in (*(kept if changes_tier else ()), *sent) if each.rule})
    found: dict[tuple[str, bool, bool], Override] = {}
    for each in sent:
        if each.key in found:
            raise PolicyError(
                f"{each.subject} overridden twice: remove one; beside a permanent override there may be one with until"
            )
        if each.quotas and not counts_quotas:
            raise PolicyError(
                "the quotas of the customer count all of its keys together: override them for the customer, not for this key"
            )
        if each.rule:
            assert tier is not None
            _require_fit(rules.get(each.rule), each, str(tier["name"]), owner, counted)
        found[each.key] = each
    for each in kept:
        is_base = not each.rule and each.until_us is None and not each.quotas
        replaced = limits_sent if is_base else overrides_sent
        # Overrides without a rule in a new tier are dropped; only overrides of the request cause an error.
        usable = (counts_quotas or not each.quotas) and (not changes_tier or _is_usable(each, tier, rules, counted))
        if usable and not replaced:
            found.setdefault(each.key, each)
    return tuple(sorted(found.values(), key=lambda each: (bool(each.rule), each.until_us is not None)))


def _sent_overrides(sent: LimitOverride, now: int) -> list[Override]:
    until_us = None if sent.until is None else parse_timestamp(sent.until, "until")
    if until_us is not None and until_us <= now:
        raise BadRequest(f"until {sent.until} is in the past: send a later time, or leave the override out", field="until")
    limits = tuple(Limit.parse(text) for text in sent.limits)
    if sent.rule is None and limits:
        fit_limits(Algorithm.SLIDING_WINDOW, limits)
    found = [Override(sent.rule or "", limits, until_us)] if limits else []
    quotas = fit_quotas(sent.quotas)
    return [*found, Override(sent.rule or "", (), until_us, quotas)] if quotas else found


async def _rules_of(transaction: AuditedTransaction, tier: RowMapping | None, names: Collection[str]) -> dict[str, RowMapping]:
    if tier is None or not names:
        return {}
    of_rule = rate_limit_rules.c
    query = select(of_rule.name, of_rule.subject, of_rule.subject_attributes, of_rule.algorithm, of_rule.failures).where(
        of_rule.tier_id == tier["id"], of_rule.name.in_(list(names))
    )
    return {row["name"]: row for row in (await transaction.connection.execute(query)).mappings()}


def _require_fit(rule: RowMapping | None, override: Override, tier: str, owner: str, counted: Collection[str]) -> None:
    name = override.rule
    if rule is None:
        raise PolicyError(f"tier {tier!r} has no rule {name[:60]!r} to override: see GET /admin/v1/rate-limit-rules")
    if policy_rows.subject_value_of(rule) not in counted:
        by = "API key" if owner == "key" else "customer or API key"
        raise PolicyError(
            f"rule {name!r} counts by {_subject_text(rule)}, not by {by}: a {owner} cannot have limits of its own there"
        )
    if not override.quotas:
        fit_limits(policy_rows.counting_of(rule), override.limits)


def _is_usable(override: Override, tier: RowMapping | None, rules: Mapping[str, RowMapping], counted: Collection[str]) -> bool:
    """Whether an override fits a tier; one without a rule fits any."""
    if tier is None or not override.rule:
        return tier is not None
    rule = rules.get(override.rule)
    if rule is None or policy_rows.subject_value_of(rule) not in counted:
        return False
    if override.quotas:
        return True
    try:
        fit_limits(policy_rows.counting_of(rule), override.limits)
    except PolicyError:
        return False
    return True


def _subject_text(rule: RowMapping) -> str:
    value = policy_rows.subject_value_of(rule)
    return value if isinstance(value, str) else ",".join(value)
