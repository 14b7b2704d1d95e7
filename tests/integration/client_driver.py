"""One interface to the blocking and the asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from tidegate.client import AsyncClient, Client

PATIENT_S = 20.0
"""A deadline that a busy machine meets, for tests that are not about deadlines."""

POLICY = """
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/login"
  limits = ["5/day"]
  subject = "ip"
  [[tiers.rules]]
  endpoint = "/api/*"
  limits = ["100/day"]
[anonymous]
tier = "free"
[[api_keys]]
key = "demo-free-key-0001"
tier = "free"
"""
"""Of days: a test that ran across the end of a shorter window would count otherwise."""


class ClientDriver:
    """A client of either kind, asked in one way: the blocking one in a thread, so that servers of this loop can answer."""

    def __init__(self, kind: str, *arguments: Any, **options: Any) -> None:
        self.client: Any = (Client if kind == "sync" else AsyncClient)(*arguments, **{"deadline_s": PATIENT_S, **options})
        self.kind = kind

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self.client, name)
        return method if self.kind == "async" else lambda *arguments, **options: asyncio.to_thread(method, *arguments, **options)
