"""What an answer's headers say of limits: Tidegate's own, and those that other servers give.

Read are, in this order: `RateLimit` and `RateLimit-Policy` of draft-ietf-httpapi-ratelimit-headers-10; `RateLimit` as earlier
drafts had it (`limit=100, remaining=50, reset=5`); `RateLimit-Limit`, `-Remaining`, `-Reset` of the first ones; `X-RateLimit-*`
and `X-Rate-Limit-*`, whose reset is seconds with some servers and unix time with others; and `Retry-After` of RFC 9110, as
seconds or as a date.
What is not understood is passed over: headers are advice, and no answer is lost for them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Final

import msgspec

_LONGEST: Final = 8192
_NUMBER: Final = re.compile(r"[0-9]{1,15}(?:\.[0-9]{1,9})?", re.ASCII)
_EPOCH_S: Final = 1_000_000_000
"""A reset of more than 31 years is no duration but a moment."""
_EPOCH_MS: Final = 1_000_000_000_000


class Quota(msgspec.Struct, frozen=True, gc=False):
    """One limit that holds.

    Args:
        name: what the server calls it; with Tidegate the limit's text or label.
        amount: units a window; None where not told.
        window_s: length of the window, s; None where not told.
        remaining: what is left of it; None where not told: Tidegate tells it of the limit with the least left.
        reset_after: seconds until it is whole again; None where not told.
    """

    name: str
    amount: int | None = None
    window_s: int | None = None
    remaining: int | None = None
    reset_after: float | None = None


class LimitHeaders(msgspec.Struct, frozen=True, gc=False):
    """What headers say; None where they say nothing.

    Args:
        limit: the most that can be had, under the limit with the least left.
        remaining: what is left of it.
        reset_after: seconds until it is whole again.
        retry_after: seconds to wait.
        quotas: all limits that are told.
    """

    limit: int | None = None
    remaining: int | None = None
    reset_after: float | None = None
    retry_after: float | None = None
    quotas: tuple[Quota, ...] = ()


def read_limit_headers(headers: Mapping[str, str] | Iterable[tuple[str, str]], now_s: float | None = None) -> LimitHeaders:
    """Read the headers of any HTTP answer.

        told = read_limit_headers(response.headers)
        if response.status_code == 429 and told.retry_after is not None:
            time.sleep(told.retry_after)

    Args:
        headers: names in any case and values, as a mapping or as pairs; httpx, requests and aiohttp give such.
        now_s: unix seconds now; the system's clock where not given.

    Returns:
        What they say. Nothing in them is an error.
    """
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    found: dict[str, str] = {}
    for name, value in pairs:
        lower = name.lower()
        if "ratelimit" in lower or "rate-limit" in lower or lower == "retry-after":
            # Of several fields of one name, HTTP makes one list.
            found[lower] = f"{found[lower]}, {value}"[:_LONGEST] if lower in found else value[:_LONGEST]
    if not found:
        return LimitHeaders()
    now = time.time() if now_s is None else now_s
    limit, remaining, reset_after, quotas = _draft(found)
    for prefix in ("ratelimit-", "x-ratelimit-", "x-rate-limit-"):
        limit = _whole(_first(found.get(prefix + "limit"))) if limit is None else limit
        remaining = _whole(_first(found.get(prefix + "remaining"))) if remaining is None else remaining
        reset_after = _seconds(_first(found.get(prefix + "reset")), now) if reset_after is None else reset_after
    return LimitHeaders(limit, remaining, reset_after, _retry_after(found.get("retry-after"), now), quotas)


def _draft(found: Mapping[str, str]) -> tuple[int | None, int | None, float | None, tuple[Quota, ...]]:
    """The two fields of the draft, in its new form and the one before."""
    quotas: dict[str, Quota] = {}
    for name, parameters in _members(found.get("ratelimit-policy", "")):
        quotas[name] = Quota(name, _whole(parameters.get("q", name)), _whole(parameters.get("w")))
    flat: dict[str, float | None] = {}
    for name, parameters in _members(found.get("ratelimit", "")):
        key, equals, value = name.partition("=")
        if equals and key in ("limit", "remaining", "reset"):
            flat[key] = _number(value)
        elif "r" in parameters:
            known = quotas.get(name, Quota(name))
            quotas[name] = Quota(name, known.amount, known.window_s, _whole(parameters["r"]), _number(parameters.get("t")))
    told = [quota for quota in quotas.values() if quota.remaining is not None]
    if told:
        least = min(told, key=lambda quota: quota.remaining or 0)
        return least.amount, least.remaining, least.reset_after, tuple(quotas.values())
    limit, remaining = (None if (number := flat.get(key)) is None else int(number) for key in ("limit", "remaining"))
    return limit, remaining, flat.get("reset"), tuple(quotas.values())


def _members(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Members of a list of RFC 9651 with their parameters; quotes are taken off, and what is broken off stays as it is."""
    for member in _split(text, ","):
        name, *rest = _split(member, ";")
        parameters = {}
        for parameter in rest:
            key, _, value = parameter.partition("=")
            parameters[key.strip().lower()] = _unquoted(value)
        if name.strip():
            yield _unquoted(name), parameters


def _split(text: str, separator: str) -> list[str]:
    """Split outside of quotes."""
    parts = []
    start = 0
    quoted = escaped = False
    for place, character in enumerate(text):
        if escaped:
            escaped = False
        elif quoted and character == "\\":
            escaped = True
        elif character == '"':
            quoted = not quoted
        elif character == separator and not quoted:
            parts.append(text[start:place])
            start = place + 1
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


def _whole(text: str | None) -> int | None:
    number = _number(text)
    return None if number is None else int(number)


def _seconds(text: str | None, now_s: float) -> float | None:
    """A reset as seconds from now, which some servers give as unix time in s or ms."""
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
