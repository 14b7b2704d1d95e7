"""Look-ups that are sent as one query: none of them waits for ever, whatever a query raises."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from tests.moments import PATIENCE_S
from tidegate.catalog.sql.batch_loader import BatchLoader
from tidegate.errors import CatalogUnavailable


async def test_those_behind_a_query_that_fails_are_requested(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[Sequence[str]] = []

    async def load(names: Sequence[str], min_version: int) -> tuple[int, Mapping[str, str]]:
        asked.append(names)
        if "broken" in names:
            raise ValueError("a row that cannot be read")
        return 1, {name: name.upper() for name in names}

    loader = BatchLoader(load, max_concurrent=1, batch_size=1)
    async with asyncio.timeout(PATIENCE_S):
        outcomes = await asyncio.gather(*(loader.get(name, 0) for name in ("broken", "a", "b")), return_exceptions=True)
    assert isinstance(outcomes[0], CatalogUnavailable)
    assert "a row that cannot be read" in outcomes[0].message
    assert outcomes[1:] == [(1, "A"), (1, "B")]
    assert asked == [["broken"], ["a"], ["b"]]
    assert "unhandled exception in a query of the catalog" in caplog.text
