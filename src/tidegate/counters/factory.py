"""From a counter store's URL to the store."""

from __future__ import annotations

from collections.abc import Callable

from tidegate.counters import CounterStore
from tidegate.counters.memory import DEFAULT_MAX_SUBJECTS, MemoryCounters
from tidegate.errors import SettingsError

KINDS = ("memory://",)


def open_counters(url: str, *, max_subjects: int = DEFAULT_MAX_SUBJECTS, clock: Callable[[], int] | None = None) -> CounterStore:
    """Open the counter store that a URL names.

    Args:
        url: `memory://`.
        max_subjects: most counters held in memory, 1 or more.
        clock: for `memory://`: gives µs since the epoch and never goes back; the machine's where not given.

    Returns:
        The store.

    Raises:
        SettingsError: if the URL names no store that this version has.
    """
    if url == "memory://":
        return MemoryCounters(max_subjects, clock)
    # Only the scheme is repeated: the rest of a store's URL may hold a password.
    scheme = url.partition("://")[0][:20]
    raise SettingsError(f"counters.url with the scheme {scheme!r} is no counter store of this version: use {', '.join(KINDS)}")
