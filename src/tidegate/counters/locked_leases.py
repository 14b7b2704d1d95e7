"""The leases of programs that are not ours: several threads and event loops may use them, and a process may fork.

A forked process is a copy of its parent, its leases among it. It must not use them: the parent does. So it begins without any.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

from tidegate.counters import Counters, LeaseRequest
from tidegate.counters.forks import FORKS
from tidegate.counters.lease_table import LeaseTable
from tidegate.decision import Decision

F = TypeVar("F", bound=Callable[..., Any])


def _locked(method: F) -> F:
    @functools.wraps(method)
    def call(self: LockedLeaseTable, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast("F", call)


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

    def request(self, counters: Counters, cost: int, now_ns: int) -> LeaseRequest | None:
        """See `LeaseTable.request`."""
        with self._lock:
            return LeaseTable.request(self, counters, cost, now_ns)

    def answered(self, counters: Counters) -> None:
        """See `LeaseTable.answered`."""
        with self._lock:
            LeaseTable.answered(self, counters)

    def confirm(self, counters: Counters) -> None:
        """See `LeaseTable.confirm`."""
        if self._usage:
            with self._lock:
                LeaseTable.confirm(self, counters)

    usage = _locked(LeaseTable.usage)
    take_usage = _locked(LeaseTable.take_usage)
    want_later = _locked(LeaseTable.want_later)
    renewal = _locked(LeaseTable.renewal)
    accept = _locked(LeaseTable.accept)
    sweep = _locked(LeaseTable.sweep)
    drop = _locked(LeaseTable.drop)
    forget = _locked(LeaseTable.forget)
    unused = _locked(LeaseTable.unused)
    settled = _locked(LeaseTable.settled)
    take_returns = _locked(LeaseTable.take_returns)
    take_renewals = _locked(LeaseTable.take_renewals)

    def abandon(self) -> None:
        """See `LeaseTable.abandon`; the lock may be held by a thread that exists in the parent alone."""
        self._lock = threading.RLock()
        super().abandon()

    forked = abandon
