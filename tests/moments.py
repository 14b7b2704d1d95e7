"""Waiting: for something to hold, and for moments of the machine's own clock, where a server has no other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

MINUTE_S = 60
HOUR_S = 3600
PATIENCE_S = 60.0
"""How long a test waits for what must happen: what takes a tenth of a second may take many on a machine whose cores are busy."""

_T = TypeVar("_T")


def wait_until(
    holds: Callable[[], _T], timeout_s: float = PATIENCE_S, what: str = "what was waited for", pause_s: float | None = None
) -> _T:
    """Ask again and again until something holds.

    Args:
        holds: asked every 20 ms at first, every 100 ms from 2 s on; what it raises as `OSError` counts as no.
        timeout_s: for how long to ask.
        what: that was waited for, for the error.
        pause_s: between two questions, where each costs much.

    Returns:
        What it gave at last.

    Raises:
        TimeoutError: if it does not hold in time.
    """
    began = time.monotonic()
    while True:
        try:
            found = holds()
            if found:
                return found
        except OSError as error:
            last = f": {error}"
        else:
            last = ""
        waited_s = time.monotonic() - began
        if waited_s > timeout_s:
            raise TimeoutError(f"{what}: not within {timeout_s} s{last}")
        # To ask takes CPU time of both sides, from what is waited for as well.
        time.sleep(min(max(0.02, waited_s / 20), 0.1) if pause_s is None else pause_s)


async def until(holds: Callable[[], object], timeout_s: float = PATIENCE_S) -> float:
    """Ask again and again until something holds, while the loop goes on.

    Args:
        holds: asked every 10 ms.
        timeout_s: for how long to ask.

    Returns:
        How long it took, s.

    Raises:
        TimeoutError: if it does not hold in time.
    """
    began = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.01)
    return time.monotonic() - began


def stay_within(window_s: int, least_s: float) -> None:
    """Wait for the next window where the present one is about to end, and what was used up with it.

    Args:
        window_s: length of windows that begin at the epoch, s.
        least_s: what has to be left of the present one, s.
    """
    left_s = window_s - time.time() % window_s
    if left_s < least_s:
        time.sleep(left_s + 0.01)
