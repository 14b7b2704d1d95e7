"""What is left under counters, and in each of their windows. Charges nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from tidegate.counters import Charge, CounterStore
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import LimitSet

_WINDOWS_BATCH_SIZE: Final = 32
"""Counters of several windows that are read at once: a thousand rules of sixteen windows must not hold up checks."""

Seen = tuple[Decision, tuple[Decision, ...]]
"""The answer to a check of cost 0, and one for each limit by itself; none of the latter where the store could not say."""


async def peek(store: CounterStore, counters: Sequence[tuple[LimitSet, str]]) -> list[Seen]:
    """What is left of counters.

    Args:
        store: the store.
        counters: pairs of limits and subject, any number.

    Returns:
        For each what was seen; where the store did not answer, the decision is degraded and without numbers.
    """
    outcomes = await store.charge([Charge((counter,), cost=0) for counter in counters]) if counters else ()
    seen: list[Seen] = []
    several: list[int] = []
    for place, (outcome, (limits, _)) in enumerate(zip(outcomes, counters, strict=True)):
        if isinstance(outcome, StoreUnavailable):
            seen.append((Decision(False, limits=limits, degraded=True), ()))
        elif len(limits.limits) == 1:
            seen.append((outcome, (outcome,)))
        else:
            seen.append((outcome, ()))
            if not outcome.degraded:
                several.append(place)
    for start in range(0, len(several), _WINDOWS_BATCH_SIZE):
        places = several[start : start + _WINDOWS_BATCH_SIZE]
        for place, windows in zip(places, await store.windows([counters[place] for place in places]), strict=True):
            seen[place] = (seen[place][0], () if windows is None else tuple(windows))
        # A store in memory never suspends.
        await asyncio.sleep(0)
    return seen
