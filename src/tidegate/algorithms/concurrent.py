"""Concurrency: how many requests are in progress. A slot is taken by a hold and free again when that is settled or expires.

Guarantee: never are more slots taken than the amount. A check takes none; it is denied while none is free.
State: `(taken,)`. Stores count the holds that are open; nothing here changes the state. A slot becomes free when a request ends,
which is unknown in advance: a denial may be retried after a second.
"""

from __future__ import annotations

from typing import Final

from tidegate.policy.limits import Limit
from tidegate.timestamps import US_PER_S

SlotState = tuple[int]
RETRY_US: Final = US_PER_S
"""The same number is in the Lua."""
_NEVER: Final = 1 << 61
_FREE: Final = (0,)


def decide(limit: Limit, state: SlotState | None, now: int, cost: int) -> tuple[SlotState | None, int, int, int | None]:  # noqa: ARG001
    """Whether a slot is free.

    Args:
        limit: its amount is the number of slots.
        state: slots taken; None for none.
        now: not needed.
        cost: 0 for a look, which always passes.
    """
    free = limit.amount - (state[0] if state else 0)
    if free > 0 or not cost:
        return state or _FREE, max(free, 0), 0, 0
    return None, 0, 0, RETRY_US


def expires_at(_: Limit, state: SlotState) -> int:
    """When the state can be dropped: at once where no slot is taken, else not by itself."""
    return _NEVER if state[0] else 0


def merge(_: Limit, state: SlotState | None, __: SlotState) -> SlotState:
    """Merge a state of another store: its slots are not known here, so nothing is added."""
    return state or _FREE
