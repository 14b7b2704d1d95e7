"""deploy/redis/reshard.sh on a real cluster: a shard more while checks go on, a dry run, after SIGKILL, and what it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from drills.load import Load

from tests.servers.redis_cluster import SLOTS, RedisCluster
from tests.servers.redis_server import Client, RedisServer, free_port

DEPLOY = Path(__file__).parents[2] / "deploy" / "redis"
SCRIPT = DEPLOY / "reshard.sh"
NEW = {"cluster-enabled": "yes", "cluster-config-file": "nodes.conf", "cluster-node-timeout": 5000}


@pytest.fixture
def cluster() -> Iterator[RedisCluster]:
    with RedisCluster(masters=3, node_timeout_ms=5000, options={"cluster-require-full-coverage": "no"}) as running:
        yield running


@pytest.fixture
def new() -> Iterator[list[RedisServer]]:
    with RedisServer(options=NEW) as master, RedisServer(options=NEW) as replica:
        yield [master, replica]


def address(node: RedisServer) -> str:
    return f"{node.host}:{node.port}"


def command(cluster: RedisCluster, new: list[RedisServer], *options: str) -> list[str]:
    return [str(SCRIPT), *options, address(cluster.nodes[0]), *map(address, new)]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=150, check=False)


def slots_of(node: RedisServer) -> int:
    line = next(line for line in node.must("CLUSTER", "NODES").decode().splitlines() if "myself" in line)
    ranges = [text.split("-") for text in line.split()[8:] if not text.startswith("[")]
    return sum(int(each[-1]) - int(each[0]) + 1 for each in ranges)


def assert_grown(cluster: RedisCluster, new: list[RedisServer]) -> None:
    shares = [slots_of(node) for node in (*cluster.nodes, new[0])]
    assert sum(shares) == SLOTS
    assert max(shares) - min(shares) <= SLOTS // 4 // 50
    role = new[1].must("ROLE")
    assert (role[0], role[2], role[3]) == (b"slave", new[0].port, b"connected")
    for node in (*cluster.nodes, *new):
        assert node.facts("CLUSTER", "INFO")["cluster_state"] == "ok"
        assert "[" not in node.must("CLUSTER", "NODES").decode()


async def test_a_shard_is_added_while_checks_go_on(cluster: RedisCluster, new: list[RedisServer]) -> None:
    dry = run(*command(cluster, new, "--dry-run"))
    assert dry.returncode == 0, dry.stderr
    assert f"add {address(new[0])}" in dry.stdout
    assert "4096 of 16384 slots" in dry.stdout
    assert "nothing was changed" in dry.stdout
    assert new[0].facts("CLUSTER", "INFO")["cluster_known_nodes"] == "1"

    load = Load(cluster.url, rate=200, timeout_s=5.0)
    ended = asyncio.Event()

    async def reshard() -> None:
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
        assert not load.degraded
        assert load.over_admitted == load.uncounted == load.counted_twice == 0
    finally:
        await load.close()
    assert_grown(cluster, new)
    again = run(*command(cluster, new))
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stdout


def test_it_goes_on_where_it_was_killed(cluster: RedisCluster, new: list[RedisServer]) -> None:
    for number in range(300):
        key = f"key-{number}"
        cluster.owner_of(cluster.slot_of(key)).must("SET", key, number)
    process = subprocess.Popen(
        command(cluster, new), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0, stdin=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 90
    while slots_of(new[0]) < 50:
        assert time.monotonic() < deadline, "no slot moved"
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    # The shell and the redis-cli that moves slots.
    subprocess.run(["kill", "-KILL", "--", f"-{process.pid}"], check=True)
    assert process.wait(10) == -signal.SIGKILL
    done = run(*command(cluster, new))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_grown(cluster, new)
    kept = sum(int(node.must("DBSIZE")) for node in (*cluster.nodes, new[0]))
    assert kept == 300


def test_slots_that_were_left_open_are_finished(cluster: RedisCluster, new: list[RedisServer]) -> None:
    slot = cluster.slot_of("{open}")
    source = cluster.owner_of(slot)
    for number in range(20):
        source.must("SET", f"{{open}}{number}", number)
    target = next(node for node in cluster.nodes if node is not source)
    cluster.begin_migration(slot, target)
    cluster.move_keys(slot, target, most=5)
    dry = run(*command(cluster, new, "--dry-run"))
    assert "finish the slots that are open" in dry.stdout
    done = run(*command(cluster, new))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_grown(cluster, new)
    assert sum(int(node.must("DBSIZE")) for node in (*cluster.nodes, new[0])) == 20


def test_what_it_refuses(cluster: RedisCluster, new: list[RedisServer]) -> None:
    member = address(cluster.nodes[0])

    def refused(*words: str, code: int = 1) -> str:
        done = run(str(SCRIPT), *words)
        assert done.returncode == code, done.stdout + done.stderr
        assert not done.stdout
        return done.stderr

    assert "MEMBER" in refused(member, code=2)
    assert "'nonsense' is no HOST:PORT" in refused(member, "nonsense", address(new[1]))
    assert "given twice" in refused(member, address(new[0]), address(new[0]))
    assert "does not answer PING" in refused(member, "127.0.0.1:1", address(new[1]))
    with RedisServer() as alone:
        assert "not in cluster mode" in refused(member, address(alone), address(new[1]))
    assert "is a master with" in refused(member, address(new[0]), address(cluster.nodes[1]))
    cluster.nodes[2].kill()
    deadline = time.monotonic() + 60
    while b"fail" not in cluster.nodes[0].must("CLUSTER", "NODES"):
        assert time.monotonic() < deadline, "the lost master is not noticed"
        time.sleep(0.1)
    assert "not well" in refused(member, address(new[0]), address(new[1]))
    assert new[0].facts("CLUSTER", "INFO")["cluster_known_nodes"] == "1"


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
        process.wait(20)


def connected(process: subprocess.Popen[bytes], port: int) -> Client:
    deadline = time.monotonic() + 30
    while True:
        try:
            return Client("127.0.0.1", port)
        except OSError:
            assert process.poll() is None, f"it ended with {process.poll()}"
            assert time.monotonic() < deadline, "it does not listen"
            time.sleep(0.05)
