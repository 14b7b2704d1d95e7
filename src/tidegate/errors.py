"""Every error Tidegate raises on purpose.

    TidegateError
     ├── BadRequest              400 BAD_REQUEST
     │    └── RequestTooLarge    413 PAYLOAD_TOO_LARGE
     ├── MissingApiKey           401 MISSING_API_KEY
     ├── InvalidApiKey           401 INVALID_API_KEY
     ├── TooManyUnknownKeys      429 API_KEY_LOOKUPS_EXCEEDED
     ├── ApiKeyRevoked           403 API_KEY_REVOKED
     ├── ApiKeyExpired           403 API_KEY_EXPIRED
     ├── StoreUnavailable        503 STORE_UNAVAILABLE
     ├── CatalogUnavailable      503 CATALOG_UNAVAILABLE
     ├── LimiterUnavailable      503 LIMITER_UNAVAILABLE: a client's, whose server was not heard
     ├── PolicyError             a policy (file) that is refused: file, line, reason
     ├── SettingsError           a setting that is refused: which, its value, the remedy
     └── CatalogError            a change to the catalog that is refused

A message says what was wrong, with which value, and what to do about it.
"""

from __future__ import annotations

from typing import ClassVar


class TidegateError(Exception):
    """The root of the tree above.

    Args:
        message: one sentence for a person: what, with which value, and the remedy.
        details: the same for a program; only JSON types.
    """

    code: ClassVar[str] = "INTERNAL"
    status: ClassVar[int] = 503

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class BadRequest(TidegateError):
    """The check itself makes no sense; nothing was charged."""

    code = "BAD_REQUEST"
    status = 400


class RequestTooLarge(BadRequest):
    """The body is larger than a check can be."""

    code = "PAYLOAD_TOO_LARGE"
    status = 413


class MissingApiKey(TidegateError):
    """No API key came, and the policy has no anonymous tier."""

    code = "MISSING_API_KEY"
    status = 401


class InvalidApiKey(TidegateError):
    """The API key is unknown or mistyped."""

    code = "INVALID_API_KEY"
    status = 401


class TooManyUnknownKeys(TidegateError):
    """The client sent so many unknown API keys that no further one is looked up for now; its `details` say for how long."""

    code = "API_KEY_LOOKUPS_EXCEEDED"
    status = 429


class ApiKeyRevoked(TidegateError):
    """The API key was revoked."""

    code = "API_KEY_REVOKED"
    status = 403


class ApiKeyExpired(TidegateError):
    """The API key's time is over."""

    code = "API_KEY_EXPIRED"
    status = 403


class StoreUnavailable(TidegateError):
    """The counter store does not answer and the rule says deny."""

    code = "STORE_UNAVAILABLE"
    status = 503


class CatalogUnavailable(TidegateError):
    """The catalog does not answer and nothing cached can stand in."""

    code = "CATALOG_UNAVAILABLE"
    status = 503


class LimiterUnavailable(TidegateError):
    """No server gave a client an answer in time; what it asked for may have been counted."""

    code = "LIMITER_UNAVAILABLE"
    status = 503


class PolicyError(TidegateError):
    """A policy that is refused as a whole; what was in force stays in force.

    Args:
        reason: what is wrong, with the value and the remedy.
        file: path of the policy file, where there is one.
        line: 1-based line in that file, where it is known.
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
    """A setting that is refused; the program ends with exit code 2."""

    code = "SETTINGS_REFUSED"


class CatalogError(TidegateError):
    """A change to the catalog that is refused; nothing was changed."""

    code = "CATALOG_REFUSED"
    status = 409
