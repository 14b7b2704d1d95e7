"""The leases of programs that are not ours: several threads and event loops may use them, and a process may fork.

A forked process is a copy of its parent, its leases among it. It must not use them: the parent does. So it begins without any.
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections.abc import Callable
from typing import Any

from tidegate.counters import Counters
from tidegate.counters.forks import FORKS
from tidegate.counters.lease_table import LeaseTable
from tidegate.decision import Decision


def _locked(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: LockedLeaseTable, *args: Any) -> Any:
        with self._lock:
            return method(self, *args)

    return call


class LockedLeaseTable(LeaseTable):
    """`LeaseTable` for any number of threads; a forked process finds it empty.

    Parameters: see `LeaseTable`.
    """

    def __init__(self, ttl_us: int, max_subjects: int, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        super().__init__(ttl_us, max_subjects, clock_ns)
        self._lock = threading.RLock()
        FORKS.add(self)

    def take(self, counters: Counters, cost: int) -> Decision | None:
        """See `LeaseTable.take`."""
        with self._lock:
            return LeaseTable.take(self, counters, cost)

    def abandon(self) -> None:
        """See `LeaseTable.abandon`; the lock may be held by a thread that exists in the parent alone."""
        self._lock = threading.RLock()
        super().abandon()

    forked = abandon


for _name, _method in vars(LeaseTable).items():
    if inspect.isfunction(_method) and not _name.startswith("_") and _name not in vars(LockedLeaseTable):
        setattr(LockedLeaseTable, _name, _locked(_method))
