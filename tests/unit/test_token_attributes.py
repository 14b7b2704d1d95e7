"""Attributes from bearer tokens at `/v1/authorize`: through the app, and through its path for plain requests."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

import jwt
from tests.rsgi import call
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.doors.http import DataPlane
from tidegate.gate.gate import Gate
from tidegate.policy.toml_reader import parse_policy

KEY = ec.generate_private_key(ec.SECP256R1())
STRANGER = ec.generate_private_key(ec.SECP256R1())
POLICY = """
[attributes]
user = "jwt:sub"
plan = "jwt:plan"
region = "header:X-Region"

[jwt]
jwks = "{jwks}"
audience = "api"
{more}

[callers]
tier_from = "plan"
default_tier = "public"

[[tiers]]
name = "public"
  [[tiers.rules]]
  endpoint = "/*"
  limits = ["1/hour"]

[[tiers]]
name = "pro"
  [[tiers.rules]]
  endpoint = "/*"
  subject = "user"
  limits = ["2/hour"]
  [[tiers.rules]]
  endpoint = "/*"
  match = {{ region = "eu" }}
  subject = "user"
  limits = ["3/hour"]

[[api_keys]]
key = "tg-like-but-not-0001"
tier = "pro"
"""


def token(key: Any = KEY, **claims: object) -> str:
    body = {"exp": int(time.time()) + 3600, "aud": "api", "sub": "user-1", "plan": "pro", **claims}
    return jwt.encode(body, key, algorithm="ES256", headers={"kid": "a"})


def data_plane(tmp_path: Path, more: str = "") -> DataPlane:
    jwks = tmp_path / "jwks.json"
    public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(KEY.public_key()))
    jwks.write_text(json.dumps({"keys": [{**public, "kid": "a"}]}))
    policy = parse_policy(POLICY.format(jwks=jwks, more=more))
    return DataPlane(Gate(CachedCatalog(PolicyCatalog(policy)), MemoryCounters()), {})


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[DataPlane]:
    made = data_plane(tmp_path)
    yield made
    await made._gate.close()


async def authorize(app: DataPlane, *headers: tuple[str, str], path: str = "/a") -> tuple[int, dict[str, str]]:
    sent = [("X-Original-URI", path.encode()), *((name, value.encode("latin-1")) for name, value in headers)]
    answer = await call(app, "/v1/authorize", sent)
    return answer.status, answer.headers


async def allowed(app: DataPlane, *headers: tuple[str, str], tries: int = 5) -> int:
    statuses = [(await authorize(app, *headers))[0] for _ in range(tries)]
    assert set(statuses) <= {204, 429}
    return statuses.count(204)


async def test_claims_name_the_tier_and_the_subject(app: DataPlane) -> None:
    assert await allowed(app, ("Authorization", f"Bearer {token()}")) == 2
    assert await allowed(app, ("Authorization", f"bearer {token(sub='user-2')}")) == 2
    assert await allowed(app, ("Authorization", f"Bearer {token(plan='none')}")) == 1  # the default tier, by address
    assert await allowed(app, ("Authorization", f"Bearer {token(sub='user-3')}"), ("X-Region", "eu")) == 3


@pytest.mark.parametrize(
    "value",
    [
        f"Bearer {token(STRANGER)}",
        f"Bearer {token(exp=1)}",
        f"Bearer {token(aud='other')}",
        "Bearer opaque",
        "Bearer ",
    ],
)
async def test_a_token_that_fails_is_401_and_charges_nothing(app: DataPlane, value: str) -> None:
    status, headers = await authorize(app, ("Authorization", value))
    assert (status, headers["x-tidegate-error"]) == (401, "INVALID_TOKEN")
    assert await allowed(app) == 1


async def test_other_schemes_are_the_apis_own_and_an_api_key_as_bearer_is_named(app: DataPlane) -> None:
    assert (await authorize(app, ("Authorization", "Basic dXNlcjpwYXNz")))[0] == 204
    status, headers = await authorize(app, ("Authorization", "Bearer tg-like-but-not-0001"))
    assert (status, headers["x-tidegate-error"]) == (401, "MISSING_API_KEY")
    status, headers = await authorize(app, ("Authorization", f"Bearer {token()}"), ("Authorization", f"Bearer {token()}"))
    assert (status, headers["x-tidegate-error"]) == (400, "BAD_REQUEST")
    assert (await authorize(app, ("Authorization", "Bearer \xe9")))[0] == 400


async def test_an_api_key_keeps_its_tier_and_the_token_adds_attributes(app: DataPlane) -> None:
    headers = (("X-API-Key", "tg-like-but-not-0001"), ("Authorization", f"Bearer {token(plan='public')}"))
    assert await allowed(app, *headers) == 2


async def test_a_header_of_its_own_may_carry_the_token_alone(tmp_path: Path) -> None:
    app = data_plane(tmp_path, 'header = "X-Token"')
    assert await allowed(app, ("X-Token", token())) == 2
    assert await allowed(app, ("X-Token", f"Bearer {token(sub='user-2')}"), ("Authorization", "Bearer of the api")) == 2
    await app._gate.close()


async def test_a_denial_may_be_cached_for_the_same_token_only(app: DataPlane) -> None:
    await allowed(app, ("Authorization", f"Bearer {token()}"))
    status, headers = await authorize(app, ("Authorization", f"Bearer {token()}"))
    assert status == 429
    assert {"authorization", "x-region", "X-API-Key"} <= set(headers["vary"].split(", "))


async def test_no_keys_is_503_and_says_so(tmp_path: Path) -> None:
    app = data_plane(tmp_path)
    (tmp_path / "jwks.json").unlink()
    status, headers = await authorize(app, ("Authorization", f"Bearer {token()}"))
    assert (status, headers["x-tidegate-error"]) == (503, "TOKEN_KEYS_UNAVAILABLE")
    assert await allowed(app) == 1  # a request without a token needs no keys
    await app._gate.close()


async def test_a_policy_without_jwt_reads_no_token(tmp_path: Path) -> None:
    policy = parse_policy('[[tiers]]\nname = "free"\n[anonymous]\ntier = "free"\n')
    app = DataPlane(Gate(CachedCatalog(PolicyCatalog(policy)), MemoryCounters()), {})
    assert (await authorize(app, ("Authorization", "Bearer eyJhbGciOiJub25lIn0.e30.")))[0] == 204
