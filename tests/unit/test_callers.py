"""Callers of several checks of one request are looked up side by side, and unknown keys are bounded by client address."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.cases.doors import FREE, POLICY
from tests.moments import PATIENCE_S, until
from tests.unit.test_cached import Held, Seconds
from tidegate import TooManyUnknownKeys
from tidegate.catalog.cached import UNKNOWN_TTL_S, CachedCatalog
from tidegate.catalog.changes import ANONYMOUS, KEY
from tidegate.catalog.unknown_keys import WINDOW_S, UnknownKeyLimit
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check, Decision
from tidegate.doors.grpc.messages import RateLimitRequest, RateLimitResponse
from tidegate.doors.grpc.service import RateLimitService
from tidegate.doors.grpc.status import CallRefused, Status
from tidegate.errors import CatalogUnavailable, InvalidApiKey
from tidegate.gate.gate import Gate
from tidegate.gate.subjects import DescriptorCheck
from tidegate.policy.key_format import hash_api_key, make_api_key
from tidegate.policy.model import ApiKey, Policy, Tier
from tidegate.policy.toml_reader import parse_policy
from tidegate.settings import EnvoySettings

BATCH = 1000
CLIENT, OTHER = "203.0.113.7", "203.0.113.8"


def policy_with(count: int) -> tuple[Policy, list[str]]:
    """A policy with so many keys, and the keys."""
    keys = [make_api_key() for _ in range(count)]
    return Policy((Tier.make("t", (), ["5/day"]),), tuple(ApiKey(hash_api_key(key), "t") for key in keys), "t"), keys


def request_of(keys: list[str]) -> bytes:
    """A request of Envoy with one descriptor for each key."""
    message = RateLimitRequest(domain=b"tidegate")
    for key in keys:
        descriptor = message.descriptors.add()
        for name, value in (("api_key", key), ("path", "/a")):
            descriptor.entries.add(key=name.encode(), value=value.encode())
    raw: bytes = message.SerializeToString()
    return raw


async def warm_gate(held: Held, **options: Any) -> Gate:
    """A gate that knows whom the policy allows and denies, but no caller."""
    gate = Gate(CachedCatalog(held), MemoryCounters(), **options)
    await gate.access.load()
    return gate


# Several checks of one request.


async def test_a_batch_looks_its_callers_up_side_by_side() -> None:
    policy, keys = policy_with(BATCH)
    held = Held(policy)
    gate = await warm_gate(held)
    held.gate.clear()
    checks = [Check.of("/a", api_key=key) for key in keys] + [Check.of("/a", ip=CLIENT)]
    asked = asyncio.create_task(gate.check_many(checks * 2))
    await until(lambda: held.most_at_once == BATCH)
    held.gate.set()
    decisions = await asked
    assert [isinstance(each, Decision) and each.remaining for each in decisions] == [4] * len(checks) + [3] * len(checks)
    assert (held.count(KEY), held.count(ANONYMOUS)) == (BATCH, 1)


async def test_the_callers_of_a_batch_have_one_deadline() -> None:
    policy, keys = policy_with(BATCH)
    held = Held(policy)
    gate = Gate(CachedCatalog(held), MemoryCounters(), lookup_timeout_s=0.05)
    known = Check.of("/a", api_key=keys[0])
    await gate.check(known)
    held.gate.clear()
    async with asyncio.timeout(PATIENCE_S):
        first, *others = await gate.check_many([known, *(Check.of("/a", api_key=key) for key in keys[1:])])
    assert isinstance(first, Decision), "who is cached is decided all the same"
    assert {type(each) for each in others} == {CatalogUnavailable}
    held.gate.set()
    await until(lambda: len(gate.catalog) == BATCH)
    assert {type(each) for each in await gate.check_many([Check.of("/a", api_key=key) for key in keys])} == {Decision}
    assert held.count(KEY) == BATCH, "a look-up that came too late for its batch is not made again"


async def test_a_batch_that_is_cancelled_leaves_no_task_behind() -> None:
    policy, keys = policy_with(20)
    held = Held(policy)
    gate = await warm_gate(held)
    held.gate.clear()
    before = asyncio.all_tasks()
    asked = asyncio.create_task(gate.check_many([Check.of("/a", api_key=key) for key in keys]))
    await until(lambda: held.most_at_once == 20)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    held.gate.set()
    await until(lambda: asyncio.all_tasks() == before)


async def test_errors_stand_at_their_places_in_a_batch() -> None:
    policy, (key,) = policy_with(1)
    gate = Gate(CachedCatalog(Held(policy)), MemoryCounters())
    asked = [Check.of("/a", api_key=make_api_key()), Check.of("/a", api_key=key), Check.of("/a"), Check.of("/a", api_key="short")]
    answers = [each.remaining if isinstance(each, Decision) else each.code for each in await gate.check_many(asked)]
    assert answers == ["INVALID_API_KEY", 4, "BAD_REQUEST", "INVALID_API_KEY"]


async def test_descriptors_of_one_call_are_looked_up_side_by_side() -> None:
    policy, keys = policy_with(100)
    held = Held(policy)
    service = RateLimitService(await warm_gate(held), EnvoySettings())
    held.gate.clear()
    asked = asyncio.create_task(service.answer(request_of(keys)))
    await until(lambda: held.most_at_once == 100)
    held.gate.set()
    answer = RateLimitResponse.FromString(await asked)
    assert [status.limit_remaining for status in answer.statuses] == [4] * 100


async def test_descriptors_of_one_call_have_one_deadline() -> None:
    policy, keys = policy_with(100)
    held = Held(policy)
    gate = await warm_gate(held, lookup_timeout_s=0.05)
    held.gate.clear()
    service = RateLimitService(gate, EnvoySettings())
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(CallRefused) as refused:
            await service.answer(request_of(keys))
        assert refused.value.status is Status.UNAVAILABLE
        found = await gate.plan_many([DescriptorCheck({"a": "b"}, key, 1) for key in keys])
    assert {type(each) for each in found} == {CatalogUnavailable}
    held.gate.set()


# Unknown keys.


class Guarded:
    """A gate whose catalog bounds unknown keys."""

    def __init__(self, per_minute: int = 3, **options: Any) -> None:
        self.clock = Seconds()
        self.held = Held(parse_policy(POLICY))
        self.limit = UnknownKeyLimit(per_minute, clock=self.clock, **options)
        self.cached = CachedCatalog(self.held, clock=self.clock, unknown_keys=self.limit)
        self.gate = Gate(self.cached, MemoryCounters())

    async def ask(self, key: str, ip: str | None = CLIENT) -> str:
        """How a check was answered."""
        try:
            await self.gate.check(Check.of("/a", api_key=key, ip=ip))
        except (InvalidApiKey, TooManyUnknownKeys) as error:
            return error.code
        return "decided"

    async def use_up(self, ip: str | None = CLIENT) -> None:
        while await self.ask(make_api_key(), ip) == "INVALID_API_KEY":
            pass


async def test_unknown_keys_of_one_address_are_looked_up_so_often_and_no_more() -> None:
    guarded = Guarded()
    answers = [await guarded.ask(make_api_key()) for _ in range(10)]
    assert answers == ["INVALID_API_KEY"] * 3 + ["API_KEY_LOOKUPS_EXCEEDED"] * 7
    assert (guarded.held.count(KEY), guarded.limit.refused) == (3, 7), "the database is not queried"
    assert await guarded.ask(make_api_key(), OTHER) == "INVALID_API_KEY", "others have bounds of their own"
    guarded.clock.now += WINDOW_S + 0.1
    assert await guarded.ask(make_api_key()) == "INVALID_API_KEY"
    assert await guarded.ask(FREE) == "decided"


async def test_a_cached_key_is_never_affected() -> None:
    guarded = Guarded()
    assert await guarded.ask(FREE) == "decided"
    await guarded.use_up()
    assert await guarded.ask(FREE) == "decided"
    # Neither is one whose time is over, nor one that everything is asked anew about.
    guarded.clock.now += 30
    await guarded.use_up()
    guarded.clock.now += 37
    await guarded.use_up()
    assert await guarded.ask(FREE) == "decided"
    guarded.cached.invalidate()
    assert await guarded.ask(FREE) == "decided"


async def test_a_key_that_is_not_cached_waits_for_its_retry_time() -> None:
    guarded = Guarded()
    await guarded.use_up()
    guarded.clock.now += 10
    with pytest.raises(TooManyUnknownKeys) as refused:
        await guarded.gate.check(Check.of("/a", api_key=FREE, ip=CLIENT))
    assert refused.value.details == {"retry_after": 50}
    guarded.clock.now += 50
    assert await guarded.ask(FREE) == "decided"


async def test_an_unknown_key_that_is_repeated_counts_when_it_is_looked_up() -> None:
    guarded = Guarded()
    key = make_api_key()
    assert {await guarded.ask(key) for _ in range(100)} == {"INVALID_API_KEY"}
    guarded.held.gate.clear()
    other = make_api_key()
    asked = [asyncio.create_task(guarded.ask(other)) for _ in range(100)]
    await until(lambda: guarded.held.count(KEY) == 2)
    guarded.held.gate.set()
    assert set(await asyncio.gather(*asked)) == {"INVALID_API_KEY"}
    assert await guarded.ask(make_api_key()) == "INVALID_API_KEY", "the third look-up"
    assert await guarded.ask(make_api_key()) == "API_KEY_LOOKUPS_EXCEEDED"
    guarded.clock.now += UNKNOWN_TTL_S + 0.1
    assert await guarded.ask(key) == "API_KEY_LOOKUPS_EXCEEDED"


async def test_an_address_counts_however_it_is_written_and_a_64_is_one() -> None:
    guarded = Guarded()
    await guarded.use_up("2001:db8::1")
    assert await guarded.ask(make_api_key(), "2001:db8::ffff") == "API_KEY_LOOKUPS_EXCEEDED"
    assert await guarded.ask(make_api_key(), "2001:db8:0:1::1") == "INVALID_API_KEY"
    await guarded.use_up("64:ff9b::203.0.113.7")
    assert await guarded.ask(make_api_key(), CLIENT) == "API_KEY_LOOKUPS_EXCEEDED"


async def test_look_ups_without_an_address_are_not_limited() -> None:
    guarded = Guarded()
    assert {await guarded.ask(make_api_key(), None) for _ in range(10)} == {"INVALID_API_KEY"}
    assert len(guarded.limit) == 0


async def test_batches_usage_and_descriptors_are_bound_too() -> None:
    guarded = Guarded()
    await guarded.use_up()
    key = make_api_key()
    check, descriptor = Check.of("/a", api_key=key, ip=CLIENT), DescriptorCheck({"a": "b"}, key, 1, CLIENT)
    assert isinstance((await guarded.gate.check_many([check]))[0], TooManyUnknownKeys)
    assert isinstance((await guarded.gate.plan_many([descriptor]))[0], TooManyUnknownKeys)
    with pytest.raises(TooManyUnknownKeys):
        await guarded.gate.usage(key, CLIENT)


async def test_a_failing_catalog_counts_nothing() -> None:
    guarded = Guarded()
    guarded.held.failing = True
    for _ in range(5):
        with pytest.raises(CatalogUnavailable):
            await guarded.gate.check(Check.of("/a", api_key=make_api_key(), ip=CLIENT))
    guarded.held.failing = False
    assert await guarded.ask(FREE) == "decided"


def test_the_table_of_clients_is_bounded() -> None:
    limit = UnknownKeyLimit(1, max_clients=100, clock=Seconds())
    for number in range(1000):
        limit.count(str(number))
    assert len(limit) == 100
    assert [limit.wait_s(str(number)) for number in (0, 899)] == [0, 0]
    assert [limit.wait_s(str(number)) for number in (900, 999)] == [WINDOW_S, WINDOW_S]
