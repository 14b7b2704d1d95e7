"""Which server counts a slot: one server, the master that sentinels name, or the nodes of a cluster.

All three have the same interface, `connection_of(slot)`. They differ in how they find a server and how they treat a
redirection. Each follows changes in the background, with at most one refresh a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import hiredis
import msgspec

from tidegate.background import SUPERVISOR, stop
from tidegate.counters.redis.connection import Connection
from tidegate.counters.redis.pipeline import ConnectionOptions
from tidegate.counters.redis.resp import encode_command
from tidegate.counters.redis.url import MAX_PORT, Endpoint, RedisUrl
from tidegate.counters.redis.url import Topology as Kind
from tidegate.errors import StoreUnavailable
from tidegate.jitter import JITTER
from tidegate.listen_address import is_host

logger = logging.getLogger(__name__)

SLOTS: Final = 16_384
NO_SHARD: Final = "none"
"""Used as the address of a slot that no server owns."""
MIN_REFRESH_INTERVAL_S: Final = 1.0
_REFRESH_INTERVAL_S: Final = 10.0
_FIRST_MAP_TIMEOUT_S: Final = 1.0


class Topology(Protocol):
    """What the store needs of its servers."""

    sharded: bool
    """Whether keys of different slots cannot be charged in one step."""

    async def start(self, timeout_s: float) -> None:
        """Connect; returns when the first servers are there or the time is over, whichever is first."""
        ...

    def connection_of(self, slot: int) -> Connection:
        """The connection to the server that counts a slot; raises `StoreUnavailable` where there is none."""
        ...

    def owner_of(self, slot: int) -> Connection | None:
        """The same; None where there is none. Does not trigger a refresh."""
        ...

    def connection_to(self, endpoint: Endpoint) -> Connection:
        """The connection to a server that a redirection names."""
        ...

    def connections(self) -> Sequence[Connection]:
        """All servers that count."""
        ...

    @property
    def complete(self) -> bool:
        """Whether every slot has a server that counts it, as far as is known."""
        ...

    def moved(self, slot: int, endpoint: Endpoint) -> None:
        """A server redirected: another one owns a slot."""
        ...

    def mark_stale(self, connection: Connection, why: str) -> None:
        """A server answered as one that is no longer responsible, such as a demoted master: refresh what is known."""
        ...

    def subscribe(
        self, channel: str, on_push: Callable[[list[Any]], None], on_change: Callable[[Connection], None]
    ) -> Connection:
        """A new connection that listens on a channel, on any suitable server; the caller closes it."""
        ...

    async def pause(self, seconds: float) -> None:
        """Wait before a command is sent again."""
        ...

    async def close(self) -> None:
        """End all connections."""
        ...


class Standalone:
    """One server, or the one that sentinels name as the master."""

    sharded = False

    def __init__(self, url: RedisUrl, options: ConnectionOptions) -> None:
        self._url = url
        self._watchers: list[Connection] = []
        sentinels = url.topology is Kind.SENTINEL
        self._options = options
        self._connection = Connection(self._find_master if sentinels else self._fixed_endpoint, options, must_be_master=sentinels)
        if sentinels:
            to_sentinel = msgspec.structs.replace(options, credentials=url.sentinel_credentials, db=0)
            for endpoint in url.endpoints:
                self._watchers.append(Connection(_at(endpoint), to_sentinel, subscribe="+switch-master", on_push=self._on_push))

    async def start(self, timeout_s: float) -> None:
        """See `Topology`."""
        await self._connection.wait_up(timeout_s)

    def connection_of(self, slot: int) -> Connection:  # noqa: ARG002 - one server counts them all
        """See `Topology`."""
        return self._connection

    def owner_of(self, slot: int) -> Connection | None:  # noqa: ARG002 - one server counts them all
        """See `Topology`."""
        return self._connection

    def connection_to(self, endpoint: Endpoint) -> Connection:
        """See `Topology`."""
        raise StoreUnavailable(
            f"Redis at {self._connection.endpoint} redirects to {endpoint}: use redis+cluster:// in counters.url",
            reason="refused",
        )

    def connections(self) -> Sequence[Connection]:
        """See `Topology`."""
        return (self._connection,)

    @property
    def complete(self) -> bool:
        """See `Topology`."""
        return True

    def moved(self, slot: int, endpoint: Endpoint) -> None:  # noqa: ARG002 - one server counts them all
        """See `Topology`."""
        self.connection_to(endpoint)

    def mark_stale(self, connection: Connection, why: str) -> None:
        """See `Topology`."""
        connection.drop(why)

    def subscribe(
        self, channel: str, on_push: Callable[[list[Any]], None], on_change: Callable[[Connection], None]
    ) -> Connection:
        """See `Topology`."""
        locate = self._find_master if self._watchers else self._fixed_endpoint
        return Connection(
            locate,
            self._options,
            must_be_master=bool(self._watchers),
            subscribe=channel,
            on_push=on_push,
            on_change=on_change,
        )

    async def close(self) -> None:
        """See `Topology`."""
        for connection in (*self._watchers, self._connection):
            await connection.close()

    async def pause(self, seconds: float) -> None:
        """See `Topology`."""
        await asyncio.sleep(seconds)

    async def _fixed_endpoint(self) -> Endpoint:
        return self._url.endpoints[0]

    async def _find_master(self) -> Endpoint:
        """Query all sentinels that can be reached and take the answer of the majority."""
        ask = encode_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._url.master)
        await asyncio.gather(*(watcher.wait_up(0.5) for watcher in self._watchers[:1]))
        votes: dict[Endpoint, int] = {}
        reached = 0
        for watcher in self._watchers:
            if not watcher.up and not await watcher.wait_up(0.05):
                continue
            try:
                reply = await watcher.send_and_wait(ask)
            except StoreUnavailable:
                continue  # an unreachable sentinel has no vote; the case of none left is handled below
            reached += 1
            endpoint = endpoint_of(reply)
            if endpoint is not None:
                votes[endpoint] = votes.get(endpoint, 0) + 1
        if not reached:
            raise StoreUnavailable("no sentinel can be reached", reason="disconnected")
        if not votes:
            raise StoreUnavailable(f"the sentinels do not know a master named {self._url.master!r}", reason="refused")
        return max(votes, key=lambda endpoint: votes[endpoint])

    def _on_push(self, push: list[Any]) -> None:
        """`+switch-master`: name, old host, old port, new host, new port."""
        if len(push) == 3 and push[0] == b"message":
            words = push[2].decode(errors="replace").split()
            if len(words) == 5 and words[0] == self._url.master:
                endpoint = endpoint_of(words[3:])
                if endpoint is not None and endpoint != self._connection.endpoint:
                    self._connection.drop(f"the sentinels promoted {endpoint} to master")


class Cluster:
    """The masters of a Redis Cluster."""

    sharded = True

    def __init__(self, url: RedisUrl, options: ConnectionOptions) -> None:
        self._seeds = url.endpoints
        self._options = options
        self._nodes: dict[Endpoint, Connection] = {}
        self._owners: list[Connection | None] = [None] * SLOTS
        self._refresh_wanted = asyncio.Event()
        self._stale = False
        self._has_map = asyncio.Event()
        self._refresher = SUPERVISOR.start("redis_topology", self._keep_map_fresh)
        self._closing: set[asyncio.Task[None]] = set()

    async def start(self, timeout_s: float) -> None:
        """See `Topology`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._has_map.wait()
                for connection in self.connections():
                    await connection.wait_up(timeout_s)

    def connection_of(self, slot: int) -> Connection:
        """See `Topology`."""
        connection = self._owners[slot]
        if connection is None:
            self._refresh_wanted.set()
            raise StoreUnavailable(f"no node of the Redis cluster owns slot {slot}", reason="cluster_down")
        return connection

    def owner_of(self, slot: int) -> Connection | None:
        """See `Topology`."""
        return self._owners[slot]

    def connection_to(self, endpoint: Endpoint) -> Connection:
        """See `Topology`."""
        connection = self._nodes.get(endpoint)
        if connection is None:
            connection = self._nodes[endpoint] = Connection(
                _at(endpoint), self._options, in_cluster=True, on_change=self._changed
            )
        return connection

    def connections(self) -> Sequence[Connection]:
        """See `Topology`."""
        return tuple(dict.fromkeys(owner for owner in self._owners if owner is not None))

    @property
    def complete(self) -> bool:
        """See `Topology`."""
        return None not in self._owners

    def moved(self, slot: int, endpoint: Endpoint) -> None:
        """See `Topology`."""
        self._owners[slot] = self.connection_to(endpoint)
        self._refresh_wanted.set()

    def mark_stale(self, connection: Connection, why: str) -> None:
        """See `Topology`."""
        # Every check of a lost slot range reports it until the map is complete: logged once.
        level = logging.DEBUG if self._stale else logging.INFO
        logger.log(level, "Redis at %s: %s; refreshing the cluster's slot map", connection.endpoint, why)
        self._stale = True
        self._refresh_wanted.set()

    def subscribe(
        self, channel: str, on_push: Callable[[list[Any]], None], on_change: Callable[[Connection], None]
    ) -> Connection:
        """See `Topology`."""
        return Connection(self._any_node, self._options, in_cluster=True, subscribe=channel, on_push=on_push, on_change=on_change)

    async def _any_node(self) -> Endpoint:
        up = [endpoint for endpoint, connection in self._nodes.items() if connection.up]
        return JITTER.choice(up or self._seeds)

    async def close(self) -> None:
        """See `Topology`."""
        await stop(self._refresher)
        await asyncio.gather(*self._closing, *(connection.close() for connection in self._nodes.values()))

    async def pause(self, seconds: float) -> None:
        """See `Topology`."""
        await asyncio.sleep(seconds)

    def _changed(self, connection: Connection) -> None:
        if not connection.up:
            self._refresh_wanted.set()

    async def _keep_map_fresh(self) -> None:
        """Refresh the slot map: after an error, else every `_REFRESH_INTERVAL_S`; at most once every `MIN_REFRESH_INTERVAL_S`."""
        for seed in self._seeds:
            self.connection_to(seed)
        while True:
            self._refresh_wanted.clear()
            whole = False
            try:
                whole = await self._refresh()
            except StoreUnavailable as error:
                logger.warning("slot map of the Redis cluster not refreshed: %s", error)
            self._stale = self._stale and not whole
            # While a part is missing or unreachable, a promotion is what is waited for.
            await asyncio.sleep(MIN_REFRESH_INTERVAL_S if self._has_map.is_set() else MIN_REFRESH_INTERVAL_S / 10)
            if whole:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._refresh_wanted.wait(), _REFRESH_INTERVAL_S)

    async def _refresh(self) -> bool:
        """Take the map from the first node that returns one. Returns whether all owners are connected."""
        if not any(connection.up for connection in self._nodes.values()):
            for seed in self._seeds:
                self.connection_to(seed)
            await asyncio.wait(
                [asyncio.ensure_future(connection.wait_up(_FIRST_MAP_TIMEOUT_S)) for connection in self._nodes.values()],
                return_when=asyncio.FIRST_COMPLETED,
            )
        # A node that is cut off from the others answers CLUSTERDOWN, and the next one is tried.
        for connection in list(self._nodes.values()):
            if not connection.up:
                continue
            try:
                reply = await connection.send_and_wait(encode_command("CLUSTER", "SLOTS"))
            except StoreUnavailable:
                continue  # the next one is tried; the case of none is handled below
            if isinstance(reply, hiredis.ReplyError):
                continue
            try:
                ranges = ranges_of(reply, connection.endpoint.host)
            except (AttributeError, IndexError, TypeError, ValueError):
                logger.warning("Redis at %s sent an invalid slot map of the cluster: %.100r", connection.endpoint, reply)
                continue
            return self._apply_map(ranges)
        raise StoreUnavailable("no node of the Redis cluster can be reached", reason="disconnected")

    def _apply_map(self, ranges: Sequence[tuple[int, int, Endpoint]]) -> bool:
        owners: list[Connection | None] = [None] * SLOTS
        for first, last, endpoint in ranges:
            owners[first : last + 1] = [self.connection_to(endpoint)] * (last + 1 - first)
        used = {id(owner) for owner in owners if owner is not None}
        if not used:
            return False
        self._owners = owners
        self._has_map.set()
        seeds = set(self._seeds)
        for endpoint, connection in list(self._nodes.items()):
            # Seeds stay, also as replicas: they know the map when the masters are gone.
            if id(connection) not in used and endpoint not in seeds:
                del self._nodes[endpoint]
                task = asyncio.ensure_future(connection.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        return all(owner is not None and owner.up for owner in owners)


def open_topology(url: RedisUrl, options: ConnectionOptions) -> Topology:
    """The topology of a URL; call it inside the event loop that will use it.

    Returns:
        It connects in the background.
    """
    return Cluster(url, options) if url.topology is Kind.CLUSTER else Standalone(url, options)


def endpoint_of(reply: Any) -> Endpoint | None:
    """The address of two texts, as sentinels give it; None where it is none."""
    if not isinstance(reply, list) or len(reply) != 2:
        return None
    host, port = (part.decode(errors="replace") if isinstance(part, bytes) else str(part) for part in reply)
    if not is_host(host) or not (port.isascii() and port.isdecimal() and 0 < int(port[:6]) <= MAX_PORT):
        return None
    return Endpoint(host, int(port))


def ranges_of(reply: Any, own_host: str) -> list[tuple[int, int, Endpoint]]:
    """The ranges of CLUSTER SLOTS: first slot, last slot, master. Raises one of several errors where the reply is not a map."""
    ranges = []
    for first, last, master, *_ in reply:
        host = master[0].decode() if master[0] else ""
        if not (0 <= first <= last < SLOTS and 0 < int(master[1]) <= MAX_PORT):
            raise ValueError("slots or port out of range")
        # An empty host or `?` means the node that answered.
        ranges.append((first, last, Endpoint(host if host not in ("", "?") else own_host, int(master[1]))))
    return ranges


def _at(endpoint: Endpoint) -> Any:
    async def locate() -> Endpoint:
        return endpoint

    return locate
