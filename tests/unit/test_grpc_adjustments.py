"""Descriptors that record hits: forced charges and negative hits."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Clock
from tests.integration.ratelimit_client import headers, request
from tidegate.algorithms.holds import REFUND_ENTRIES
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.doors.grpc.domains import FileDomain
from tidegate.doors.grpc.messages import OK, OVER_LIMIT, RateLimitResponse
from tidegate.doors.grpc.ratelimit_file import parse_ratelimit
from tidegate.doors.grpc.service import RateLimitService
from tidegate.doors.grpc.status import CallRefused
from tidegate.errors import SettingsError
from tidegate.gate.gate import Gate
from tidegate.observation import Observation
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.policy.toml_reader import parse_policy
from tidegate.settings import EnvoySettings
from tidegate.settings_loader import load_settings

POLICY = """
[[tiers]]
name = "public"
  [[tiers.rules]]
  endpoint = "/v1/*"
  subject = "tier"
  algorithm = "fixed_window"
  limits = ["100/hour", "1000/day"]
  [[tiers.rules]]
  descriptor = { user = "*" }
  algorithm = "token_bucket"
  limits = ["60/minute"]
  [[tiers.rules]]
  endpoint = "/login"
  subject = "tier"
  limits = ["3/hour"]
  count = "failures"
  [[tiers.rules]]
  endpoint = "/slots"
  subject = "tier"
  limits = ["1 concurrent"]
[anonymous]
tier = "public"
"""
FILE = """\
domain: tokens
descriptors:
  - key: user
    rate_limit: {unit: hour, requests_per_unit: 100}
  - key: watched
    shadow_mode: true
    rate_limit: {unit: hour, requests_per_unit: 10}
"""
FORCED = ("tidegate_forced", "yes")
USER = ("user", "42")


@pytest.fixture
def service(clock: Clock, seen: list[Observation]) -> RateLimitService:
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), MemoryCounters(clock=clock), seen.append)
    service = RateLimitService(gate, EnvoySettings())
    service.domains = {each.domain: FileDomain(each) for each in parse_ratelimit([("config.yaml", FILE)])}
    return service


async def ask(service: RateLimitService, message: Any, *negative: int) -> Any:
    """The answer to a request; the numbers are those of descriptors with negative hits."""
    for number in negative:
        message.descriptors[number].is_negative_hits = True
    return RateLimitResponse.FromString(await service.answer(message.SerializeToString()))


async def left(service: RateLimitService, *entries: tuple[str, str], domain: str = "tidegate") -> tuple[int, int]:
    """What a look answers."""
    answer = await ask(service, request(entries, domain=domain, own_hits=[0]))
    return answer.overall_code, answer.statuses[0].limit_remaining


@pytest.mark.parametrize(("domain", "entry"), [("tidegate", ("path", "/v1/chat")), ("tokens", USER)])
async def test_a_forced_charge_goes_above_the_limit_and_refunds_end_at_zero(
    service: RateLimitService, domain: str, entry: tuple[str, str], clock: Clock
) -> None:
    assert await left(service, entry, domain=domain) == (OK, 100)
    answer = await ask(service, request([entry, FORCED], domain=domain, own_hits=[60]))
    assert (answer.overall_code, answer.statuses[0].limit_remaining) == (OK, 40)
    # The same bytes are charged each time; the whole cost counts, also what is above the limit.
    answer = await ask(service, request([FORCED, entry], domain=domain, own_hits=[90]))
    assert (answer.overall_code, answer.statuses[0].limit_remaining) == (OK, 0)
    assert await left(service, entry, domain=domain) == (OVER_LIMIT, 0)
    assert (await ask(service, request([entry], domain=domain))).overall_code == OVER_LIMIT
    answer = await ask(service, request([entry], domain=domain, own_hits=[70]), 0)
    assert (answer.overall_code, answer.statuses[0].limit_remaining) == (OK, 20)
    answer = await ask(service, request([entry], domain=domain, own_hits=[1_000]), 0)
    assert (answer.overall_code, answer.statuses[0].limit_remaining) == (OK, 100)
    # Nothing goes back into another window.
    await ask(service, request([entry, FORCED], domain=domain, own_hits=[100]))
    clock.advance(3600)
    assert (await ask(service, request([entry], domain=domain, own_hits=[50]), 0)).statuses[0].limit_remaining == 100


async def test_hits_that_are_a_status_are_an_outcome(service: RateLimitService, seen: list[Observation]) -> None:
    path, outcome = ("path", "/login"), ("tidegate_forced", "status")
    for status, remaining in ((200, 3), (401, 2), (500, 2), (403, 1), (302, 1), (401, 0)):
        await ask(service, request([path, outcome], own_hits=[status]))
        assert await left(service, path) == (OK if remaining else OVER_LIMIT, remaining)
    assert {each.cost for each in seen} == {0, 1}, "one unit for telemetry, whatever the status"
    other = ("path", "/v1/a")
    await ask(service, request([other, outcome], own_hits=[401]))
    assert (await left(service, other))[1] == 99, "rules that count requests count one"
    answer = await ask(service, request([other, outcome], own_hits=[5]))
    assert (answer.overall_code, headers(answer)["x-tidegate-error"]) == (OVER_LIMIT, "BAD_REQUEST")
    assert (await ask(service, request([path, outcome], own_hits=[0]))).overall_code == OVER_LIMIT, "no response: a look"


async def test_a_charge_and_a_refund_in_one_call(service: RateLimitService, seen: list[Observation]) -> None:
    path, other = ("path", "/v1/a"), ("user", "other")
    await ask(service, request([other], own_hits=[20]))
    del seen[:]
    answer = await ask(service, request([path], [other], [path, FORCED], own_hits=[5, 8, 200]), 1)
    assert (answer.overall_code, [each.code for each in answer.statuses]) == (OK, [OK, OK, OK])
    assert [each.limit_remaining for each in answer.statuses] == [95, 48, 0]
    # A refund is not reported as a check.
    assert [each.cost for each in seen] == [5, 200]
    # What is denied itself does not keep the others from being recorded.
    answer = await ask(service, request([path], [other], own_hits=[1, 8]), 1)
    assert [each.code for each in answer.statuses] == [OVER_LIMIT, OK]
    assert answer.statuses[1].limit_remaining == 56


async def test_looks_charge_nothing_also_of_descriptors_that_record(service: RateLimitService) -> None:
    path = ("path", "/v1/a")
    for negative in ((), (0,)):
        answer = await ask(service, request([path, FORCED], own_hits=[0]), *negative)
        assert (answer.overall_code, answer.statuses[0].limit_remaining) == (OK, 100)
    assert (await ask(service, request([path, FORCED]))).statuses[0].limit_remaining == 99


async def test_errors_and_what_is_not_limited(service: RateLimitService) -> None:
    for negative in ((), (0,)):
        huge = await ask(service, request([("path", "/v1/a"), FORCED], own_hits=[2**60]), *negative)
        assert (huge.overall_code, headers(huge)["x-tidegate-error"]) == (OVER_LIMIT, "BAD_REQUEST")
        other = await ask(service, request([USER, FORCED], domain="elsewhere", own_hits=[5]), *negative)
        free = await ask(service, request([("service", "free"), FORCED], domain="tokens", own_hits=[5]), *negative)
        assert (other.overall_code, free.overall_code) == (OK, OK)
        # A limit of requests in progress has no units.
        slots = await ask(service, request([("path", "/slots"), FORCED], own_hits=[5]), *negative)
        assert slots.overall_code == OK
        with pytest.raises(CallRefused, match="66 entries"):
            await ask(service, request([*[USER] * 65, FORCED], domain="tokens"), *negative)
    assert await left(service, ("path", "/v1/a")) == (OK, 100)
    watched = ("watched", "x")
    answer = await ask(service, request([watched, FORCED], domain="tokens", own_hits=[12]))
    assert (answer.overall_code, answer.statuses[0].limit_remaining) == (OK, 0)
    answer = await ask(service, request([watched], domain="tokens", own_hits=[5]), 0)
    assert answer.statuses[0].limit_remaining == 3


async def test_a_store_that_cannot_adjust(clock: Clock) -> None:
    class OtherStore:
        """A store with what `CounterStore` has, and nothing else."""

        def __init__(self) -> None:
            self.immediate = False
            memory = MemoryCounters(clock=clock)
            self.charge, self.windows, self.reset = memory.charge, memory.windows, memory.reset
            self.ping, self.close = memory.ping, memory.close

    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), OtherStore())
    answer = await ask(RateLimitService(gate, EnvoySettings()), request([("path", "/v1/a"), FORCED]))
    assert (answer.overall_code, headers(answer)["x-tidegate-error"]) == (OVER_LIMIT, "BAD_REQUEST")
    assert b"use memory:// or Redis" in answer.raw_body


def test_the_entry_has_a_name_of_its_own() -> None:
    with pytest.raises(SettingsError, match="must be distinct"):
        load_settings(None, {"TIDEGATE_ENVOY__FORCED_ENTRY": "path"})


def test_a_refund_reads_a_bounded_number_of_entries(clock: Clock) -> None:
    store = MemoryCounters(clock=clock)
    counters = ((LimitSet("log", Algorithm.SLIDING_LOG, [Limit.parse("5000/day")]), "k"),)
    for _ in range(REFUND_ENTRIES + 10):
        clock.advance(1)
        store.charge_all(counters, 2)
    assert store.adjust_now(counters, -3).remaining == 5000 - 2 * REFUND_ENTRIES - 20 + 3
    # One unit was left in an entry, which is the first that is read.
    assert store.adjust_now(counters, -5000).remaining == 5000 - 18
    assert store.adjust_now(counters, -5000).remaining == 5000
