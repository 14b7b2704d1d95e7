"""`tidegate serve` as a user runs it: a process, files, signals, other processes beside it."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.moments import MINUTE_S, PATIENCE_S, stay_within, wait_until
from tests.servers import forked
from tidegate.server.handover import listening_sockets

POLICY = """\
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/api/*"
  limits = ["{limit}/day"]
[[api_keys]]
key = "demo-free-key-0001"
tier = "free"
"""
CHECK = {"path": "/api/a", "api_key": "demo-free-key-0001"}


def _metric(server: Any, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found, f"{name} is not in:\n{text}"
    return float(found.group(1))


def _remaining(server: Any, **fields: Any) -> int:
    answer = httpx.post(f"{server.url}/v1/check", json={**CHECK, "cost": 0, **fields}).json()
    return int(answer["remaining"])


def test_the_printed_requests_work_as_pasted(serve: Callable[..., Any]) -> None:
    if shutil.which("curl") is None or shutil.which("bash") is None:
        pytest.skip("curl and bash are needed to paste the printed lines, and are not here")
    server = serve("--demo")
    printed = []
    while not printed or "Ctrl-C" not in printed[-1]:
        printed.append(server.process.stdout.readline())
    pasted = "".join(printed).replace("\\\n", " ").splitlines()
    commands = [line.strip() for line in pasted if line.strip().startswith(("curl", "for "))]
    assert len(commands) == 3
    stay_within(MINUTE_S, 5)
    outputs = [subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout for line in commands]
    assert json.loads(outputs[0])["remaining"] == 99
    assert outputs[1].startswith("HTTP/1.1 204")
    assert "ratelimit-policy:" in outputs[1]
    assert outputs[2].split() == ["200"] * 5 + ["429"]


def test_policy_file_is_reloaded_and_a_wrong_one_rejected(serve: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "tidegate.policy.toml"
    file.write_text(POLICY.format(limit=10))
    server = serve()
    for _ in range(3):
        assert httpx.post(f"{server.url}/v1/check", json=CHECK).status_code == 200
    assert _remaining(server) == 7

    file.write_text(POLICY.format(limit=5))
    wait_until(lambda: _remaining(server) == 2)  # what was consumed stays consumed

    file.write_text(POLICY.format(limit=5).replace("/day", "/fortnight"))
    wait_until(lambda: _metric(server, "rate_limiter_policy_reload_errors_total") == 1)
    assert _metric(server, "rate_limiter_policy_valid") == 0
    assert _remaining(server) == 2, "the old policy stays in force"

    file.write_text(POLICY.format(limit=8))
    wait_until(lambda: _remaining(server) == 5)
    assert _metric(server, "rate_limiter_policy_valid") == 1
    code, _, err = server.stop()
    assert code == 0
    assert "tidegate.policy.toml:5" in err, "file and line of the refused policy are logged"
    assert "fortnight" in err


def test_policy_behind_swapped_symlinks(serve: Callable[..., Any], tmp_path: Path) -> None:
    """As Kubernetes mounts a ConfigMap: file → ..data/file, ..data → ..<time>, replaced by a rename."""

    def publish(name: str, limit: int) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "policy.toml").write_text(POLICY.format(limit=limit))
        (tmp_path / "..data_tmp").symlink_to(name)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    publish("..2026_01", 10)
    (tmp_path / "policy.toml").symlink_to("..data/policy.toml")
    server = serve(TIDEGATE_POLICY__FILE=str(tmp_path / "policy.toml"))
    assert _remaining(server) == 10
    publish("..2026_02", 20)
    wait_until(lambda: _remaining(server) == 20)
    publish("..2026_03", 30)
    wait_until(lambda: _remaining(server) == 30)


def test_key_made_and_revoked_beside_a_running_server(serve: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY.format(limit=10))
    server = serve()
    made = json.loads(server.run("keys", "create", "--tier", "free", "--name", "acme", "--json").stdout)
    assert re.fullmatch(r"tg_[0-9A-Za-z]{38}", made["api_key"])
    ask = {"path": "/api/a", "api_key": made["api_key"]}
    assert httpx.post(f"{server.url}/v1/check", json=ask).json()["remaining"] == 9
    mistyped = made["api_key"][:-1] + ("a" if made["api_key"][-1] != "a" else "b")
    assert httpx.post(f"{server.url}/v1/check", json={**ask, "api_key": mistyped}).status_code == 401

    listed = json.loads(server.run("keys", "list", "--json").stdout)
    assert {row["name"] for row in listed} == {"acme", ""}
    assert made["api_key"] not in json.dumps(listed)

    revoked = server.run("keys", "revoke", made["id"], "--reason", "leaked")
    assert revoked.returncode == 0, revoked.stderr
    wait_until(lambda: httpx.post(f"{server.url}/v1/check", json=ask).status_code == 403, 60)
    assert made["api_key"] not in server.stop()[2], "no key is ever logged"


def test_check_command_and_doctor(serve: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY.format(limit=1).replace("demo-free-key-0001", "own-free-key-000001"))
    server = serve()
    first = server.run("check", "own-free-key-000001", "GET", "/api/a")
    assert (first.returncode, first.stdout[:8]) == (0, "allowed:")
    second = server.run("check", "own-free-key-000001", "GET", "/api/a")
    assert (second.returncode, second.stdout[:7]) == (1, "denied:")
    unknown = server.run("check", "demo-nobody-key-01", "GET", "/api/a")
    assert unknown.returncode == 2
    assert "INVALID_API_KEY" in unknown.stderr
    doctor = server.run("doctor")
    assert doctor.returncode == 0, doctor.stdout
    assert "server database: healthy" in doctor.stdout
    rules = json.loads(server.run("rules", "--json").stdout)
    assert [(rule["tier"], rule["endpoint"], rule["limits"]) for rule in rules] == [("free", "/api/*", ["1/day"])]
    server.stop()
    gone = server.run("check", "own-free-key-000001", "GET", "/api/a")
    assert gone.returncode == 2
    assert "tidegate serve" in gone.stderr


def test_health_and_metrics(serve: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY.format(limit=2))
    server = serve()
    for _ in range(3):
        httpx.post(f"{server.url}/v1/check", json=CHECK)
    httpx.post(f"{server.url}/v1/check", json={**CHECK, "api_key": "nobody-knows-this-key"})
    health = httpx.get(f"{server.url}/health")
    assert (health.status_code, health.json()["status"]) == (200, "healthy")
    assert set(health.json()["components"]) == {"database", "ledger", "policy", "rate_limiter"}
    assert httpx.get(f"{server.url}/livez").status_code == 200
    assert _metric(server, 'rate_limiter_requests_total{status="allowed"}') == 2
    assert _metric(server, 'rate_limiter_requests_total{status="blocked"}') == 1
    assert _metric(server, 'rate_limiter_errors_total{type="invalid_api_key"}') == 1
    assert _metric(server, "rate_limiter_latency_seconds_count") == 3
    assert _metric(server, "rate_limiter_subjects") == 1
    assert httpx.head(f"{server.url}/metrics").status_code == 200


def test_a_new_process_takes_the_address_over(serve: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY.format(limit=1_000_000))
    old = serve(TIDEGATE_SERVER__REUSE_PORT="true")
    with socket.create_connection(("127.0.0.1", old.port)) as kept:
        request = b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n"
        kept.sendall(request)
        assert kept.recv(4096).startswith(b"HTTP/1.1 200 ")
        new = serve(wait=False, TIDEGATE_SERVER__REUSE_PORT="true", TIDEGATE_SERVER__HTTP=f"127.0.0.1:{old.port}")
        assert old.url in new.process.stdout.readline()
        old.process.send_signal(signal.SIGTERM)
        wait_until(lambda: listening_sockets("127.0.0.1", old.port) == 1)
        assert httpx.get(f"{old.url}/readyz").status_code == 200, "new connections reach the new process"
        kept.sendall(request)
        answer = kept.recv(4096)
        assert answer.startswith(b"HTTP/1.1 503 "), "open connections are answered by the old one"
        assert b"connection: close\r\n" in answer
    code, _, said = old.stop_by_itself()
    assert (code, "no more connections are accepted here" in said) == (0, True)


def test_sigterm_under_load_loses_no_request(serve: Callable[..., Any], tmp_path: Path) -> None:
    """Clients that honour `Connection: close` get every answer; the process ends with 0 within drain_s."""
    (tmp_path / "tidegate.policy.toml").write_text(POLICY.format(limit=1_000_000))
    server = serve(TIDEGATE_SERVER__DRAIN_S="5")
    body = json.dumps(CHECK)
    request = f"POST /v1/check HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    answered, lost = [0], [0]

    async def keep_asking(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Asks on one connection until it is told to close it."""
        while True:
            writer.write(request)
            try:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))  # type: ignore[index]
            except (ConnectionError, asyncio.IncompleteReadError):
                lost[0] += 1
                return
            answered[0] += 1
            if b"connection: close" in head:
                return

    async def client(stopping: asyncio.Event) -> None:
        """Makes a new connection whenever it was told to close one, until the server is told to stop."""
        while not stopping.is_set():
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            try:
                await keep_asking(reader, writer)
            finally:
                writer.close()

    async def load() -> int:
        stopping = asyncio.Event()
        clients = [asyncio.create_task(client(stopping)) for _ in range(8)]
        await asyncio.sleep(1)
        stopping.set()
        server.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(asyncio.gather(*clients), PATIENCE_S)
        return await asyncio.to_thread(server.process.wait, 20)

    assert asyncio.run(load()) == 0
    assert answered[0] > 100
    assert lost[0] == 0


def test_sigterm_during_the_start_ends_the_process(serve: Callable[..., Any]) -> None:
    """It waits for a database that takes connections and says nothing."""
    with socket.socket() as hung:
        hung.bind(("127.0.0.1", 0))
        hung.listen()
        hung.settimeout(PATIENCE_S)
        url = f"postgresql://nobody@127.0.0.1:{hung.getsockname()[1]}/none"
        server = serve(wait=False, TIDEGATE_CATALOG__URL=url, TIDEGATE_CATALOG__TIMEOUT_S="30")
        connection, _ = hung.accept()
        with connection:
            server.process.send_signal(signal.SIGTERM)
            code, _, err = server.stop_by_itself()
    assert code == 0, err
    assert "stopped during startup" in err
    assert "Traceback" not in err


def test_request_in_flight_is_finished(serve: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY.format(limit=10))
    server = serve(TIDEGATE_SERVER__DRAIN_S="120")
    body = json.dumps(CHECK).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        connection.sendall(b"POST /v1/check HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body[:5]))
        wait_until(lambda: _metric(server, "rate_limiter_in_flight") >= 2)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        connection.sendall(body[5:])
        received = connection.recv(65536)
    assert received.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in received
    assert server.process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"TIDEGATE_SERVER__HTTP": "127.0.0.1"}, "server.http"),
        ({"TIDEGATE_SERVER__HTTP": "192.0.2.1:80"}, "cannot listen on"),
        ({"TIDEGATE_SERVER__WORKERS": "2"}, "memory://"),
        ({"TIDEGATE_SERVER__WORKERS": "many"}, "int"),
        ({"TIDEGATE_SERVER__PORT": "80"}, "unknown setting 'server.port'"),
        ({"TIDEGATE_SERVR__HTTP": "x"}, "did you mean 'server'"),
        ({"TIDEGATE_COUNTERS__URL": "mongodb://user:secret@h"}, "mongodb"),
        ({"TIDEGATE_CATALOG__URL": "sqlite:////proc/none/tidegate.db"}, "/proc/none/tidegate.db"),
        ({"TIDEGATE_POLICY__FILE": "absent.toml"}, "absent.toml"),
    ],
)
def test_what_cannot_start_gives_the_reason_in_one_sentence(
    serve: Callable[..., Any], environment: dict[str, str], said: str
) -> None:
    code, out, err = serve(wait=False, **environment).stop_by_itself()
    assert code == 2
    assert out == ""
    assert said in err
    assert "secret" not in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_port_in_use(serve: Callable[..., Any]) -> None:
    first = serve()
    code, _, err = serve(wait=False, TIDEGATE_SERVER__HTTP=f"127.0.0.1:{first.port}").stop_by_itself()
    assert (code, "port is in use" in err) == (2, True)
    assert httpx.get(f"{first.url}/livez").status_code == 200


def test_policy_check_reports_what_the_server_would(serve: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "tidegate.policy.toml"
    file.write_text(POLICY.format(limit=10).replace("endpoint", "endpiont"))
    code, _, err = serve(wait=False).stop_by_itself()
    assert code == 2
    said = forked.run(("policy", "check", str(file)), PATIENCE_S)
    assert said.returncode == 2
    for text in (err, said.stderr):
        assert "tidegate.policy.toml:4" in text
        assert "endpiont" in text
        assert "endpoint" in text
    example = forked.run(("policy", "example"), PATIENCE_S)
    file.write_text(example.stdout)
    said = forked.run(("policy", "check", "--strict", str(file)), PATIENCE_S)
    assert said.returncode == 0, said.stderr
