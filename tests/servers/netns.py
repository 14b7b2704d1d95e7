"""A network of its own: Linux namespaces as hosts on one bridge, which processes can run in and whose links can be cut.

Nothing outside the namespaces is touched. It takes root, and a kernel that lets root make namespaces and veth pairs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

STOP_S = 10.0


def need_namespaces() -> None:
    """Skip the test where network namespaces cannot be had, saying why."""
    if shutil.which("ip") is None:
        pytest.skip("ip is not installed: it comes with the Debian package iproute2")
    if os.geteuid() != 0:
        pytest.skip("only root can make network namespaces")
    name = f"tg{os.getpid()}probe"
    try:
        _ip("netns", "add", name)
        try:
            _ip("-n", name, "link", "add", "br0", "type", "bridge")
            _ip("-n", name, "link", "add", "one", "type", "veth", "peer", "name", "two")
        finally:
            _ip("netns", "delete", name)
    except RuntimeError as error:
        pytest.skip(f"network namespaces are not permitted here: {error}")


class Host:
    """One namespace with one interface, `eth0`.

    Args:
        name: of the namespace.
        port: its end on the bridge.
        bridge: the namespace that has the bridge.
    """

    def __init__(self, name: str, port: str, bridge: str) -> None:
        self.name = name
        self._port = port
        self._bridge = bridge

    def popen(self, *command: str | Path, directory: Path, log: Path, environment: Mapping[str, str] | None = None) -> Process:
        """Start a process here.

        Args:
            command: program and arguments.
            directory: to run it in.
            log: a file that gets both of its streams.
            environment: beside that of the tests.
        """
        return Process(["ip", "netns", "exec", self.name, *map(str, command)], directory, log, environment or {})

    def run(self, *command: str, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
        """Run a command here to its end, whatever it ends with.

        Args:
            command: program and arguments.
        """
        return subprocess.run(
            ["ip", "netns", "exec", self.name, *command], capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def addresses(self) -> set[str]:
        """Its IPv4 addresses now."""
        said = json.loads(_ip("-n", self.name, "-4", "-json", "address", "show", "dev", "eth0"))
        return {each["local"] for each in said[0]["addr_info"]}

    def cut(self) -> None:
        """Take its cable out of the bridge: nothing arrives any more, and no one is told."""
        _ip("-n", self._bridge, "link", "set", self._port, "nomaster")

    def mend(self) -> None:
        """Put it back."""
        _ip("-n", self._bridge, "link", "set", self._port, "master", "br0")


class Network:
    """Hosts on one bridge; a context manager that makes and removes them.

    Args:
        hosts: the address of each, such as `10.0.0.2/24`, by name; several addresses with spaces between.
    """

    def __init__(self, hosts: Mapping[str, str]) -> None:
        self._addresses = hosts
        self._prefix = f"tg{os.getpid()}"
        self._bridge = f"{self._prefix}bridge"
        self._made: list[str] = []
        self._processes: list[Process] = []
        self.hosts: dict[str, Host] = {}

    def __enter__(self) -> Self:
        try:
            self._add(self._bridge)
            _ip("-n", self._bridge, "link", "add", "br0", "type", "bridge")
            _ip("-n", self._bridge, "link", "set", "br0", "up")
            for number, (name, addresses) in enumerate(self._addresses.items()):
                host, port = f"{self._prefix}{name}", f"port{number}"
                self._add(host)
                _ip("-n", self._bridge, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host)
                _ip("-n", self._bridge, "link", "set", port, "master", "br0", "up")
                for address in addresses.split():
                    _ip("-n", host, "address", "add", address, "dev", "eth0")
                _ip("-n", host, "link", "set", "eth0", "up")
                self.hosts[name] = Host(host, port, self._bridge)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._remove()

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def _add(self, name: str) -> None:
        _ip("netns", "add", name)
        self._made.append(name)
        _ip("-n", name, "link", "set", "lo", "up")

    def _remove(self) -> None:
        for name in reversed(self._made):
            with contextlib.suppress(RuntimeError):  # the others are to go all the same
                _ip("netns", "delete", name)
        self._made.clear()


class Process:
    """A process that was started somewhere; ended by its own process id.

    Args:
        command: program and arguments.
        directory: to run it in.
        log: gets both of its streams.
        environment: beside that of the tests.
    """

    def __init__(self, command: Sequence[str], directory: Path, log: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        with log.open("ab") as stream:
            self.popen = subprocess.Popen(
                command,
                cwd=directory,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def kill(self) -> None:
        """SIGKILL; nothing happens if it has ended."""
        self.popen.kill()
        self.popen.wait()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL after 10 s; nothing happens if it has ended."""
        self.popen.terminate()
        try:
            self.popen.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
