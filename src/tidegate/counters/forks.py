"""What a fork means to counters: the child is a copy, whose connections, threads, names and leases are still its parent's."""

from __future__ import annotations

import os
from typing import Final, Protocol
from weakref import WeakSet


class OfOneProcess(Protocol):
    """What belongs to the process that made it."""

    def forked(self) -> None:
        """Let go of what is the parent's, in a forked process; takes no lock that another thread of the parent may hold."""
        ...


FORKS: Final[WeakSet[OfOneProcess]] = WeakSet()
"""Whose `forked` is called in a forked process."""


def _forked() -> None:
    for each in list(FORKS):
        each.forked()


os.register_at_fork(after_in_child=_forked)
