"""Combines concurrent lookups of one kind: those that arrive while queries are running share the next query.

A query for a hundred keys costs the client and the server about as much as a query for one. So a cold start, in which thousands
of keys per second are looked up for the first time, takes a few hundred queries per second; a single lookup does not wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Generic, TypeVar

from tidegate.errors import CatalogUnavailable

logger = logging.getLogger(__name__)

MAX_CONCURRENT: Final = 4
"""Maximum number of concurrent queries."""
BATCH_SIZE: Final = 500
"""Maximum number of names in one query."""

_V = TypeVar("_V")


class BatchLoader(Generic[_V]):
    """Loads values by name, many names per query.

    Args:
        load: takes distinct names and the lowest version that the values may be read at; returns the version they were read at,
            and the values found, by name.
        max_concurrent: maximum number of concurrent queries, 1 or more.
        batch_size: maximum number of names in one query, 1 or more.
    """

    def __init__(
        self,
        load: Callable[[Sequence[str], int], Awaitable[tuple[int, Mapping[str, _V]]]],
        max_concurrent: int = MAX_CONCURRENT,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        self._load = load
        self._max_concurrent = max_concurrent
        self._batch_size = batch_size
        self._waiting: list[tuple[str, int, asyncio.Future[tuple[int, _V | None]]]] = []
        self._running: set[asyncio.Task[None]] = set()

    async def get(self, name: str, min_version: int) -> tuple[int, _V | None]:
        """Load one value.

        Returns:
            The version that the value was read at, and the value; None if there is none.

        Raises:
            CatalogUnavailable: if the query fails.
        """
        answer: asyncio.Future[tuple[int, _V | None]] = asyncio.get_running_loop().create_future()
        self._waiting.append((name, min_version, answer))
        if len(self._running) < self._max_concurrent:
            # It starts in the next iteration of the event loop, with all lookups of this one.
            task = asyncio.ensure_future(self._run())
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return await answer

    async def _run(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[: self._batch_size], self._waiting[self._batch_size :]
            # Lookups that were cancelled in the meantime are dropped.
            batch = [each for each in batch if not each[2].done()]
            if not batch:
                continue
            try:
                version, found = await self._load(list({name: None for name, _, _ in batch}), max(each[1] for each in batch))
            except CatalogUnavailable as error:
                _fail(batch, error.message, **error.details)
            except Exception as error:
                # The next batches still run: nothing else would complete their lookups.
                logger.exception("unhandled exception in a query of the catalog")
                _fail(batch, f"the catalog's query failed: {error!r:.200}")
            except BaseException:  # cancelled, with the event loop
                _fail(batch, "the catalog's query was cancelled")
                raise
            else:
                for name, _, answer in batch:
                    if not answer.done():
                        answer.set_result((version, found.get(name)))


def _fail(batch: Sequence[tuple[str, int, asyncio.Future[tuple[int, _V | None]]]], message: str, **details: object) -> None:
    """Each lookup gets its own error: a shared one would accumulate the tracebacks of all."""
    for _, _, answer in batch:
        if not answer.done():
            answer.set_exception(CatalogUnavailable(message, **details))
