"""Who may connect to a Redis with the files of deploy/redis, and what its users may do: real servers, Tidegate and exporter."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hiredis
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Serve
from tests.moments import PATIENCE_S, wait_until
from tests.servers.exporters import RedisExporter
from tests.servers.ports import HOST, free_port
from tests.servers.redis_server import Client, need
from tidegate.policy.limits import Algorithm

DEPLOY = Path(__file__).parents[2] / "deploy" / "redis"
OPERATOR, TIDEGATE, EXPORTER = "operator-pw-0001", "tidegate-pw-0002", "exporter-pw-0003"
TOKEN = "token-of-the-settings"
POLICY = (
    "[[tiers]]\nname = 'free'\n"
    + "".join(
        f"[[tiers.rules]]\nendpoint = '/{algorithm}'\nalgorithm = '{algorithm}'\nlimits = ['2/hour']\n" for algorithm in Algorithm
    )
    + "[[tiers.rules]]\nendpoint = '/mixed'\nsubject = 'ip'\nlimits = ['2/hour']\n"
    + "[[api_keys]]\nkey = 'demo-free-key-0001'\ntier = 'free'\n"
)


class Server:
    """A server that a command starts, asked without credentials until it logs in.

    Args:
        command: that becomes the server.
        directory: in which it runs.
        environment: more variables.
    """

    def __init__(self, command: list[str], port: int, directory: Path, environment: dict[str, str] | None = None) -> None:
        self.port = port
        self._clients: list[Client] = []
        with (directory / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=directory,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        wait_until(lambda: self.client() is not None, 30, f"{command[0]} listens")

    def client(self, user: str = "", password: str = "") -> Client:
        client = Client(HOST, self.port)
        self._clients.append(client)
        if password:
            assert client.call("AUTH", *([user] if user else []), password) == b"OK"
        return client

    def listens_at(self) -> set[str]:
        """The addresses of its listening sockets, as the kernel writes them."""
        lines = "".join(Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6"))
        return set(re.findall(rf" ([0-9A-F]+):{self.port:04X} 0+:0000 0A ", lines))

    def stop(self) -> None:
        for client in self._clients:
            client.close()
        self.process.terminate()
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def run() -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(*arguments: Any, **options: Any) -> Server:
        need("redis")
        started.append(Server(*arguments, **options))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def node(run: Callable[..., Server], tmp_path: Path) -> Server:
    """What start-node starts, as a cluster of one."""
    port = free_port()
    passwords = {"REDISCLI_AUTH": OPERATOR, "REDIS_TIDEGATE_PASSWORD": TIDEGATE, "REDIS_EXPORTER_PASSWORD": EXPORTER}
    directory = tmp_path / "node"
    directory.mkdir()
    command = ["sh", str(DEPLOY / "start-node"), "--port", str(port), "--bind", HOST, "--dir", str(directory)]
    server = run(command, port, directory, {**passwords, "NODE_IP": HOST, "REDIS_MAXMEMORY": "64mb"})
    operator = server.client("", OPERATOR)
    assert operator.call("CLUSTER", "ADDSLOTSRANGE", 0, 16383) == b"OK"
    wait_until(lambda: b"cluster_state:ok" in operator.call("CLUSTER", "INFO"), PATIENCE_S, "the cluster of one is well")
    return server


def _refused(reply: Any, word: str) -> bool:
    return isinstance(reply, hiredis.ReplyError) and str(reply).startswith(word)


@pytest.mark.parametrize("file", ["redis.conf", "sentinel.conf"])
def test_a_server_without_a_password_listens_on_loopback_alone(file: str, run: Callable[..., Server], tmp_path: Path) -> None:
    port = free_port()
    configuration = tmp_path / file
    shutil.copy(DEPLOY / file, configuration)  # a sentinel writes into it
    more = ["--sentinel"] if file == "sentinel.conf" else ["--appendonly", "no"]
    server = run(["redis-server", str(configuration), "--port", str(port), "--dir", str(tmp_path), *more], port, tmp_path)
    assert server.listens_at() <= {"0100007F", "00000000000000000000000001000000"}
    # Where somebody binds it to more: other machines are refused while there is no password.
    setting = ("CONFIG", "GET", "protected-mode") if file == "redis.conf" else ("PING",)
    assert server.client().call(*setting) in ([b"protected-mode", b"yes"], b"PONG")
    assert "\nprotected-mode yes\n" in (DEPLOY / file).read_text()


def test_a_node_of_a_cluster_asks_for_a_password(node: Server) -> None:
    assert _refused(node.client().call("GET", "tg:{x}y"), "NOAUTH")
    # It listens on every address when it is not told otherwise.
    assert "\nbind * -::*\nrequirepass " in (DEPLOY / "start-node").read_text()


def test_tidegate_needs_no_more_than_its_user_may(
    node: Server, serve: Callable[..., Serve], postgres_url: str, tmp_path: Path
) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    url = f"redis+cluster://tidegate:{TIDEGATE}@{HOST}:{node.port}"
    settings = {"TIDEGATE_COUNTERS__URL": url, "TIDEGATE_ADMIN__TOKEN": TOKEN, "TIDEGATE_CATALOG__URL": postgres_url}
    server, other = (serve(**settings) for _ in range(2))
    for algorithm in (*Algorithm, "mixed"):
        asked = {"path": f"/{algorithm}", "api_key": "demo-free-key-0001", "ip": "203.0.113.7"}
        told = [httpx.post(f"{each.url}/v1/check", json=asked).json() for each in (server, other, server)]
        assert not any(each["degraded"] for each in told)
        assert (told[0]["allowed"], told[2]["allowed"]) == (True, False)
    batch = {"checks": [{"path": f"/{algorithm}", "api_key": "demo-free-key-0001"} for algorithm in Algorithm]}
    assert {each["allowed"] for each in httpx.post(f"{other.url}/v1/check/batch", json=batch).json()["decisions"]} == {False}
    own = {"namespace": "n", "subject": "s", "limits": ["100/day"], "cost": 90}
    hold = httpx.post(f"{server.url}/v1/holds", json=own).json()["hold"]
    assert httpx.post(f"{other.url}/v1/holds/{hold}/renew", json={"ttl_s": 600}).status_code == 200
    assert httpx.post(f"{other.url}/v1/holds/{hold}/settle", json={"cost": 20}).json()["remaining"] == 80
    admin, headers = f"http://{HOST}:{server.admin_port}/admin/v1", {"Authorization": f"Bearer {TOKEN}"}
    assert httpx.post(f"{admin}/counters/reset", json={"ip": "203.0.113.7"}, headers=headers).status_code == 200
    assert httpx.post(f"{admin}/tiers", json={"name": "new"}, headers=headers).status_code == 201  # announced
    operator = node.client("", OPERATOR)
    # It has used its cache, and its channel.
    keys = {key.partition(b":")[0] for key in operator.call("KEYS", "*")}
    assert keys == {b"tg", b"tgc"}
    wait_until(lambda: b"tg:catalog" in operator.call("PUBSUB", "CHANNELS"), PATIENCE_S, "Tidegate listens to announcements")
    assert [each.stop()[0] for each in (server, other)] == [0, 0]
    refused = [dict(zip(entry[::2], entry[1::2], strict=True))[b"object"] for entry in operator.call("ACL", "LOG")]
    assert refused == []


def test_tidegates_user_may_do_nothing_else(node: Server) -> None:
    node.client("", OPERATOR).call("SET", "of-somebody-else", "1")
    tidegate = node.client("tidegate", TIDEGATE)
    for words in (
        ("GET", "of-somebody-else"),
        ("SET", "of-somebody-else", "2"),
        ("EVAL", "return redis.call('GET', KEYS[1])", 1, "of-somebody-else"),
        ("PUBLISH", "of-somebody-else", "1"),
        ("CONFIG", "GET", "requirepass"),
        ("ACL", "LIST"),
        ("KEYS", "*"),
        ("SCAN", 0),
        ("FLUSHALL",),
        ("SHUTDOWN",),
        ("REPLICAOF", "NO", "ONE"),
        ("MONITOR",),
    ):
        assert _refused(tidegate.call(*words), "NOPERM"), words


def test_the_exporter_has_its_figures_and_reads_neither_keys_nor_passwords(node: Server) -> None:
    operator = node.client("", OPERATOR)
    operator.call("SET", "tg:{x}y", "1")
    # As Compose and Kubernetes start it.
    for file in ("docker/compose.yaml", "kubernetes/base/redis.yaml"):
        assert '"--config-command=-"' in (DEPLOY.parent / file).read_text()
    environment = {"REDIS_USER": "exporter", "REDIS_PASSWORD": EXPORTER}
    with RedisExporter(f"redis://{HOST}:{node.port}", ["--config-command=-"], environment) as exporter:
        families = {family.name: family for family in text_string_to_metric_families(httpx.get(f"{exporter.url}/metrics").text)}
    assert families["redis_up"].samples[0].value == 1
    assert families["redis_memory_max_bytes"].samples[0].value == 64 * 2**20
    for name in (
        "redis_memory_used_bytes",
        "redis_keyspace_hits",
        "redis_keyspace_misses",
        "redis_cluster_state",
        "redis_slowlog_length",
    ):
        assert name in families, name
    exporter_user = node.client("exporter", EXPORTER)
    for words in (
        ("GET", "tg:{x}y"),
        ("SET", "tg:{x}y", "2"),
        ("CONFIG", "GET", "requirepass"),
        ("CONFIG", "GET", "masterauth"),
        ("ACL", "LIST"),
        ("KEYS", "*"),
        ("SUBSCRIBE", "tg:catalog"),
        ("FLUSHALL",),
        ("CLIENT", "LIST"),
        ("SLOWLOG", "RESET"),
    ):
        assert _refused(exporter_user.call(*words), "NOPERM"), words


def test_users_are_printed_without_their_passwords_and_only_with_one() -> None:
    def printed(**environment: str) -> str:
        done = subprocess.run(
            ["sh", DEPLOY / "users"],
            env={"PATH": os.environ["PATH"], **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=True,
        )
        return done.stdout

    assert printed() == ""
    only = printed(REDIS_EXPORTER_PASSWORD=EXPORTER)
    assert re.fullmatch(r"user exporter on #[0-9a-f]{64} .*\n", only)
    both = printed(REDIS_EXPORTER_PASSWORD=EXPORTER, REDIS_TIDEGATE_PASSWORD=TIDEGATE)
    assert len(both.splitlines()) == 2
    assert TIDEGATE not in both
    assert EXPORTER not in both
