"""A Redis Cluster on loopback, formed by its own commands."""

from __future__ import annotations

from typing import NamedTuple

from tests.moments import wait_until
from tests.servers.lifetime import Started
from tests.servers.redis_server import Kind, Options, RedisServer, stop_all

SLOTS = 16_384
FORM_S = 90.0
PATIENT_MS = 60_000
_MIGRATE_MS = 5000


class _SelfView(NamedTuple):
    """What a node says of itself."""

    master: bool
    master_id: str
    epoch: int
    ranges: tuple[tuple[int, int], ...]


class RedisCluster(Started):
    """Some masters with the slots in equal shares, and replicas; a context manager that starts and stops all.

    Args:
        masters: 1 or more; replicas take over only with 3 or more.
        replicas: of each master.
        kind: `redis` or `valkey`.
        node_timeout_ms: after how long a node that does not answer is suspected.
        options: more configuration directives for every node.

    Attributes:
        nodes: the masters of the beginning, in the order of their slots, then their replicas.
    """

    def __init__(
        self,
        masters: int = 3,
        replicas: int = 0,
        kind: Kind = "redis",
        node_timeout_ms: int = 1000,
        options: Options | None = None,
    ) -> None:
        self._masters = masters
        self._ids: dict[int, str] = {}
        directives = {
            "cluster-enabled": "yes",
            "cluster-config-file": "nodes.conf",
            "cluster-node-timeout": node_timeout_ms,
            "cluster-announce-ip": RedisServer.host,
            **({"masterauth": options["requirepass"]} if options and "requirepass" in options else {}),
            **(options or {}),
        }
        self._kind, self._directives = kind, directives
        self.nodes = [RedisServer(kind, directives) for _ in range(masters * (1 + replicas))]

    @property
    def url(self) -> str:
        """`redis+cluster://127.0.0.1:P1,127.0.0.1:P2,…`, all nodes."""
        return "redis+cluster://" + ",".join(f"{node.host}:{node.port}" for node in self.nodes)

    def start(self) -> None:
        """Start the nodes, form the cluster and wait until every node takes commands and every replica is in sync.

        Raises:
            RuntimeError: if a node does not start or refuses a command.
            TimeoutError: if the cluster does not form within 30 s.
        """
        try:
            for node in self.nodes:
                node.launch()
            for node in self.nodes:
                node.wait_ready()
            self._form()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all nodes."""
        stop_all(self.nodes)

    def new_nodes(self, number: int) -> list[RedisServer]:
        """Start more nodes, which nobody knows yet; they end with the others.

        Returns:
            They, at the end of `nodes` too.
        """
        new = [RedisServer(self._kind, self._directives) for _ in range(number)]
        self.nodes += new
        for node in new:
            node.launch()
        for node in new:
            node.wait_ready()
            self._ids[node.port] = node.must("CLUSTER", "MYID").decode()
        return new

    def masters(self) -> list[RedisServer]:
        """Ask the nodes which of them are masters; those that are stopped or paused are left out.

        Returns:
            The masters, in the order of `nodes`.
        """
        return [node for node in self.nodes if node.alive and self._view(node).master]

    def replicas_of(self, node: RedisServer) -> list[RedisServer]:
        """Ask the nodes which of them are replicas of one, which may be stopped or paused itself.

        Args:
            node: a master.

        Returns:
            Its replicas that run, in the order of `nodes`.
        """
        wanted = self.id_of(node)
        return [other for other in self.nodes if other.alive and self._view(other).master_id == wanted]

    def owner_of(self, slot: int) -> RedisServer:
        """Ask the nodes who owns a slot; the newest claim counts, as in the cluster itself.

        Args:
            slot: 0…16383.

        Returns:
            The master that owns it.

        Raises:
            LookupError: if no node that runs owns it.
        """
        claims: list[tuple[int, RedisServer]] = []
        for node in self.nodes:
            if node.alive:
                view = self._view(node)
                if view.master and any(first <= slot <= last for first, last in view.ranges):
                    claims.append((view.epoch, node))
        if not claims:
            raise LookupError(f"no node that runs owns slot {slot}")
        return max(claims, key=lambda claim: claim[0])[1]

    def id_of(self, node: RedisServer) -> str:
        """Name a node as the cluster does.

        Args:
            node: of this cluster, running or not.

        Returns:
            Its 40 hexadecimal digits.
        """
        return self._ids[node.port]

    def slot_of(self, key: str | bytes) -> int:
        """Ask which slot a key is in.

        Returns:
            The slot, 0…16383.
        """
        return int(next(node for node in self.nodes if node.alive).must("CLUSTER", "KEYSLOT", key))

    def begin_migration(self, slot: int, to: RedisServer) -> None:
        """Open a slot on both sides: from now on, its owner answers ASK for keys that it does not have.

        Args:
            slot: 0…16383.
            to: the master that is to own it.
        """
        source = self.owner_of(slot)
        to.must("CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(source))
        source.must("CLUSTER", "SETSLOT", slot, "MIGRATING", self.id_of(to))

    def move_keys(self, slot: int, to: RedisServer, most: int | None = None) -> int:
        """Move keys of a slot that is open.

        Args:
            slot: 0…16383.
            to: the master that is to own it.
            most: how many keys; all if None.

        Returns:
            How many were moved.
        """
        source = self.owner_of(slot)
        password = ("AUTH", to.options["requirepass"]) if "requirepass" in to.options else ()
        moved = 0
        while most is None or moved < most:
            keys = source.must("CLUSTER", "GETKEYSINSLOT", slot, 100 if most is None else min(100, most - moved))
            if not keys:
                break
            source.must("MIGRATE", to.host, to.port, "", 0, _MIGRATE_MS, *password, "KEYS", *keys)
            moved += len(keys)
        return moved

    def finish_migration(self, slot: int, to: RedisServer) -> None:
        """Move the rest of an open slot's keys and give it to its new owner, on all masters.

        Args:
            slot: 0…16383.
            to: the master that is to own it.
        """
        source = self.owner_of(slot)
        self.move_keys(slot, to)
        # The new owner first: if the old one gave the slot up before, nobody would own it for a moment.
        for node in (to, source, *(node for node in self.masters() if node not in (to, source))):
            node.must("CLUSTER", "SETSLOT", slot, "NODE", self.id_of(to))

    def migrate_slot(self, slot: int, to: RedisServer) -> None:
        """Move a slot with its keys; nothing happens if it is there.

        Args:
            slot: 0…16383.
            to: the master that is to own it.
        """
        if self.owner_of(slot) is not to:
            self.begin_migration(slot, to)
            self.finish_migration(slot, to)

    def wait_ok(self, timeout_s: float = FORM_S) -> None:
        """Wait until every node that runs takes commands and every replica that runs is in sync.

        Args:
            timeout_s: for how long to ask.

        Raises:
            TimeoutError: if that does not come in time.
        """
        wait_until(self.is_ok, timeout_s, "every node says cluster_state:ok")

    def be_patient(self) -> None:
        """From now on let no node take another for lost that a busy machine gives no core for a while; a lost one is not found.

        Not from the start: a cluster forms the slower the longer the timeout is.
        """
        for node in self.nodes:
            node.must("CONFIG", "SET", "cluster-node-timeout", PATIENT_MS)

    def is_ok(self) -> bool:
        """Whether every node that runs takes commands and every replica that runs is in sync.

        Raises:
            OSError: if a node does not answer.
        """
        return all(self._is_ok(node) for node in self.nodes if node.alive)

    def _form(self) -> None:
        for number, node in enumerate(self.nodes):
            self._ids[node.port] = node.must("CLUSTER", "MYID").decode()
            # Else all begin with the same epoch and spend seconds on agreeing whose claims are newer.
            node.must("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < self._masters:
                first, behind = SLOTS * number // self._masters, SLOTS * (number + 1) // self._masters
                node.must("CLUSTER", "ADDSLOTSRANGE", first, behind - 1)
        for node in self.nodes[1:]:
            self.nodes[0].must("CLUSTER", "MEET", node.host, node.port)
        wait_until(lambda: all(self._knows_all(node) for node in self.nodes), FORM_S, "every node knows every other")
        for number, node in enumerate(self.nodes[self._masters :]):
            node.must("CLUSTER", "REPLICATE", self.id_of(self.nodes[number % self._masters]))
        self.wait_ok()
        wait_until(lambda: all(self._sees_roles(node) for node in self.nodes), FORM_S, "every node knows who replicates whom")

    def _lines(self, node: RedisServer) -> list[list[str]]:
        return [line.split() for line in node.must("CLUSTER", "NODES").decode().splitlines()]

    def _knows_all(self, node: RedisServer) -> bool:
        lines = self._lines(node)
        settled = all("handshake" not in line[2] and (line[7] == "connected" or "myself" in line[2]) for line in lines)
        return settled and {line[0] for line in lines} == set(self._ids.values())

    def _sees_roles(self, node: RedisServer) -> bool:
        masters = [line for line in self._lines(node) if "master" in line[2] and "fail" not in line[2]]
        return len(masters) == self._masters and all(len(line) > 8 for line in masters)

    def _is_ok(self, node: RedisServer) -> bool:
        facts = node.facts("CLUSTER", "INFO")
        if facts["cluster_state"] != "ok" or facts["cluster_slots_assigned"] != str(SLOTS):
            return False
        role = node.must("ROLE")
        return bool(role[0] == b"master" or role[3] == b"connected")

    def _view(self, node: RedisServer) -> _SelfView:
        line = next(line for line in self._lines(node) if "myself" in line[2])
        ranges = []
        for text in line[8:]:
            if not text.startswith("["):  # a slot that is open, listed with its range as well
                first, _, last = text.partition("-")
                ranges.append((int(first), int(last or first)))
        return _SelfView("master" in line[2].split(","), line[3], int(line[6]), tuple(ranges))
