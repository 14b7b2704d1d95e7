"""All errors that Tidegate raises.

    TidegateError
     ├── BadRequest              400 BAD_REQUEST
     │    └── RequestTooLarge    413 PAYLOAD_TOO_LARGE
     ├── MissingApiKey           401 MISSING_API_KEY
     ├── InvalidApiKey           401 INVALID_API_KEY
     ├── InvalidToken            401 INVALID_TOKEN
     ├── TooManyTokens           429 TOKEN_VERIFICATIONS_EXCEEDED
     ├── TokenKeysUnavailable    503 TOKEN_KEYS_UNAVAILABLE
     ├── TooManyUnknownKeys      429 API_KEY_LOOKUPS_EXCEEDED
     ├── ApiKeyRevoked           403 API_KEY_REVOKED
     ├── ApiKeyExpired           403 API_KEY_EXPIRED
     ├── RateLimitExceeded       429 RATE_LIMIT_EXCEEDED, raised by limited functions (`tidegate.doors.exceeded`)
     ├── Blocked                 403 BLOCKED
     ├── StoreUnavailable        503 STORE_UNAVAILABLE
     ├── CatalogUnavailable      503 CATALOG_UNAVAILABLE
     ├── LimiterUnavailable      503 LIMITER_UNAVAILABLE, raised by clients: no server answered in time
     ├── HoldNotFound            404 HOLD_NOT_FOUND
     ├── HoldEnded               409 HOLD_ENDED
     ├── TooManyHolds            429 TOO_MANY_HOLDS
     ├── ReservationNotFound     404 RESERVATION_NOT_FOUND
     ├── TooManyReservations     429 TOO_MANY_RESERVATIONS
     ├── PolicyError             an invalid policy (file): file, line, reason
     ├── SettingsError           an invalid setting: name, value, remedy
     └── CatalogError            a refused change of the catalog

A message states what is wrong, with which value, and what to do.
"""

from __future__ import annotations

from typing import ClassVar


class TidegateError(Exception):
    """The base class of all errors.

    Args:
        message: one sentence for people: what is wrong, with which value, and the remedy.
        details: the same for programs; JSON types only.
    """

    code: ClassVar[str] = "INTERNAL"
    status: ClassVar[int] = 503

    def __init__(self, message: str, **details: object) -> None:
        # Not `super()`: a framework's exception may be the next class, see `tidegate.doors.exceeded`.
        Exception.__init__(self, message)
        self.message = message
        self.details = details


class BadRequest(TidegateError):
    """The check is invalid; nothing was charged."""

    code = "BAD_REQUEST"
    status = 400


class RequestTooLarge(BadRequest):
    """The body is larger than a check can be."""

    code = "PAYLOAD_TOO_LARGE"
    status = 413


class MissingApiKey(TidegateError):
    """The request has no API key, and the policy has no anonymous tier."""

    code = "MISSING_API_KEY"
    status = 401


class InvalidApiKey(TidegateError):
    """The API key is unknown or mistyped."""

    code = "INVALID_API_KEY"
    status = 401


class InvalidToken(TidegateError):
    """A JSON Web Token failed a check, named in `details["check"]`; the message never contains the token."""

    code = "INVALID_TOKEN"
    status = 401


class TooManyTokens(TidegateError):
    """The client sent too many tokens that failed, or too many wait for verification; `details["retry_after"]` in s."""

    code = "TOKEN_VERIFICATIONS_EXCEEDED"
    status = 429


class TokenKeysUnavailable(TidegateError):
    """The issuer's public keys could not be fetched yet, so no token can be verified."""

    code = "TOKEN_KEYS_UNAVAILABLE"
    status = 503


class TooManyUnknownKeys(TidegateError):
    """The client sent too many unknown API keys; look-ups are refused until the time in `details`."""

    code = "API_KEY_LOOKUPS_EXCEEDED"
    status = 429


class ApiKeyRevoked(TidegateError):
    """The API key was revoked."""

    code = "API_KEY_REVOKED"
    status = 403


class ApiKeyExpired(TidegateError):
    """The API key has expired."""

    code = "API_KEY_EXPIRED"
    status = 403


class Blocked(TidegateError):
    """The policy or an operator denies this client, or this rule; waiting does not help."""

    code = "BLOCKED"
    status = 403


class StoreUnavailable(TidegateError):
    """The counter store is unavailable and the rule has `on_failure = "deny"`."""

    code = "STORE_UNAVAILABLE"
    status = 503


class CatalogUnavailable(TidegateError):
    """The catalog is unavailable and no usable entry is cached."""

    code = "CATALOG_UNAVAILABLE"
    status = 503


class LimiterUnavailable(TidegateError):
    """A client got no answer from any server in time; its check may have been counted."""

    code = "LIMITER_UNAVAILABLE"
    status = 503


class HoldNotFound(TidegateError):
    """There is no hold of this id: it was made elsewhere, or ended too long ago."""

    code = "HOLD_NOT_FOUND"
    status = 404


class HoldEnded(TidegateError):
    """The hold was settled or has expired, and cannot be renewed."""

    code = "HOLD_ENDED"
    status = 409


class TooManyHolds(TidegateError):
    """The subject has as many open holds as one may have."""

    code = "TOO_MANY_HOLDS"
    status = 429


class ReservationNotFound(TidegateError):
    """There is no reservation of this id: it was made on another counter store, or the store lost its data."""

    code = "RESERVATION_NOT_FOUND"
    status = 404


class TooManyReservations(TidegateError):
    """As many reservations wait for their moments as counters in memory remember."""

    code = "TOO_MANY_RESERVATIONS"
    status = 429


class PolicyError(TidegateError):
    """An invalid policy; it is refused as a whole and the previous policy stays active.

    Args:
        reason: what is wrong, with the value and the remedy.
        file: path of the policy file, if any.
        line: 1-based line in that file, if known.
    """

    code = "POLICY_REFUSED"
    status = 400

    def __init__(self, reason: str, file: str | None = None, line: int | None = None) -> None:
        where = ":".join(str(part) for part in (file, line) if part is not None)
        super().__init__(f"{where}: {reason}" if where else reason)
        self.reason = reason
        self.file = file
        self.line = line


class SettingsError(TidegateError):
    """An invalid setting; the program ends with exit code 2."""

    code = "SETTINGS_REFUSED"


class CatalogError(TidegateError):
    """A refused change of the catalog; nothing was changed."""

    code = "CATALOG_REFUSED"
    status = 409


def clip(value: object, length: int = 80) -> str:
    """The representation of a value that came from outside, short enough for a message: at most `length` characters."""
    # Of a long text its beginning is enough; to escape all of it would cost its sender's peers.
    text = repr(value[:length] if type(value) is str else value)
    return text if len(text) <= length else text[: length - 3] + "..."
