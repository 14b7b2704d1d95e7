"""Limit sets that are in use, by their content, so that a tier that is loaded again unchanged has the same ones."""

from __future__ import annotations

from typing import Final
from weakref import WeakValueDictionary

from tidegate.policy.limits import LimitSet

_IN_USE: Final[WeakValueDictionary[tuple[object, ...], LimitSet]] = WeakValueDictionary()


def share(limits: LimitSet) -> LimitSet:
    """The set with the same content that is in use already, or this one.

    Stores remember denials, leases and last answers for each set, by its identity. What an instance knows of a subject bounds
    what it admits while the store is slow: it must not be lost whenever a cached tier is loaded again.
    """
    content = (
        *(limits.name, limits.algorithm, limits.limits, limits.on_failure, limits.rule, limits.tier, limits.quotas),
        *(limits.leasable, limits.soft, limits.shadow, limits.failures),
    )
    return _IN_USE.setdefault(content, limits)
