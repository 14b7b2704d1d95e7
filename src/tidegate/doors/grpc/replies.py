"""Renders the decisions of a request as a `RateLimitResponse`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Final

import msgspec

from tidegate.counters import ChargeOutcome
from tidegate.decision import CallerIdentity, Decision
from tidegate.doors.grpc.messages import OK, OVER_LIMIT, RateLimitResponse
from tidegate.doors.grpc.reply_template import MAX_REMAINING, allowed_reply, set_current_limit
from tidegate.doors.responses import (
    caller_headers,
    encode,
    error_body,
    exceeded_body,
    limit_headers,
    overage_headers,
    retry_headers,
)
from tidegate.errors import StoreUnavailable, TidegateError
from tidegate.gate.charging import ChargeResult, CheckPlan
from tidegate.timestamps import US_PER_S

_JSON: Final = ("content-type", "application/json")
_DECIDED: Final = CheckPlan(None, ())


class Part(msgspec.Struct, frozen=True, gc=False):
    """One descriptor, before it is charged.

    Args:
        plan: the plan of its check, or the error; None if no limit applies.
        cost: units; 0 peeks.
        name: name of the limit; empty for the name of the rule.
        unlimited: whether it is explicitly unlimited.
        quota: whether its limit is in quota mode: never denied, and reported where it is over.
    """

    plan: CheckPlan | TidegateError | None
    cost: int
    name: str = ""
    unlimited: bool = False
    quota: bool = False


def reply(parts: Sequence[Part], results: Iterable[ChargeResult]) -> bytes:
    """Render the answer. Its headers describe the first descriptor that was denied, else the one with the fewest units remaining.

    Args:
        parts: one for each descriptor, in order.
        results: one for each part with a plan, in order.

    Returns:
        A `RateLimitResponse`.
    """
    outcomes = iter(results)
    message = RateLimitResponse(overall_code=OK)
    denial: Decision | TidegateError | None = None
    lowest: Decision | None = None
    over_quota: list[int] = []
    for number, part in enumerate(parts):
        status = message.statuses.add(code=OK)
        if part.plan is None:
            if part.unlimited:
                status.limit_remaining = MAX_REMAINING
            continue
        each = next(outcomes)
        outcome = each.outcome
        if isinstance(outcome, TidegateError):
            status.code = OVER_LIMIT
            if not isinstance(denial, Decision):
                denial = denial or outcome
            continue
        shown = _shown(outcome, each)
        _set_limit(status, shown, part.name)
        passes = outcome.allowed and not (part.cost == 0 and outcome.remaining == 0)
        if part.quota and (not shown.allowed or (shown.remaining == 0 and not (part.cost and shown.limit))):
            over_quota.append(number)
            # As envoyproxy/ratelimit answers it.
            status.ClearField("duration_until_reset")
        elif not passes:
            status.code = OVER_LIMIT
            denial = denial or outcome
        if shown.remaining is not None and (lowest is None or shown.remaining < (lowest.remaining or 0)):
            lowest = shown
    if denial is None:
        if lowest is not None:
            _add_headers(message, limit_headers(lowest))
    elif isinstance(denial, Decision):
        message.overall_code = OVER_LIMIT
        _add_headers(message, [*limit_headers(denial), _JSON])
        message.raw_body = encode(exceeded_body(denial))
    else:
        _deny(message, denial)
    if any(part.quota for part in parts):
        _add_quota_metadata(message, over_quota)
    rendered: bytes = message.SerializeToString()
    return rendered


def reply_to_one(decision: Decision, cost: int, shadow_outcomes: Sequence[ChargeOutcome]) -> bytes:
    """Render the answer to one descriptor that the policy decided.

    Args:
        cost: units; 0 peeks.
        shadow_outcomes: outcomes of shadow rules.

    Returns:
        A `RateLimitResponse`. An allowance names the caller in headers for the service.
    """
    if decision.allowed and (cost or decision.remaining):
        rendered = allowed_reply(decision) or reply([Part(_DECIDED, cost)], [ChargeResult(decision, shadow_outcomes)])
        # A message may be continued by the bytes of its further fields.
        return rendered + _caller_fields(decision.caller, decision.tier, decision.rule, decision.overage)
    return reply([Part(_DECIDED, cost)], [ChargeResult(decision, shadow_outcomes)])


@lru_cache(maxsize=16_384)
def _caller_fields(caller: CallerIdentity | None, tier: str | None, rule: str | None, overage: int) -> bytes:
    """What Envoy adds to the request for the service: who is calling, as `/v1/authorize` has it in headers."""
    message = RateLimitResponse()
    decision = Decision(True, unlimited_tier=tier, caller=caller, overage=overage)
    headers = [*caller_headers(decision), *overage_headers(decision)]
    if rule:
        headers.append(("x-tidegate-rule", rule))
    for key, value in headers:
        message.request_headers_to_add.add(key=key, value=value)
    fields: bytes = message.SerializeToString()
    return fields


def denied(error: TidegateError) -> bytes:
    """The `RateLimitResponse` that denies a whole request with an error."""
    message = RateLimitResponse()
    _deny(message, error)
    rendered: bytes = message.SerializeToString()
    return rendered


def _deny(message: Any, error: TidegateError) -> None:
    message.overall_code = OVER_LIMIT
    _add_headers(message, [("x-tidegate-error", error.code), *retry_headers(error), _JSON])
    message.raw_body = encode(error_body(error))


def _add_quota_metadata(message: Any, over_quota: list[int]) -> None:
    """What Envoy hands to its later filters, with the names that envoyproxy/ratelimit uses."""
    fields = message.dynamic_metadata.fields
    fields["quotaModeEnabled"].bool_value = True
    for number in over_quota:
        fields["quotaModeViolations"].list_value.values.add(number_value=number)


def _shown(outcome: Decision, result: ChargeResult) -> Decision:
    """The decision whose figures are shown: that of a shadow rule if no other has any."""
    if outcome.binding is None and result.shadow_outcomes:
        shadow_outcomes = result.shadow_outcomes[0]
        if not isinstance(shadow_outcomes, StoreUnavailable):
            return shadow_outcomes
    return outcome


def _set_limit(status: Any, decision: Decision, name: str) -> None:
    binding = decision.binding
    if binding is None:
        return
    set_current_limit(status.current_limit, binding, name or decision.rule or "")
    status.limit_remaining = min(decision.remaining or 0, MAX_REMAINING)
    seconds, us = divmod(decision.reset_after_us, US_PER_S)
    status.duration_until_reset.seconds = seconds
    status.duration_until_reset.nanos = us * 1000


def _add_headers(message: Any, headers: Iterable[tuple[str, str]]) -> None:
    for key, value in headers:
        message.response_headers_to_add.add(key=key, value=value)
