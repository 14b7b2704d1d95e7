"""Prometheus and Alertmanager as processes, with the shipped files, and a listener that plays PagerDuty and Slack.

Each is a context manager that starts and stops one process of its own on a free loopback port, with a temporary directory that
goes with it. What Debian starts by itself when it installs the packages is neither used nor touched.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec
import pytest

from tests.moments import wait_until
from tests.servers.lifetime import Started
from tests.servers.ports import HOST, accepts, free_port

DEPLOY = Path(__file__).parents[2] / "deploy"
START_S = 90.0
STOP_S = 5.0
PEER_TIMEOUT_S = 3
"""How long the second Alertmanager of a pair leaves it to the first to notify; 15 s where nobody says otherwise."""

_PACKAGES = {
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
    "amtool": "prometheus-alertmanager",
    "prometheus-redis-exporter": "prometheus-redis-exporter",
    "prometheus-postgres-exporter": "prometheus-postgres-exporter",
    "java": "default-jre-headless",
    "nginx": "nginx",
    "haproxy": "haproxy",
    "keepalived": "keepalived",
    "prometheus-nginx-exporter": "prometheus-nginx-exporter",
    "prometheus-blackbox-exporter": "prometheus-blackbox-exporter",
}


def need(program: str) -> str:
    """Find a program or skip the test, saying which package has it.

    Returns:
        Its path.
    """
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed: it comes with the Debian package {_PACKAGES[program]}")
    return path


def run(program: str, *arguments: str | Path, directory: Path | None = None) -> str:
    """Run a tool to its end.

    Args:
        program: its name; the test skips where it is missing.
        directory: to run it in.

    Returns:
        What it said, on both streams.

    Raises:
        AssertionError: with what it said, if it ends with anything but 0.
    """
    done = subprocess.run([need(program), *arguments], cwd=directory, capture_output=True, text=True, timeout=170, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def divided(text: str, divisor: int) -> str:
    """A shipped file with every interval divided; windows of expressions stay as they are.

    Args:
        text: of the file.
        divisor: 1 or more.

    Returns:
        The text with intervals in ms.
    """

    def divide(found: re.Match[str]) -> str:
        milliseconds = int(found[2]) * {"s": 1000, "m": 60_000}[found[3]] // divisor
        return f"{found[1]}{milliseconds}ms"

    names = "scrape_interval|scrape_timeout|evaluation_interval|interval|for|group_wait|group_interval"
    return re.sub(rf"^(\s*(?:- )?(?:{names}): )(\d+)([sm])$", divide, text, flags=re.MULTILINE)


def prometheus_files(directory: Path, divisor: int, blackbox: str | None = None, **targets: list[str]) -> Path:
    """Write the shipped configuration and rules, with intervals divided, these targets and no others.

    Args:
        divisor: of the intervals.
        blackbox: `host:port` of the blackbox exporter; the shipped one if None.
        targets: by the name of their file in `targets/`.

    Returns:
        The configuration's path.
    """
    for name in ("prometheus.yml", "recording.yml", "alerts.yml"):
        text = divided((DEPLOY / "prometheus" / name).read_text(), divisor)
        (directory / name).write_text(text if blackbox is None else text.replace("127.0.0.1:9115", blackbox))
    (directory / "targets").mkdir()
    for shipped in (DEPLOY / "prometheus/targets").glob("*.yml"):
        groups = [{"targets": targets[shipped.stem]}] if shipped.stem in targets else []
        (directory / "targets" / shipped.name).write_bytes(msgspec.yaml.encode(groups))
    return directory / "prometheus.yml"


class Service(Started):
    """A process that serves HTTP on a loopback port.

    Args:
        path: that answers 200 when it is ready.
        port: to serve at; a free one if None.
    """

    start_s = START_S
    stop_s = STOP_S

    def __init__(self, program: str, path: str, port: int | None = None) -> None:
        self.program = need(program)
        self.port = port or free_port()
        self.address = f"{HOST}:{self.port}"
        self.url = f"http://{self.address}"
        self.directory = Path(tempfile.mkdtemp(prefix=f"tidegate-{program}-"))
        weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
        self.log = self.directory / "server.log"
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None, f"{self.program} does not run"
        return self._process.pid

    def arguments(self) -> Sequence[str]:
        """Of the command line."""
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        """What the process gets beside the environment of the tests."""
        return {}

    def options(self) -> Mapping[str, Any]:
        """What `subprocess.Popen` is told beside the above."""
        return {}

    def start(self) -> None:
        """Start the process and wait until it answers.

        Raises:
            RuntimeError: with what it logged, if it ends or does not answer in time, 20 s for most.
        """
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [self.program, *self.arguments()],
                cwd=self.directory,
                env={**os.environ, **self.environment()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **self.options(),
            )
        try:
            wait_until(self._answers, self.start_s, f"{self.program} on port {self.port} answers")
        except TimeoutError as error:
            self.stop()
            raise RuntimeError(f"{error}; its log:\n{self.tail()}") from None

    def stop(self) -> None:
        """End the process, by force after 5 s for most; nothing happens if it does not run."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(self.stop_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End the process at once by SIGKILL; nothing happens if it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def get(self, path: str, **parameters: str) -> Any:
        """Ask for JSON.

        Args:
            path: on this server.
            parameters: of the query.

        Returns:
            What it answers.
        """
        return httpx.get(self.url + path, params=parameters, timeout=5).raise_for_status().json()

    def tail(self) -> str:
        """The end of what it logged."""
        return self.log.read_text(errors="replace")[-4000:]

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"{self.program} ended with {self._process.returncode}; its log:\n{self.tail()}")
        if not accepts(self.port):  # a try to connect is cheap, a client of httpx is not
            return False
        try:
            return httpx.get(self.url + self._path, timeout=2).status_code == 200
        except httpx.TransportError:
            return False


class Prometheus(Service):
    """A Prometheus server.

    Args:
        configuration: its file; what it names lies beside it.
        replica: what tells it from the other one of a pair.
        port: to serve at; a free one if None.
    """

    def __init__(self, configuration: Path, replica: str = "a", port: int | None = None) -> None:
        super().__init__("prometheus", "/-/ready", port)
        self._configuration = configuration
        self._replica = replica

    def arguments(self) -> Sequence[str]:
        return (
            f"--config.file={self._configuration}",
            f"--storage.tsdb.path={self.directory / 'data'}",
            f"--web.listen-address={self.address}",
            "--enable-feature=expand-external-labels",
        )

    def environment(self) -> Mapping[str, str]:
        return {"PROMETHEUS_REPLICA": self._replica}

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Evaluate an expression now.

        Args:
            expression: whose value is a vector.

        Returns:
            Labels and value of each series.
        """
        found = self.get("/api/v1/query", query=expression)["data"]["result"]
        return [(each["metric"], float(each["value"][1])) for each in found]

    def firing(self) -> set[str]:
        """The names of the alerts that fire."""
        return {each["labels"]["alertname"] for each in self.get("/api/v1/alerts")["data"]["alerts"] if each["state"] == "firing"}


class Alertmanager(Service):
    """An Alertmanager, alone or one of a pair.

    Args:
        configuration: its file.
        peer: `host:port` of the other one's cluster port; alone if neither this nor the next is given.
        clustered: listen for a peer.
    """

    def __init__(self, configuration: Path, peer: str | None = None, clustered: bool = False) -> None:
        super().__init__("prometheus-alertmanager", "/-/ready")
        self._configuration = configuration
        self.cluster_address = f"{HOST}:{free_port()}" if clustered or peer else ""
        self._peer = peer

    def arguments(self) -> Sequence[str]:
        return (
            f"--config.file={self._configuration}",
            f"--storage.path={self.directory / 'data'}",
            f"--web.listen-address={self.address}",
            f"--cluster.listen-address={self.cluster_address}",
            f"--cluster.peer-timeout={PEER_TIMEOUT_S}s",
            *([f"--cluster.peer={self._peer}"] if self._peer else []),
        )

    def alerts(self) -> dict[str, bool]:
        """The names of the alerts it knows, and whether one of that name is inhibited."""
        return {each["labels"]["alertname"]: bool(each["status"]["inhibitedBy"]) for each in self.get("/api/v2/alerts")}


class Receiver:
    """Answers as PagerDuty's Events API and Slack's webhooks do, on loopback, and keeps what came and when."""

    def __init__(self) -> None:
        self.received: list[tuple[float, str, dict[str, Any]]] = []
        """Monotonic time in s, path and body of each."""
        keep = self.received

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                keep.append((time.monotonic(), self.path, json.loads(body)))
                to_pagerduty = self.path.endswith("/enqueue")
                # Slack's webhooks say "ok"; newer Alertmanagers take any JSON without "ok": true for a refusal.
                answer = b'{"status":"success","message":"Event processed","dedup_key":"1"}' if to_pagerduty else b"ok"
                self.send_response(202 if to_pagerduty else 200)
                self.send_header("Content-Type", "application/json" if to_pagerduty else "text/plain")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer((HOST, 0), Handler)
        self.url = f"http://{HOST}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def of(self, path: str) -> list[tuple[float, dict[str, Any]]]:
        """What came at one path.

        Args:
            path: such as `/v2/enqueue`.

        Returns:
            Monotonic time in s and body of each.
        """
        return [(at, body) for at, where, body in list(self.received) if where == path]
