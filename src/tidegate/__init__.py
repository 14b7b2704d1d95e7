"""Tidegate decides, for every request to an API, whether it may pass.

    from tidegate import Limiter
    limiter = Limiter("100/minute")
    decision = await limiter.check("user-42")

The names below are the public surface; everything else may change without notice. Nothing here blocks an event loop, and all
of it serves one loop: it is not for threads.
"""

from tidegate._version import __version__
from tidegate.catalog import Catalog
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters import Charge, CounterStore
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check, Decision, Observation
from tidegate.doors.asgi import RateLimitMiddleware
from tidegate.doors.limiter import Limiter
from tidegate.errors import (
    ApiKeyExpired,
    ApiKeyRevoked,
    BadRequest,
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
from tidegate.policy.limits import Algorithm, Limit
from tidegate.policy.model import ApiKey, Policy, Rule, Tier
from tidegate.policy.toml_reader import load_policy

__all__ = [
    "Algorithm",
    "ApiKey",
    "ApiKeyExpired",
    "ApiKeyRevoked",
    "BadRequest",
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
    "RateLimitMiddleware",
    "Rule",
    "SettingsError",
    "StoreUnavailable",
    "TidegateError",
    "Tier",
    "TokenKeysUnavailable",
    "TooManyTokens",
    "TooManyUnknownKeys",
    "__version__",
    "load_policy",
]
