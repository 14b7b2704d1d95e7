"""How many unknown API keys one client may have looked up: who guesses keys must not keep the database busy.

Only look-ups count, and only those that found nothing: keys that are cached, as known or as unknown, are answered from memory. A
client that has used up its look-ups is refused keys that are not cached, until a minute after its first one. What it has under
way at that moment is still looked up: keys go to the database some hundred at a time, so that costs a few queries.

Each process counts for itself, in a bounded table. One event loop.
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
        per_minute: most look-ups of unknown keys for one client, 1 or more.
        max_clients: clients counted, 1 or more; beyond it those that were counted least recently are forgotten.
        clock: gives monotonic seconds.

    Attributes:
        refused: look-ups that were refused.
    """

    def __init__(self, per_minute: int, max_clients: int = MAX_CLIENTS, clock: Callable[[], float] = time.monotonic) -> None:
        self.refused = 0
        self._per_minute = per_minute
        self._max_clients = max_clients
        self._clock = clock
        # When the client's window ends, and its unknown keys in it.
        self._counted: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def __len__(self) -> int:
        """Clients counted."""
        return len(self._counted)

    def wait_s(self, client: str) -> float:
        """How long a client has to wait for its next look-up.

        Args:
            client: its address, as `client_of` gives it.

        Returns:
            Seconds; 0 where it need not wait.
        """
        counted = self._counted.get(client)
        if counted is None or counted[1] < self._per_minute:
            return 0.0
        return max(counted[0] - self._clock(), 0.0)

    def count(self, client: str) -> None:
        """Count a look-up that found nothing.

        Args:
            client: its address, as `client_of` gives it.
        """
        now = self._clock()
        ends, keys = self._counted.pop(client, (now + WINDOW_S, 0))
        self._counted[client] = (now + WINDOW_S, 1) if ends <= now else (ends, keys + 1)
        if len(self._counted) > self._max_clients:
            self._counted.popitem(last=False)
