"""The shortcuts of the gRPC door: answers from templates are those of protobuf, known requests those that are parsed anew."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import CallerIdentity, Decision
from tidegate.doors.grpc.messages import OK, OVER_LIMIT, RateLimitRequest, RateLimitResponse
from tidegate.doors.grpc.replies import Part, reply, reply_to_one
from tidegate.doors.grpc.reply_template import allowed_reply, varint
from tidegate.doors.grpc.request_cache import MAX_REQUEST_BYTES, MAX_REQUESTS, RequestCache
from tidegate.doors.grpc.service import RateLimitService
from tidegate.doors.grpc.status import CallRefused
from tidegate.gate.charging import ChargeResult, CheckPlan
from tidegate.gate.gate import Gate
from tidegate.policy.limits import MAX_AMOUNT, Algorithm, Limit, LimitSet
from tidegate.policy.toml_reader import parse_policy
from tidegate.settings import EnvoySettings

KEY = "demo-free-key-0001"
POLICY = f"""
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/api/*"
  limits = ["3/hour"]
  [[tiers.rules]]
  endpoint = "/watched"
  limits = ["2/hour"]
  mode = "shadow"
[[api_keys]]
key = "{KEY}"
tier = "free"
"""


@st.composite
def limits(draw: st.DrawFn) -> LimitSet:
    calendar = draw(st.sampled_from(("", "month", "year")))
    window_s = draw(st.integers(1, 366 * 86_400))
    limit = Limit(
        draw(st.integers(1, MAX_AMOUNT)),
        window_s * 1_000_000,
        calendar == "month",
        label=draw(st.sampled_from(("", "100% fair", "größe", "x" * 120))),
        calendar_year=calendar == "year",
    )
    rule = draw(st.sampled_from((None, "", "/api/*", "50%", "ü" * 20, "r" * 100, "r" * 300)))
    return LimitSet("s", Algorithm.FIXED_WINDOW, (limit,), rule=rule, tier="free")


@given(
    limits(),
    st.one_of(st.integers(0, 300), st.integers(0, 2**33)),
    st.one_of(st.integers(0, 3_000_000), st.integers(0, 366 * 86_400_000_000)),
    st.integers(0, 2**52),
    st.integers(0, 2),
)
def test_the_answer_from_a_template_is_that_of_protobuf(
    limits: LimitSet, remaining: int, reset_after_us: int, at_us: int, cost: int
) -> None:
    caller = CallerIdentity("0" * 24, "acme") if limits.rule else None
    decision = Decision(True, limits.limits[0], remaining, reset_after_us, 0, at_us, limits, overage=cost, caller=caller)
    built = reply([Part(CheckPlan(None, ()), cost)], [ChargeResult(decision)])

    message = RateLimitResponse.FromString(built)
    if cost or remaining:
        named = {
            "x-tidegate-key-id": caller and caller.key_id,
            "x-tidegate-customer": caller and caller.customer,
            "x-tidegate-tier": limits.tier,
            "x-tidegate-overage": str(cost) if cost else None,
            "x-tidegate-rule": limits.rule,
        }
        for name, value in named.items():
            if value:
                message.request_headers_to_add.add(key=name, value=value)
    assert reply_to_one(decision, cost, ()) == message.SerializeToString()
    assert message.overall_code == (OK if cost or remaining else OVER_LIMIT)


def test_a_usual_answer_comes_from_a_template() -> None:
    limits = LimitSet("s", Algorithm.FIXED_WINDOW, (Limit.parse("100/minute"),), rule="/api/*", tier="free")
    assert allowed_reply(Decision(True, limits.limits[0], 99, 30_000_000, 0, 1, limits)) is not None


@given(st.integers(0, 2**35 - 1))
def test_varint(number: int) -> None:
    encoded, value = varint(number), 0
    for place, byte in enumerate(encoded):
        value |= (byte & 127) << (7 * place)
    assert value == number
    assert [byte >= 128 for byte in encoded] == [True] * (len(encoded) - 1) + [False]


def _service(policy: str = POLICY) -> RateLimitService:
    return RateLimitService(Gate(CachedCatalog(PolicyCatalog(parse_policy(policy))), MemoryCounters()), EnvoySettings())


def _payload(path: str, key: str = KEY, domain: bytes = b"tidegate") -> bytes:
    message = RateLimitRequest(domain=domain)
    entries = message.descriptors.add().entries
    for name, value in (("api_key", key), ("method", "GET"), ("path", path)):
        entries.add(key=name.encode(), value=value.encode())
    payload: bytes = message.SerializeToString()
    return payload


async def _asked(service: RateLimitService, payload: bytes) -> Any:
    return RateLimitResponse.FromString(await service.answer(payload))


async def test_the_same_bytes_are_counted_each_time() -> None:
    service = _service()
    answers = [await _asked(service, _payload("/api/x")) for _ in range(4)]

    assert [each.overall_code for each in answers] == [OK, OK, OK, OVER_LIMIT]
    assert [each.statuses[0].limit_remaining for each in answers] == [2, 1, 0, 0]


async def test_a_known_request_is_answered_without_awaiting() -> None:
    service = _service()
    await service.answer(_payload("/api/x"))

    assert isinstance(service.answer_now(_payload("/api/x")), bytes)


async def test_the_figures_of_a_shadow_rule_are_shown_where_no_other_rule_applies() -> None:
    service = _service()
    for remaining in (1, 0, 0):
        status = (await _asked(service, _payload("/watched"))).statuses[0]
        assert (status.code, status.limit_remaining, status.current_limit.requests_per_unit) == (OK, remaining, 2)


async def test_refused_requests_are_refused_each_time() -> None:
    service = _service()
    for _ in range(2):
        assert (await _asked(service, _payload("/api/x", key="demo-none-key-0001"))).overall_code == OVER_LIMIT
        assert (await _asked(service, _payload("/a/../b"))).overall_code == OVER_LIMIT
        with pytest.raises(CallRefused, match="not a valid"):
            await service.answer(b"\xff")
        with pytest.raises(CallRefused, match="no domain"):
            await service.answer(_payload("/api/x", domain=b""))


async def test_a_change_of_the_domains_forgets_the_requests_that_were_read_with_them() -> None:
    class Refuses:
        async def parts(self, descriptors: list[Any]) -> list[Part]:
            return [Part(CheckPlan(Decision(False), ()), 1) for _ in descriptors]

        async def settle(self, _: Gate, parts: list[Part]) -> list[ChargeResult]:
            return [ChargeResult(part.plan.answer) for part in parts if isinstance(part.plan, CheckPlan) and part.plan.answer]

    service = _service()
    payload = _payload("/x", domain=b"edge")
    service.domains = {"edge": Refuses()}
    for _ in range(2):
        assert (await _asked(service, payload)).overall_code == OVER_LIMIT
    service.domains = {}
    assert (await _asked(service, payload)).overall_code == OK
    service.domains = None
    with pytest.raises(CallRefused, match="config is invalid"):
        await service.answer(payload)


def test_the_cache_of_requests_is_bounded_and_keeps_those_that_repeat() -> None:
    cache = RequestCache()
    often, checks = b"often", [("check", 1)]
    cache.add(often, checks)  # type: ignore[arg-type]
    for number in range(5 * MAX_REQUESTS):
        cache.add(b"%d" % number, checks)  # type: ignore[arg-type]
        assert cache.find(often) is checks
    assert len(cache) <= 2 * MAX_REQUESTS
    long = b"x" * (MAX_REQUEST_BYTES + 1)
    cache.add(long, checks)  # type: ignore[arg-type]
    assert cache.find(long) is None
    cache.clear()
    assert (len(cache), cache.find(often)) == (0, None)
