"""What the page System shows of the stores and the settings, without secrets."""

from __future__ import annotations

from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.leased import LeasedCounters
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.redis.store import RedisCounters
from tidegate.server.system import HIDDEN, counters_report, settings_without_secrets
from tidegate.settings import AdminSettings, CacheSettings, CatalogSettings, CounterSettings, Settings


def test_secrets_are_hidden_and_urls_have_no_password() -> None:
    shown = settings_without_secrets(
        Settings(
            admin=AdminSettings(token="a-secret-of-the-admin"),
            cache=CacheSettings(secret="a-secret-of-the-cache"),
            catalog=CatalogSettings(url="postgresql://me:hunter2@db/x", replicas=("postgresql://me:hunter3@db2/x",)),
            counters=CounterSettings(url="redis://:hunter4@cache:6379/0"),
        )
    )
    assert shown["admin"]["token"] == shown["cache"]["secret"] == HIDDEN
    assert not any(word in str(shown) for word in ("hunter", "a-secret"))
    assert shown["catalog"]["url"] == "postgresql://db/x"
    assert shown["cache"]["max_keys"] == 100_000
    assert settings_without_secrets(Settings())["admin"]["token"] is None


async def test_every_kind_of_store_is_described() -> None:
    assert counters_report(MemoryCounters()) == {"kind": "memory", "subjects": 0, "evicted": 0}
    guarded = GuardedCounters(RedisCounters("redis://127.0.0.1:1", 0.05))
    found = counters_report(guarded)
    assert (found["kind"], found["breakers_open"], found["owed"]) == ("redis", 0, 0)
    leased = counters_report(LeasedCounters(guarded))
    assert (leased["kind"], leased["leases"]["leases"]) == ("redis", 0)
    await guarded.close()
