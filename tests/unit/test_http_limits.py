"""`/v1/limit` and `/v1/limit/batch`, through the app."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.raw_http import RawAnswer
from tests.rsgi import call
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.doors.http import DataPlane
from tidegate.gate.gate import Gate
from tidegate.observation import Observation
from tidegate.policy.toml_reader import parse_policy

NAMESPACES = """
[[namespaces]]
name = "sms"
limits = ["2/minute"]
  [[namespaces.overrides]]
  subject = "vip-*"
  limits = ["3/minute"]
"""


@pytest.fixture
def app() -> DataPlane:
    seen: list[Observation] = []
    policy = parse_policy(NAMESPACES)
    made = DataPlane(Gate(CachedCatalog(PolicyCatalog(policy)), MemoryCounters(), seen.append), {}, seen.append)
    made.seen = seen  # type: ignore[attr-defined]
    return made


async def limit(app: DataPlane, body: Any, path: str = "/v1/limit", method: str = "POST") -> tuple[RawAnswer, Any]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await call(app, path, method=method, body=raw)
    return answer, json.loads(answer.body)


async def test_limits_of_the_request(app: DataPlane) -> None:
    sent = {"namespace": "emails", "subject": "user-42", "limits": ["2/minute"], "algorithm": "token_bucket", "cost": 1.0}
    answer, body = await limit(app, sent)
    assert answer.status == 200
    assert (body["allowed"], body["limit"], body["remaining"], body["rule"], body["tier"]) == (True, 2, 1, "emails", None)
    assert answer.headers["x-ratelimit-remaining"] == "1"
    answer, body = await limit(app, {**sent, "cost": 2})
    assert (answer.status, body["allowed"], body["remaining"]) == (429, False, 1)
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize(("subject", "units"), [("user-42", 2), ("vip-1", 3)])
async def test_limits_of_a_namespace_take_precedence(app: DataPlane, subject: str, units: int) -> None:
    sent = {"namespace": "sms", "subject": subject, "limits": ["100/minute"]}
    assert [(await limit(app, sent))[0].status for _ in range(4)] == [200] * units + [429] * (4 - units)
    assert (await limit(app, {"namespace": "sms", "subject": "x"}))[0].status == 200


async def test_a_batch_is_decided_in_order_and_a_bad_check_is_an_error_of_its_own(app: DataPlane) -> None:
    one = {"namespace": "emails", "subject": "a", "limits": ["2/minute"]}
    bad = {"namespace": "emails", "subject": "", "limits": ["2/minute"]}
    answer, body = await limit(app, {"checks": [one, bad, one, one, {**one, "subject": "b"}]}, "/v1/limit/batch")
    assert answer.status == 200
    decisions = body["decisions"]
    assert decisions[1]["error"]["code"] == "BAD_REQUEST"
    assert [each.get("allowed") for each in decisions] == [True, None, True, False, True]
    assert [each.error for each in app.seen].count("BAD_REQUEST") == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not a limit check"),
        (b"[]", "not a limit check"),
        (b'{"namespace": "a", "subject": "\xff"}', "not a limit check"),
        ({"namespace": "a", "subject": "b"}, "limits"),
        ({"namespace": "a", "subject": "b", "limits": ["often"]}, "'often'"),
        ({"namespace": "a", "subject": "b", "limits": ["1/s"], "extra": 1}, "extra"),
        ({"namespace": "a", "subject": "b", "limits": ["1/s"], "cost": 1.5}, "cost"),
        ({"namespace": "a", "subject": "b", "limits": ["1/s"] * 17}, "1 to 16"),
    ],
)
async def test_bad_input_is_400_and_charges_nothing(app: DataPlane, body: Any, words: str) -> None:
    answer, error = await limit(app, body)
    assert answer.status == 400
    assert words in error["error"]["message"]
    _, decision = await limit(app, {"namespace": "a", "subject": "b", "limits": ["1/s"], "cost": 0})
    assert decision["remaining"] == 1


@pytest.mark.parametrize("checks", [[], [{"namespace": "a", "subject": "b", "limits": ["1/s"]}] * 1001])
async def test_a_batch_is_bounded(app: DataPlane, checks: list[Any]) -> None:
    answer, error = await limit(app, {"checks": checks}, "/v1/limit/batch")
    assert (answer.status, error["error"]["details"]) == (400, {"checks": len(checks)})


async def test_other_methods_are_refused(app: DataPlane) -> None:
    answer, _ = await limit(app, b"", method="GET")
    assert answer.status == 405
