"""Blocks: whom operators stopped, in the memory of one process.

All blocks that hold are in memory, so a check that is not blocked costs no query. A change of the catalog that touches blocks
reads only the rows that were changed since; after a failover, or a gap in the log of changes, all of them are read again. While
the database does not answer, the last known blocks stay active, without end. A block ends at its time by itself, on this
process's clock. One event loop.
"""

from __future__ import annotations

import asyncio
import heapq
import ipaddress
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Protocol

import msgspec

from tidegate.catalog.changes import ALL, BLOCK, Item
from tidegate.errors import CatalogUnavailable
from tidegate.policy.access import AccessSet, ExactAttributes
from tidegate.policy.descriptors import entries_text, unescaped
from tidegate.policy.networks import NEVER, Network
from tidegate.time_slice import TimeSlice
from tidegate.timestamps import now_us

logger = logging.getLogger(__name__)

CIDR: Final = "cidr"
API_KEY_ID: Final = "api_key_id"
CUSTOMER: Final = "customer"
ATTRIBUTE: Final = "attribute"
KINDS: Final = (CIDR, API_KEY_ID, CUSTOMER, ATTRIBUTE)
MAX_BLOCKS: Final = 200_000
"""Most blocks that hold at the same time; each takes about 300 bytes in every process."""
MAX_TARGET: Final = 400
"""Longest text of what is blocked."""
PAGE: Final = 5_000
RETRY_S: Final = 1.0
"""Pause between attempts to read blocks while the catalog does not answer."""


class Block(msgspec.Struct, frozen=True, gc=False):
    """One block.

    Args:
        id: of its row.
        kind: one of `KINDS`.
        target: a network, the id of an API key, a customer's name, or attributes as `attributes_text` writes them.
        until_us: end, µs since the epoch; `NEVER` for a block without an end.
        message: what the blocked client is shown; empty for the usual text.
        ended: whether an operator has removed it.
        version: of the catalog at its last change.
    """

    id: int
    kind: str
    target: str
    until_us: int = NEVER
    message: str = ""
    ended: bool = False
    version: int = 0


class BlockSource(Protocol):
    """Where the blocks are stored."""

    async def version(self) -> int:
        """The current version of the catalog."""
        ...

    async def holding_blocks(self, after_id: int, limit: int) -> Sequence[Block]:
        """Blocks that hold, by id, after one.

        Raises:
            CatalogUnavailable: if the catalog does not answer.
        """
        ...

    async def changed_blocks(self, version: int, after_id: int, limit: int) -> Sequence[Block]:
        """Blocks changed after a version, or in it and with a higher id, by version and id; ended ones too.

        Raises:
            CatalogUnavailable: if the catalog does not answer.
        """
        ...


class BlockIndex:
    """Blocks, found by what they are for.

    Attributes:
        named: networks, API keys and customers.
        attributes: sets of attributes.
        messages: texts for the blocked client, by kind and target; most blocks have none.
    """

    __slots__ = ("_ends", "attributes", "messages", "named")

    def __init__(self) -> None:
        self.named = AccessSet()
        self.attributes = ExactAttributes()
        self.messages: dict[tuple[str, str], str] = {}
        # Blocks that end, the next one first: to free their memory.
        self._ends: list[tuple[int, str, str]] = []

    def __len__(self) -> int:
        """Number of blocks, with those that have ended but were not removed yet."""
        named = self.named
        return len(named.ipv4) + len(named.ipv6) + len(named.api_keys) + len(named.customers) + len(self.attributes)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.named) or bool(self.attributes)

    def apply(self, block: Block) -> None:
        """Add, change or remove a block."""
        if block.ended or block.until_us <= now_us():
            self._remove(block.kind, block.target)
            return
        if block.kind == CIDR:
            network = ipaddress.ip_network(block.target)
            self.named.table_of(network).add(int(network.network_address), network.prefixlen, block.until_us)
        elif block.kind == API_KEY_ID:
            self.named.api_keys[block.target] = block.until_us
        elif block.kind == CUSTOMER:
            self.named.customers[block.target] = block.until_us
        elif block.kind == ATTRIBUTE:
            self.attributes.add(attributes_of(block.target), block.until_us)
        else:
            return  # of a later version
        if block.message:
            self.messages[block.kind, block.target] = block.message
        else:
            self.messages.pop((block.kind, block.target), None)
        if block.until_us != NEVER:
            heapq.heappush(self._ends, (block.until_us, block.kind, block.target))

    def drop_ended(self, at_us: int, most: int = PAGE) -> None:
        """Free the memory of blocks that have ended.

        Args:
            at_us: the time now.
            most: how many at a time.
        """
        while self._ends and self._ends[0][0] <= at_us and most:
            until_us, kind, target = heapq.heappop(self._ends)
            # It may have got another end since.
            if self._end_of(kind, target) == until_us:
                self._remove(kind, target)
            most -= 1

    def network_message(self, network: Network) -> str:
        """What a client in this network is shown; empty for the usual text."""
        return self.messages.get((CIDR, str(network)), "") if self.messages else ""

    def _end_of(self, kind: str, target: str) -> int | None:
        if kind == CIDR:
            network = ipaddress.ip_network(target)
            return self.named.table_of(network).end_of(int(network.network_address), network.prefixlen)
        if kind == ATTRIBUTE:
            return self.attributes.end_of(attributes_of(target))
        return (self.named.api_keys if kind == API_KEY_ID else self.named.customers).get(target)

    def _remove(self, kind: str, target: str) -> None:
        if kind == CIDR:
            network = ipaddress.ip_network(target)
            self.named.table_of(network).remove(int(network.network_address), network.prefixlen)
        elif kind == ATTRIBUTE:
            self.attributes.remove(attributes_of(target))
        else:
            (self.named.api_keys if kind == API_KEY_ID else self.named.customers).pop(target, None)
        self.messages.pop((kind, target), None)


class Blocks:
    """The blocks that hold.

    Args:
        source: where they are stored.
        on_change: called whenever `index` was changed or replaced.
        ttl_s: interval of reading them without a known change, s.

    Attributes:
        index: the blocks.
        failing: whether the last attempt to read them failed.
    """

    def __init__(self, source: BlockSource, on_change: Callable[[BlockIndex], None], ttl_s: float = 60.0) -> None:
        self.index = BlockIndex()
        self.failing = False
        self._source = source
        self._on_change = on_change
        self._ttl_s = ttl_s
        self._place = (0, 0)
        self._all = True
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        """Number of blocks that hold."""
        return len(self.index)

    def changed(self, items: Iterable[Item], *, everything: bool = False) -> None:
        """Read blocks again if a change of the catalog touched them.

        Args:
            items: what was touched.
            everything: whether anything may have been touched, or changes may have been lost.
        """
        if everything:
            self._all = True
        elif all(kind not in (BLOCK, ALL) for kind, _ in items):
            return
        self._wake.set()

    async def load(self) -> None:
        """Read what changed, or all blocks where that is not known.

        Raises:
            CatalogUnavailable: if the catalog does not answer; then the last known ones stay active.
        """
        if self._all:
            await self._load_all()
        await self._load_changed()
        self.index.drop_ended(now_us())
        self._on_change(self.index)

    async def run(self) -> None:
        """Keep the blocks up to date until cancelled."""
        while True:
            try:
                await asyncio.wait_for(self._wake.wait(), RETRY_S if self.failing else self._ttl_s)
            except TimeoutError:
                pass  # nothing was announced: read again all the same
            self._wake.clear()
            try:
                await self.load()
            except CatalogUnavailable as error:
                if not self.failing:
                    logger.warning("blocks cannot be read, the last known ones stay active: %s", error)
                self.failing = True
            else:
                if self.failing:
                    logger.info("blocks read again")
                self.failing = False

    async def _load_all(self) -> None:
        # Cleared first: a gap that is found meanwhile has them read once more.
        self._all = False
        try:
            version = await self._source.version()
            index = BlockIndex()
            after = 0
            slice_ = TimeSlice()
            while page := await self._source.holding_blocks(after, PAGE):
                for block in page:
                    index.apply(block)
                    if slice_.over:
                        await slice_.pause()
                after = page[-1].id
        except BaseException:
            self._all = True
            raise
        self.index = index
        # What changed while they were read is read again, from that version on.
        self._place = (version, 0)

    async def _load_changed(self) -> None:
        slice_ = TimeSlice()
        while page := await self._source.changed_blocks(*self._place, PAGE):
            for block in page:
                self.index.apply(block)
                if slice_.over:
                    await slice_.pause()
            self._place = (page[-1].version, page[-1].id)


def attributes_text(attributes: Mapping[str, str]) -> str:
    """Attributes as one text, `org=acme&user=42`, sorted by name; no two sets of attributes share one."""
    return entries_text(sorted(attributes.items()))


def attributes_of(text: str) -> dict[str, str]:
    """The attributes in a text of `attributes_text`."""
    pairs = (part.partition("=") for part in text.split("&"))
    return {name: unescaped(value) for name, _, value in pairs}
