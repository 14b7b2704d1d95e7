"""Tidegate decides, for every request to an API, whether it may pass.

    from tidegate import Limiter, limit
    limiter = Limiter("100/minute")
    decision = await limiter.check("user-42")

    @limit("5/minute", key="email")
    def send_mail(email: str) -> None: ...

The names below are the public surface; everything else may change without notice. Each is imported when it is first used. Nothing
here blocks an event loop, except `SyncLimiter` and `limit` on a `def`, which are for threads; all else serves one loop.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tidegate._version import __version__

if TYPE_CHECKING:
    from tidegate.catalog import Catalog
    from tidegate.catalog.cached import CachedCatalog
    from tidegate.catalog.in_memory import PolicyCatalog
    from tidegate.counters import Charge, CounterStore
    from tidegate.counters.memory import MemoryCounters
    from tidegate.counters.reservations import Reservation
    from tidegate.decision import Check, Decision
    from tidegate.doors.asgi import RateLimitMiddleware
    from tidegate.doors.exceeded import RateLimitExceeded
    from tidegate.doors.limit import limit
    from tidegate.doors.limited_functions import exempt
    from tidegate.doors.limiter import Limiter, SyncLimiter
    from tidegate.errors import (
        ApiKeyExpired,
        ApiKeyRevoked,
        BadRequest,
        Blocked,
        CatalogError,
        CatalogUnavailable,
        InvalidApiKey,
        InvalidToken,
        LimiterUnavailable,
        MissingApiKey,
        PolicyError,
        SettingsError,
        StoreUnavailable,
        TidegateError,
        TokenKeysUnavailable,
        TooManyTokens,
        TooManyUnknownKeys,
    )
    from tidegate.gate.gate import Gate
    from tidegate.observation import Observation
    from tidegate.policy.limits import Algorithm, Limit
    from tidegate.policy.model import ApiKey, Policy, Tier
    from tidegate.policy.rules import Rule
    from tidegate.policy.toml_reader import load_policy

_HOMES = {
    "Catalog": "tidegate.catalog",
    "CachedCatalog": "tidegate.catalog.cached",
    "PolicyCatalog": "tidegate.catalog.in_memory",
    "Charge": "tidegate.counters",
    "CounterStore": "tidegate.counters",
    "MemoryCounters": "tidegate.counters.memory",
    "Reservation": "tidegate.counters.reservations",
    "Check": "tidegate.decision",
    "Decision": "tidegate.decision",
    "RateLimitMiddleware": "tidegate.doors.asgi",
    "RateLimitExceeded": "tidegate.doors.exceeded",
    "exempt": "tidegate.doors.limited_functions",
    "limit": "tidegate.doors.limit",
    "Limiter": "tidegate.doors.limiter",
    "SyncLimiter": "tidegate.doors.limiter",
    "ApiKeyExpired": "tidegate.errors",
    "ApiKeyRevoked": "tidegate.errors",
    "BadRequest": "tidegate.errors",
    "Blocked": "tidegate.errors",
    "CatalogError": "tidegate.errors",
    "CatalogUnavailable": "tidegate.errors",
    "InvalidApiKey": "tidegate.errors",
    "InvalidToken": "tidegate.errors",
    "LimiterUnavailable": "tidegate.errors",
    "MissingApiKey": "tidegate.errors",
    "PolicyError": "tidegate.errors",
    "SettingsError": "tidegate.errors",
    "StoreUnavailable": "tidegate.errors",
    "TidegateError": "tidegate.errors",
    "TokenKeysUnavailable": "tidegate.errors",
    "TooManyTokens": "tidegate.errors",
    "TooManyUnknownKeys": "tidegate.errors",
    "Gate": "tidegate.gate.gate",
    "Observation": "tidegate.observation",
    "Algorithm": "tidegate.policy.limits",
    "Limit": "tidegate.policy.limits",
    "ApiKey": "tidegate.policy.model",
    "Policy": "tidegate.policy.model",
    "Tier": "tidegate.policy.model",
    "Rule": "tidegate.policy.rules",
    "load_policy": "tidegate.policy.toml_reader",
}
"""Module of each name."""

__all__ = [
    "Algorithm",
    "ApiKey",
    "ApiKeyExpired",
    "ApiKeyRevoked",
    "BadRequest",
    "Blocked",
    "CachedCatalog",
    "Catalog",
    "CatalogError",
    "CatalogUnavailable",
    "Charge",
    "Check",
    "CounterStore",
    "Decision",
    "Gate",
    "InvalidApiKey",
    "InvalidToken",
    "Limit",
    "Limiter",
    "LimiterUnavailable",
    "MemoryCounters",
    "MissingApiKey",
    "Observation",
    "Policy",
    "PolicyCatalog",
    "PolicyError",
    "RateLimitExceeded",
    "RateLimitMiddleware",
    "Reservation",
    "Rule",
    "SettingsError",
    "StoreUnavailable",
    "SyncLimiter",
    "TidegateError",
    "Tier",
    "TokenKeysUnavailable",
    "TooManyTokens",
    "TooManyUnknownKeys",
    "__version__",
    "exempt",
    "limit",
    "load_policy",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'tidegate' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(home), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
