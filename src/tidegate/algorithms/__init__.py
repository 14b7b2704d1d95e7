"""The algorithms of limits, quotas and concurrency, as pure functions:
`(limit, state, now, cost) → (state', remaining, reset, retry)`.

Each module has `decide` and `expires_at`, no I/O and no clock. Times are integer µs since the epoch, read off the
counter store's clock. A state is a tuple of integers, or None where nothing was consumed that still counts; it never depends
on a limit's amount in a way that changing the amount would lose what was consumed.

`decide` returns `(state', remaining, reset_after_us, retry_after_us)`:

- `state'` is None when the cost is denied: then nothing may be written. For cost 0 it is the state as it stands.
- `remaining` is what is left after the charge (before it, when denied), never below 0; that of a quota is below 0 where the cost
  is allowed as overage: by so many units more than the quota are used then.
- `reset_after_us` is the time until nothing that was consumed counts any more: the state is None again from then on.
- `retry_after_us` is 0 when allowed, the exact time until the same cost passes without other charges when denied, and
  None if it never will (the cost exceeds the capacity).

`merge(limit, state, other)` adds a state of another store without applying the limit: what a fallback admitted while the store
was unavailable, or, with units below 0, refunds.

Each module has a Lua script with the same logic, which Redis runs; tests compare the two step by step.

All functions are pure and thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from tidegate.algorithms import concurrent, failures, fixed_window, leaky_bucket, quota, sliding_log, sliding_window, token_bucket
from tidegate.policy.limits import Algorithm, AnyAlgorithm, ConcurrencyAlgorithm, FailureAlgorithm, QuotaAlgorithm

State: TypeAlias = tuple[Any, ...] | None
AlgorithmResult: TypeAlias = tuple[State, int, int, int | None]
Decide: TypeAlias = Callable[[Any, Any, int, int], AlgorithmResult]
ExpiresAt: TypeAlias = Callable[[Any, Any], int]
Merge: TypeAlias = Callable[[Any, Any, Any], tuple[Any, ...]]

DECIDE: Final[Mapping[AnyAlgorithm, Decide]] = {
    Algorithm.FIXED_WINDOW: fixed_window.decide,
    Algorithm.SLIDING_WINDOW: sliding_window.decide,
    Algorithm.SLIDING_LOG: sliding_log.decide,
    Algorithm.TOKEN_BUCKET: token_bucket.decide,
    Algorithm.LEAKY_BUCKET: leaky_bucket.decide,
    QuotaAlgorithm.QUOTA: quota.decide,
    ConcurrencyAlgorithm.CONCURRENT: concurrent.decide,
    FailureAlgorithm.FAILURES: failures.decide,
}
EXPIRES_AT: Final[Mapping[AnyAlgorithm, ExpiresAt]] = {
    Algorithm.FIXED_WINDOW: fixed_window.expires_at,
    Algorithm.SLIDING_WINDOW: sliding_window.expires_at,
    Algorithm.SLIDING_LOG: sliding_log.expires_at,
    Algorithm.TOKEN_BUCKET: token_bucket.expires_at,
    Algorithm.LEAKY_BUCKET: leaky_bucket.expires_at,
    QuotaAlgorithm.QUOTA: quota.expires_at,
    ConcurrencyAlgorithm.CONCURRENT: concurrent.expires_at,
    FailureAlgorithm.FAILURES: failures.expires_at,
}
MERGE: Final[Mapping[AnyAlgorithm, Merge]] = {
    Algorithm.FIXED_WINDOW: fixed_window.merge,
    Algorithm.SLIDING_WINDOW: sliding_window.merge,
    Algorithm.SLIDING_LOG: sliding_log.merge,
    Algorithm.TOKEN_BUCKET: token_bucket.merge,
    Algorithm.LEAKY_BUCKET: leaky_bucket.merge,
    QuotaAlgorithm.QUOTA: quota.merge,
    ConcurrencyAlgorithm.CONCURRENT: concurrent.merge,
    FailureAlgorithm.FAILURES: failures.merge,
}
