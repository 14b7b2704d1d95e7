"""Storage of the counters in memory: keys, expiry, eviction, and the states that sets of one name share.

Layout. A counter's key is a short token for (name, algorithm, windows) followed by the subject; its value is the algorithm's
state, or a tuple of states where there are several limits. Keys are spread over 256 dictionaries, because a dictionary that
grows is copied whole: 1 million keys in one would block the process for 40 ms, in 256 for 0.2 ms.

Expiry. Each key is in exactly one bucket of keys that expire at about the same time (bucket width: an eighth of the time to
expiry). Every charge does a bounded part of the work that is due; a key whose expiry has moved meanwhile goes to a later
bucket.

Bounds. At `max_subjects` counters (a sliding log weighs one more for every `LOG_ENTRIES_A_SUBJECT` entries) the nearest to
expiry are evicted first, counted in `evicted`. "Nearest" is exact to a bucket's width; after `SWEEP_STEPS` keys in a row whose
expiry has moved the next one is evicted in any case, to bound the work of one check.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from tidegate.algorithms import DECIDE, EXPIRES_AT
from tidegate.policy.limits import Algorithm, LimitSet

DEFAULT_MAX_SUBJECTS: Final = 1_000_000
LOG_ENTRIES_A_SUBJECT: Final = 8
_SHARDS: Final = 256
SWEEP_STEPS: Final = 8
_MAX_EXPIRED_ENTRIES: Final = 128
"""A denial drops the expired entries of a log where there are more: the next denial would walk them again."""
_MAX_COMPILED: Final = 65_536
_EMPTIED: Final[tuple[()]] = ()
"""State of a counter that was reset or carried over: nothing consumed, but its key is still in an expiry bucket."""


def store_clock() -> Callable[[], int]:
    """A clock that starts at the wall clock's time and then never jumps.

    Returns:
        A function that gives µs since the epoch.
    """
    offset = time.time_ns() - time.monotonic_ns()
    monotonic_ns = time.monotonic_ns
    return lambda: (monotonic_ns() + offset) // 1000


class CompiledLimits:
    """What was prepared for one `LimitSet`."""

    __slots__ = ("bucket", "decide", "expires_at", "fresh", "limit", "limits", "logs", "only", "other_layouts", "simple", "token")

    def __init__(self, limits: LimitSet, token: str) -> None:
        self.limits = limits
        self.token = token
        self.bucket = limits.algorithm.is_bucket
        self.decide = DECIDE[limits.algorithm]
        self.expires_at = EXPIRES_AT[limits.algorithm]
        self.limit = limits.limits[0]
        self.only = self.limit if len(limits.limits) == 1 else None
        self.fresh: tuple[Any, ...] = (None,) * len(limits.limits)
        self.logs = limits.algorithm is Algorithm.SLIDING_LOG
        self.simple = self.only is not None and not self.logs and not limits.soft
        self.other_layouts: list[CompiledLimits] = []

    def unpack(self, stored: Any) -> tuple[Any, ...]:
        """The states of all limits in a stored value."""
        if self.only is None:
            states: tuple[Any, ...] = stored or self.fresh
            return states
        return (stored or None,)

    def pack(self, states: Sequence[Any]) -> Any:
        """The value to store for the states of all limits."""
        return states[0] if self.only is not None else tuple(states)

    def expiry(self, stored: Any) -> int:
        """When a stored value stops counting, µs since the epoch; 0 for one that no longer does."""
        if self.only is not None:
            return self.expires_at(self.only, stored) if stored else 0
        return max(
            (
                self.expires_at(limit, state)
                for limit, state in zip(self.limits.limits, self.unpack(stored), strict=True)
                if state is not None
            ),
            default=0,
        )

    def entries(self, stored: Any) -> int:
        """Log entries in a stored value."""
        return sum(len(state[1]) for state in self.unpack(stored) if state is not None) if self.logs else 0


class MemoryStorage:
    """Counters in memory with bounds. Parameters: see `MemoryCounters`."""

    def __init__(self, max_subjects: int = DEFAULT_MAX_SUBJECTS, clock: Callable[[], int] | None = None) -> None:
        if max_subjects < 1:
            raise ValueError(f"max_subjects {max_subjects} must be at least 1")
        self.max_subjects = max_subjects
        self.evicted = 0
        self._clock = clock or store_clock()
        self._shards: list[dict[str, Any]] = [{} for _ in range(_SHARDS)]
        self._compiled: dict[LimitSet, CompiledLimits] = {}
        self._newest: dict[str, CompiledLimits] = {}
        self._pairs: dict[int, Any] = {}
        self._tokens: dict[tuple[str, str], str] = {}
        self._by_name: dict[str, list[str]] = {}
        self._due: dict[int, list[str]] = {}
        self._ends: list[int] = []
        self._next_due = 1 << 62
        self._count = 0
        self._log_entries = 0

    def __len__(self) -> int:
        """Number of counters, expired ones that were not yet removed included."""
        return self._count

    async def close(self) -> None:
        """See `CounterStore.close`."""
        self.clear()

    def clear(self) -> None:
        """Reset all counters."""
        for shard in self._shards:
            shard.clear()
        self._due.clear()
        self._ends.clear()
        self._next_due = 1 << 62
        self._count = self._log_entries = 0

    def use_clock(self, clock: Callable[[], int] | None) -> None:
        """Count by another clock, with nothing consumed: for tests.

        Args:
            clock: gives µs since the epoch and never goes back; None for the machine's.
        """
        self.clear()
        self._clock = clock or store_clock()

    def sweep(self, steps: int, now: int | None = None) -> int:
        """Process keys that are due: drop the expired ones, move the others to a later bucket.

        Args:
            steps: most keys to process, 1 or more; 1,000 take about 1 ms.
            now: µs since the epoch; the store's clock where not given.

        Returns:
            Keys processed; fewer than `steps` when nothing more is due.
        """
        now = self._clock() if now is None else now
        for done in range(steps):
            if now < self._next_due:
                return done
            key = self._take_first()
            if key is not None:
                self._drop_or_move(key, now)
        return steps

    def _prepare(self, limits: LimitSet) -> CompiledLimits:
        """What was prepared for a limit set. Sets that differ only in amounts share a token and so their counters."""
        known = self._compiled.get(limits)
        if known is not None:
            return known
        layout = f"{limits.algorithm}:" + ",".join(limit.window_name for limit in limits.limits)
        token = self._tokens.get((limits.name, layout))
        if token is None:
            token = self._tokens[(limits.name, layout)] = f"{len(self._tokens):x}:"
            self._by_name.setdefault(limits.name, []).append(token)
        if len(self._compiled) >= _MAX_COMPILED:
            self._compiled.clear()
        compiled = self._compiled[limits] = self._newest[token] = CompiledLimits(limits, token)
        # Sets of the same name with other windows: their counters are read when a subject is new under this one.
        for other in self._by_name[limits.name]:
            if other != token:
                compiled.other_layouts.append(self._newest[other])
        for other in self._by_name[limits.name]:
            other_layouts = self._newest[other].other_layouts
            if other != token and all(other_set.token != token for other_set in other_layouts):
                other_layouts.append(compiled)
        return compiled

    def _inherit(self, compiled: CompiledLimits, subject: str) -> Any:
        """Carry over what a subject consumed under the same name while the rule had other windows beside the shared ones."""
        for other_set in compiled.other_layouts:
            stored = self._shards[hash(other_set.token + subject) & 255].get(other_set.token + subject)
            if not stored or other_set.limits.algorithm is not compiled.limits.algorithm:
                continue
            by_window = dict(zip((limit.window_name for limit in other_set.limits.limits), other_set.unpack(stored), strict=True))
            states = [by_window.get(limit.window_name) for limit in compiled.limits.limits]
            if any(state is not None for state in states):
                self._empty(other_set, subject)
                key = compiled.token + subject
                # A limit that is new here starts from nothing consumed: the state of a peek.
                now = self._clock()
                value = compiled.pack(
                    [
                        compiled.decide(limit, state, now, 0)[0]
                        for limit, state in zip(compiled.limits.limits, states, strict=True)
                    ]
                )
                shard = self._shards[hash(key) & 255]
                known = key in shard  # emptied when its units went to another set: it is still in an expiry bucket
                shard[key] = value
                if not known:
                    self._file_new(key, compiled.expiry(value), now)
                self._log_entries += compiled.entries(value)
                return value
        return None

    def _drop_expired_entries(self, compiled: CompiledLimits, shard: dict[str, Any], key: str, now: int) -> None:
        """Drop a log's expired entries, where they are many, though nothing is charged."""
        stored = shard.get(key)
        if not stored:
            return
        states = compiled.unpack(stored)
        if not any(
            state is not None and len(state[1]) > _MAX_EXPIRED_ENTRIES and state[1][_MAX_EXPIRED_ENTRIES] <= now - limit.window_us
            for limit, state in zip(compiled.limits.limits, states, strict=True)
        ):
            return
        kept = shard[key] = compiled.pack(
            [compiled.decide(limit, state, now, 0)[0] for limit, state in zip(compiled.limits.limits, states, strict=True)]
        )
        self._log_entries += compiled.entries(kept) - compiled.entries(stored)

    def _empty(self, compiled: CompiledLimits, subject: str) -> None:
        key = compiled.token + subject
        shard = self._shards[hash(key) & 255]
        stored = shard.get(key)
        if stored:
            self._log_entries -= compiled.entries(stored)
            shard[key] = _EMPTIED

    def _file_new(self, key: str, expires: int, now: int) -> None:
        # Room is made before the new key is filed: only filed keys can be evicted, so it cannot be its own victim.
        if self._count + self._log_entries // LOG_ENTRIES_A_SUBJECT >= self.max_subjects:
            self._evict(now, room=1)
        self._count += 1
        self._file(key, expires, now)

    def _file(self, key: str, expires: int, now: int) -> None:
        """Put a key into the bucket of its expiry: one of at most eight for each doubling of the time to it."""
        shift = max((expires - now).bit_length() - 3, 17)
        end = ((expires >> shift) + 1) << shift
        bucket = self._due.get(end)
        if bucket is None:
            self._due[end] = [key]
            heapq.heappush(self._ends, end)
            self._next_due = self._ends[0]
        else:
            bucket.append(key)

    def _take_first(self) -> str | None:
        """Take a key out of the bucket that is due first; None where that one was empty."""
        end = self._ends[0]
        bucket = self._due[end]
        key = bucket.pop() if bucket else None
        if not bucket:
            heapq.heappop(self._ends)
            del self._due[end]
            self._next_due = self._ends[0] if self._ends else 1 << 62
        return key

    def _find(self, key: str) -> tuple[CompiledLimits, dict[str, Any], Any]:
        """The compiled limits, the shard and the stored value of a filed key."""
        shard = self._shards[hash(key) & 255]
        return self._newest[key[: key.index(":") + 1]], shard, shard[key]

    def _drop_or_move(self, key: str, now: int) -> None:
        """Drop a key that has expired, or file it again where its expiry has moved."""
        compiled, shard, stored = self._find(key)
        expires = compiled.expiry(stored) if stored else 0
        if expires > now:
            self._file(key, expires, now)
        else:
            self._drop(compiled, shard, key, stored)

    def _drop(self, compiled: CompiledLimits, shard: dict[str, Any], key: str, stored: Any) -> None:
        del shard[key]
        self._count -= 1
        if stored:
            self._log_entries -= compiled.entries(stored)

    def _count_log_entries(self, grown: int, now: int) -> None:
        """Keep the number of log entries, and the bound on it where a log has grown."""
        self._log_entries += grown
        if grown > 0 and self._count + self._log_entries // LOG_ENTRIES_A_SUBJECT > self.max_subjects:
            self._evict(now, room=0)

    def _evict(self, now: int, room: int) -> None:
        """Make room: drop what has expired, else the nearest to expiry; never the last one: it would refill itself."""
        moved = 0
        while (
            self._ends
            and self._count + room > 1
            and self._count + room + self._log_entries // LOG_ENTRIES_A_SUBJECT > self.max_subjects
        ):
            end = self._ends[0]
            key = self._take_first()
            if key is None:
                continue
            compiled, shard, stored = self._find(key)
            expires = compiled.expiry(stored) if stored else 0
            if expires > end and moved < SWEEP_STEPS:
                self._file(key, expires, now)
                moved += 1
                continue
            self._drop(compiled, shard, key, stored)
            self.evicted += expires > now
