"""Adjustments: units that a gateway reports after a request, charged whatever the limits say, or given back."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import msgspec

from tidegate.counters import Counters
from tidegate.decision import Decision
from tidegate.errors import BadRequest


@runtime_checkable
class AdjustingCounterStore(Protocol):
    """A counter store that can charge above a limit, and give units back."""

    async def adjust(self, counters: Counters, units: int) -> Decision:
        """Charge units whatever the limits say, or give some back, to all counters in one atomic step.

        Args:
            counters: as those of a `Charge`, without limits of requests in progress.
            units: below 0 to give units back: at most what counts in the current window of each limit, of a bucket at most its
                level, of a log at most its 1,000 latest entries.

        Returns:
            What is left afterwards, as the decision of a check of cost 0; always allowed.

        Raises:
            StoreUnavailable: if the store does not answer; it may have adjusted the counters.
        """
        ...


def adjusting(store: object) -> AdjustingCounterStore:
    """A counter store that can adjust.

    Raises:
        BadRequest: if the store, which is not one of Tidegate's, cannot.
    """
    if isinstance(store, AdjustingCounterStore):
        return store
    raise BadRequest(
        f"the counter store {type(store).__name__} can neither charge above a limit nor give units back: use memory:// or Redis"
    )


def of_adjustment(peek: Decision, units: int) -> Decision:
    """The decision of an adjustment.

    Args:
        peek: of a check of cost 0 afterwards.
        units: of the adjustment.
    """
    return msgspec.structs.replace(peek, allowed=True, retry_after_us=0, overage=min(peek.overage, max(units, 0)))
