"""What remains of every limit of a check, for headers that name them all: read after it, with one more call to the store."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TypeVar

from msgspec.structs import replace

from tidegate.counters import Counters, CounterStore
from tidegate.decision import Decision, WindowLeft

_Outcome = TypeVar("_Outcome")


async def with_windows(store: CounterStore, decided: Sequence[tuple[_Outcome, Counters]]) -> list[_Outcome]:
    """Add to decisions what remains of all their limits.

    Args:
        store: that decided.
        decided: outcomes, and what each was charged to.

    Returns:
        The outcomes. Those that are no decision by any limit, by the fallback, or by counters that the store cannot read now,
        are as they were.
    """
    outcomes = [outcome for outcome, _ in decided]
    wanted = [
        (place, counters)
        for place, (outcome, counters) in enumerate(decided)
        if isinstance(outcome, Decision) and outcome.binding is not None and not outcome.degraded
    ]
    if not wanted:
        return outcomes
    found = iter(await store.windows([counter for _, counters in wanted for counter in counters]))
    for place, counters in wanted:
        own = list(islice(found, len(counters)))
        lefts = [
            WindowLeft(each.binding, each.remaining or 0, each.reset_after_us)
            for windows in own
            for each in windows or ()
            if each.binding is not None
        ]
        decision = outcomes[place]
        if None not in own and isinstance(decision, Decision):
            outcomes[place] = replace(decision, windows=tuple(lefts))
    return outcomes
