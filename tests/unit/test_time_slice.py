"""No request holds the event loop for longer than its slice: what it works through is interrupted for others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from tests.cases.doors import FREE
from tests.integration.ratelimit_client import request
from tidegate import time_slice
from tidegate.decision import Check, Decision
from tidegate.doors.grpc.domains import FileDomain
from tidegate.doors.grpc.messages import RateLimitResponse
from tidegate.doors.grpc.ratelimit_file import parse_ratelimit
from tidegate.doors.grpc.service import MAX_DESCRIPTORS, RateLimitService
from tidegate.doors.http import DataPlane
from tidegate.doors.http_exchange import MAX_BUFFERED_BODY_BYTES, Exchange, RequestHeaders
from tidegate.gate.gate import Gate
from tidegate.settings import EnvoySettings
from tidegate.time_slice import TimeSlice

COUNT = 100


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every slice is over at once, so that the turns of others can be counted whatever the machine's speed."""
    monkeypatch.setattr(time_slice, "SLICE_NS", 0)


@pytest.fixture
async def turns() -> AsyncIterator[list[int]]:
    """How many turns something else got."""
    count = [0]

    async def other() -> None:
        while True:
            await asyncio.sleep(0)
            count[0] += 1

    task = asyncio.create_task(other())
    yield count
    task.cancel()


async def test_a_slice_ends_with_its_time_and_begins_anew_after_a_pause() -> None:
    now = [0]
    slice_ = TimeSlice(1000, lambda: now[0])
    now[0] = 999
    assert not slice_.over
    now[0] = 1000
    assert slice_.over
    await slice_.pause()
    assert not slice_.over
    now[0] = 2000
    assert slice_.over


async def _turns_during(work: Callable[[], Awaitable[object]], turns: list[int]) -> int:
    before = turns[0]
    await work()
    return turns[0] - before


async def test_others_get_turns_while_many_checks_are_planned(gate: Gate, no_patience: None, turns: list[int]) -> None:
    checks = [Check.of(f"/api/v1/{number}", api_key=FREE) for number in range(COUNT)]
    decided: list[object] = []

    async def work() -> None:
        decided.extend(await gate.check_many(checks))

    assert await _turns_during(work, turns) >= COUNT
    assert all(isinstance(each, Decision) for each in decided)


async def test_others_get_turns_while_a_batch_is_read_and_answered(
    gate: Gate, listen: Callable[..., Awaitable[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = await listen(DataPlane(gate, {}))
    pauses = [0]
    pause = TimeSlice.pause

    async def counted(self: TimeSlice) -> None:
        pauses[0] += 1
        await pause(self)

    monkeypatch.setattr(time_slice, "SLICE_NS", 0)
    monkeypatch.setattr(TimeSlice, "pause", counted)
    async with httpx.AsyncClient() as client:
        body = {"checks": [{"path": "/" + "|" * 300, "api_key": FREE}] * COUNT}
        answer = await client.post(f"{url}/v1/check/batch", json=body)
    assert answer.status_code == 200
    assert len(answer.json()["decisions"]) == COUNT
    # Each check is read, compared with [[access]], planned and answered.
    assert pauses[0] == 4 * COUNT


@pytest.mark.parametrize("domain", ["tidegate", "file"])
async def test_others_get_turns_between_descriptors(gate: Gate, domain: str, no_patience: None, turns: list[int]) -> None:
    service = RateLimitService(gate, EnvoySettings())
    text = "domain: file\ndescriptors:\n  - {key: path, rate_limit: {unit: day, requests_per_unit: 100}}\n"
    service.domains = {each.domain: FileDomain(each) for each in parse_ratelimit([("config.yaml", text)])}
    entries = [[("path", f"/api/v1/{number}"), ("api_key", FREE)][: 2 if domain == "tidegate" else 1] for number in range(COUNT)]
    payload = request(*entries[:MAX_DESCRIPTORS], domain=domain).SerializeToString()
    answers: list[bytes] = []

    async def work() -> None:
        answers.append(await service.answer(payload))

    # Under the policy each descriptor is read, then planned; under a file one look does both.
    assert await _turns_during(work, turns) >= MAX_DESCRIPTORS * (2 if domain == "tidegate" else 1)
    assert len(RateLimitResponse.FromString(answers[0]).statuses) == MAX_DESCRIPTORS


async def test_a_connection_is_read_on_once_a_whole_body_was_taken() -> None:
    """A body that was whole before it was asked for left its connection paused: the next batch on it was never answered."""

    class Paused:
        client = "127.0.0.1:1"
        held = False

        def hold_body(self) -> None:
            self.held = True

        def release_body(self) -> None:
            self.held = False

    connection: Any = Paused()
    exchange = Exchange(connection, "POST", "/v1/check/batch", RequestHeaders({}, {}, 0), True, "1.1")
    exchange.add(b"x" * (MAX_BUFFERED_BODY_BYTES + 1))
    exchange.end()
    assert connection.held
    assert len(await exchange()) == MAX_BUFFERED_BODY_BYTES + 1
    assert not connection.held
