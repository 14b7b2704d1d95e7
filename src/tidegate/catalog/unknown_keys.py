"""Limits look-ups of unknown API keys per client, so that guessing keys cannot overload the database.

Only look-ups that found nothing count: cached keys, known or unknown, are answered from memory. Beyond the limit, keys of this
client that are not cached are rejected until a minute after its first look-up. Look-ups in progress at that time still complete:
keys are looked up in batches of hundreds, so this costs a few queries.

Each process counts separately, in a bounded table. For use in one event loop.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

WINDOW_S: Final = 60.0
MAX_CLIENTS: Final = 10_000


class UnknownKeyLimit:
    """Counts unknown keys by client address.

    Args:
        per_minute: maximum look-ups of unknown keys per client, 1 or more.
        max_clients: maximum number of clients counted, 1 or more; beyond it the least recently counted are dropped.

    Attributes:
        refused: rejected look-ups.
    """

    def __init__(self, per_minute: int, max_clients: int = MAX_CLIENTS, clock: Callable[[], float] = time.monotonic) -> None:
        self.refused = 0
        self._per_minute = per_minute
        self._max_clients = max_clients
        self._clock = clock
        # End of the client's window, and its unknown keys in it.
        self._counted: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def __len__(self) -> int:
        """Number of clients counted."""
        return len(self._counted)

    def wait_s(self, client: str) -> float:
        """How long a client (as returned by `client_of`) must wait for its next look-up, s; 0 if it need not wait."""
        counted = self._counted.get(client)
        if counted is None or counted[1] < self._per_minute:
            return 0.0
        return max(counted[0] - self._clock(), 0.0)

    def count(self, client: str) -> None:
        """Count a look-up that found nothing."""
        now = self._clock()
        ends, keys = self._counted.pop(client, (now + WINDOW_S, 0))
        self._counted[client] = (now + WINDOW_S, 1) if ends <= now else (ends, keys + 1)
        if len(self._counted) > self._max_clients:
            self._counted.popitem(last=False)
