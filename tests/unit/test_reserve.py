"""Reservations through the gate and the app, with counters in memory; the client's waiting."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest

from tests.conftest import Clock
from tests.rsgi import call
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.client.answer import Answer
from tidegate.client.core import BREAKER, ClientCore
from tidegate.client.reservations import AsyncWaiting, PlaceRequest, ReservedAnswer, cancel_steps, wait_blocking
from tidegate.counters import memory_reservations
from tidegate.counters.holds import new_id
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.reservations import ReservationHandle, ReservedCounter
from tidegate.decision import Check
from tidegate.doors.http import DataPlane
from tidegate.errors import BadRequest, LimiterUnavailable, ReservationNotFound, TooManyReservations
from tidegate.gate.gate import Gate
from tidegate.observation import Observation
from tidegate.policy.toml_reader import parse_policy

POLICY = """
[[tiers]]
name = "t"
  [[tiers.rules]]
  endpoint = "/jobs"
  name = "jobs"
  algorithm = "leaky_bucket"
  limits = ["1/second"]
  [[tiers.rules]]
  endpoint = "/log"
  algorithm = "sliding_log"
  limits = ["1/minute"]
  [[tiers.rules]]
  endpoint = "/windows"
  algorithm = "fixed_window"
  limits = ["1/minute"]
  [[tiers.rules]]
  endpoint = "/jobs"
  name = "stricter"
  mode = "shadow"
  algorithm = "fixed_window"
  limits = ["1/day"]

[anonymous]
tier = "t"

[[namespaces]]
name = "sold"
limits = ["1/second"]
algorithm = "token_bucket"
"""
JOBS = Check.of("/jobs", ip="203.0.113.7")


@pytest.fixture
def store(clock: Clock) -> MemoryCounters:
    return MemoryCounters(clock=clock)


@pytest.fixture
def observed() -> list[Observation]:
    return []


@pytest.fixture
def gate(store: MemoryCounters, observed: list[Observation]) -> Gate:
    return Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), store, observed.append)


async def test_places_come_in_the_order_of_asking_and_count_as_admissions(gate: Gate, observed: list[Observation]) -> None:
    places = [await gate.reservations.reserve(JOBS, 30) for _ in range(4)]
    assert [each.wait_s for each in places] == [0, 1, 2, 3]
    assert [each.reservation is None for each in places] == [True, False, False, False]
    assert all(each.decision.allowed and each.decision.rule == "jobs" for each in places)
    assert [each.decision is not None and each.decision.allowed for each in observed] == [True] * 4
    assert [each.shadow_denied for each in observed] == [(), ("stricter",), ("stricter",), ("stricter",)]
    late = await gate.reservations.reserve(JOBS, 3.5)
    assert (late.decision.allowed, late.decision.retry_after, late.wait_s, late.reservation) == (False, 4, 0, None)
    assert observed[-1].denied_by is not None, "one denial"
    assert not (await gate.check(JOBS)).allowed, "a check does not go first"


async def test_a_place_is_given_back_once(gate: Gate, clock: Clock) -> None:
    _, second, third = [await gate.reservations.reserve(JOBS, 30) for _ in range(3)]
    assert await gate.reservations.cancel(third.reservation)
    assert await gate.reservations.cancel(third.reservation), "the same answer"
    again = await gate.reservations.reserve(JOBS, 30)
    assert again.wait_s == third.wait_s, "given back once"
    assert not await gate.reservations.cancel(second.reservation), "the place behind was given on it"
    clock.now_us += 2_500_000
    assert not await gate.reservations.cancel(again.reservation), "its moment has come"
    assert (await gate.reservations.reserve(JOBS, 30)).wait_s == pytest.approx(0.5)


async def test_the_windows_of_a_cancelled_place_are_free_again(gate: Gate) -> None:
    windows = Check.of("/windows", ip="203.0.113.7")
    assert (await gate.check(windows)).allowed
    first, second = [await gate.reservations.reserve(windows, 600) for _ in range(2)]
    assert second.wait_s - first.wait_s == 60
    assert await gate.reservations.cancel(second.reservation)
    assert (await gate.reservations.reserve(windows, 600)).wait_s == second.wait_s


async def test_what_cannot_be_reserved_is_decided_as_a_check(gate: Gate) -> None:
    log = Check.of("/log", ip="203.0.113.7")
    first, second = [await gate.reservations.reserve(log, 600) for _ in range(2)]
    assert (first.decision.allowed, first.wait_s, first.reservation) == (True, 0, None)
    assert (second.decision.allowed, second.decision.retry_after, second.reservation) == (False, 60, None)
    unlimited = await gate.reservations.reserve(Check.of("/free", ip="203.0.113.7"), 0)
    assert (unlimited.decision.allowed, unlimited.decision.limit, unlimited.wait_s) == (True, None, 0)


async def test_cost_0_reads_the_moment_and_too_much_never_has_one(gate: Gate) -> None:
    assert (await gate.reservations.reserve(JOBS, 30)).wait_s == 0
    peek = Check.of("/jobs", ip="203.0.113.7", cost=0)
    assert (await gate.reservations.reserve(peek, 30)).reservation is None
    never = await gate.reservations.reserve(Check.of("/jobs", ip="203.0.113.7", cost=2), 3600)
    assert (never.decision.allowed, never.decision.retry_after) == (False, None)
    assert (await gate.reservations.reserve(JOBS, 30)).wait_s == 1


@pytest.mark.parametrize("at_most_s", [-1, 3601, float("nan"), float("inf"), True, "30", None])
async def test_times_out_of_range(gate: Gate, observed: list[Observation], at_most_s: object) -> None:
    with pytest.raises(BadRequest, match=r"at_most_s .* must be a number of seconds from 0 to 3600"):
        await gate.reservations.reserve(JOBS, at_most_s)
    assert observed[-1].error == "BAD_REQUEST"
    assert (await gate.reservations.reserve(JOBS, 0)).wait_s == 0, "nothing was charged"


async def test_ids_that_are_malformed_or_not_known(gate: Gate, clock: Clock) -> None:
    for text in ("", "x", "a" * 9000, "ä", None, 7, new_id(), ReservationHandle("short", 1, 1).text):
        with pytest.raises(BadRequest, match="is not an id: send the value of 'reservation'"):
            await gate.reservations.cancel(text)
    later_us = clock.now_us + 1_000_000
    foreign = ReservationHandle(new_id(), 1, later_us, (ReservedCounter(b"=s", b"AAAAAAAA", b"\x90"),))
    for handle in (foreign, ReservationHandle(new_id(), 1, later_us)):
        with pytest.raises(ReservationNotFound, match="made on another counter store"):
            await gate.reservations.cancel(handle.text)
    await gate.reservations.reserve(JOBS, 30)
    place = await gate.reservations.reserve(JOBS, 30)
    changed = msgspec.structs.replace(ReservationHandle.of(place.reservation), cost=1000)
    assert await gate.reservations.cancel(changed.text), "what the store remembers is given back, whatever the id says"
    assert (await gate.reservations.reserve(JOBS, 30)).wait_s == 1


async def test_reservations_in_memory_are_bounded(
    gate: Gate, clock: Clock, store: MemoryCounters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_reservations, "MAX_NAMED", 2)
    for _ in range(3):
        assert (await gate.reservations.reserve(JOBS, 30)).decision.allowed
    with pytest.raises(TooManyReservations, match="2 reservations wait"):
        await gate.reservations.reserve(JOBS, 30)
    clock.now_us += 1_000_000
    last = await gate.reservations.reserve(JOBS, 30)
    assert last.wait_s == 2
    store.clear()
    with pytest.raises(ReservationNotFound):
        await gate.reservations.cancel(last.reservation)


async def test_through_the_app(gate: Gate) -> None:
    app = DataPlane(gate, {})

    async def post(path: str, body: object = None) -> tuple[int, Any]:
        sent = b"" if body is None else json.dumps(body).encode()
        answer = await call(app, path, method="POST", body=sent)
        return answer.status, json.loads(answer.body)

    asked = {"path": "/jobs", "ip": "203.0.113.7", "at_most_s": 1.5}
    assert (await post("/v1/reserve", asked))[1]["wait_s"] == 0
    status, place = await post("/v1/reserve", asked)
    assert (status, place["allowed"], place["wait_s"], place["rule"]) == (200, True, 1, "jobs")
    status, denied = await post("/v1/reserve", asked)
    assert (status, denied["allowed"], denied["retry_after"], denied["reservation"]) == (429, False, 2, None)
    cancel = f"/v1/reserve/{place['reservation']}/cancel"
    for _ in range(2):
        assert await post(cancel) == (200, {"reservation": place["reservation"], "given_back": True})

    named = {"namespace": "sold", "subject": "all", "at_most_s": 5}
    assert [(await post("/v1/reserve", named))[1]["wait_s"] for _ in range(3)] == [0, 1, 2]

    for body, says in (
        ({"path": "/jobs"}, "at_most_s"),
        ({**asked, "at_most_s": 3601}, "at_most_s 3601 must be a number of seconds from 0 to 3600"),
        ({**asked, "cost": -1}, "cost -1"),
        ({**asked, "namespace": "sold"}, "path and namespace came together"),
        ({"at_most_s": 1}, "path is missing"),
        ({**asked, "subject": "all"}, "need a namespace"),
        ({**asked, "ttl_s": 60}, "ttl_s"),
        ({"namespace": "unknown", "subject": "all", "at_most_s": 1}, "the request has 0 limits"),
    ):
        status, refused = await post("/v1/reserve", body)
        assert (status, refused["error"]["code"]) == (400, "BAD_REQUEST")
        assert says in refused["error"]["message"]
    assert (await post("/v1/reserve/x/cancel"))[0] == 400
    assert (await post("/v1/reserve/x"))[0] == 404
    assert (await post(f"/v1/reserve/{ReservationHandle(new_id(), 1, 1 << 60).text}/cancel"))[1]["error"]["code"] == (
        "RESERVATION_NOT_FOUND"
    )
    assert (await call(app, "/v1/reserve")).status == 405


def answer(wait_s: float = 0.0, *, allowed: bool = True, retry_after: float | None = 0.0) -> ReservedAnswer:
    reservation = "place" if wait_s else None
    return ReservedAnswer(allowed, 1, 0, 1.0, retry_after, "jobs", "t", degraded=False, wait_s=wait_s, reservation=reservation)


async def test_a_cancelled_wait_gives_its_place_back() -> None:
    cancelled: list[str] = []
    asked = asyncio.Event()

    async def reserve(at_most_s: float) -> Answer:
        asked.set()
        await asyncio.sleep(0)
        return answer(min(at_most_s, 3000.0))

    async def cancel(reservation: str) -> None:
        cancelled.append(reservation)

    waiting = asyncio.ensure_future(AsyncWaiting().wait(reserve, cancel, 36_000))
    await asked.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert cancelled == ["place"], "also where the answer had not come yet"


def test_an_interrupted_wait_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    cancelled: list[str] = []
    monkeypatch.setattr("time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wait_blocking(lambda _: answer(5), cancelled.append, 30)
    assert cancelled == ["place"]

    def unavailable(_: str) -> None:
        raise LimiterUnavailable("no Tidegate server is available")

    with pytest.raises(KeyboardInterrupt):
        wait_blocking(lambda _: answer(5), unavailable, 30)


def test_a_denial_that_may_pass_in_time_is_tried_again() -> None:
    answers = [answer(allowed=False, retry_after=0.0), answer()]
    assert wait_blocking(lambda _: answers.pop(0), print, 30).allowed
    assert not wait_blocking(lambda _: answer(allowed=False, retry_after=31), print, 30).allowed
    assert not wait_blocking(lambda _: answer(allowed=False, retry_after=None), print, 30).allowed
    with pytest.raises(BadRequest, match="at_most_s -1"):
        wait_blocking(lambda _: answer(), print, -1)


def test_arguments_are_checked_before_anything_is_sent() -> None:
    core = ClientCore("http://127.0.0.1:1", 0.25, "allow", BREAKER, 1)
    for at_most_s in (-1, 3601, float("nan"), True):
        with pytest.raises(BadRequest, match="at_most_s"):
            next(PlaceRequest(JOBS).steps(core, at_most_s))
    for reservation in ("", "a/b", "ä", "a?b"):
        with pytest.raises(BadRequest, match="is not an id"):
            next(cancel_steps(core, reservation))
    request: Any = next(PlaceRequest(JOBS).steps(core, 2.5))
    assert json.loads(request.body) == {"at_most_s": 2.5, "path": "/jobs", "ip": "203.0.113.7"}
