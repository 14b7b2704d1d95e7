"""What the instances that share a store report of themselves: their version, and the version of the catalog that they apply.

Each instance writes its own state every few seconds into one document, which contains those of all. The console shows it; no
decision depends on it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

import msgspec

from tidegate.counters.redis.scripts import script
from tidegate.counters.redis.store import RedisCounters
from tidegate.errors import StoreUnavailable
from tidegate.jitter import JITTER

logger = logging.getLogger(__name__)

INTERVAL_S: Final = 3.0
EXPIRY_S: Final = 15
MAX_INSTANCES: Final = 500
"""Maximum number of instances in the document, about 100 KB."""

_TAG: Final = b"instances"
_STATES: Final = b"tg:{instances}states"


class InstanceState(msgspec.Struct, frozen=True):
    """The state of an instance.

    Args:
        name: unique.
        address: of its data plane.
        version: of Tidegate.
        catalog_version: of the catalog, as it applies it.
        started_at: timestamp.
        holds_open: open holds: opened here less settled here, so only the sum over all instances is exact.
        holds_expired: holds that expired unsettled, counted in the same way.
    """

    name: str
    address: str
    version: str
    catalog_version: int
    started_at: str
    holds_open: int = 0
    holds_expired: int = 0


class _Entry(msgspec.Struct):
    at: int
    state: str


class InstanceStates:
    """The states of all instances that share a store.

    Args:
        store: where they are.
        state: returns that of this instance.

    Attributes:
        known: of the last exchange, by name; at most `INTERVAL_S` seconds old while the store answers.
    """

    def __init__(self, store: RedisCounters, state: Callable[[], InstanceState]) -> None:
        self._store = store
        self._state = state
        self.known: tuple[InstanceState, ...] = ()

    async def run(self) -> None:
        """Exchange the states until cancelled."""
        while True:
            try:
                await self.exchange()
            except StoreUnavailable as error:
                # The breakers count failures of checks; the console shows that they are open.
                logger.debug("the state of this instance was not recorded: %s", error)
            await asyncio.sleep(INTERVAL_S * JITTER.uniform(0.8, 1.2))

    async def exchange(self) -> None:
        """Record the state of this instance, and read those of all.

        Raises:
            StoreUnavailable: if the store does not answer.
        """
        own = self._state()
        reply = await self._run(own.name, msgspec.json.encode(own).decode())
        self.known = tuple(sorted((own, *_others(reply, own.name)), key=lambda each: each.name))

    async def leave(self) -> None:
        """Remove the state of this instance; without a store it expires."""
        try:
            await self._run(self._state().name, "")
        except StoreUnavailable as error:
            logger.debug("the state of this instance was not removed: %s", error)

    async def _run(self, name: str, state: str) -> Any:
        arguments = (name, state, str(EXPIRY_S), str(MAX_INSTANCES))
        return await self._store.run(_TAG, script("instances", frozenset()), (_STATES,), arguments)


def _others(reply: Any, own: str) -> list[InstanceState]:
    """The other instances of a document; what another program wrote there is left out."""
    found: list[InstanceState] = []
    try:
        entries = msgspec.json.decode(reply, type=dict[str, _Entry])
    except (msgspec.MsgspecError, TypeError, UnicodeError):
        return found
    for name, entry in entries.items():
        try:
            state = msgspec.json.decode(entry.state, type=InstanceState)
        except (msgspec.MsgspecError, UnicodeError):
            continue
        if state.name == name != own:
            found.append(state)
    return found
