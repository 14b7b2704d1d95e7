"""The public surface: what others build on. Change it only by adding."""

from __future__ import annotations

import importlib

import pytest

import tidegate

NAMES = """
Algorithm ApiKey ApiKeyExpired ApiKeyRevoked BadRequest Blocked CachedCatalog Catalog CatalogError CatalogUnavailable Charge Check
CounterStore Decision Gate InvalidApiKey InvalidToken Limit Limiter LimiterUnavailable MemoryCounters MissingApiKey Observation
Policy PolicyCatalog PolicyError RateLimitExceeded RateLimitMiddleware Reservation Rule SettingsError StoreUnavailable SyncLimiter
TidegateError Tier TokenKeysUnavailable TooManyTokens TooManyUnknownKeys __version__ exempt limit load_policy
"""


def test_public_names() -> None:
    assert list(tidegate.__all__) == sorted(NAMES.split())
    assert set(tidegate.__all__) <= set(dir(tidegate))


@pytest.mark.parametrize("name", tidegate.__all__)
def test_every_name_is_found_where_it_is_said_to_be(name: str) -> None:
    found = getattr(tidegate, name)
    home = tidegate._HOMES.get(name)
    assert home is None or getattr(importlib.import_module(home), name) is found


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="module 'tidegate' has no attribute 'Limits'"):
        tidegate.Limits  # noqa: B018
