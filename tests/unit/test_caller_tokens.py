"""Tokens of gateways and back ends in the memory of one process: what a change, an expiry and an unavailable database do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tests.moments import PATIENCE_S
from tidegate.catalog import caller_tokens as caller_tokens_module
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.caller_tokens import CallerToken, CallerTokens, hash_caller_token, make_caller_token
from tidegate.catalog.changes import ALL, CALLER_TOKEN, TIER, Changes
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.errors import CatalogUnavailable
from tidegate.policy.toml_reader import parse_policy


class Source:
    """The stored tokens; fails or waits as a test says."""

    def __init__(self, *tokens: str) -> None:
        self.stored = {hash_caller_token(token.encode()): token for token in tokens}
        self.failing = False
        self.loads = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def caller_tokens(self) -> list[CallerToken]:
        self.loads += 1
        found = [CallerToken(sha256, "edge", frozenset({"check"})) for sha256 in self.stored]
        await self.gate.wait()
        if self.failing:
            raise CatalogUnavailable("the database does not answer")
        return found


async def reached(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


def touch(token: str) -> tuple[str, str]:
    return CALLER_TOKEN, hash_caller_token(token.encode())


async def test_a_token_is_found_in_the_forms_that_gateways_send_and_then_without_hashing_it() -> None:
    token = make_caller_token()
    tokens = CallerTokens(Source(token))
    await tokens.load()
    for value in (token.encode(), b"Bearer " + token.encode(), b"bearer  " + token.encode()):
        assert value not in tokens.by_value
        found = await tokens.find(value)
        assert found is not None
        assert found.name == "edge"
        assert tokens.by_value[value] is found


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"tgc_",
        b"Basic " + b"tgc_" + b"a" * 40,
        b"tgc_" + b"a" * 41,
        b"tgc_" + b"a" * 39 + b"\xc3",
        b"tgc_" + b"a" * 10_000,
        b"Bearer" + b" " * 10_000 + b"tgc_" + b"a" * 40,
        b"tga_" + b"a" * 40,
    ],
)
async def test_what_is_not_a_token_is_unknown_without_work_or_memory(value: bytes) -> None:
    tokens = CallerTokens(Source())
    await tokens.load()
    assert await tokens.find(value) is None
    assert not tokens.by_value


async def test_a_revoked_token_is_refused_at_once_and_others_go_on() -> None:
    kept, revoked = make_caller_token(), make_caller_token()
    source = Source(kept, revoked)
    tokens = CallerTokens(source)
    await tokens.load()
    assert await tokens.find(revoked.encode()) is not None
    del source.stored[hash_caller_token(revoked.encode())]
    running = asyncio.create_task(tokens.run())
    try:
        tokens.changed([touch(revoked)])
        assert revoked.encode() not in tokens.by_value
        assert await tokens.find(revoked.encode()) is None
        assert await tokens.find(kept.encode()) is not None
        assert source.loads == 2
    finally:
        running.cancel()


async def test_a_new_token_works_for_requests_that_come_while_it_is_loaded() -> None:
    source = Source()
    tokens = CallerTokens(source)
    await tokens.load()
    token = make_caller_token()
    running = asyncio.create_task(tokens.run())
    try:
        source.gate.clear()
        source.stored[hash_caller_token(token.encode())] = token
        tokens.changed([touch(token)])
        finding = asyncio.create_task(tokens.find(token.encode()))
        await reached(lambda: source.loads == 2)
        assert not finding.done()
        source.gate.set()
        assert await finding is not None
    finally:
        running.cancel()


async def test_a_change_during_a_load_is_loaded_too() -> None:
    first, second = make_caller_token(), make_caller_token()
    source = Source(first)
    tokens = CallerTokens(source)
    source.gate.clear()
    loading = asyncio.create_task(tokens.load())
    await reached(lambda: source.loads == 1)
    source.stored[hash_caller_token(second.encode())] = second
    tokens.changed([touch(second)])
    source.gate.set()
    await loading
    assert source.loads == 2
    assert await tokens.find(second.encode()) is not None


async def test_other_changes_of_the_catalog_load_nothing_and_a_change_of_everything_does() -> None:
    source = Source()
    cached = CachedCatalog(PolicyCatalog(parse_policy('[[tiers]]\nname = "t"')))
    cached.caller_tokens = tokens = CallerTokens(source)
    await tokens.load()
    running = asyncio.create_task(tokens.run())
    try:
        cached.changed(Changes(1, 0, ((1, (TIER, "t")),)))
        cached.touched(2, [(TIER, "t")])
        await asyncio.sleep(0)
        assert source.loads == 1
        cached.touched(3, [(ALL, "")])
        await reached(lambda: source.loads == 2)
        # The log is broken before version 9: what changed is not known.
        cached.changed(Changes(9, 9))
        await reached(lambda: source.loads == 3)
    finally:
        running.cancel()


async def test_tokens_go_on_working_while_the_database_is_away_for_as_long_as_api_keys_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(caller_tokens_module, "RETRY_S", 0.001)
    token, touched = make_caller_token(), make_caller_token()
    source, now = Source(token, touched), [100.0]
    tokens = CallerTokens(source, stale_after_s=50.0, clock=lambda: now[0])
    await tokens.load()
    source.failing = True
    running = asyncio.create_task(tokens.run())
    try:
        tokens.changed([touch(touched)])
        await reached(lambda: source.loads >= 3)
        assert await tokens.find(token.encode()) is not None
        # Its present state is not known: neither accepted as it was, nor refused as unknown.
        with pytest.raises(CatalogUnavailable):
            await tokens.find(touched.encode())
        assert await tokens.find(make_caller_token().encode()) is None
        now[0] = 151.0
        await reached(lambda: not len(tokens))
        with pytest.raises(CatalogUnavailable):
            await tokens.find(token.encode())
        source.failing = False
        await reached(lambda: len(tokens) == 2)
        assert await tokens.find(token.encode()) is not None
    finally:
        running.cancel()


async def test_the_table_of_header_values_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caller_tokens_module, "_MAX_VALUES", 100)
    token = make_caller_token()
    tokens = CallerTokens(Source(token))
    await tokens.load()
    for bits in range(64):
        bearer = bytes(letter ^ (0x20 if bits >> place & 1 else 0) for place, letter in enumerate(b"bearer"))
        for spaces in range(1, 9):
            assert await tokens.find(bearer + b" " * spaces + token.encode()) is not None
            assert len(tokens.by_value) <= 100
