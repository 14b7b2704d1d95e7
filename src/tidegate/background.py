"""Background tasks: whatever runs as long as its owner runs under a supervisor.

A task that ends with an exception is logged with its traceback, counted, and started again after a pause that doubles from
`FIRST_PAUSE_S` to `MAX_PAUSE_S`. It counts as failing until it has run for `SETTLED_S` again; `/health` shows that.

The supervisor is one for the process, as logging is: connections and topologies start tasks without a reference to the
instance. Its counts may be read from any thread; a task belongs to the event loop that it was started in.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from tidegate.jitter import JITTER

logger = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 0.1
MAX_PAUSE_S: Final = 5.0
SETTLED_S: Final = 10.0
"""A task that has run for so long is healthy, and the next pause is the shortest again."""


class TaskSupervisor:
    """Starts tasks and restarts those that fail.

    Args:
        clock: returns monotonic seconds.
        sleep: waits for so many seconds.

    Attributes:
        failures: by name of a task, how often it failed; 0 from its first start on.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self.failures: dict[str, int] = {}
        self._clock = clock
        self._sleep = sleep
        self._failed: set[_Run] = set()

    def start(self, name: str, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Run something until it is cancelled.

        Args:
            name: of the task, for log, metric and health; several tasks may have the same.
            work: called at the start and at each restart; a return counts as a failure.

        Returns:
            The task that supervises it; cancel it to end both.
        """
        self.failures.setdefault(name, 0)
        return asyncio.get_running_loop().create_task(self._supervise(name, work), name=name)

    def failing(self) -> list[str]:
        """The tasks that failed and have not run for `SETTLED_S` since, each with the kind of its last error."""
        now = self._clock()
        self._failed = {run for run in self._failed if run.settles_at > now}
        return sorted({f"{run.name} ({run.error})" for run in self._failed})

    async def _supervise(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        run = _Run(name)
        pause_s = FIRST_PAUSE_S
        try:
            while True:
                started = self._clock()
                try:
                    await work()
                    failure: BaseException = RuntimeError("it returned without being cancelled")
                except asyncio.CancelledError as error:
                    task = asyncio.current_task()
                    if task is None or task.cancelling():
                        raise
                    # Something it awaited was cancelled, not the task itself: that must not end it.
                    failure = error
                except Exception as error:  # noqa: BLE001 - restarting after any failure is what this is for
                    failure = error
                if self._clock() - started >= SETTLED_S:
                    pause_s = FIRST_PAUSE_S
                self.failures[name] += 1
                run.error = type(failure).__name__  # the text is for the log: it may name addresses
                run.settles_at = self._clock() + pause_s + SETTLED_S
                self._failed.add(run)
                logger.error(
                    "background task %s failed, restarting in %.1f s",
                    name,
                    pause_s,
                    exc_info=failure,
                    extra={"ecs": {"tidegate.task": name}},
                )
                # Jittered, so that tasks that failed by the same cause do not fail together again.
                await self._sleep(pause_s * JITTER.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
        finally:
            self._failed.discard(run)


class _Run:
    """One supervised task: its last error, and until when that counts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.error = ""
        self.settles_at = 0.0


SUPERVISOR: Final = TaskSupervisor()
"""The supervisor of this process."""


async def stop(*tasks: asyncio.Task[None] | None) -> None:
    """Cancel tasks and wait for their end.

    Args:
        tasks: any number; None counts as ended.
    """
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
