"""Redis without an event loop: the same commands, scripts and redirections as `store`, over blocking sockets.

`BlockingRedisCounters` is `RedisCounters` with another transport: its connections answer before `send` returns, so that none of
its coroutines ever waits, and `run_blocking` gets a result from them at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import cast

import msgspec

from tidegate.counters import Counters, LeaseReturn
from tidegate.counters.redis.blocking_connection import BlockingConnection, sockets_open_before
from tidegate.counters.redis.keyspace import hash_tag
from tidegate.counters.redis.pipeline import ConnectionOptions
from tidegate.counters.redis.resp import encode_command
from tidegate.counters.redis.store import RedisCounters
from tidegate.counters.redis.topology import MIN_REFRESH_INTERVAL_S, SLOTS, Topology, endpoint_of, ranges_of
from tidegate.counters.redis.url import Endpoint, RedisUrl
from tidegate.counters.redis.url import Topology as Kind
from tidegate.errors import StoreUnavailable

logger = logging.getLogger(__name__)


class _Session:
    """A server, equal whenever it was named: a socket that was open then and still is leads to the same process.

    Args:
        connection: to the server.
        at_ns: when, monotonic.
    """

    __slots__ = ("at_ns", "connection")

    def __init__(self, connection: object, at_ns: int) -> None:
        self.connection = connection
        self.at_ns = at_ns

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Session) and other.connection is self.connection

    def __hash__(self) -> int:
        return id(self.connection)


class _BlockingServers:
    """What both topologies have in common; see `Topology`."""

    async def start(self, timeout_s: float) -> None:
        """Sockets are opened by the first command."""

    async def pause(self, seconds: float) -> None:
        """See `Topology`."""
        time.sleep(seconds)  # noqa: ASYNC251 - no event loop: only the calling thread waits


class BlockingStandalone(_BlockingServers):
    """One server, or the one that sentinels name as the master.

    Args:
        url: what to connect to.
        options: of the connections.
    """

    sharded = False
    complete = True

    def __init__(self, url: RedisUrl, options: ConnectionOptions) -> None:
        self._url = url
        sentinels = url.topology is Kind.SENTINEL
        self._connection = BlockingConnection(
            self._find_master if sentinels else lambda: url.endpoints[0], options, must_be_master=sentinels
        )
        to_sentinel = msgspec.structs.replace(options, credentials=url.sentinel_credentials, db=0)
        self._sentinels = [
            BlockingConnection(lambda at=endpoint: at, to_sentinel)  # type: ignore[misc]
            for endpoint in (url.endpoints if sentinels else ())
        ]

    def connection_of(self, slot: int) -> BlockingConnection:  # noqa: ARG002 - one server counts them all
        """See `Topology`."""
        return self._connection

    owner_of = connection_of

    def connection_to(self, endpoint: Endpoint) -> BlockingConnection:
        """See `Topology`."""
        raise StoreUnavailable(
            f"Redis at {self._connection.endpoint} redirects to {endpoint}: use redis+cluster:// in counters.url",
            reason="refused",
        )

    def connections(self) -> Sequence[BlockingConnection]:
        """See `Topology`."""
        return (self._connection,)

    def moved(self, slot: int, endpoint: Endpoint) -> None:  # noqa: ARG002 - one server counts them all
        """See `Topology`."""
        self.connection_to(endpoint)

    def mark_stale(self, connection: BlockingConnection, why: str) -> None:
        """See `Topology`."""
        connection.drop(why)

    async def close(self) -> None:
        """See `Topology`."""
        for connection in (*self._sentinels, self._connection):
            connection.drop("closed")

    def _find_master(self) -> Endpoint:
        """Query all sentinels that can be reached and take the answer of the majority."""
        ask = encode_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._url.master)
        votes: dict[Endpoint, int] = {}
        reached = 0
        for sentinel in self._sentinels:
            try:
                endpoint = endpoint_of(sentinel.send(ask).result())
            except StoreUnavailable:
                continue  # an unreachable sentinel has no vote; the case of none left is handled below
            reached += 1
            if endpoint is not None:
                votes[endpoint] = votes.get(endpoint, 0) + 1
        if not reached:
            raise StoreUnavailable("no sentinel can be reached", reason="disconnected")
        if not votes:
            raise StoreUnavailable(f"the sentinels do not know a master named {self._url.master!r}", reason="refused")
        return max(votes, key=lambda endpoint: votes[endpoint])


class BlockingCluster(_BlockingServers):
    """The masters of a Redis Cluster.

    Args:
        url: some of its nodes.
        options: of the connections.
    """

    sharded = True

    def __init__(self, url: RedisUrl, options: ConnectionOptions) -> None:
        self._seeds = url.endpoints
        self._options = options
        self._nodes: dict[Endpoint, BlockingConnection] = {}
        self._owners: list[BlockingConnection | None] = [None] * SLOTS
        self._stale = True
        self._refreshed_at = float("-inf")
        self._refreshing = threading.Lock()

    @property
    def complete(self) -> bool:
        """See `Topology`."""
        return None not in self._owners

    def connection_of(self, slot: int) -> BlockingConnection:
        """See `Topology`."""
        if self._stale:
            self._refresh()
        connection = self._owners[slot]
        if connection is None:
            self._stale = True
            raise StoreUnavailable(f"no node of the Redis cluster owns slot {slot}", reason="cluster_down")
        return connection

    def owner_of(self, slot: int) -> BlockingConnection | None:
        """See `Topology`."""
        return self._owners[slot]

    def connection_to(self, endpoint: Endpoint) -> BlockingConnection:
        """See `Topology`."""
        connection = self._nodes.get(endpoint)
        if connection is None:
            made = BlockingConnection(lambda: endpoint, self._options, in_cluster=True, on_failure=self._mark)
            connection = self._nodes.setdefault(endpoint, made)
        return connection

    def connections(self) -> Sequence[BlockingConnection]:
        """See `Topology`."""
        return tuple(dict.fromkeys(owner for owner in self._owners if owner is not None))

    def moved(self, slot: int, endpoint: Endpoint) -> None:
        """See `Topology`."""
        self._owners[slot] = self.connection_to(endpoint)
        self._stale = True

    def mark_stale(self, connection: BlockingConnection, why: str) -> None:
        """See `Topology`."""
        logger.debug("Redis at %s: %s; refreshing the cluster's slot map", connection.endpoint, why)
        self._stale = True

    async def close(self) -> None:
        """See `Topology`."""
        for connection in self._nodes.values():
            connection.drop("closed")

    def _mark(self) -> None:
        self._stale = True

    def _refresh(self) -> None:
        """Take the slot map from the first node that returns one, at most once every `MIN_REFRESH_INTERVAL_S`."""
        if time.monotonic() - self._refreshed_at < MIN_REFRESH_INTERVAL_S:
            return
        has_map = any(owner is not None for owner in self._owners)
        # While one thread asks, the others use the map that there is, if there is one.
        if not self._refreshing.acquire(blocking=not has_map):
            return
        try:
            if time.monotonic() - self._refreshed_at < MIN_REFRESH_INTERVAL_S:
                return
            for endpoint in dict.fromkeys((*self._nodes, *self._seeds)):
                try:
                    reply = self.connection_to(endpoint).send(encode_command("CLUSTER", "SLOTS")).result()
                    ranges = ranges_of(reply, endpoint.host)
                except (StoreUnavailable, AttributeError, IndexError, TypeError, ValueError) as error:
                    logger.debug("no slot map of the cluster from Redis at %s: %s", endpoint, error)
                    continue
                if ranges:
                    owners: list[BlockingConnection | None] = [None] * SLOTS
                    for first, last, owner in ranges:
                        owners[first : last + 1] = [self.connection_to(owner)] * (last + 1 - first)
                    self._owners = owners
                    self._stale = None in owners
                    break
            self._refreshed_at = time.monotonic()
        finally:
            self._refreshing.release()


class BlockingRedisCounters(RedisCounters):
    """`RedisCounters` over blocking sockets; call its coroutines through `run_blocking`, from any thread.

    Parameters: see `RedisCounters`. Charges whose counters lie on several shards of a cluster are not supported.
    """

    def __init__(self, url: str | RedisUrl, timeout_s: float = 0.05, name: str = "tidegate") -> None:
        super().__init__(url, timeout_s, name=name)
        topology = BlockingCluster if self.url.topology is Kind.CLUSTER else BlockingStandalone
        self._topology = cast("Topology", topology(self.url, self._options))

    async def start(self) -> None:
        """Sockets are opened by the first command."""

    def _ready(self) -> bool:
        return True

    def session(self, counters: Counters) -> object:
        """See `LeaseGrantor.session`."""
        try:
            return _Session(self._connection(hash_tag(counters[0][1])), time.monotonic_ns())
        except StoreUnavailable:
            return None

    async def give_back(self, returns: Sequence[LeaseReturn]) -> list[bool]:
        """See `LeaseGrantor.give_back`: over sockets that were open when the leases were granted."""
        moments = [each.session.at_ns for each in returns if isinstance(each.session, _Session)]
        with sockets_open_before(min(moments, default=0)):
            return await super().give_back(returns)

    async def close(self) -> None:
        """Close all idle sockets."""
        await self._require_topology().close()
