"""The log-in of `examples/protect_login.py`, driven as an ASGI server drives it, by guesses that run in parallel."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from types import ModuleType

import httpx
import pytest

from tests.moments import PATIENCE_S

_PATH = Path(__file__).parents[2] / "examples" / "protect_login.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example, with counters of its own."""
    monkeypatch.delenv("TIDEGATE_COUNTERS__URL", raising=False)
    spec = importlib.util.spec_from_file_location("protect_login", _PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "protect_login", module)
    spec.loader.exec_module(module)
    return module


def client(example: ModuleType, address: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(example.app, client=(address, 5))
    return httpx.AsyncClient(transport=transport, base_url="http://app", timeout=PATIENCE_S)


async def test_parallel_guesses(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    check = example.is_right

    async def counting(credentials: object) -> bool:
        checked.append(credentials.user)  # type: ignore[attr-defined]
        return bool(await check(credentials))

    monkeypatch.setattr(example, "is_right", counting)
    right = {"user": "ann", "password": example.PASSWORDS["ann"]}
    async with client(example, "192.0.2.1") as attacker, client(example, "192.0.2.2") as other:

        async def guess(who: httpx.AsyncClient, user: str, number: int) -> int:
            return (await who.post("/login", json={"user": user, "password": f"guess {number}"})).status_code

        # 50 guesses of one user's password, however it is spelled.
        statuses = await asyncio.gather(*(guess(attacker, "ann" if number % 2 else "Ann", number) for number in range(50)))
        assert (len(checked), sorted(set(statuses)), statuses.count(401)) == (5, [401, 429], 5)
        # As many of other users' passwords: 20 failures of the address in all, then a penalty.
        statuses = await asyncio.gather(*(guess(attacker, f"user {number}", number) for number in range(50)))
        assert (len(checked), statuses.count(401)) == (20, 15)
        denied = await attacker.post("/login", json=right)
        assert denied.status_code == 429
        assert 0 < int(denied.headers["retry-after"]) <= 300
        # Others log in meanwhile, but for the user whose failures have used up the limit.
        example.PASSWORDS["bob"] = "secret"
        assert await guess(other, "bob", 0) == 401
        welcome = await other.post("/login", json={"user": "bob", "password": "secret"})
        assert (welcome.status_code, welcome.json()) == (200, {"welcome": "bob"})
        refused = await other.post("/login", json=right)
        assert (refused.status_code, refused.json()) == (429, {"error": "too many failures of this user"})
        assert int(refused.headers["retry-after"]) > 300
    await example.gate.close()
