"""The slot of a request in progress: taken when it arrives, free again when its last byte was sent, or it was abandoned."""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType
from typing import Final, Self

from tidegate.errors import TidegateError
from tidegate.gate.holds import Holds, OpenedHold

logger = logging.getLogger(__name__)

TTL_S: Final = 60
"""After how many seconds the slot of a process that died is free."""
_RENEW_S: Final = TTL_S / 3


class RequestSlot:
    """Keeps a hold open while an `async with` block runs, then settles it with what was reserved, also where that is cancelled.

    Where the rule counts failures, it is settled with the outcome of the request. Without a response, because the request was
    abandoned or its app raised an exception, that is neither a failure nor a success.

    Args:
        holds: where it was opened.
        opened: the hold; one that was denied is left as it is.

    Attributes:
        status: of the response; 0 while there is none.
    """

    def __init__(self, holds: Holds, opened: OpenedHold) -> None:
        self._holds = holds
        self._opened = opened
        self.status = 0
        self._timer: asyncio.TimerHandle | None = None
        self._work: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        if self._opened.hold is not None:
            self._renew_later()
        return self

    async def __aexit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        if self._opened.hold is None:
            return
        if self._timer is not None:
            self._timer.cancel()
        # A cancellation here must not cancel the release.
        await asyncio.shield(asyncio.ensure_future(self._release()))

    def _renew_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_RENEW_S, self._start_renewal)

    def _start_renewal(self) -> None:
        task = asyncio.ensure_future(self._renew())
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        self._renew_later()

    async def _renew(self) -> None:
        try:
            await self._holds.renew(self._opened.hold, TTL_S)
        except TidegateError as error:
            logger.debug("slot of a request in progress not renewed, trying again: %s", error)

    async def _release(self) -> None:
        try:
            failures = self._opened.failures
            if failures is None:
                await self._holds.settle(self._opened.hold, self._opened.reserved)
            else:
                failed = self.status in failures.statuses
                await self._holds.settle(self._opened.hold, int(failed), success=self.status > 0 and not failed)
        except TidegateError as error:
            logger.warning("slot of a request not freed, it is free when its hold expires: %s", error)
