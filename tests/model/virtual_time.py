"""An event loop in which waiting takes no time: its clock stands while a task can run, else it jumps to the next timer."""

from __future__ import annotations

import asyncio
import selectors
from types import SimpleNamespace
from typing import Any


class VirtualLoop(asyncio.SelectorEventLoop):
    """For what waits for timers alone: a task that waits for a thread or a socket would see time jump."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self.seconds

    def now_us(self) -> int:
        """Monotonic µs."""
        return round(self.seconds * 1e6)

    def time_module(self, epoch_us: int) -> Any:
        """Stands in for the module `time`.

        Args:
            epoch_us: what the wall clock shows at the monotonic moment 0.
        """
        return SimpleNamespace(
            monotonic=self.time,
            monotonic_ns=lambda: self.now_us() * 1000,
            perf_counter_ns=lambda: self.now_us() * 1000,
            time_ns=lambda: (self.now_us() + epoch_us) * 1000,
        )


class _Jumping(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("every task waits for something that no timer brings")
        if timeout > 0:
            self._loop.seconds += timeout
        return super().select(0)
