"""How decisions and errors look from outside: headers and bodies that every HTTP door gives alike."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from tidegate.decision import Decision
from tidegate.errors import TidegateError
from tidegate.limits import US_PER_S

Headers = list[tuple[str, str]]

_ENCODER: Final = msgspec.json.Encoder()


class DecisionBody(msgspec.Struct, frozen=True, gc=False):
    """A decision as JSON; times in seconds.

    Args:
        allowed: whether the request may pass.
        limit: the most that can be had at once under the limit with the least left; null where no rule applies.
        remaining: what is left of it.
        reset_after: seconds until it is whole again.
        retry_after: seconds until the same cost passes if nobody else asks; 0 when allowed, null when it never will.
        rule: name of the rule; null where none applies.
        tier: name of the tier.
        degraded: whether the counter store was unwell.
    """

    allowed: bool
    limit: int | None
    remaining: int | None
    reset_after: float | None
    retry_after: float | None
    rule: str | None
    tier: str | None
    degraded: bool


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
