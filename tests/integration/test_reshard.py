"""deploy/redis/reshard.sh on a real cluster: shards more while checks go on, a dry run, after SIGKILL, and what it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from drills.load import Load

from tests.moments import PATIENCE_S, wait_until
from tests.servers.ports import free_port
from tests.servers.redis_cluster import SLOTS, RedisCluster
from tests.servers.redis_server import Client, RedisServer

DEPLOY = Path(__file__).parents[2] / "deploy" / "redis"
SCRIPT = DEPLOY / "reshard.sh"
NEW = {
    "cluster-enabled": "yes",
    "cluster-config-file": "nodes.conf",
    "cluster-node-timeout": 5000,
    "cluster-require-full-coverage": "no",
}


@pytest.fixture
def cluster() -> Iterator[RedisCluster]:
    with RedisCluster(masters=3, options={"cluster-require-full-coverage": "no"}) as running:
        # Not from the start: a cluster forms the slower the longer it is.
        set_node_timeout(running.nodes, 5000)
        yield running


def set_node_timeout(nodes: list[RedisServer], timeout_ms: int) -> None:
    for node in nodes:
        node.must("CONFIG", "SET", "cluster-node-timeout", timeout_ms)


@pytest.fixture
def new() -> Iterator[list[RedisServer]]:
    with RedisServer(options=NEW) as master, RedisServer(options=NEW) as replica:
        yield [master, replica]


@pytest.fixture
def two_pairs(new: list[RedisServer]) -> Iterator[list[RedisServer]]:
    with RedisServer(options=NEW) as master, RedisServer(options=NEW) as replica:
        yield [*new, master, replica]


def address(node: RedisServer) -> str:
    return f"{node.host}:{node.port}"


def command(cluster: RedisCluster, new: list[RedisServer], *options: str) -> list[str]:
    return [str(SCRIPT), *options, address(cluster.nodes[0]), *map(address, new)]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=150, check=False)


def slots_of(node: RedisServer) -> set[int]:
    line = next(line for line in node.must("CLUSTER", "NODES").decode().splitlines() if "myself" in line)
    ranges = [text.split("-") for text in line.split()[8:] if not text.startswith("[")]
    return {slot for each in ranges for slot in range(int(each[0]), int(each[-1]) + 1)}


def keys_of(nodes: list[RedisServer]) -> int:
    return sum(int(node.must("DBSIZE")) for node in nodes)


def fill(cluster: RedisCluster, keys: int) -> None:
    owners = {slot: node for node in cluster.nodes for slot in slots_of(node)}
    for number in range(keys):
        key = f"key-{number}"
        owners[cluster.slot_of(key)].must("SET", key, number)


def assert_grown(cluster: RedisCluster, new: list[RedisServer]) -> None:
    """That the new pairs, master, replica, master, replica …, count their parts and every node says so."""
    shares = [len(slots_of(node)) for node in (*cluster.nodes, *new[::2])]
    assert sum(shares) == SLOTS
    assert max(shares) - min(shares) <= SLOTS // len(shares) // 50
    for master, replica in zip(new[::2], new[1::2], strict=True):
        role = replica.must("ROLE")
        assert (role[0], role[2], role[3]) == (b"slave", master.port, b"connected")
    for node in (*cluster.nodes, *new):
        assert node.facts("CLUSTER", "INFO")["cluster_state"] == "ok"
        assert "[" not in node.must("CLUSTER", "NODES").decode()


def killed_at(command: list[str], enough: Callable[[], bool]) -> None:
    """Begin, and kill the shell and the redis-cli that it runs as soon as enough has happened."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0, stdin=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 90
    while not enough():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(PATIENCE_S) == -signal.SIGKILL


async def test_a_shard_is_added_while_checks_go_on_also_where_it_was_killed(
    cluster: RedisCluster, new: list[RedisServer]
) -> None:
    """With a slot that was left open before, and killed in the middle of the slots."""
    slot = cluster.slot_of("{open}")
    source = cluster.owner_of(slot)
    for number in range(20):
        source.must("SET", f"{{open}}{number}", number)
    target = next(node for node in cluster.nodes if node is not source)
    cluster.begin_migration(slot, target)
    cluster.move_keys(slot, target, most=5)
    dry = run(*command(cluster, new, "--dry-run"))
    assert dry.returncode == 0, dry.stderr
    assert "finish the slots that are open" in dry.stdout
    assert f"add {address(new[0])}" in dry.stdout
    assert "4096 of 16384 slots" in dry.stdout
    assert "nothing was changed" in dry.stdout
    assert new[0].facts("CLUSTER", "INFO")["cluster_known_nodes"] == "1"

    load = Load(cluster.url, rate=200, timeout_s=5.0)
    ended = asyncio.Event()

    async def reshard() -> None:
        await asyncio.to_thread(killed_at, command(cluster, new), lambda: len(slots_of(new[0])) >= 50)
        assert len(slots_of(new[0])) < SLOTS // 4 - 100, "it was not in the middle any more"
        done = await asyncio.to_thread(run, *command(cluster, new))
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"done: {address(new[0])} counts" in done.stdout
        ended.set()

    try:
        # The load lasts until the event has ended, however slow the machine is.
        await load.run(3.0, [(0.5, reshard)])
        await load.settle()
        assert ended.is_set()
        assert not load.errors
        assert not load.degraded, [store.degraded for store in load.stores]
        assert load.over_admitted == load.uncounted == load.counted_twice == 0
    finally:
        await load.close()
    assert_grown(cluster, new)
    owner = next(node for node in (*cluster.nodes, new[0]) if slot in slots_of(node))
    found = [owner.must("GET", f"{{open}}{number}") for number in range(20)]
    assert found == [str(number).encode() for number in range(20)]
    again = run(*command(cluster, new))
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stdout


def test_several_shards_are_added_and_slots_move_once(cluster: RedisCluster, two_pairs: list[RedisServer]) -> None:
    """Killed when one of them is met; where slots moved before, redis-cli may finish them on another old master."""
    fill(cluster, 300)
    before = [slots_of(node) for node in cluster.nodes]
    dry = run(*command(cluster, two_pairs, "--dry-run"))
    assert dry.returncode == 0, dry.stderr
    first, first_replica, second, second_replica = map(address, two_pairs)
    for words in (
        f"add {first}",
        f"add {second}",
        f"make {first_replica} the replica of {first}",
        f"make {second_replica} the replica of {second}",
        f"move about 3276 of 16384 slots to {first}",
        f"move about 3276 of 16384 slots to {second}",
    ):
        assert f"- {words}\n" in dry.stdout
    assert {node.facts("CLUSTER", "INFO")["cluster_known_nodes"] for node in two_pairs} == {"1"}

    killed_at(command(cluster, two_pairs), lambda: two_pairs[0].facts("CLUSTER", "INFO")["cluster_known_nodes"] != "1")
    assert not any(slots_of(node) for node in two_pairs), "no slot has moved yet"
    done = run(*command(cluster, two_pairs))
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [line for line in done.stdout.splitlines() if "reshard: moving slots" in line]
    assert len(steps) == 1, "once for all of them"
    assert_grown(cluster, two_pairs)
    for node, had in zip(cluster.nodes, before, strict=True):
        assert slots_of(node) < had, "an old master gives slots and takes none"
    assert keys_of([*cluster.nodes, *two_pairs[::2]]) == 300

    two_pairs[3].must("CLUSTER", "FAILOVER")
    wait_until(lambda: two_pairs[2].must("ROLE")[0] == b"slave", 60, "the second pair changed roles")
    wait_until(lambda: all(len(slots_of(node)) > 0 for node in (two_pairs[0], two_pairs[3])), 60, "it has the slots")
    again = run(*command(cluster, two_pairs))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("nothing to do") == 2
    assert f"{second_replica} counts" in again.stdout, "whoever was promoted since is the master"


def test_what_it_rejects(cluster: RedisCluster, two_pairs: list[RedisServer]) -> None:
    member = address(cluster.nodes[0])
    new = [address(node) for node in two_pairs]

    def refused(*words: str, code: int = 1) -> str:
        done = run(str(SCRIPT), *words)
        assert done.returncode == code, done.stdout + done.stderr
        assert not done.stdout
        return done.stderr

    assert "MEMBER" in refused(member, code=2)
    assert "MEMBER" in refused(member, *new[:3], code=2), "a pair that is not whole"
    assert "'nonsense' is no HOST:PORT" in refused(member, "nonsense", new[1])
    assert "given twice" in refused(member, new[0], new[0])
    assert "given twice" in refused(member, *new[:2], new[1], new[2])
    assert "does not answer PING" in refused(member, "127.0.0.1:1", new[1])
    assert "does not answer PING" in refused(member, *new[:3], "127.0.0.1:1")
    with RedisServer() as alone:
        assert "not in cluster mode" in refused(member, address(alone), new[1])
    assert "is a master with" in refused(member, *new[:3], address(cluster.nodes[1]))
    two_pairs[2].must("CLUSTER", "ADDSLOTS", two_pairs[2].must("CLUSTER", "KEYSLOT", "own"))
    wait_until(lambda: two_pairs[2].call("SET", "own", 1) == b"OK", 60, "it takes keys")
    assert f"{new[2]} holds 1 keys" in refused(member, *new)
    two_pairs[2].must("FLUSHALL")
    two_pairs[2].must("CLUSTER", "MEET", two_pairs[3].host, two_pairs[3].port)
    wait_until(lambda: two_pairs[3].facts("CLUSTER", "INFO")["cluster_known_nodes"] == "2", 60, "the two have met")
    assert f"{new[2]} belongs to another cluster" in refused(member, *new)
    set_node_timeout(cluster.nodes, 1000)
    cluster.nodes[2].kill()
    deadline = time.monotonic() + 60
    while b"fail" not in cluster.nodes[0].must("CLUSTER", "NODES"):
        assert time.monotonic() < deadline, "the lost master is not noticed"
        time.sleep(0.1)
    assert "not well" in refused(member, *new[:2])
    assert two_pairs[0].facts("CLUSTER", "INFO")["cluster_known_nodes"] == "1", "nothing was changed by any of them"


def test_the_configuration_files_are_taken_by_real_servers(tmp_path: Path) -> None:
    port = free_port()
    changed = {"dir": tmp_path, "bind": "127.0.0.1", "port": port, "maxmemory": "64mb"}
    words = [word for name, value in changed.items() for word in (f"--{name}", str(value))]
    with started(["redis-server", str(DEPLOY / "redis.conf"), *words], port) as client:
        said = client.call("CONFIG", "GET", "maxmemory-policy", "cluster-enabled", "appendonly", "save")
        settings = dict(zip(said[::2], said[1::2], strict=True)) if isinstance(said, list) else said
        assert settings[b"maxmemory-policy"] == b"noeviction"
        assert settings[b"cluster-enabled"] == b"no", "what a cluster needs is in cluster.conf"
        assert (settings[b"appendonly"], settings[b"save"]) == (b"yes", b"")
    port = free_port()
    own = tmp_path / "sentinel.conf"
    text = (DEPLOY / "sentinel.conf").read_text()
    # Nobody listens there: what is tried is the file.
    text = text.replace("mymaster 10.0.0.21 6379", f"mymaster 127.0.0.1 {free_port()}")
    own.write_text(text.replace("port 26379", f"port {port}\nbind 127.0.0.1\ndir {tmp_path}"))
    with started(["redis-sentinel", str(own)], port) as client:
        master = client.call("SENTINEL", "MASTER", "mymaster")
        facts = dict(zip(master[::2], master[1::2], strict=True)) if isinstance(master, list) else master
        names = (b"quorum", b"down-after-milliseconds", b"failover-timeout", b"parallel-syncs")
        assert [facts[name] for name in names] == [b"2", b"3000", b"10000", b"1"]
        refusal = str(client.call("SENTINEL", "SET", "mymaster", "notification-script", "/bin/true"))
        assert "deny-scripts-reconfig" in refusal


@contextlib.contextmanager
def started(command: list[str], port: int) -> Iterator[Client]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        client = connected(process, port)
        try:
            yield client
        finally:
            client.close()
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def connected(process: subprocess.Popen[bytes], port: int) -> Client:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return Client("127.0.0.1", port)
        except OSError:
            assert process.poll() is None, f"it ended with {process.poll()}"
            assert time.monotonic() < deadline, "it does not listen"
            time.sleep(0.05)
