"""Signatures wait here for their verification: in turn by client, so that one client's flood delays others by one signature.

Verifying a signature takes 50 to 150 µs (RSA 2048, P-256) on the event loop; OpenSSL's bindings keep the interpreter's lock, so a
thread would not help. The queue works for at most `SLICE_NS`, then lets other checks run.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final, TypeVar

from tidegate.errors import TooManyTokens
from tidegate.time_slice import TimeSlice

MAX_WAITING: Final = 4096
MAX_WAITING_PER_CLIENT: Final = 256
SLICE_NS: Final = 1_000_000

T = TypeVar("T")
_Job = tuple[asyncio.Future[object], Callable[[], object]]


class VerificationQueue:
    """A bounded queue that serves clients in turn. One event loop."""

    def __init__(self, max_waiting: int = MAX_WAITING, max_per_client: int = MAX_WAITING_PER_CLIENT) -> None:
        self._max_waiting = max_waiting
        self._max_per_client = max_per_client
        self._jobs: OrderedDict[str, deque[_Job]] = OrderedDict()
        self._waiting = 0
        self._worker: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Jobs that wait."""
        return self._waiting

    async def run(self, client: str, work: Callable[[], T]) -> T:
        """Run a job when the client's turn comes.

        Args:
            client: whose job it is.
            work: synchronous; its result or exception is passed on.

        Raises:
            TooManyTokens: if the queue is full, or has too many jobs of this client.
        """
        jobs = self._jobs.get(client)
        if self._waiting >= self._max_waiting or (jobs is not None and len(jobs) >= self._max_per_client):
            raise TooManyTokens("too many tokens wait for verification: try again in 1 s", retry_after=1)
        loop = asyncio.get_running_loop()
        result: asyncio.Future[object] = loop.create_future()
        if jobs is None:
            jobs = self._jobs[client] = deque()
        jobs.append((result, work))
        self._waiting += 1
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._drain(), name="token verification")
        return await result  # type: ignore[return-value]

    async def _drain(self) -> None:
        """Run jobs until none is left. Never raises: exceptions belong to the jobs."""
        turn = TimeSlice(SLICE_NS)
        while self._jobs:
            client, jobs = next(iter(self._jobs.items()))
            result, work = jobs.popleft()
            self._waiting -= 1
            if jobs:
                self._jobs.move_to_end(client)
            else:
                del self._jobs[client]
            if not result.done():
                try:
                    result.set_result(work())
                except Exception as error:  # noqa: BLE001 - passed on to whoever awaits the job
                    result.set_exception(error)
            if turn.over:
                await turn.pause()
