"""When a follower looks: at announcements, when the channel comes and goes, and by itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tidegate.catalog import follower as follower_module
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.changes import Changes
from tidegate.catalog.follower import CatalogFollower
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.errors import CatalogUnavailable
from tidegate.policy.toml_reader import parse_policy

POLL_S = 0.01
LONG_S = 60.0
SOON_S = 20.0
"""Far less than what would be waited for, far more than what it takes."""


class Catalog(PolicyCatalog):
    """At a version that a test sets; notes each look."""

    def __init__(self) -> None:
        super().__init__(parse_policy('[[tiers]]\nname = "t"'))
        self.now = 1
        self.failing = False
        self.looks = 0

    async def changes(self, since: int) -> Changes:
        self.looks += 1
        if self.failing:
            raise CatalogUnavailable("away")
        return Changes(self.now, since)


class Channel:
    """Is up or down as a test says."""

    def __init__(self, connected: bool = True) -> None:
        self.connected = connected
        self.heard: Callable[[], None] | None = None
        self.failures = 0

    async def announce(self, version: int) -> None:
        raise AssertionError("a follower announces nothing")

    async def listen(self, heard: Callable[[], None]) -> None:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("a fault")
        self.heard = heard
        heard()
        await asyncio.Event().wait()

    def set(self, connected: bool) -> None:
        self.connected = connected
        assert self.heard is not None
        self.heard()


@pytest.fixture
async def start(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Any]]:
    """Starts a follower; gives its catalog and its cache."""
    tasks: list[asyncio.Task[None]] = []

    async def started(channel: Channel | None, poll_s: float, settle_s: float = 0.0, quiet_s: float = LONG_S) -> Any:
        monkeypatch.setattr(follower_module, "SETTLE_S", settle_s)
        monkeypatch.setattr(follower_module, "QUIET_POLL_S", quiet_s)
        catalog: Any = Catalog()
        cached = CachedCatalog(catalog)
        tasks.append(asyncio.create_task(CatalogFollower(catalog, cached, poll_s, channel).run()))
        await until(lambda: channel is None or channel.heard is not None)
        await until(lambda: cached.version == 1)
        return catalog, cached

    yield started
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not holds():
            await asyncio.sleep(0.001)


async def rests(catalog: Catalog) -> None:
    """Fails if it looks by itself."""
    looks = catalog.looks
    await asyncio.sleep(POLL_S * 10)
    assert catalog.looks == looks


async def test_an_announcement_is_looked_after_and_else_it_rests(start: Callable[..., Any]) -> None:
    channel = Channel()
    catalog, cached = await start(channel, POLL_S)
    await rests(catalog)
    catalog.now = 2
    channel.set(True)
    await until(lambda: cached.version == 2)
    await rests(catalog)


async def test_many_announcements_at_once_are_one_look(start: Callable[..., Any]) -> None:
    channel = Channel()
    catalog, cached = await start(channel, POLL_S)
    looks = catalog.looks
    catalog.now = 2
    for _ in range(1000):
        channel.set(True)
    await until(lambda: cached.version == 2)
    await rests(catalog)
    assert catalog.looks <= looks + 2


async def test_without_a_channel_it_looks_by_itself(start: Callable[..., Any]) -> None:
    catalog, cached = await start(None, POLL_S)
    catalog.now = 2
    await until(lambda: cached.version == 2)


async def test_a_channel_that_is_lost_does_not_leave_it_resting(start: Callable[..., Any]) -> None:
    channel = Channel()
    catalog, cached = await start(channel, POLL_S)
    await rests(catalog)
    channel.set(False)
    catalog.now = 2
    await until(lambda: cached.version == 2)
    catalog.now = 3
    await until(lambda: cached.version == 3)
    channel.set(True)
    await until(lambda: catalog.looks > 3)
    await rests(catalog)


async def test_a_channel_that_has_just_come_is_not_relied_on(start: Callable[..., Any]) -> None:
    """Whoever changes something may still be without it."""
    channel = Channel(connected=False)
    catalog, cached = await start(channel, POLL_S, settle_s=0.5)
    channel.set(True)
    catalog.now = 2
    await until(lambda: cached.version == 2)
    looks = catalog.looks
    await until(lambda: catalog.looks > looks + 3)
    async with asyncio.timeout(SOON_S):
        while looks != catalog.looks:
            looks = catalog.looks
            await asyncio.sleep(POLL_S * 10)


async def test_a_catalog_that_fails_is_polled_until_it_answers(start: Callable[..., Any]) -> None:
    channel = Channel()
    catalog, cached = await start(channel, POLL_S)
    catalog.failing = True
    catalog.now = 2
    channel.set(True)
    looks = catalog.looks
    await until(lambda: catalog.looks > looks + 3)
    assert cached.version == 1
    catalog.failing = False
    await until(lambda: cached.version == 2)
    await rests(catalog)


async def test_a_fault_of_the_channel_ends_nothing(start: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    channel = Channel()
    channel.failures = 3
    catalog, cached = await start(channel, POLL_S)
    assert caplog.text.count("background task catalog_announcements failed") == 3
    catalog.now = 2
    channel.set(True)
    await until(lambda: cached.version == 2)


async def test_a_quiet_channel_is_checked_now_and_then(start: Callable[..., Any]) -> None:
    """For changes by somebody who could not announce them."""
    catalog, cached = await start(Channel(), POLL_S, quiet_s=0.05)
    catalog.now = 2
    await until(lambda: cached.version == 2)
