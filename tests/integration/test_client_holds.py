"""Holds of both clients, at the app on a real listener."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.client import AsyncClient, Client
from tidegate.counters.memory import MemoryCounters
from tidegate.doors.http import DataPlane
from tidegate.errors import BadRequest, HoldEnded
from tidegate.gate.gate import Gate
from tidegate.policy.toml_reader import parse_policy

POLICY = '[[tiers]]\nname = "t"\n[[tiers.rules]]\nendpoint = "/llm"\nlimits = ["100/day"]\n[anonymous]\ntier = "t"\n'
IP = "203.0.113.7"


async def test_holds_of_both_clients(listen: Callable[..., Any]) -> None:
    url = await listen(DataPlane(Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), MemoryCounters()), {}))
    async with AsyncClient(url, deadline_s=10) as client:
        async with client.hold("/llm", ip=IP, cost=80) as hold:
            assert hold.allowed
            assert hold.answer is not None
            assert (hold.answer.remaining, dict(hold.answer.headers)["x-ratelimit-remaining"]) == (20, "20")
            async with client.hold("/llm", ip=IP, cost=30) as denied:
                assert (denied.allowed, denied.id) == (False, None)
            await hold.renew(600)
            hold.settle(10)
        assert hold.settlement is not None
        assert (hold.settlement.cost, hold.settlement.remaining) == (10, 90)
        with pytest.raises(HoldEnded):
            await hold.renew(600)
        with pytest.raises(ZeroDivisionError):
            async with client.hold("/llm", ip=IP, cost=80):
                raise ZeroDivisionError
        with pytest.raises(BadRequest, match="ever admits at once"):
            async with client.hold("/llm", ip=IP, cost=101):
                pass
        with pytest.raises(BadRequest, match="cost -1"):
            hold.settle(-1)

    def blocking() -> tuple[bool, int | None]:
        with Client(url, deadline_s=10) as client:
            with client.hold("/llm", ip=IP, cost=500, clamp=True) as denied:
                pass
            with client.hold("/llm", ip=IP, cost=50) as hold:
                pass
            assert hold.settlement is not None
            return denied.allowed, hold.settlement.remaining

    assert await asyncio.to_thread(blocking) == (False, 40)


async def test_without_a_server() -> None:
    async with AsyncClient("http://127.0.0.1:1") as client:
        async with client.hold("/llm", ip=IP, cost=80) as hold:
            hold.settle(1)
        assert hold.answer is not None
        assert (hold.allowed, hold.answer.failed, hold.settlement) == (True, True, None)
