"""Responses of a server, parsed: decisions, usage, and the errors that are raised to callers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from tidegate.client.answer import Answer
from tidegate.client.steps import Reply, TransportFailure
from tidegate.errors import (
    ApiKeyExpired,
    ApiKeyRevoked,
    BadRequest,
    Blocked,
    CatalogUnavailable,
    HoldEnded,
    HoldNotFound,
    InvalidApiKey,
    InvalidToken,
    MissingApiKey,
    RequestTooLarge,
    ReservationNotFound,
    StoreUnavailable,
    TidegateError,
    TokenKeysUnavailable,
    TooManyHolds,
    TooManyReservations,
    TooManyTokens,
    TooManyUnknownKeys,
)
from tidegate.wire import DecisionBody, UsageBody

_LIMIT_HEADERS: Final = frozenset(
    (b"ratelimit", b"ratelimit-policy", b"retry-after", b"x-ratelimit-limit", b"x-ratelimit-remaining", b"x-ratelimit-reset")
)
_ERRORS: Final[dict[str, type[TidegateError]]] = {
    "HEADERS_TOO_LARGE": BadRequest,
    **{
        error.code: error
        for error in (
            HoldEnded,
            HoldNotFound,
            TooManyHolds,
            *(ReservationNotFound, TooManyReservations),
            *(BadRequest, RequestTooLarge, MissingApiKey, InvalidApiKey),
            *(ApiKeyRevoked, ApiKeyExpired, Blocked, TooManyUnknownKeys, StoreUnavailable, CatalogUnavailable),
            *(InvalidToken, TooManyTokens, TokenKeysUnavailable),
        )
    },
}
"""Errors that are raised to the caller, by code. Any other error counts as a failure of the server."""


class _ErrorFields(msgspec.Struct, frozen=True):
    code: str
    message: str = ""
    details: dict[str, object] = {}


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _ErrorFields


class _BatchBody(msgspec.Struct, frozen=True):
    decisions: list[msgspec.Raw]


T = TypeVar("T")

_DECISION: Final = msgspec.json.Decoder(DecisionBody)
_USAGE: Final = msgspec.json.Decoder(UsageBody)
_ERROR: Final = msgspec.json.Decoder(_ErrorBody)
_BATCH: Final = msgspec.json.Decoder(_BatchBody)


def parse_reply(reply: Reply, read: Callable[[Reply], T]) -> T | TidegateError | TransportFailure:
    """The parsed response, the server's error, or the reason why it is not a response of Tidegate."""
    try:
        if reply.status == 200 or (reply.status == 429 and not reply.body.startswith(b'{"error":')):
            return read(reply)
        result = _error(_ERROR.decode(reply.body))
    except (msgspec.MsgspecError, ValueError):
        return TransportFailure(f"answered {reply.status} with a body that is not from Tidegate: check the URL", sent=True)
    return TransportFailure(f"answered {reply.status}: {result}", sent=True) if isinstance(result, str) else result


def headers_to_pass_on(reply: Reply) -> tuple[tuple[str, str], ...]:
    """The limit headers of a response, names in lower case."""
    return tuple(
        (lower.decode("latin-1"), value.decode("latin-1"))
        for name, value in reply.headers
        if (lower := name.lower()) in _LIMIT_HEADERS
    )


def read_check(reply: Reply) -> Answer:
    """The decision of one check."""
    return _answer(_DECISION.decode(reply.body), headers_to_pass_on(reply))


def read_usage(reply: Reply) -> UsageBody:
    """What a caller has left."""
    return _USAGE.decode(reply.body)


def reader_of(count: int) -> Callable[[Reply], list[Answer | TidegateError | TransportFailure]]:
    """A parser of a batch of `count` answers."""

    def read(reply: Reply) -> list[Answer | TidegateError | TransportFailure]:
        decisions = _BATCH.decode(reply.body).decisions
        if len(decisions) != count:
            raise ValueError(f"expected {count} answers, got {len(decisions)}")
        return list(map(_read_one, decisions))

    return read


def _read_one(raw: msgspec.Raw) -> Answer | TidegateError | TransportFailure:
    if not bytes(raw).startswith(b'{"error":'):
        return _answer(_DECISION.decode(raw))
    result = _error(_ERROR.decode(raw))
    return (
        TransportFailure(f"the limiter answered {result}", sent=False) if isinstance(result, str | CatalogUnavailable) else result
    )


def _answer(body: DecisionBody, headers: tuple[tuple[str, str], ...] = ()) -> Answer:
    return Answer(*msgspec.structs.astuple(body), headers=headers)


def _error(body: _ErrorBody) -> TidegateError | str:
    """The server's error; its code and message as text if it is not one that is raised to callers."""
    result = body.error
    kind = _ERRORS.get(result.code)
    if kind is None:
        return f"{result.code} {result.message}"
    error = kind(result.message)
    error.details = dict(result.details)
    return error
