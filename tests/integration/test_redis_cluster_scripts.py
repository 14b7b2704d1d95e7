"""The scripts in deploy/redis, on real servers: a cluster is made, grown with its counters, mended, and handed over."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.moments import PATIENCE_S, wait_until
from tests.servers.ports import HOST, free_port
from tests.servers.redis_server import binary
from tidegate import Limiter
from tidegate.counters.factory import open_counters
from tidegate.settings import CounterSettings

SCRIPTS = Path(__file__).parents[2] / "deploy" / "redis"
PASSWORD = "0123456789abcdef"
ENVIRONMENT = {**os.environ, "REDISCLI_AUTH": PASSWORD, "NODE_IP": HOST, "REDIS_MAXMEMORY": "64mb"}


class Node:
    """A server that `start-node` started.

    Args:
        directory: of its files.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.port = free_port()
        self.address = f"{HOST}:{self.port}"
        self.start()

    def start(self, *more: str) -> None:
        arguments = ["--port", str(self.port), "--bind", HOST, "--dir", str(self.directory), *more]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["sh", SCRIPTS / "start-node", *arguments],
                cwd=self.directory,
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def ask(self, *words: str) -> str:
        command = ["redis-cli", "-e", "-h", HOST, "-p", str(self.port), *words]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        return done.stdout + done.stderr


def script(name: str, *arguments: str, port: int = 0, code: int = 0, folder: Path = SCRIPTS) -> str:
    done = subprocess.run(
        ["sh", folder / name, *arguments],
        env={**ENVIRONMENT, "REDIS_PORT": str(port)},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def nodes(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Node]]:
    """Eight, or as many as a test gives as the parameter of this fixture."""
    if binary("redis") is None:
        pytest.skip("redis-server is not installed: it comes with the Debian package redis-server")
    started = [Node(tmp_path / str(place)) for place in range(getattr(request, "param", 8))]
    yield started
    # At once: a master that is to end by itself waits for its replicas, which end too.
    for node in started:
        node.process.kill()
    for node in started:
        node.process.wait()


def roles(node: Node) -> list[tuple[str, bool, int]]:
    """Of every node that one knows: its address, whether it is a master, and how many slots it has."""
    known = []
    for line in node.ask("cluster", "nodes").splitlines():
        _, address, flags, _, _, _, _, _, *ranges = line.split()
        bounds = [part.split("-") for part in ranges if not part.startswith("[")]
        known.append((address.partition("@")[0], "master" in flags, sum(int(b[-1]) - int(b[0]) + 1 for b in bounds)))
    return known


def settings(node: Node, *names: str) -> list[str]:
    return [node.ask("config", "get", name).split()[1] for name in names]


async def consume(url: str, subjects: int) -> list[int]:
    # Far above what a call takes: this is about counts, and the machine may be busy.
    limiter = Limiter("100/day", counters=open_counters(CounterSettings(url=url, timeout_ms=5000)))
    try:
        decisions = [await limiter.check(f"user-{subject}") for subject in range(subjects)]
    finally:
        await limiter.close()
    assert not any(decision.degraded for decision in decisions)
    return [decision.remaining for decision in decisions]


def test_a_cluster_is_made_once_and_grown_with_its_counters_also_where_it_was_killed(nodes: list[Node], tmp_path: Path) -> None:
    six = [node.address for node in nodes[:6]]
    for node in nodes[:6]:
        # As after the start of a pod: a peer that is not there yet is left alone.
        script("meet-peers", *six, "not-there.invalid:6379", port=node.port)
    assert "3 shards count, all 6 nodes say so" in script("make-cluster", *six)
    found = {address: (master, slots) for address, master, slots in roles(nodes[0])}
    assert [found[address] for address in six] == [(True, 5461), (False, 0), (True, 5461), (False, 0), (True, 5462), (False, 0)]
    url = f"redis+cluster://:{PASSWORD}@{six[0]},{six[2]}"
    assert asyncio.run(consume(url, 50)) == [99] * 50
    before = roles(nodes[0])
    script("make-cluster", *six)
    assert sorted(roles(nodes[0])) == sorted(before), "again changes nothing"

    # As Kubernetes gives them: no file of a ConfigMap is a program.
    mounted = tmp_path / "mounted"
    shutil.copytree(SCRIPTS, mounted)
    for file in mounted.iterdir():
        file.chmod(0o444)
    eight = [f"localhost:{node.port}" for node in nodes]
    said = killed_while_slots_move(nodes, "sh", str(mounted / "make-cluster"), *eight)
    assert f"reshard: adding {eight[6]}" in said, "there is one way to grow"
    assert "4 shards count" in script("make-cluster", *eight, folder=mounted), "it goes on where it was killed"
    assert sorted(slots for _, master, slots in roles(nodes[0]) if master) == [4096] * 4
    assert [(master, slots) for address, master, slots in roles(nodes[0]) if address == nodes[7].address] == [(False, 0)]
    assert asyncio.run(consume(url, 50)) == [98] * 50, "the counters moved with their slots"
    before = roles(nodes[0])
    assert "reshard" not in script("make-cluster", *eight)
    assert sorted(roles(nodes[0])) == sorted(before), "again changes nothing"


def killed_while_slots_move(nodes: list[Node], *command: str) -> str:
    """Grow the cluster, and kill everything in the middle; gives the output until then."""
    output = nodes[0].directory / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=file, stderr=file, process_group=0)

    def slots() -> int:
        return next((slots for address, _, slots in roles(nodes[6]) if address == nodes[6].address), 0)

    try:
        wait_until(lambda: slots() >= 50, 90, "slots move")
    finally:
        # make-cluster, reshard.sh and the redis-cli that moves slots.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE_S)
    assert slots() < 4000, "it was not in the middle any more"
    return output.read_text()


def test_a_master_that_came_back_empty_becomes_the_replica(nodes: list[Node]) -> None:
    eight = [node.address for node in nodes]
    script("make-cluster", *eight[:6])
    url = f"redis+cluster://:{PASSWORD}@{eight[1]}"
    assert asyncio.run(consume(url, 50)) == [99] * 50
    lost, promoted = nodes[0], nodes[1]
    lost.stop()
    wait_until(lambda: "role:master" in promoted.ask("info", "replication"), 60, "the replica is promoted")
    wait_until(lambda: "cluster_state:ok" in promoted.ask("cluster", "info"), 60, "the cluster is well again")
    shutil.rmtree(lost.directory)
    lost.directory.mkdir()
    lost.start()
    assert "3 shards count, all 6 nodes say so" in script("make-cluster", *eight[:6])
    replication = lost.ask("info", "replication").splitlines()
    assert {"role:slave", f"master_port:{promoted.port}", "master_link_status:up"} <= set(replication)
    assert asyncio.run(consume(url, 50)) == [98] * 50

    # The others still know of the node that it was, without an address: nothing that growing has to wait for.
    assert "noaddr" in promoted.ask("cluster", "nodes")
    said = killed_while_slots_move(nodes, "sh", str(SCRIPTS / "make-cluster"), *eight[1::-1], *eight[2:])
    assert f"reshard: adding {eight[6]}" in said


@pytest.mark.parametrize("nodes", [1], indirect=True)
def test_a_node_runs_with_both_files_and_arguments_win(nodes: list[Node]) -> None:
    node = nodes[0]
    wait_until(lambda: "PONG" in node.ask("ping"), 60, "the node answers")
    assert settings(node, "maxmemory-policy", "appendonly", "repl-backlog-size", "maxmemory") == [
        "noeviction",
        "yes",
        str(64 * 2**20),
        str(64 * 2**20),
    ], "of redis.conf and of the environment"
    of_cluster = ("cluster-enabled", "cluster-node-timeout", "cluster-replica-validity-factor", "cluster-require-full-coverage")
    assert settings(node, *of_cluster) == ["yes", "3000", "0", "no"]
    node.stop()
    node.start("--cluster-node-timeout", "4321", "--maxmemory-policy", "volatile-ttl")
    wait_until(lambda: "PONG" in node.ask("ping"), 60, "the node answers")
    assert settings(node, "cluster-node-timeout", "maxmemory-policy", "appendonly") == ["4321", "volatile-ttl", "yes"]


@pytest.mark.parametrize("nodes", [6], indirect=True)
def test_nodes_that_all_come_back_elsewhere_find_each_other(nodes: list[Node]) -> None:
    six = nodes[:6]
    script("make-cluster", *(node.address for node in six))
    assert asyncio.run(consume(f"redis+cluster://:{PASSWORD}@{six[0].address}", 5)) == [99] * 5
    for node in nodes:
        node.stop()
    for node in six:
        node.port = free_port()
        node.address = f"{HOST}:{node.port}"
        node.start()
    for node in six:
        script("meet-peers", *(each.address for each in six), port=node.port)
    for node in six:
        wait_until(lambda node=node: "cluster_state:ok" in node.ask("cluster", "info"), 60, "the cluster is well again")  # type: ignore[misc]
    assert asyncio.run(consume(f"redis+cluster://:{PASSWORD}@{six[0].address}", 5)) == [98] * 5, (
        "what was consumed is still known"
    )


@pytest.mark.parametrize("arguments", [[], ["a:1", "b:1"], ["a:1", "b:1", "c:1", "d:1", "e:1", "f:1", "g:1"]])
def test_too_few_or_unpaired_nodes_are_rejected(arguments: list[str]) -> None:
    assert "three or more pairs" in script("make-cluster", *arguments, code=1)


@pytest.mark.parametrize("nodes", [1], indirect=True)
def test_the_password_is_on_no_command_line(nodes: list[Node]) -> None:
    for node in nodes:
        assert PASSWORD not in Path(f"/proc/{node.process.pid}/cmdline").read_text()
    wait_until(lambda: "PONG" in nodes[0].ask("ping"), 60, "the node answers")
    assert "NOAUTH" in nodes[0].ask("--user", "default", "--pass", "not it", "ping") + nodes[0].ask("-a", "not it", "ping")


@pytest.mark.parametrize("nodes", [6], indirect=True)
def test_a_node_that_is_ended_hands_over_before(nodes: list[Node]) -> None:
    six = nodes[:6]
    script("make-cluster", *(node.address for node in six))
    master, replica = six[0], six[1]
    url = f"redis+cluster://:{PASSWORD}@{six[2].address}"
    assert asyncio.run(consume(url, 20)) == [99] * 20
    script("hand-over", port=replica.port)
    assert "role:slave" in replica.ask("info", "replication"), "a replica has nothing to hand over"
    script("hand-over", port=master.port)
    assert "role:master" in replica.ask("info", "replication")
    master.stop()
    assert asyncio.run(consume(url, 20)) == [98] * 20, "nothing is lost, and nobody waits"
