"""Parsing of rate limit headers: Tidegate's own, and those of other servers.

Understood are, in this order: `RateLimit` and `RateLimit-Policy` of draft-ietf-httpapi-ratelimit-headers-10; `RateLimit` of
earlier drafts (`limit=100, remaining=50, reset=5`); `RateLimit-Limit`, `-Remaining`, `-Reset` of the first drafts;
`X-RateLimit-*` and `X-Rate-Limit-*`, whose reset is seconds with some servers and Unix time with others; and `Retry-After` of
RFC 9110, as seconds or as a date.
Anything else is ignored: these headers are advisory, and an invalid one must not fail a response.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Final

import msgspec

_MAX_LENGTH: Final = 8192
_NUMBER: Final = re.compile(r"[0-9]{1,15}(?:\.[0-9]{1,9})?", re.ASCII)
_EPOCH_S: Final = 1_000_000_000
"""A larger reset (31 years) is not a duration but a Unix time."""
_EPOCH_MS: Final = 1_000_000_000_000


class Quota(msgspec.Struct, frozen=True, gc=False):
    """One limit; None where the headers do not contain a value.

    Args:
        name: name given by the server; from Tidegate the limit's text or label.
        amount: units per window.
        window_s: length of the window, s.
        remaining: remaining units; Tidegate sends it for the limit with the lowest remaining quota.
        reset_after: seconds until the limit is fully replenished.
    """

    name: str
    amount: int | None = None
    window_s: int | None = None
    remaining: int | None = None
    reset_after: float | None = None


class LimitHeaders(msgspec.Struct, frozen=True, gc=False):
    """Parsed headers; None where they do not contain a value.

    Args:
        limit: units of the limit with the lowest remaining quota.
        remaining: remaining units of that limit.
        reset_after: seconds until that limit is fully replenished.
        retry_after: seconds to wait before the next request.
        quotas: all limits in the headers.
    """

    limit: int | None = None
    remaining: int | None = None
    reset_after: float | None = None
    retry_after: float | None = None
    quotas: tuple[Quota, ...] = ()


def read_limit_headers(headers: Mapping[str, str] | Iterable[tuple[str, str]], now_s: float | None = None) -> LimitHeaders:
    """Parse the rate limit headers of any HTTP response.

        limits = read_limit_headers(response.headers)
        if response.status_code == 429 and limits.retry_after is not None:
            time.sleep(limits.retry_after)

    Args:
        headers: names (in any case) and values, as a mapping or as pairs, e.g. those of httpx, requests and aiohttp.
        now_s: current Unix time, s; default: the system's clock.

    Returns:
        The parsed headers. Invalid headers are ignored, never an error.
    """
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    fields: dict[str, str] = {}
    for name, value in pairs:
        lower = name.lower()
        if "ratelimit" in lower or "rate-limit" in lower or lower == "retry-after":
            # Several fields of one name form one list (RFC 9110).
            fields[lower] = f"{fields[lower]}, {value}"[:_MAX_LENGTH] if lower in fields else value[:_MAX_LENGTH]
    if not fields:
        return LimitHeaders()
    now = time.time() if now_s is None else now_s
    limit, remaining, reset_after, quotas = _draft(fields)
    for prefix in ("ratelimit-", "x-ratelimit-", "x-rate-limit-"):
        limit = _integer(_first(fields.get(prefix + "limit"))) if limit is None else limit
        remaining = _integer(_first(fields.get(prefix + "remaining"))) if remaining is None else remaining
        reset_after = _seconds(_first(fields.get(prefix + "reset")), now) if reset_after is None else reset_after
    return LimitHeaders(limit, remaining, reset_after, _retry_after(fields.get("retry-after"), now), quotas)


def _draft(fields: Mapping[str, str]) -> tuple[int | None, int | None, float | None, tuple[Quota, ...]]:
    """Parse the two fields of the draft, in the current and in the previous form."""
    quotas: dict[str, Quota] = {}
    for name, parameters in _members(fields.get("ratelimit-policy", "")):
        quotas[name] = Quota(name, _integer(parameters.get("q", name)), _integer(parameters.get("w")))
    flat: dict[str, float | None] = {}
    for name, parameters in _members(fields.get("ratelimit", "")):
        key, equals, value = name.partition("=")
        if equals and key in ("limit", "remaining", "reset"):
            flat[key] = _number(value)
        elif "r" in parameters:
            policy = quotas.get(name, Quota(name))
            quotas[name] = Quota(name, policy.amount, policy.window_s, _integer(parameters["r"]), _number(parameters.get("t")))
    with_remaining = [quota for quota in quotas.values() if quota.remaining is not None]
    if with_remaining:
        lowest = min(with_remaining, key=lambda quota: quota.remaining or 0)
        return lowest.amount, lowest.remaining, lowest.reset_after, tuple(quotas.values())
    limit, remaining = (None if (number := flat.get(key)) is None else int(number) for key in ("limit", "remaining"))
    return limit, remaining, flat.get("reset"), tuple(quotas.values())


def _members(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Members of an RFC 9651 list with their parameters, unquoted; a truncated member is returned as it is."""
    for member in _split(text, ","):
        name, *rest = _split(member, ";")
        parameters = {}
        for parameter in rest:
            key, _, value = parameter.partition("=")
            parameters[key.strip().lower()] = _unquoted(value)
        if name.strip():
            yield _unquoted(name), parameters


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside of quotes."""
    parts = []
    start = 0
    quoted = escaped = False
    for index, character in enumerate(text):
        if escaped:
            escaped = False
        elif quoted and character == "\\":
            escaped = True
        elif character == '"':
            quoted = not quoted
        elif character == separator and not quoted:
            parts.append(text[start:index])
            start = index + 1
    parts.append(text[start:])
    return parts


def _unquoted(text: str) -> str:
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL)
    return text


def _first(text: str | None) -> str | None:
    """The first member without its parameters: `100` of `100, 100;w=60`."""
    return None if text is None else text.partition(",")[0].partition(";")[0]


def _number(text: str | None) -> float | None:
    return float(text) if text is not None and _NUMBER.fullmatch(text := text.strip()) else None


def _integer(text: str | None) -> int | None:
    number = _number(text)
    return None if number is None else int(number)


def _seconds(text: str | None, now_s: float) -> float | None:
    """A reset as seconds from now; some servers send Unix time in s or ms."""
    number = _number(text)
    if number is None or number < _EPOCH_S:
        return number
    return max(number / 1000 - now_s if number >= _EPOCH_MS else number - now_s, 0.0)


def _retry_after(text: str | None, now_s: float) -> float | None:
    if text is None:
        return None
    number = _number(text)
    if number is not None:
        return number
    try:
        return max(parsedate_to_datetime(text).timestamp() - now_s, 0.0)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None  # neither seconds nor a date
