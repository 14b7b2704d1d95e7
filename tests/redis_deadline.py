"""The deadline of calls to a Redis, moved while its connection lives."""

from __future__ import annotations

import msgspec

from tests.moments import PATIENCE_S
from tidegate.counters.redis.store import RedisCounters

NEVER_S = 10 * PATIENCE_S
"""A deadline that no test lasts to: what is answered by then is answered at once, whatever else the machine does."""


def set_deadline(store: RedisCounters, timeout_s: float) -> None:
    """Set the deadline of calls of a store that has one connection: of those not yet answered, and of those to come.

    Args:
        store: connected.
        timeout_s: s; a connection counts as hung by the deadline that it was made with.
    """
    (connection,) = store.connections()
    connection._options = msgspec.structs.replace(connection._options, timeout_s=timeout_s)
