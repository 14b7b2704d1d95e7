"""Questions of one kind that are put together: what comes while others are being answered goes to the database as one query.

A query costs the client and the server much the same for one key as for a hundred. So a cold start, in which thousands of keys a
second are asked for the first time, is a few hundred queries a second; and a lone question waits for nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Generic, TypeVar

from tidegate.errors import CatalogUnavailable

logger = logging.getLogger(__name__)

AT_ONCE: Final = 4
"""So many queries run at the same time."""
MOST: Final = 500
"""So many questions go into one query."""

_V = TypeVar("_V")


class BatchLoader(Generic[_V]):
    """Answers questions by name.

    Args:
        ask: is given different names and the version that the answer must have seen; gives the version that it is of, and what it
            found by name.
        at_once: so many queries run at the same time, 1 or more.
        most: so many questions go into one query, 1 or more.
    """

    def __init__(
        self,
        ask: Callable[[Sequence[str], int], Awaitable[tuple[int, Mapping[str, _V]]]],
        at_once: int = AT_ONCE,
        most: int = MOST,
    ) -> None:
        self._ask = ask
        self._at_once = at_once
        self._most = most
        self._waiting: list[tuple[str, int, asyncio.Future[tuple[int, _V | None]]]] = []
        self._running: set[asyncio.Task[None]] = set()

    async def get(self, name: str, min_version: int) -> tuple[int, _V | None]:
        """Ask one question.

        Args:
            name: what is asked for.
            min_version: the version that the answer must have seen.

        Returns:
            The version that the answer is of, and the answer; None where there is none.

        Raises:
            CatalogUnavailable: if the query fails.
        """
        answer: asyncio.Future[tuple[int, _V | None]] = asyncio.get_running_loop().create_future()
        self._waiting.append((name, min_version, answer))
        if len(self._running) < self._at_once:
            # It begins in the loop's next turn, and takes with it all that is asked in this one.
            task = asyncio.ensure_future(self._run())
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return await answer

    async def _run(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
            # Whoever was cancelled meanwhile asks no more.
            batch = [each for each in batch if not each[2].done()]
            if not batch:
                continue
            try:
                version, found = await self._ask(list({name: None for name, _, _ in batch}), max(each[1] for each in batch))
            except CatalogUnavailable as error:
                _fail(batch, error.message, **error.details)
            except Exception as error:
                # Those who wait behind this batch are asked for all the same: nothing else would wake them.
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
    """Each gets an error of its own: one that many raise would gather the traces of all."""
    for _, _, answer in batch:
        if not answer.done():
            answer.set_exception(CatalogUnavailable(message, **details))
