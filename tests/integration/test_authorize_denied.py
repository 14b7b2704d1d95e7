"""What `/v1/authorize` tells gateways of a refusal: its status in the form they know, and for how long a cache may repeat it."""

from __future__ import annotations

from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import pytest

from tests.cases.doors import FREE, REVOKED
from tests.conftest import MOMENT_US
from tidegate.decision import Check, Decision
from tidegate.doors.http import DataPlane
from tidegate.doors.responses import denial_cache_headers, edge_cache_headers
from tidegate.errors import StoreUnavailable
from tidegate.gate.gate import Gate

AS_403 = {"X-Tidegate-Denied-Status": "403"}


@pytest.fixture
async def client(gate: Gate, listen: Any) -> Any:
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as asking:
        yield asking


async def _ask(client: httpx.AsyncClient, path: str = "/api/v1/a", key: str = FREE, **headers: str) -> httpx.Response:
    return await client.get("/v1/authorize", headers={"X-API-Key": key, "X-Original-URI": path, **headers})


async def test_an_allowance_is_never_cacheable(client: httpx.AsyncClient) -> None:
    for headers in ({}, AS_403):
        answer = await _ask(client, **headers)
        assert (answer.status_code, answer.headers["cache-control"]) == (204, "no-store")
        assert "x-accel-expires" not in answer.headers


async def test_a_denial_reports_how_long_it_holds_and_for_whom(client: httpx.AsyncClient) -> None:
    for _ in range(3):
        await _ask(client)
    answer = await _ask(client)
    assert answer.status_code == 429
    # The sliding window lets one pass when the third of the three has slid far enough: a fraction is rounded down here, up there.
    max_age = int(answer.headers["cache-control"].removeprefix("max-age="))
    assert max_age == int(answer.headers["retry-after"]) - 1
    assert "X-API-Key" in answer.headers["vary"]
    assert "x-tidegate-status" not in answer.headers


async def test_a_denial_as_403(client: httpx.AsyncClient) -> None:
    for _ in range(3):
        await _ask(client)
    plain, answer = await _ask(client), await _ask(client, **AS_403)
    assert answer.status_code == 403
    assert not answer.content
    told = {name: value for name, value in answer.headers.items() if name != "date"}
    assert {name: told.pop(name) for name in plain.headers if name != "date"} == {
        name: value for name, value in plain.headers.items() if name != "date"
    }
    assert told.pop("x-tidegate-status") == "429"
    assert told.pop("x-tidegate-error") == "RATE_LIMIT_EXCEEDED"
    assert int(told.pop("x-accel-expires")) == int(plain.headers["retry-after"]) - 2
    retry_at = parsedate_to_datetime(told.pop("x-tidegate-retry-at")).timestamp()
    assert retry_at == MOMENT_US // 1_000_000 + int(plain.headers["retry-after"])
    assert told == {}


@pytest.mark.parametrize("other", ["200", "429", "204", "", "403, 403"])
async def test_no_other_status_can_be_asked_for(client: httpx.AsyncClient, other: str) -> None:
    for _ in range(3):
        await _ask(client)
    assert (await _ask(client, **{"X-Tidegate-Denied-Status": other})).status_code == 429


async def test_errors_as_403(client: httpx.AsyncClient, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(headers: dict[str, str]) -> tuple[int, str, str | None]:
        answer = await client.get("/v1/authorize", headers=headers)
        assert not answer.content
        assert answer.headers["cache-control"] == "no-store"
        return answer.status_code, answer.headers["x-tidegate-error"], answer.headers.get("x-tidegate-status")

    item = {"X-Original-URI": "/api/v1/a", "X-API-Key": FREE, **AS_403}
    assert await refused({**item, "X-API-Key": "nobody-knows-this-key"}) == (401, "INVALID_API_KEY", None)
    assert await refused({**item, "X-API-Key": REVOKED}) == (403, "API_KEY_REVOKED", None)
    assert await refused({**item, "X-Original-URI": "/api//v1"}) == (403, "BAD_REQUEST", "400")
    assert await refused({**item, "X-Much": "x" * 9000}) == (403, "HEADERS_TOO_LARGE", "431")

    def unwell(check: Check) -> Decision:
        raise StoreUnavailable("the counter store does not answer")

    monkeypatch.setattr(gate, "check_now", unwell)
    assert await refused(item) == (403, "STORE_UNAVAILABLE", "503")

    def broken(check: Check) -> Decision:
        raise ZeroDivisionError

    monkeypatch.setattr(gate, "check_now", broken)
    assert await refused(item) == (403, "INTERNAL", "503")


@pytest.mark.parametrize(
    ("decision", "cache_control", "edge_s"),
    [
        (Decision(False, retry_after_us=41_000_000), "max-age=41", 40),
        (Decision(False, retry_after_us=41_999_999), "max-age=41", 40),
        (Decision(False, retry_after_us=1_999_999), "max-age=1", 0),
        (Decision(False, retry_after_us=999_999), "no-store", 0),
        (Decision(False, retry_after_us=50_000_000_000), "max-age=50000", 60),
        (Decision(False, retry_after_us=None), "no-store", 0),
        (Decision(False, retry_after_us=41_000_000, degraded=True), "no-store", 0),
    ],
)
def test_never_longer_than_the_retry(decision: Decision, cache_control: str, edge_s: int) -> None:
    assert dict(denial_cache_headers(decision))["cache-control"] == cache_control
    assert dict(edge_cache_headers(decision))["x-accel-expires"] == str(edge_s)
