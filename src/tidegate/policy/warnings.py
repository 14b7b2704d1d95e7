"""What is valid in a policy but surely not meant: `tidegate policy check` and `tidegate doctor` print it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tidegate.policy.coverage import unreachable_rules, unreachable_warning
from tidegate.policy.limits import Algorithm, Limit
from tidegate.policy.model import Policy, Tier
from tidegate.policy.rules import Mode, Rule
from tidegate.timestamps import US_PER_S

MAX_RULES_FOR_ALL: Final = 16
"""Of the rules for `/*` in one tier, at most this many are compared with the others."""


def policy_warnings(policy: Policy) -> list[str]:
    """What is valid in a policy but surely not meant.

    Returns:
        One sentence each: rules that can never answer, limits that can never bind, tiers without callers or limits, plans that
        are written as limits (months and years that do not start anew with the calendar, a `/*` that other rules escape).
    """
    warnings = []
    used = (
        {customer.tier for customer in policy.customers}
        | {api_key.tier for api_key in policy.api_keys}
        | {policy.anonymous_tier, policy.caller_policy.default_tier}
    )
    # A tier may be named by the caller's attribute, too.
    only_keys = bool(policy.api_keys) and not policy.caller_policy.tier_from
    for tier in policy.tiers:
        if not tier.rules and not tier.limits and not tier.quotas:
            warnings.append(f"tier {tier.name!r} limits nothing: it has neither rules nor limits nor quotas")
        if only_keys and tier.name not in used:
            warnings.append(f"tier {tier.name!r} has no API key in this file and is not the anonymous tier")
        unreachable = unreachable_rules(tier.rules)
        for rule in tier.rules:
            if rule.name in unreachable:
                warnings.append(unreachable_warning(tier.name, rule.name, unreachable[rule.name]))
            warnings.extend(
                f"tier {tier.name!r}, rule {rule.name!r}: limit {idle.text!r} never binds: {binding.text!r} is reached first"
                for idle, binding in _idle_limits(rule)
            )
        warnings.extend(f"tier {tier.name!r}: {warning}" for warning in (*_calendar_traps(tier), *_escaping_rules(tier)))
    return warnings


def _calendar_traps(tier: Tier) -> Iterable[str]:
    """Limits per month or year that do not start anew with it."""
    for limit in tier.limits:
        if limit.is_calendar:
            yield (
                f"limit {limit.text!r} slides: it does not start anew on the 1st, the {limit.window_name} before fades over the "
                f'new one; for what a plan includes per {limit.window_name} write quotas = ["{limit.text}"]'
            )
    for rule in tier.rules:
        for limit in rule.limits:
            if not limit.is_calendar or rule.algorithm is Algorithm.FIXED_WINDOW:
                continue
            if rule.algorithm.is_bucket:
                does = f"is in a {rule.algorithm}, which refills all the time"
            elif rule.algorithm is Algorithm.SLIDING_LOG:
                does = f"is counted over the last {limit.window_us // (86_400 * US_PER_S)} days by sliding_log"
            else:
                does = f"slides: the {limit.window_name} before fades over the new one"
            yield (
                f"rule {rule.name!r}: limit {limit.text!r} {does}; it does not start anew on the 1st: for what a plan includes "
                f'per {limit.window_name} write quotas = ["{limit.amount}/{limit.window_name}"]'
            )


def _escaping_rules(tier: Tier) -> Iterable[str]:
    """Rules for all paths that other rules take requests from."""
    # Rules with a match are for some callers, and meant to take these from others.
    enforced = [
        rule for rule in tier.rules if rule.mode is Mode.ENFORCE and rule.endpoint.startswith("/") and not rule.required_entries
    ]
    # A tier's own limits and quotas hold over all endpoints already.
    for everything in (
        () if tier.limits or tier.quotas else [rule for rule in enforced if rule.endpoint == "/*"][:MAX_RULES_FOR_ALL]
    ):
        # A rule of lower priority takes nothing from it, and one of other methods nothing that it would count.
        escaping = [
            rule.name
            for rule in enforced
            if rule.endpoint != "/*"
            and rule.priority >= everything.priority
            and (not everything.methods or not rule.methods or set(rule.methods) & set(everything.methods))
        ]
        if escaping:
            named = ", ".join(map(repr, escaping[:3])) + (f" and {len(escaping) - 3} more" if len(escaping) > 3 else "")
            yield (
                f"rule {everything.name!r} does not count what {named} answer{'s' if len(escaping) == 1 else ''}: one rule "
                "answers a request; put what is to hold over all endpoints into the tier's own limits, or into its quotas where "
                "a plan sells it"
            )


def _idle_limits(rule: Rule) -> Iterable[tuple[Limit, Limit]]:
    """Pairs of a limit that can never bind and the shorter one that is always reached first."""
    if rule.algorithm.is_bucket:
        return
    for limit in rule.limits:
        for shorter in rule.limits:
            # Twice the rate: a window counter may admit nearly twice its amount within one window's length.
            fits = -(-limit.window_us // shorter.window_us) + 1
            if not shorter.concurrent and shorter.window_us < limit.window_us and shorter.amount * fits <= limit.amount:
                yield limit, shorter
                break
