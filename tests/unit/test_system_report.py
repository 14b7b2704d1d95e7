"""What the page System shows of the stores and the settings, without secrets."""

from __future__ import annotations

from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.leased import LeasedCounters
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.redis.instances import InstanceState
from tidegate.counters.redis.store import RedisCounters
from tidegate.gate.holds import HoldFigures
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.server.system import HIDDEN, counters_report, holds_report, open_and_expired, settings_without_secrets
from tidegate.settings import AdminSettings, CacheSettings, CatalogSettings, CounterSettings, Settings
from tidegate.timestamps import now_us


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


async def test_holds_of_all_instances_are_summed() -> None:
    store = MemoryCounters()
    _, hold = store.open_hold_now(((LimitSet("r", Algorithm.FIXED_WINDOW, [Limit.parse("9/day")]), "k"),), 3, 1_000_000)
    assert hold is not None
    assert open_and_expired(store) == (1, 0)
    guarded = GuardedCounters(RedisCounters("redis://127.0.0.1:1", 0.05))
    guarded.store.holds.ends.note(now_us() + 60_000_000, 1)
    assert open_and_expired(guarded) == open_and_expired(LeasedCounters(guarded)) == (1, 0)
    await guarded.close()
    # One opened four that the other settled; an older version says nothing of holds.
    states = [InstanceState("a", "", "1", 1, "", *figures) for figures in ((6, 2), (-4, -1))]
    states.append(InstanceState("c", "", "1", 1, ""))
    report = holds_report(HoldFigures(), states)
    assert (report["open"], report["expired_unsettled"], report["opened"]) == (2, 1, 0)
    assert holds_report(HoldFigures(), states[1:2])["open"] == 0


async def test_every_kind_of_store_is_described() -> None:
    assert counters_report(MemoryCounters()) == {"kind": "memory", "subjects": 0, "evicted": 0}
    guarded = GuardedCounters(RedisCounters("redis://127.0.0.1:1", 0.05))
    found = counters_report(guarded)
    assert (found["kind"], found["breakers_open"], found["owed"]) == ("redis", 0, 0)
    leased = counters_report(LeasedCounters(guarded))
    assert (leased["kind"], leased["leases"]["leases"]) == ("redis", 0)
    await guarded.close()
