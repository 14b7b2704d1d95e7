"""Rules that count failures, with counters in memory: policy, gate, HTTP door and middleware."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.conftest import Clock
from tests.rsgi import call
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check
from tidegate.doors.asgi import RateLimitMiddleware
from tidegate.doors.http import DataPlane
from tidegate.errors import BadRequest, PolicyError
from tidegate.gate.gate import Gate
from tidegate.gate.holds import OpenedHold
from tidegate.policy.rules import Rule
from tidegate.policy.toml_reader import parse_policy
from tidegate.policy.toml_writer import policy_text

POLICY = """
[[tiers]]
name = "public"
limits = ["100/hour"]

  [[tiers.rules]]
  name = "log-in"
  endpoint = "/login"
  subject = "ip"
  limits = ["5/15m", "8/hour"]
  count = "failures"
  clear_on_success = true

  [[tiers.rules]]
  name = "codes"
  endpoint = "/code"
  subject = "ip"
  limits = ["2/10m", "1 concurrent"]
  count = "failures"
  statuses = [422]
  penalty = ["1m", "5m"]

[anonymous]
tier = "public"
"""
IP = "192.0.2.1"
LOGIN = Check.of("/login", "POST", None, IP)
CODE = Check.of("/code", "POST", None, IP)


@pytest.fixture
def gate(clock: Clock) -> Gate:
    return Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), MemoryCounters(clock=clock))


async def attempt(gate: Gate, check: Check, failed: bool, success: bool = False) -> OpenedHold:
    """One attempt and its outcome."""
    opened = await gate.holds.open_slot(check)
    assert opened is not None
    if opened.hold is not None:
        await gate.holds.settle(opened.hold, int(failed), success=success)
    return opened


async def left(gate: Gate, check: Check) -> int | None:
    return (await gate.check(Check.of(check.path, check.method, None, check.ip, 0))).remaining


def test_the_policy_reads_what_it_writes() -> None:
    policy = parse_policy(POLICY)
    login, codes = policy.tiers[0].rules
    assert login.failures is not None
    assert codes.failures is not None
    assert (login.failures.statuses, login.failures.clear_on_success, login.failures.penalty_s) == ((401, 403), True, ())
    assert (codes.failures.statuses, codes.failures.clear_on_success, codes.failures.penalty) == ((422,), False, ["1m", "5m"])
    assert parse_policy(policy_text(policy)) == policy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": "errors"}, "count 'errors' is not known: use one of requests, failures"),
        ({"statuses": [401]}, r"statuses \[401\] needs count = 'failures'"),
        ({"penalty": ["1m"]}, "penalty .* needs count = 'failures'"),
        ({"clear_on_success": True}, "clear_on_success True needs count = 'failures'"),
        ({"count": "failures", "statuses": [99]}, "99, which must be a whole number from 100 to 599"),
        ({"count": "failures", "statuses": "401"}, "statuses '401' must be a list"),
        ({"count": "failures", "clear_on_success": "yes"}, "clear_on_success 'yes' must be true or false"),
        ({"count": "failures", "penalty": ["5m", "1m"]}, "penalty has 1m after 5m: each must be longer"),
        ({"count": "failures", "penalty": ["31d"]}, "must be a duration from 1s to 30d"),
        ({"count": "failures", "penalty": ["soon"]}, "penalty has 'soon', which must be a duration"),
        ({"count": "failures", "penalty": ["1m"] * 17}, "list of 1 to 16 durations"),
        ({"count": "failures", "limits": ["5/month"]}, "'5/month' cannot count failures"),
        ({"count": "failures", "limits": ["1001/hour"]}, "at most 1000"),
        ({"count": "failures", "limits": ["5 concurrent"]}, "needs limits per window"),
        ({"count": "failures", "algorithm": "token_bucket"}, "algorithm .*'token_bucket'.* does not go with"),
        ({"count": "failures", "mode": "shadow"}, "mode 'shadow' does not go with"),
        ({"count": "failures", "quotas": ["100/month"]}, "quotas count requests"),
        ({"count": "failures", "action": "deny", "limits": []}, "does nothing beside an action"),
    ],
    ids=range(18),
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Rule.make(**{"endpoint": "/login", "limits": ["5/minute"], **fields})


def test_an_error_names_the_line_of_the_field() -> None:
    with pytest.raises(PolicyError, match="31d") as caught:
        parse_policy(POLICY.replace('"5m"]', '"31d"]'), "file.toml")
    assert caught.value.line == POLICY[: POLICY.index("penalty")].count("\n") + 1


async def test_attempts_in_progress_count_and_successes_do_not(gate: Gate, clock: Clock) -> None:
    opened = [await gate.holds.open_slot(LOGIN) for _ in range(6)]
    held = [each.hold for each in opened if each is not None and each.hold is not None]
    assert len(held) == 5
    denied = await gate.check(LOGIN)
    assert (denied.allowed, denied.rule, denied.retry_after_us) == (False, "log-in", 1_000_000)
    for hold in held[:3]:
        assert (await gate.holds.settle(hold, 1)).remaining == 0
    assert (await gate.holds.settle(held[3], 0)).remaining == 1
    # Settled once: a second outcome changes nothing. A check counts nothing.
    assert (await gate.holds.settle(held[3], 1)).remaining == 1
    for _ in range(20):
        assert (await gate.check(LOGIN)).allowed
    assert await left(gate, LOGIN) == 1
    clock.advance(900)
    assert await left(gate, LOGIN) == 5
    # The last attempt has expired, and its outcome comes late.
    assert (await gate.holds.settle(held[4], 1)).late
    # Failures of two windows: 4 in the last hour.
    assert [(await attempt(gate, LOGIN, failed=True)).decision.allowed for _ in range(6)] == [True] * 4 + [False] * 2
    denied = await gate.check(LOGIN)
    assert (denied.allowed, denied.retry_after_us) == (False, 2_700_000_000)


async def test_a_success_clears_failures_but_not_attempts_in_progress(gate: Gate) -> None:
    for _ in range(3):
        await attempt(gate, LOGIN, failed=True)
    guess = await gate.holds.open_slot(LOGIN)
    assert guess is not None
    assert await left(gate, LOGIN) == 1
    # The outcome of this one is unknown.
    await attempt(gate, LOGIN, failed=False)
    assert await left(gate, LOGIN) == 1
    await attempt(gate, LOGIN, failed=False, success=True)
    assert await left(gate, LOGIN) == 4
    assert (await gate.holds.settle(guess.hold, 1)).remaining == 4
    for _ in range(2):
        await attempt(gate, CODE, failed=False, success=True)
    await attempt(gate, CODE, failed=True)
    await attempt(gate, CODE, failed=False, success=True)
    # This rule does not clear; and one at a time.
    assert (await gate.holds.open(CODE)).decision.allowed
    assert not (await gate.holds.open(CODE)).decision.allowed
    with pytest.raises(BadRequest, match="cost 1 and success came together"):
        await gate.holds.settle(guess.hold, 1, success=True)


async def test_penalties_grow_and_are_forgotten(gate: Gate, clock: Clock) -> None:
    async def fail_twice() -> float:
        for _ in range(2):
            assert (await attempt(gate, CODE, failed=True)).decision.allowed
        denied = (await gate.holds.open(CODE)).decision
        assert not denied.allowed
        assert (await gate.check(CODE)).retry_after_us == denied.retry_after_us
        return (denied.retry_after_us or 0) / 1e6

    assert await fail_twice() == 60
    clock.advance(59)
    assert not (await gate.check(CODE)).allowed
    clock.advance(1)
    assert await fail_twice() == 300
    clock.advance(300)
    assert await fail_twice() == 300
    # As long again as the longest window, which is longer than the penalty.
    clock.advance(300 + 600)
    assert await fail_twice() == 60
    # An operator's reset ends a penalty.
    assert await gate.reset(ip=IP)
    assert (await gate.check(CODE)).allowed


async def test_the_tiers_own_limits_count_requests(gate: Gate) -> None:
    for success in (False, True):
        await attempt(gate, LOGIN, failed=not success, success=success)
    await gate.check(LOGIN)
    usage = await gate.usage(ip=IP)
    assert {each.rule: [window.remaining for window in each.windows] for each in usage.rules} == {
        None: [97],
        "log-in": [5, 8],
        "codes": [2, 1],
    }


async def test_forced_hits_are_failures(gate: Gate) -> None:
    plan = await gate.plan(Check.of("/login", "POST", None, IP, 3))
    await gate.adjust([(plan, 1)])
    assert await left(gate, LOGIN) == 2
    await gate.adjust([(plan, -1)])
    assert await left(gate, LOGIN) == 2


async def test_over_http(clock: Clock) -> None:
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), MemoryCounters(clock=clock))
    app = DataPlane(gate, {})

    async def post(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        answer = await call(app, path, method="POST", body=json.dumps(body).encode())
        return answer.status, json.loads(answer.body)

    check = {"path": "/login", "method": "POST", "ip": IP}
    for remaining in (4, 3):
        status, opened = await post("/v1/holds", check)
        assert (status, opened["remaining"]) == (200, remaining)
        status, settled = await post(f"/v1/holds/{opened['hold']}/settle", {"cost": 1})
        assert (status, settled["cost"], settled["remaining"]) == (200, 1, remaining)
    assert (await post("/v1/check", check))[1]["remaining"] == 3
    _, opened = await post("/v1/holds", check)
    _, settled = await post(f"/v1/holds/{opened['hold']}/settle", {"cost": 0, "success": True})
    assert settled["remaining"] == 5
    status, refused = await post(f"/v1/holds/{opened['hold']}/settle", {"cost": 0, "success": "yes"})
    assert (status, refused["error"]["code"]) == (400, "BAD_REQUEST")


async def request(app: Any, path: str = "/login") -> int:
    """The status of the response; 0 without one."""
    statuses = [0]

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": []}
    await app({**scope, "client": (IP, 5)}, receive, send)
    return statuses[-1]


def protected(gate: Gate, check_password: Callable[[], Awaitable[int]]) -> RateLimitMiddleware:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": await check_password(), "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return RateLimitMiddleware(inner, gate=gate)


async def test_of_parallel_guesses_as_many_reach_the_password_check_as_the_limit_allows(gate: Gate) -> None:
    checked = 0
    go = asyncio.Event()

    async def check_password() -> int:
        nonlocal checked
        checked += 1
        await go.wait()
        return 401

    app = protected(gate, check_password)
    guesses = [asyncio.ensure_future(request(app)) for _ in range(50)]
    pending = set(guesses)
    while len(pending) > 5:
        _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    go.set()
    statuses = await asyncio.gather(*guesses)
    assert (checked, statuses.count(401), statuses.count(429)) == (5, 5, 45)
    assert await request(app) == 429


async def test_the_middleware_settles_by_the_response(gate: Gate) -> None:
    statuses = [401, 500, 200, 403]

    async def check_password() -> int:
        return statuses.pop(0)

    app = protected(gate, check_password)
    remaining = []
    for _ in range(4):
        await request(app)
        remaining.append(await left(gate, LOGIN))
    # Also a failure of the server is none of the client.
    assert remaining == [4, 5, 5, 4]


async def test_without_a_response_the_outcome_is_unknown(gate: Gate) -> None:
    await attempt(gate, LOGIN, failed=True)
    entered = asyncio.Event()

    async def check_password() -> int:
        entered.set()
        await asyncio.Event().wait()
        raise AssertionError("never set")

    abandoned = asyncio.ensure_future(request(protected(gate, check_password)))
    await entered.wait()
    assert await left(gate, LOGIN) == 3
    abandoned.cancel()
    with pytest.raises(asyncio.CancelledError):
        await abandoned
    assert await left(gate, LOGIN) == 4

    async def broken() -> int:
        raise RuntimeError("database")

    with pytest.raises(RuntimeError, match="database"):
        await request(protected(gate, broken))
    assert await left(gate, LOGIN) == 4


async def test_a_reset_ends_attempts(gate: Gate) -> None:
    opened = await gate.holds.open(LOGIN)
    await gate.reset(ip=IP)
    assert await left(gate, LOGIN) == 5
    await gate.holds.settle(opened.hold, 1)
    assert await left(gate, LOGIN) == 4
