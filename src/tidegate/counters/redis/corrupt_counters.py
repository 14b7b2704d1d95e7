"""Counters whose values no script can read: something else wrote the key, or it was damaged.

A script that fails for such a value would fail every check of that subject for as long as the key lives. So the value is reset,
once it is certain that the value is the cause (`reset_corrupt.lua`); all that is lost is what that counter had counted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from tidegate.counters.redis.keyspace import hash_tag, key_of
from tidegate.counters.redis.scripts import Script, parameters, script
from tidegate.errors import clip
from tidegate.policy.limits import LimitSet

logger = logging.getLogger(__name__)

_LOG_EVERY_S: Final = 1.0

RunBy = Callable[[bytes, Script, Sequence[bytes], Sequence[bytes], float], Awaitable[Any]]
"""Runs a script on the shard of a hash tag, with keys and arguments, until a deadline."""


class CorruptCounters:
    """Resets them, and counts how many there were.

    Attributes:
        resets: counters that were reset.
    """

    def __init__(self, run: RunBy) -> None:
        self.resets = 0
        self._run = run
        self._logged_at = -_LOG_EVERY_S

    async def reset(self, counters: Sequence[tuple[LimitSet, str]], cost: int, deadline: float) -> bool:
        """Reset those of a failed check that cannot be read; several instances may do so at once.

        Args:
            counters: of the check, all on one server.
            cost: of the check.
            deadline: monotonic s.

        Returns:
            Whether any was reset, so that the check can be tried again.

        Raises:
            StoreUnavailable: if the server does not answer.
        """
        tag = hash_tag(counters[0][1])
        keys = [key_of(limits, subject) for limits, subject in counters]
        arguments = [*(parameters(limits) for limits, _ in counters), b"%d" % cost]
        work = script("reset_corrupt", frozenset(limits.algorithm for limits, _ in counters))
        reply = await self._run(tag, work, [*keys, b"tg:{%b}" % tag], arguments, deadline)
        places = [place for place in reply if type(place) is int] if type(reply) is list else []
        for place in places:
            self._count(keys[place - 1], counters[place - 1][0])
        return bool(places)

    def _count(self, key: bytes, limits: LimitSet) -> None:
        self.resets += 1
        now = time.monotonic()
        if now - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = now
            logger.warning(
                "corrupt counter reset: key %s of %s had a value that cannot be decoded; %d reset so far. "
                "Check which other program writes keys that begin with tg:",
                clip(key),
                clip(limits.name),
                self.resets,
            )
