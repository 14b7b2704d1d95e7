"""The cache in front of the catalog: single flight, times, bounds, what a change takes away. `test_gate` has the plain cases."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from tests.cases.doors import FREE, POLICY
from tests.moments import until
from tidegate.catalog import loader as loader_module
from tidegate.catalog.cache_level import SECOND_CHANCES
from tidegate.catalog.cached import MAX_UNKNOWN, UNKNOWN_TTL_S, CachedCatalog
from tidegate.catalog.changes import ALL, ANONYMOUS, KEY, TIER, Changes
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.catalog.loader import PATIENCE_S, RETRY_S
from tidegate.catalog.tier_cache import RELOADS
from tidegate.errors import CatalogUnavailable
from tidegate.policy.attributes import CallerPolicy
from tidegate.policy.key_format import hash_api_key, make_api_key
from tidegate.policy.model import ApiKey, KeyStatus, Policy, Tier
from tidegate.policy.toml_reader import parse_policy

FREE_KEY = hash_api_key(FREE)


class Seconds:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Held(PolicyCatalog):
    """A policy in memory that notes what it is asked, answers when a gate is open, and can be told to fail."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.policy = policy
        self.asked: list[tuple[str, str, int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.failing = False
        self.delay_s = 0.0
        self.at_once = self.most_at_once = 0

    async def _answer(self, kind: str, name: str, min_version: int, answer: Callable[[], Any]) -> Any:
        self.asked.append((kind, name, min_version))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        # As a database does: what it answers is of the moment at which it was asked.
        found = await answer()
        try:
            await asyncio.sleep(self.delay_s)
            await self.gate.wait()
        finally:
            self.at_once -= 1
        if self.failing:
            raise CatalogUnavailable("away")
        return found

    async def api_key(self, sha256: str, min_version: int = 0) -> tuple[int, ApiKey | None]:
        found: tuple[int, ApiKey | None] = await self._answer(KEY, sha256, min_version, lambda: super(Held, self).api_key(sha256))
        return found

    async def tier(self, name: str, min_version: int = 0) -> tuple[int, Tier | None]:
        found: tuple[int, Tier | None] = await self._answer(TIER, name, min_version, lambda: super(Held, self).tier(name))
        return found

    async def caller_policy(self, min_version: int = 0) -> tuple[int, CallerPolicy]:
        found: tuple[int, CallerPolicy] = await self._answer(
            ANONYMOUS, "", min_version, lambda: super(Held, self).caller_policy()
        )
        return found

    def count(self, kind: str, name: str | None = None) -> int:
        return sum(each[0] == kind and name in (None, each[1]) for each in self.asked)

    def set_key(self, sha256: str, **fields: Any) -> None:
        """Change a key, as somebody else would."""
        self.replace(
            msgspec.structs.replace(
                self.policy,
                api_keys=tuple(
                    msgspec.structs.replace(each, **fields) if each.sha256 == sha256 else each for each in self.policy.api_keys
                ),
            )
        )

    def set_limits(self, old: str, new: str) -> None:
        """Change a tier's rule, as somebody else would."""
        self.replace(parse_policy(POLICY.replace(old, new)))

    def replace(self, policy: Policy) -> None:
        self.policy = policy
        super().replace(policy)


def many(count: int) -> tuple[Policy, list[str]]:
    """A policy with so many keys of one tier, and their digests."""
    keys = tuple(ApiKey(hash_api_key(make_api_key()), "t") for _ in range(count))
    return Policy((Tier.make("t"),), keys), [key.sha256 for key in keys]


@pytest.fixture
def clock() -> Seconds:
    return Seconds()


@pytest.fixture
async def held() -> Held:
    return Held(parse_policy(POLICY))


def limit_of(caller: Any) -> str:
    return next(rule.limits.limits[0].text for rule in caller.tier.rules if rule.rule.endpoint == "/api/v1/*")


# Single flight.


async def test_misses_of_one_thing_make_one_query_and_of_others_their_own(held: Held) -> None:
    cached = CachedCatalog(held)
    held.gate.clear()
    digests = [FREE_KEY, "0" * 64, "1" * 64]
    asked = [asyncio.create_task(cached.caller(digest)) for digest in digests * 1000]
    asked += [asyncio.create_task(cached.anonymous()) for _ in range(1000)]
    await asyncio.sleep(0.01)
    held.gate.set()
    found = await asyncio.gather(*asked)
    assert Counter(held.asked) == {
        **{(KEY, digest, 0): 1 for digest in digests},
        (ANONYMOUS, "", 0): 1,
        (TIER, "free", 0): 1,
        (TIER, "open", 0): 1,
    }
    assert len({id(caller) for caller in found}) == 3, "one caller for the key, one for those without, None for the unknown"


async def test_cancelled_waiters_do_not_cancel_others(held: Held) -> None:
    cached = CachedCatalog(held)
    held.gate.clear()
    asked = [asyncio.create_task(cached.caller(FREE_KEY)) for _ in range(1000)]
    await asyncio.sleep(0)
    for task in asked[::2]:
        task.cancel()
    await asyncio.sleep(0)
    assert all(task.cancelled() for task in asked[::2])
    late = asyncio.create_task(cached.caller(FREE_KEY))
    await asyncio.sleep(0)
    held.gate.set()
    assert {caller is not None for caller in await asyncio.gather(*asked[1::2], late)} == {True}
    assert held.count(KEY) == 1


async def test_when_all_waiters_give_up_the_answer_is_kept_all_the_same(held: Held) -> None:
    cached = CachedCatalog(held)
    held.gate.clear()
    asked = [asyncio.create_task(cached.caller(FREE_KEY)) for _ in range(3)]
    await asyncio.sleep(0)
    for task in asked:
        task.cancel()
    await asyncio.wait(asked)
    held.gate.set()
    assert await cached.caller(FREE_KEY) is not None
    assert await cached.caller(FREE_KEY) is not None
    assert held.count(KEY) == 1


async def test_a_failed_query_fails_all_who_wait_and_is_not_remembered(held: Held) -> None:
    cached = CachedCatalog(held)
    held.gate.clear()
    held.failing = True
    asked = [asyncio.create_task(cached.caller(FREE_KEY)) for _ in range(100)]
    await asyncio.sleep(0)
    held.gate.set()
    assert {type(error) for error in await asyncio.gather(*asked, return_exceptions=True)} == {CatalogUnavailable}
    held.failing = False
    assert await cached.caller(FREE_KEY) is not None
    assert held.count(KEY) == 2


# Times.


async def test_entries_do_not_expire_together(clock: Seconds) -> None:
    random.seed(1)
    policy, digests = many(2000)
    held = Held(policy)
    # The tier's own time is over for all at once: it is asked for then, and the keys are not.
    cached = CachedCatalog(held, l1_ttl_s=100, clock=clock)
    for digest in digests:
        await cached.caller(digest)
    began = clock.now
    gone: list[int] = []
    for after_s in (89.9, 95, 100, 105, 110.1):
        clock.now = began + after_s
        asked = held.count(KEY)
        # Looked at from a cache that is thrown away: a question would begin a new time.
        entries = cached._callers.entries
        gone.append(sum(entries[digest][0] <= clock.now for digest in digests))
        assert held.count(KEY) == asked
    assert gone[0] == 0
    assert gone[-1] == 2000
    assert all(300 < later - earlier < 700 for earlier, later in itertools.pairwise(gone)), gone


async def test_reloading_a_tier_does_not_extend_the_ttl_of_its_keys(held: Held, clock: Seconds) -> None:
    """Else a key that was changed without a word would be served as it was for as long as its tier is."""
    cached = CachedCatalog(held, l1_ttl_s=60, clock=clock)
    began = clock.now
    await cached.caller(FREE_KEY)
    for number in range(6):
        clock.now = began + 9 * (number + 1)
        cached.touched(number + 1, [(TIER, "free")])
        await cached.caller(FREE_KEY)
    assert (held.count(KEY), held.count(TIER)) == (1, 7)
    held.set_key(FREE_KEY, status=KeyStatus.REVOKED)
    clock.now = began + 67
    caller = await cached.caller(FREE_KEY)
    assert caller is not None
    assert caller.api_key is not None
    assert caller.api_key.status is KeyStatus.REVOKED


async def test_a_tier_that_is_loaded_again_unchanged_has_the_same_limits(held: Held, clock: Seconds) -> None:
    """Stores know denials, leases and last answers by them: else each subject would get a check more where the store is slow."""
    cached = CachedCatalog(held, clock=clock, l1_ttl_s=10)

    async def rules() -> list[Any]:
        caller = await cached.caller(FREE_KEY)
        assert caller is not None
        return [rule.limits for rule in caller.tier.rules] + [caller.tier.limits]

    before = await rules()
    assert any(limits is not None for limits in before)
    clock.now += 100
    again = await rules()
    assert held.count(TIER) == 2
    assert all(one is two for one, two in zip(before, again, strict=True))


async def test_stale_entries_serve_to_their_bound_and_not_beyond(held: Held, clock: Seconds) -> None:
    cached = CachedCatalog(held, l1_ttl_s=60, stale_if_error_s=100, clock=clock)
    began = clock.now
    for ask in (lambda: cached.caller(FREE_KEY), cached.anonymous, lambda: cached.tier("free")):
        assert await ask() is not None
    held.failing = True
    stale = 0
    for after_s in (70.0, 100.0, 150.0):
        clock.now = began + after_s
        assert await cached.caller(FREE_KEY) is not None
        assert await cached.anonymous() is not None
        assert await cached.tier("free") is not None
        assert cached.stale > stale, "and it is counted"
        stale = cached.stale
    clock.now = began + 60 * 1.1 + 100.1
    for ask in (lambda: cached.caller(FREE_KEY), cached.anonymous, lambda: cached.tier("free")):
        with pytest.raises(CatalogUnavailable):
            await ask()
    held.failing = False
    assert await cached.caller(FREE_KEY) is not None


async def test_a_bound_of_nothing_serves_nothing_stale(held: Held, clock: Seconds) -> None:
    cached = CachedCatalog(held, l1_ttl_s=60, stale_if_error_s=0, clock=clock)
    await cached.caller(FREE_KEY)
    held.failing = True
    clock.now += 67
    with pytest.raises(CatalogUnavailable):
        await cached.caller(FREE_KEY)


async def test_a_failing_catalog_is_queried_once_a_second(held: Held, clock: Seconds) -> None:
    cached = CachedCatalog(held, l1_ttl_s=60, clock=clock)
    await cached.caller(FREE_KEY)
    held.failing = True
    clock.now += 67
    for _ in range(100):
        assert await cached.caller(FREE_KEY) is not None
    assert held.count(KEY) == 2
    clock.now += RETRY_S
    for _ in range(100):
        assert await cached.caller(FREE_KEY) is not None
    assert held.count(KEY) == 3
    held.failing = False
    clock.now += RETRY_S
    stale = cached.stale
    assert await cached.caller(FREE_KEY) is not None
    assert await cached.caller(FREE_KEY) is not None
    assert (held.count(KEY), cached.stale) == (4, stale)


async def test_a_hanging_catalog_blocks_no_check_with_a_stale_entry(
    held: Held, clock: Seconds, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = CachedCatalog(held, l1_ttl_s=60, clock=clock)
    await cached.caller(FREE_KEY)
    held.set_key(FREE_KEY, name="new")
    held.gate.clear()
    clock.now += 67
    loop = asyncio.get_running_loop()
    before = loop.time()
    asked = await asyncio.gather(*(cached.caller(FREE_KEY) for _ in range(1000)))
    assert {caller.api_key.name for caller in asked if caller is not None and caller.api_key is not None} == {""}
    assert loop.time() - before >= PATIENCE_S * 0.9
    # For a second nobody waits: whoever does would do so for an hour from now on.
    monkeypatch.setattr(loader_module, "PATIENCE_S", 3600)
    async with asyncio.timeout(60):
        for _ in range(1000):
            await cached.caller(FREE_KEY)
    assert held.count(KEY) == 2
    held.gate.set()
    # The answer is taken in when it comes, though nobody waits for it.
    await asyncio.sleep(0.01)
    caller = await cached.caller(FREE_KEY)
    assert caller is not None
    assert caller.api_key is not None
    assert caller.api_key.name == "new"


async def test_a_slow_catalog_is_queried_for_everything(clock: Seconds) -> None:
    """A database a continent away answers later than a check waits as a rule: all keys that may have changed wait for it."""
    policy, digests = many(200)
    held = Held(policy)
    cached = CachedCatalog(held, l1_ttl_s=60, clock=clock)
    await asyncio.gather(*(cached.caller(digest) for digest in digests))
    held.delay_s = PATIENCE_S * 1.5
    # What changed is not known: many keys may have been revoked at once.
    cached.changed(Changes(5, 5))
    held.replace(
        msgspec.structs.replace(
            policy, api_keys=tuple(msgspec.structs.replace(each, status=KeyStatus.REVOKED) for each in policy.api_keys)
        )
    )
    callers = await asyncio.gather(*(cached.caller(digest) for digest in digests))
    assert {caller.api_key.status for caller in callers if caller is not None and caller.api_key is not None} == {
        KeyStatus.REVOKED
    }
    assert held.count(KEY) == 400, "each once"


# Unknown keys.


async def test_unknown_keys_expire_seconds_after_their_look_up(held: Held, clock: Seconds) -> None:
    cached = CachedCatalog(held, clock=clock)
    assert await cached.caller("0" * 64) is None
    clock.now += UNKNOWN_TTL_S - 0.1
    for _ in range(3):
        assert await cached.caller("0" * 64) is None
    assert held.count(KEY) == 1, "a hit begins no new time"
    clock.now += 0.2
    assert await cached.caller("0" * 64) is None
    assert held.count(KEY) == 2
    held.failing = True
    clock.now += UNKNOWN_TTL_S
    with pytest.raises(CatalogUnavailable):
        await cached.caller("0" * 64)


async def test_a_flood_of_unknown_keys_is_bounded_and_evicts_the_oldest(held: Held, clock: Seconds) -> None:
    cached = CachedCatalog(held, max_keys=5, clock=clock)
    for number in range(MAX_UNKNOWN + 1):
        await cached.caller(f"{number:064x}")
    assert len(cached) == MAX_UNKNOWN
    asked = held.count(KEY)
    await cached.caller(f"{MAX_UNKNOWN:064x}")
    assert held.count(KEY) == asked
    await cached.caller(f"{0:064x}")
    assert held.count(KEY) == asked + 1


async def test_a_key_that_is_made_is_known_at_once(clock: Seconds) -> None:
    policy, digests = many(2)
    held = Held(msgspec.structs.replace(policy, api_keys=policy.api_keys[:1]))
    cached = CachedCatalog(held, clock=clock)
    assert await cached.caller(digests[1]) is None
    held.replace(policy)
    cached.changed(Changes(7, 0, ((7, (KEY, digests[1])),)))
    assert await cached.caller(digests[1]) is not None


async def test_a_key_that_is_deleted_is_unknown_at_once_and_never_stale(clock: Seconds) -> None:
    policy, digests = many(2)
    held = Held(policy)
    cached = CachedCatalog(held, clock=clock)
    assert await cached.caller(digests[0]) is not None
    held.replace(msgspec.structs.replace(policy, api_keys=policy.api_keys[1:]))
    cached.changed(Changes(7, 0, ((7, (KEY, digests[0])),)))
    held.failing = True
    with pytest.raises(CatalogUnavailable):
        await cached.caller(digests[0])
    held.failing = False
    assert await cached.caller(digests[0]) is None


async def test_a_change_made_here_is_not_invalidated_again_when_it_is_read(held: Held, clock: Seconds) -> None:
    """The catalog may fail before it is loaded a third time: a revoked key is refused as revoked all the same."""
    cached = CachedCatalog(held, clock=clock)
    assert await cached.caller(FREE_KEY) is not None
    held.set_key(FREE_KEY, status=KeyStatus.REVOKED)
    cached.touched(7, [(KEY, FREE_KEY), (TIER, "free")])
    assert await cached.caller(FREE_KEY) is not None
    asked = len(held.asked)
    held.failing = True
    cached.changed(Changes(7, 0, ((7, (KEY, FREE_KEY)), (7, (TIER, "free")))))
    caller = await cached.caller(FREE_KEY)
    assert caller is not None
    assert caller.api_key is not None
    assert caller.api_key.status is KeyStatus.REVOKED
    assert len(held.asked) == asked
    # A change that somebody else made after it is.
    cached.changed(Changes(8, 7, ((8, (KEY, FREE_KEY)),)))
    with pytest.raises(CatalogUnavailable):
        await cached.caller(FREE_KEY)


# Bounds.


async def test_keys_are_bounded_and_those_in_use_stay(clock: Seconds) -> None:
    policy, digests = many(300)
    held = Held(policy)
    cached = CachedCatalog(held, max_keys=50, clock=clock)
    used = digests[:5]
    for digest in digests:
        assert await cached.caller(digest) is not None
        assert len(cached) <= 50
        for each in used:
            await cached.caller(each)
    assert [held.count(KEY, digest) for digest in used] == [1] * 5, "they were asked for between any two others"
    assert held.count(KEY) == 300
    asked = held.count(KEY)
    await cached.caller(digests[10])
    assert held.count(KEY) == asked + 1


@pytest.mark.parametrize("most", [1, 2, SECOND_CHANCES + 5])
async def test_where_all_are_in_use_the_bound_holds(most: int, clock: Seconds) -> None:
    policy, digests = many(most + 3)
    held = Held(policy)
    cached = CachedCatalog(held, max_keys=most, clock=clock)
    for _ in range(3):
        for digest in digests:
            for _ in range(2):
                assert await cached.caller(digest) is not None
            assert len(cached) <= most


async def test_what_is_doubted_is_bounded_too(clock: Seconds) -> None:
    policy, digests = many(100)
    held = Held(policy)
    cached = CachedCatalog(held, max_keys=20, clock=clock)
    for start in range(0, 100, 20):
        for digest in digests[start : start + 20]:
            await cached.caller(digest)
        cached.invalidate()
    assert len(cached._callers.stale) <= 20
    held.failing = True
    served = 0
    for digest in digests:
        try:
            served += await cached.caller(digest) is not None
        except CatalogUnavailable:
            continue
    assert served == 20, "the latest stand in"


# What a change takes away.


async def test_a_revoked_key_is_never_served_as_it_was(held: Held, clock: Seconds) -> None:
    cached = CachedCatalog(held, clock=clock)
    assert await cached.caller(FREE_KEY) is not None
    held.set_key(FREE_KEY, status=KeyStatus.REVOKED)
    held.failing = True
    cached.changed(Changes(7, 0, ((7, (KEY, FREE_KEY)),)))
    for _ in range(3):
        with pytest.raises(CatalogUnavailable):
            await cached.caller(FREE_KEY)
        clock.now += RETRY_S
    held.failing = False
    caller = await cached.caller(FREE_KEY)
    assert caller is not None
    assert caller.api_key is not None
    assert caller.api_key.status is KeyStatus.REVOKED


async def test_nor_when_it_was_in_doubt_before(held: Held, clock: Seconds) -> None:
    cached = CachedCatalog(held, clock=clock)
    await cached.caller(FREE_KEY)
    held.failing = True
    cached.changed(Changes(6, 6))
    assert await cached.caller(FREE_KEY) is not None, "it may have been changed, or not"
    cached.changed(Changes(7, 6, ((7, (KEY, FREE_KEY)),)))
    with pytest.raises(CatalogUnavailable):
        await cached.caller(FREE_KEY)


async def test_a_changed_tier_is_served_as_it_was_while_the_catalog_fails(held: Held, clock: Seconds) -> None:
    cached = CachedCatalog(held, clock=clock)
    assert limit_of(await cached.caller(FREE_KEY)) == "3/minute"
    held.set_limits("3/minute", "2/minute")
    held.failing = True
    cached.changed(Changes(7, 0, ((7, (TIER, "free")),)))
    for _ in range(3):
        assert limit_of(await cached.caller(FREE_KEY)) == "3/minute", "an old limit is better than none"
    assert cached.stale >= 3
    held.failing = False
    clock.now += RETRY_S
    assert limit_of(await cached.caller(FREE_KEY)) == "2/minute"
    assert held.count(KEY) == 1, "the key itself was not changed"


@pytest.mark.parametrize("how", ["tier", "everything", "made here", "anonymous"])
async def test_a_limit_that_was_replaced_decides_nothing_however_slow_the_catalog_is(how: str, held: Held) -> None:
    """15 ms to the database and thousands of rules take longer than a check waits for an entry that is merely past its time."""
    cached = CachedCatalog(held)
    assert limit_of(await cached.caller(FREE_KEY)) == "3/minute"
    await cached.anonymous()
    held.set_limits("3/minute", "2/minute")
    held.delay_s = PATIENCE_S * 3
    if how == "everything":
        cached.changed(Changes(7, 7))
    elif how == "made here":
        cached.touched(7, [(TIER, "free")])
    elif how == "anonymous":
        held.replace(msgspec.structs.replace(held.policy, anonymous_tier="free"))
        cached.changed(Changes(7, 0, ((7, (ANONYMOUS, "")), (7, (TIER, "free")))))
        assert limit_of(await cached.anonymous()) == "2/minute"
    else:
        cached.changed(Changes(7, 0, ((7, (TIER, "free")),)))
    found = await asyncio.gather(*(cached.caller(FREE_KEY) for _ in range(100)))
    assert {limit_of(caller) for caller in found} == {"2/minute"}
    assert cached.stale == 0
    assert held.count(TIER, "free") == 2, "all wait for one query"


async def test_a_tier_that_changed_is_loaded_again_before_anybody_needs_it(held: Held) -> None:
    cached = CachedCatalog(held)
    await cached.caller(FREE_KEY)
    held.set_limits("3/minute", "2/minute")
    cached.changed(Changes(7, 0, ((7, (TIER, "free")), (7, (TIER, "open")), (7, (TIER, "none")))))
    await until(lambda: held.count(TIER, "free") == 2)
    await until(lambda: "free" in cached._tiers.entries)
    asked = len(held.asked)
    assert limit_of(await cached.caller(FREE_KEY)) == "2/minute"
    assert len(held.asked) == asked, "the first check makes no query"
    assert held.count(TIER, "open") == held.count(TIER, "none") == 0, "what was not cached is not loaded"


async def test_tiers_are_loaded_again_a_few_at_a_time() -> None:
    names = [f"t{number}" for number in range(100)]
    held = Held(Policy(tuple(Tier.make(name) for name in names)))
    cached = CachedCatalog(held)
    for name in names:
        await cached.tier(name)
    held.delay_s = 0.001
    cached.changed(Changes(7, 7))
    await until(lambda: len(held.asked) == 200 and len(cached._tiers.entries) == 100)
    assert held.most_at_once == RELOADS


async def test_a_waiter_that_joins_a_load_after_a_change_gets_the_new_limit(held: Held) -> None:
    cached = CachedCatalog(held)
    held.gate.clear()
    before = asyncio.create_task(cached.caller(FREE_KEY))
    await until(lambda: held.count(KEY) == 1)
    held.gate.set()
    await asyncio.sleep(0)
    held.gate.clear()
    await until(lambda: held.count(TIER) == 1)
    # The key is there, and the tier as it was is on its way.
    held.set_limits("3/minute", "2/minute")
    cached.changed(Changes(7, 0, ((7, (TIER, "free")),)))
    after = asyncio.create_task(cached.caller(FREE_KEY))
    await asyncio.sleep(0)
    held.gate.set()
    assert limit_of(await after) == "2/minute"
    await before


async def test_while_the_catalog_fails_a_replaced_limit_is_not_waited_for_long(held: Held, clock: Seconds) -> None:
    """Who follows the catalog knows that it fails: then a check waits as for any entry past its time, and no longer."""
    cached = CachedCatalog(held, clock=clock)
    await cached.caller(FREE_KEY)
    held.gate.clear()
    cached.changed(Changes(7, 0, ((7, (TIER, "free")),)))
    waiting = asyncio.create_task(cached.caller(FREE_KEY))
    await asyncio.sleep(PATIENCE_S * 2)
    assert not waiting.done()
    cached.followed(failing=True)
    async with asyncio.timeout(60):
        assert limit_of(await cached.caller(FREE_KEY)) == "3/minute"
    held.gate.set()
    await waiting
    cached.followed(failing=False)


async def test_a_key_past_its_time_serves_under_the_tier_as_it_is_now(held: Held, clock: Seconds) -> None:
    cached = CachedCatalog(held, l1_ttl_s=60, clock=clock)
    await cached.caller(FREE_KEY)
    held.set_limits("3/minute", "2/minute")
    cached.changed(Changes(7, 0, ((7, (TIER, "free")),)))
    await until(lambda: "free" in cached._tiers.entries)
    clock.now += 67
    held.gate.clear()
    async with asyncio.timeout(60):
        assert limit_of(await cached.caller(FREE_KEY)) == "2/minute"
    assert cached.stale == 1
    held.gate.set()


async def test_a_change_of_one_thing_leaves_the_others(clock: Seconds) -> None:
    policy, digests = many(1000)
    held = Held(policy)
    cached = CachedCatalog(held, clock=clock)
    for digest in digests:
        await cached.caller(digest)
    held.asked.clear()
    cached.changed(Changes(7, 0, ((7, (KEY, digests[3])), (7, (TIER, "other")))))
    for digest in digests:
        await cached.caller(digest)
    assert held.asked == [(KEY, digests[3], 7)]


async def test_the_minimum_version_is_passed_on(held: Held, clock: Seconds) -> None:
    cached = CachedCatalog(held, clock=clock)
    cached.changed(Changes(20, 10, ((15, (KEY, FREE_KEY)), (17, (TIER, "open")))))
    await cached.caller(FREE_KEY)
    await cached.caller("0" * 64)
    await cached.anonymous()
    assert held.asked == [
        (KEY, FREE_KEY, 15),
        (TIER, "free", 10),
        (KEY, "0" * 64, 10),
        (ANONYMOUS, "", 10),
        (TIER, "open", 17),
    ]
    held.asked.clear()
    # Made here, and not read of yet.
    cached.touched(30, [(TIER, "free"), (ANONYMOUS, "")])
    assert cached.version == 20
    await cached.caller(FREE_KEY)
    await cached.anonymous()
    assert held.asked == [(TIER, "free", 30), (ANONYMOUS, "", 30)]
    held.asked.clear()
    cached.touched(40, [(ALL, "")])
    await cached.caller(FREE_KEY)
    # All tiers that were cached are loaded again at once, in the background.
    await until(lambda: len(held.asked) == 3)
    assert set(held.asked) == {(KEY, FREE_KEY, 40), (TIER, "free", 40), (TIER, "open", 40)}
    held.asked.clear()
    cached.changed(Changes(35, 35))
    await cached.caller(FREE_KEY)
    await until(lambda: len(held.asked) == 3)
    assert set(held.asked) == {(KEY, FREE_KEY, 35), (TIER, "free", 35), (TIER, "open", 35)}, "a version that went back counts"


@pytest.mark.parametrize("how", ["key", "everything", "made here"])
async def test_a_load_started_before_a_change_is_not_cached(how: str, held: Held, clock: Seconds) -> None:
    cached = CachedCatalog(held, clock=clock)
    held.gate.clear()
    before = asyncio.create_task(cached.caller(FREE_KEY))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert held.count(KEY) == 1
    held.set_key(FREE_KEY, status=KeyStatus.REVOKED)
    if how == "key":
        cached.changed(Changes(7, 0, ((7, (KEY, FREE_KEY)),)))
    elif how == "everything":
        cached.changed(Changes(7, 7))
    else:
        cached.touched(7, [(KEY, FREE_KEY)])
    after = asyncio.create_task(cached.caller(FREE_KEY))
    await asyncio.sleep(0)
    held.gate.set()
    told = [caller.api_key.status for caller in await asyncio.gather(before, after) if caller and caller.api_key]
    assert told == [KeyStatus.ACTIVE, KeyStatus.REVOKED], "who asks after the change does not join who asked before it"
    again = await cached.caller(FREE_KEY)
    assert again is not None
    assert again.api_key is not None
    assert again.api_key.status is KeyStatus.REVOKED
    assert held.count(KEY) == 2


async def test_a_tier_loaded_before_a_change_is_not_cached_for_its_keys(held: Held, clock: Seconds) -> None:
    cached = CachedCatalog(held, clock=clock)
    held.gate.clear()
    before = asyncio.create_task(cached.caller(FREE_KEY))
    await asyncio.sleep(0.01)
    held.gate.set()
    await asyncio.sleep(0)
    held.gate.clear()
    await asyncio.sleep(0.01)
    assert held.count(TIER) == 1, "the key is there, its tier is being asked for"
    held.set_limits("3/minute", "2/minute")
    cached.changed(Changes(7, 0, ((7, (TIER, "free")),)))
    held.gate.set()
    await before
    assert limit_of(await cached.caller(FREE_KEY)) == "2/minute"


async def test_changes_under_load_leave_nothing_old(clock: Seconds) -> None:
    """Keys are asked for all the time while one after the other is revoked, and answers come late and out of order."""
    random.seed(2)
    policy, digests = many(50)
    held = Held(policy)
    cached = CachedCatalog(held, clock=clock)
    revoked: set[str] = set()
    wrong: list[str] = []
    over = False

    async def check() -> None:
        while not over:
            digest = random.choice(digests)
            known = digest in revoked
            held.delay_s = random.choice((0, 0.001, 0.003))
            await asyncio.sleep(0)
            caller = await cached.caller(digest)
            assert caller is not None
            assert caller.api_key is not None
            if known and caller.api_key.status is not KeyStatus.REVOKED:
                wrong.append(digest)

    checks = [asyncio.create_task(check()) for _ in range(20)]
    for version, digest in enumerate(digests, 1):
        held.replace(
            msgspec.structs.replace(
                held.policy,
                api_keys=tuple(
                    msgspec.structs.replace(each, status=KeyStatus.REVOKED) if each.sha256 == digest else each
                    for each in held.policy.api_keys
                ),
            )
        )
        cached.changed(Changes(version, version - 1, ((version, (KEY, digest)),)))
        revoked.add(digest)
        await asyncio.sleep(0.004)
    over = True
    await asyncio.gather(*checks)
    assert wrong == []
    assert held.count(KEY) > 80, "nearly every key was asked for before and after its change"


async def test_a_fresh_tier_is_waited_for() -> None:
    """Whoever changed a tier is not answered with the one of before, however slow the catalog is."""
    catalog = PolicyCatalog(parse_policy('[[tiers]]\nname = "t"\nlimits = ["10/hour"]\n'))
    cached = CachedCatalog(catalog)
    assert await cached.fresh_tier("t") is await cached.tier("t")
    slow = asyncio.Event()
    asked = catalog.tier

    async def after_a_while(name: str, min_version: int = 0) -> tuple[int, Tier | None]:
        await slow.wait()
        return await asked(name, min_version)

    catalog.tier = after_a_while  # type: ignore[method-assign]
    before = await cached.tier("t")
    cached.touched(1, [(TIER, "t")])
    waiting = [asyncio.create_task(ask("t")) for ask in (cached.tier, cached.fresh_tier)]
    await asyncio.sleep(PATIENCE_S * 2)
    assert not any(task.done() for task in waiting), "nor is a check"
    slow.set()
    assert before not in await asyncio.gather(*waiting)
    assert await cached.fresh_tier("none") is None
