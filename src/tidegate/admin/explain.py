"""Explains a request for operators: `tidegate.gate.explain`, the caller by the id of its key, and a sentence for the answer."""

from __future__ import annotations

from collections.abc import Mapping

from tidegate.admin.lists import key_row
from tidegate.admin.models import KeyRead
from tidegate.admin.models.explain import ExplainedCaller, ExplainedCounter, ExplainedRule, ExplainRead
from tidegate.admin.models.usage import WindowUsageRead
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import NotFound
from tidegate.admin.usage import caller_of
from tidegate.catalog.cache_level import Caller
from tidegate.decision import Check, Decision
from tidegate.errors import ApiKeyExpired, ApiKeyRevoked, Blocked, MissingApiKey
from tidegate.gate.explain import Candidate, CounterNow, Explanation, access_of, explain
from tidegate.gate.gate import Gate
from tidegate.policy.access_entries import AccessAction
from tidegate.policy.limits import Algorithm
from tidegate.policy.quotas import QuotaLimit
from tidegate.policy.rules import Mode
from tidegate.timestamps import US_PER_S, format_timestamp

_REFUSALS = {"revoked": ApiKeyRevoked.code, "expired": ApiKeyExpired.code}


async def explain_request(editor: CatalogEditor, gate: Gate, key_id: str | None, check: Check) -> ExplainRead:
    """Explain the answer to a request.

    Args:
        key_id: id of the caller's API key; None for a caller without one.
        check: the request, without an API key.

    Returns:
        The explanation, also for revoked and expired keys.

    Raises:
        NotFound: if there is no such key, or callers without one have no tier.
        BadRequest: if the check names a tier that does not exist.
        CatalogUnavailable: if the catalog does not answer.
    """
    if key_id is None:
        caller, described = await _without_key(gate, check)
    else:
        record = KeyRead.of_row(await key_row(editor, key_id))
        caller = await caller_of(editor, gate, key_id)
        refused = _REFUSALS.get(record.status)
        why = f"the API key {record.id} belongs to the tier {record.tier!r}" + (f" and is {record.status}" if refused else "")
        described = ExplainedCaller(
            api_key_id=record.id, name=record.name or None, tier=caller.tier.tier.name, why=why, refused=refused
        )
    found = await explain(gate.counters, caller, check)
    blocked, exempt = await access_of(gate.access, check, caller)
    allowed, answer = found.allowed, _answer(found, check)
    if described.refused:
        allowed, answer = False, f"refused with 403 {described.refused}, whatever the rules say"
    elif blocked is not None:
        allowed, answer = False, f"refused with 403 {Blocked.code} by the access lists, before any rule: {blocked}"
    elif exempt:
        allowed, answer = True, "allowed: the access lists exempt it from all limits, so nothing is counted"
    return ExplainRead(
        allowed=allowed,
        answer=answer,
        method=check.method,
        path=check.path,
        caller=described,
        rule=None if found.rule is None else found.rule.rule.name,
        rules=[_rule(each) for each in found.candidates],
        left_out=found.left_out,
        counters=[_counter(each) for each in found.counters],
    )


async def _without_key(gate: Gate, check: Check) -> tuple[Caller, ExplainedCaller]:
    try:
        caller = await gate.unkeyed_caller(check.tier, check.attributes)
    except MissingApiKey as error:
        raise NotFound(f"the policy has no tier for this caller, so its requests get 401 {MissingApiKey.code}") from error
    policy = await gate.catalog.caller_policy()
    why = _why_tier(caller.tier.tier.name, check.tier, check.attributes, policy.tier_from, policy.anonymous_tier)
    return caller, ExplainedCaller(api_key_id=None, name=None, tier=caller.tier.tier.name, why=why, refused=None)


def _why_tier(tier: str, named: str | None, attributes: Mapping[str, str], tier_from: str, anonymous: str | None) -> str:
    if named is not None:
        return f"no API key; the request names the tier {tier!r}"
    if tier_from and attributes.get(tier_from) == tier:
        return f"no API key; the attribute {tier_from!r}, which [callers] tier_from names, is {tier!r}"
    if anonymous == tier and not tier_from:
        return f"no API key; [anonymous] gives the tier {tier!r}"
    return f"no API key; default_tier of [callers], or else [anonymous], gives the tier {tier!r}"


def _answer(found: Explanation, check: Check) -> str:
    if found.problem is not None:
        return f"refused with 400 BAD_REQUEST: {found.problem}"
    action = None if found.rule is None else found.rule.action
    if found.rule is not None and action is AccessAction.DENY:
        return f"refused with 403 {Blocked.code}: the rule {found.rule.rule.name!r} denies what matches it"
    if found.rule is not None and action is not None:
        return f"allowed: the rule {found.rule.rule.name!r} allows what matches it without counting"
    enforced = [each for each in found.counters if each.mode is not Mode.SHADOW]
    if not enforced:
        return f"allowed: no rule of the tier {found.tier!r} matches, and the tier has no limits"
    by = "no rule matches" if found.rule is None else f"the rule {found.rule.rule.name!r} answers"
    if found.allowed is None:
        return f"{by}; the counter store did not answer, so nothing is known of what is left"
    if not found.allowed:
        short = next(each for each in enforced if not each.admits(check.cost))
        what = "limits" if isinstance(short.limits.algorithm, Algorithm) else "quotas"
        whose = f"the {what} of the tier" if short.limits.rule is None else f"the {what} of the rule {short.limits.rule!r}"
        left = f"{short.left} of {_capacity(short.decision)} left under {whose}"
        return f"blocked with 429: {left}, and the request costs {check.cost}"
    least = min(enforced, key=lambda each: each.left or 0)
    over = ", and what is above passes as overage" if (least.left or 0) < check.cost else ""
    return f"allowed: {by}, {least.left} of {_capacity(least.decision)} left{over}"


def _capacity(decision: Decision | None) -> int | None:
    return None if decision is None else decision.limit


def _rule(each: Candidate) -> ExplainedRule:
    rule = each.compiled.rule
    return ExplainedRule(
        rule=rule.name,
        endpoint=rule.endpoint,
        methods=list(rule.methods),
        match=dict(rule.match),
        priority=rule.priority,
        mode=rule.mode.value,
        result=each.result,
        reason=each.reason,
    )


def _counter(each: CounterNow) -> ExplainedCounter:
    decision = each.decision
    return ExplainedCounter(
        rule=each.limits.rule,
        mode=each.mode.value,
        algorithm=each.limits.algorithm.value,
        limits=[limit.text for limit in each.limits.limits],
        subject=each.subject,
        problem=each.problem,
        limit=None if decision is None else decision.limit,
        remaining=None if decision is None else decision.remaining,
        reset_after=None if decision is None or decision.binding is None else decision.reset_after,
        degraded=decision is not None and decision.degraded,
        windows=[_window(window) for window in each.windows],
    )


def _window(decision: Decision) -> WindowUsageRead:
    limit, remaining, binding = decision.limit or 0, decision.remaining or 0, decision.binding
    used = max(limit - remaining, 0) + decision.overage
    return WindowUsageRead(
        limit=limit,
        window=0 if binding is None else binding.window_us // US_PER_S,
        used=used,
        remaining=remaining,
        resets_at=format_timestamp(decision.at_us + decision.reset_after_us) if used or decision.reset_after_us else None,
        period=binding.clock.period.value if isinstance(binding, QuotaLimit) else None,
    )
