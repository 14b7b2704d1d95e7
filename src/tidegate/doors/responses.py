"""How decisions and errors look from outside: headers and bodies that every HTTP door gives alike."""

from __future__ import annotations

from email.utils import formatdate
from functools import lru_cache
from typing import Any, Final

import msgspec

from tidegate.decision import CallerIdentity, Decision, RuleUsage, Usage, header_parts
from tidegate.doors.outward import outward
from tidegate.errors import TidegateError
from tidegate.policy.limits import Limit, LimitSet
from tidegate.policy.quotas import QuotaLimit
from tidegate.timestamps import US_PER_S, format_timestamp
from tidegate.wire import DecisionBody, RuleUsageBody, UsageBody, WindowUsageBody

Headers = list[tuple[str, str]]

NO_STORE: Final = ("cache-control", "no-store")
MAX_EDGE_S: Final = 60
"""Maximum time for which nginx answers from its edge cache: a raised limit takes effect there at most so much later."""

_ENCODER: Final = msgspec.json.Encoder()


def decision_body(decision: Decision) -> DecisionBody:
    """The JSON form of a decision.

    Returns:
        The record to encode.
    """
    # The properties of a decision, written out: each call costs as much as what it does.
    binding, limits, caller, retry_us = decision.binding, decision.limits, decision.caller, decision.retry_after_us
    return DecisionBody(
        decision.allowed,
        None if binding is None else binding.capacity,
        decision.remaining,
        None if binding is None else decision.reset_after_us / US_PER_S,
        None if retry_us is None else retry_us / US_PER_S,
        None if limits is None else limits.rule,
        decision.unlimited_tier if limits is None else limits.tier,
        decision.degraded,
        decision.overage,
        None if caller is None else caller.customer,
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
        None if binding is None else 0 if binding.concurrent else binding.window_us // US_PER_S,
        decision.degraded,
        tuple(map(_window_usage_body, usage.windows)),
    )


def _window_usage_body(decision: Decision) -> WindowUsageBody:
    binding, remaining = decision.binding, decision.remaining
    assert binding is not None, "a window is one limit"
    assert remaining is not None, "a limit says what is left"
    capacity = binding.capacity
    used = max(capacity - remaining, 0) + decision.overage
    if binding.concurrent:
        # Requests end when they do.
        return WindowUsageBody(capacity, 0, used, remaining, None)
    resets_at = format_timestamp(decision.at_us + decision.reset_after_us) if used or decision.reset_after_us else None
    period = binding.clock.period.value if isinstance(binding, QuotaLimit) else None
    return WindowUsageBody(capacity, binding.window_us // US_PER_S, used, remaining, resets_at, period)


def error_body(error: TidegateError) -> dict[str, Any]:
    """The JSON form of an error: `{"error": {"code", "message", "details"}}`; see `outward` for what it does not say.

    Returns:
        What to encode.
    """
    message, details = outward(error)
    return {"error": {"code": error.code, "message": message, "details": details}}


def retry_headers(error: TidegateError) -> Headers:
    """When an error that passes by itself is over.

    Returns:
        `Retry-After` in seconds, where the error says so; else none.
    """
    after_s = error.details.get("retry_after")
    return [] if after_s is None else [("retry-after", str(after_s))]


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
    """The headers of a decided answer, as `Decision.headers` has them; names in lower case, as HTTP/2 and RSGI want them."""
    return decision.headers


def raw_limit_headers(decision: Decision) -> list[tuple[bytes, bytes]]:
    """What `limit_headers` gives, as bytes: for ASGI."""
    binding, limits = decision.binding, decision.limits
    if binding is None or limits is None:
        return []
    if decision.windows:
        return [(name.encode(), value.encode()) for name, value in decision.headers]
    known = _RAW.get(limits)
    if known is None or known[0] is not binding:
        if len(_RAW) >= _MAX_TEMPLATES:
            _RAW.clear()
        policy, label, limit = header_parts(limits, binding)
        known = _RAW[limits] = (
            binding,
            (b"ratelimit-policy", policy[1].encode()),
            b"%b;r=%%d;t=%%d" % label.encode().replace(b"%", b"%%"),
            (b"x-ratelimit-limit", limit[1].encode()),
        )
    remaining, reset_us = decision.remaining, decision.reset_after_us
    assert remaining is not None, "a limit says what is left"
    headers = [
        known[1],
        (b"ratelimit", known[2] % (remaining, -(-reset_us // US_PER_S))),
        known[3],
        (b"x-ratelimit-remaining", b"%d" % remaining),
        (b"x-ratelimit-reset", b"%d" % -(-(decision.at_us + reset_us) // US_PER_S)),
    ]
    if not decision.allowed and decision.retry_after_us is not None:
        headers.append((b"retry-after", b"%d" % ceil_s(decision.retry_after_us)))
    return headers


_RAW: Final[dict[LimitSet, tuple[Limit, tuple[bytes, bytes], bytes, tuple[bytes, bytes]]]] = {}


def limit_lines(decision: Decision) -> bytes:
    """What `limit_headers` gives, as lines of an HTTP/1.1 head. Costs 0.5 µs.

    Returns:
        The lines, each with its end.
    """
    binding, limits = decision.binding, decision.limits
    if binding is None or limits is None:
        return b""
    if decision.windows:
        return "".join(f"{name}: {value}\r\n" for name, value in decision.headers).encode()
    known = _TEMPLATES.get(limits)
    if known is None or known[0] is not binding:
        known = _template(limits, binding)
    remaining, reset_us = decision.remaining, decision.reset_after_us
    lines = known[1] % (remaining, -(-reset_us // US_PER_S), remaining, -(-(decision.at_us + reset_us) // US_PER_S))
    if not decision.allowed and decision.retry_after_us is not None:
        return lines + b"retry-after: %d\r\n" % ceil_s(decision.retry_after_us)
    return lines


def authorize_answer(head: bytes, decision: Decision) -> bytes:
    """The answer of `/v1/authorize` to a request that may pass: see `overage_headers` too.

    Args:
        head: status line and Date header.

    Returns:
        The whole answer.
    """
    limits, binding = decision.limits, decision.binding
    if limits is None:
        return head + _last_lines(decision.caller, decision.unlimited_tier, None)
    last = _last_lines(decision.caller, limits.tier, limits.rule)
    if decision.overage:
        return b"%b%bx-tidegate-overage: %d\r\n%b" % (head, limit_lines(decision), decision.overage, last)
    known = _TEMPLATES.get(limits)
    if known is None or known[0] is not binding:
        return head + limit_lines(decision) + last
    # `limit_lines`, written out: the template leaves room for what comes before and behind.
    remaining, reset_us = decision.remaining, decision.reset_after_us
    return known[2] % (
        head,
        remaining,
        -(-reset_us // US_PER_S),
        remaining,
        -(-(decision.at_us + reset_us) // US_PER_S),
        last,
    )


def caller_headers(decision: Decision) -> Headers:
    """Who a request that may pass is from, for the API behind a gateway: what is known of key id, customer, tier and rule."""
    caller = decision.caller
    named = (
        ("x-tidegate-key-id", None if caller is None else caller.key_id),
        ("x-tidegate-customer", None if caller is None else caller.customer),
        ("x-tidegate-tier", decision.tier),
        ("x-tidegate-rule", decision.rule),
    )
    return [(name, value) for name, value in named if value]


@lru_cache(maxsize=16_384)
def _last_lines(caller: CallerIdentity | None, tier: str | None, rule: str | None) -> bytes:
    """What `caller_headers` gives, as lines, and the end of an HTTP/1.1 head. None of the values can contain a line break."""
    headers = caller_headers(Decision(True, unlimited_tier=tier, caller=caller))
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    named = "" if rule is None else f"x-tidegate-rule: {rule}\r\n"
    return f"{lines}{named}cache-control: no-store\r\n\r\n".encode()


def overage_headers(decision: Decision) -> Headers:
    """What tells a gateway that a request passes above a quota or a soft limit: `X-Tidegate-Overage`, units; none where not."""
    return [("x-tidegate-overage", str(decision.overage))] if decision.overage else []


def check_lines(decision: Decision) -> bytes:
    """What follows the Date header in the answer of `/v1/check`.

    Returns:
        The other header lines, the empty one, and the body.
    """
    body = _ENCODER.encode(decision_body(decision))
    return b"%bcontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (limit_lines(decision), len(body), body)


# For each set the template of the limit that was binding last: as a rule it is the same one.
_TEMPLATES: Final[dict[LimitSet, tuple[Limit, bytes, bytes]]] = {}
_MAX_TEMPLATES: Final = 4096


def _template(limits: LimitSet, binding: Limit) -> tuple[Limit, bytes, bytes]:
    """The lines of `limit_headers` for one binding limit, with places for the numbers; alone, and between two other places."""
    texts = (limits.quotas, binding.label or binding.text)
    if any("\n" in text or "\r" in text for text in texts):
        raise ValueError("a limit has a line break in its text")
    quotas, label = (text.encode().replace(b"%", b"%%") for text in texts)
    template = b"".join(
        (
            b"ratelimit-policy: %b\r\n" % quotas,
            b'ratelimit: "%b";r=%%d;t=%%d\r\n' % label,
            b"x-ratelimit-limit: %d\r\n" % binding.capacity,
            b"x-ratelimit-remaining: %d\r\n",
            b"x-ratelimit-reset: %d\r\n",
        )
    )
    if len(_TEMPLATES) >= _MAX_TEMPLATES:
        _TEMPLATES.clear()
    made = _TEMPLATES[limits] = (binding, template, b"%b" + template + b"%b")
    return made


def denial_cache_headers(decision: Decision, more: tuple[str, ...] = ()) -> Headers:
    """For how long, and for which requests, a cache may repeat a denial of `/v1/authorize`.

    Until its retry and not a moment longer: seconds are rounded down. Not at all where that is below one second, where the same
    cost never passes, and while the counter store is unavailable: the denial may be over when the store is back.

    Args:
        decision: a denial.
        more: headers that this policy reads beside the usual ones.

    Returns:
        `Cache-Control`, and `Vary` with all that the answer depends on.
    """
    max_age_s = _holds_s(decision)
    if max_age_s < 1:
        return [NO_STORE]
    return [("cache-control", f"max-age={max_age_s}"), _vary(more) if more else _VARY]


def edge_cache_headers(decision: Decision) -> Headers:
    """What a cache of nginx needs beside `denial_cache_headers`.

    nginx counts in whole seconds of its clock and takes an answer for fresh while that second lasts, up to a second longer than
    `X-Accel-Expires` says: so one second less is sent. nginx adds no `Age` either: the retry time is sent as a date.

    Args:
        decision: a denial.

    Returns:
        `X-Accel-Expires` in seconds, 0 for not at all, and `X-Tidegate-Retry-At`, an HTTP date rounded up.
    """
    headers = [("x-accel-expires", str(max(min(_holds_s(decision) - 1, MAX_EDGE_S), 0)))]
    if decision.holds_until_us is not None:
        headers.append(("x-tidegate-retry-at", _http_date(ceil_s(decision.holds_until_us))))
    return headers


_VARY: Final = (
    "vary",
    "X-API-Key, X-Original-URI, X-Original-Method, X-Forwarded-Uri, X-Forwarded-Method, X-Real-IP, X-Forwarded-For, "
    "Forwarded, X-Tidegate-Denied-Status",
)


@lru_cache(maxsize=16)
def _vary(more: tuple[str, ...]) -> tuple[str, str]:
    return _VARY[0], ", ".join((_VARY[1], *more))


@lru_cache(maxsize=1024)
def _http_date(at_s: int) -> str:
    """Cached, because denied clients retry often, and formatting costs 2 µs."""
    return formatdate(at_s, usegmt=True)


def _holds_s(decision: Decision) -> int:
    """Whole seconds for which a denial may be repeated."""
    return 0 if decision.degraded or decision.retry_after_us is None else decision.retry_after_us // US_PER_S


def ceil_s(us: int) -> int:
    """Whole seconds, rounded up.

    Args:
        us: µs.

    Returns:
        Seconds.
    """
    return -(-us // US_PER_S)
