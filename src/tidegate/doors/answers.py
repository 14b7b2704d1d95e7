"""How decisions and errors look from outside: headers and bodies that every HTTP door gives alike."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from tidegate.bodies import DecisionBody, RuleUsageBody, UsageBody
from tidegate.decision import Decision, RuleUsage, Usage
from tidegate.errors import TidegateError
from tidegate.limits import US_PER_S

Headers = list[tuple[str, str]]

_ENCODER: Final = msgspec.json.Encoder()


def decision_body(decision: Decision) -> DecisionBody:
    """The JSON form of a decision.

    Args:
        decision: the decision.

    Returns:
        The record to encode.
    """
    return DecisionBody(
        decision.allowed,
        decision.limit,
        decision.remaining,
        None if decision.binding is None else decision.reset_after,
        decision.retry_after,
        decision.rule,
        decision.tier,
        decision.degraded,
    )


def usage_body(usage: Usage) -> UsageBody:
    """The JSON form of usage.

    Args:
        usage: what is left to a caller.

    Returns:
        The record to encode.
    """
    return UsageBody(usage.tier, tuple(map(_rule_usage_body, usage.rules)), usage.not_counted, usage.truncated)


def _rule_usage_body(usage: RuleUsage) -> RuleUsageBody:
    decision, binding = usage.decision, usage.decision.binding
    return RuleUsageBody(
        usage.rule,
        usage.endpoint,
        usage.mode,
        usage.subject,
        decision.limit,
        decision.remaining,
        None if binding is None else decision.reset_after,
        None if binding is None else binding.window_us // US_PER_S,
        decision.degraded,
    )


def error_body(error: TidegateError) -> dict[str, Any]:
    """The JSON form of an error: `{"error": {"code", "message", "details"}}`.

    Args:
        error: the error.

    Returns:
        What to encode.
    """
    return {"error": {"code": error.code, "message": error.message, "details": error.details}}


def exceeded_body(decision: Decision) -> dict[str, Any]:
    """The error form of a denial, for end clients.

    Args:
        decision: a denial.

    Returns:
        What to encode.
    """
    if decision.retry_after is None:
        message = f"the request costs more than the limit {decision.binding} ever allows: ask for less at once"
    else:
        message = f"rate limit {decision.binding} exceeded: try again in {ceil_s(decision.retry_after_us or 0)} s"
    details = msgspec.to_builtins(decision_body(decision))
    return {"error": {"code": "RATE_LIMIT_EXCEEDED", "message": message, "details": details}}


def encode(body: object) -> bytes:
    """JSON bytes of a body.

    Args:
        body: what msgspec can encode.

    Returns:
        The bytes.
    """
    return _ENCODER.encode(body)


def limit_headers(decision: Decision) -> Headers:
    """The headers of a decided answer; names in lower case, as HTTP/2 and RSGI want them.

    `RateLimit-Policy` and `RateLimit` follow draft-ietf-httpapi-ratelimit-headers-10; `X-RateLimit-Reset` is in unix seconds.
    Seconds are rounded up: a client that waits as told is never early.

    Args:
        decision: the decision.

    Returns:
        Pairs of name and value; none where no rule applies.
    """
    binding = decision.binding
    if binding is None or decision.limits is None:
        return []
    reset_us = decision.reset_after_us
    headers = [
        ("ratelimit-policy", decision.limits.quotas),
        ("ratelimit", f'"{binding.label or binding.text}";r={decision.remaining};t={ceil_s(reset_us)}'),
        ("x-ratelimit-limit", str(binding.capacity)),
        ("x-ratelimit-remaining", str(decision.remaining)),
        ("x-ratelimit-reset", str(ceil_s(decision.at_us + reset_us))),
    ]
    if not decision.allowed and decision.retry_after_us is not None:
        headers.append(("retry-after", str(ceil_s(decision.retry_after_us))))
    return headers


def ceil_s(us: int) -> int:
    """Whole seconds, rounded up.

    Args:
        us: µs.

    Returns:
        Seconds.
    """
    return -(-us // US_PER_S)
