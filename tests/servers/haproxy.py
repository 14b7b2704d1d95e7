"""One HAProxy as a process of its own, with a given configuration on loopback ports.

What Debian starts by itself when it installs the package is neither used nor touched.
"""

from __future__ import annotations

import csv
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence

from tests.servers.ports import HOST
from tests.servers.prometheus import Service


class HAProxy(Service):
    """A HAProxy in one process; a context manager that checks the configuration, starts and stops it.

    Args:
        configuration: the whole of haproxy.cfg. It must listen on `port`; `daemon` and `master-worker` must not stand in it.
            `{directory}` stands for `directory`, where a path must be absolute.
        port: that takes connections when it is ready, choose it with `free_port()`.
        files: further files by name, put into `directory`, in which it is started.
    """

    def __init__(self, configuration: str, port: int, files: Mapping[str, str] | None = None) -> None:
        super().__init__("haproxy", "/", port)
        # Made for root alone; HAProxy may give up being root.
        self.directory.chmod(0o755)
        self.configuration = self.directory / "haproxy.cfg"
        self.configuration.write_text(configuration.replace("{directory}", str(self.directory)))
        for name, text in (files or {}).items():
            (self.directory / name).write_text(text)

    def arguments(self) -> Sequence[str]:
        return "-db", "-f", str(self.configuration)

    def check(self) -> str:
        """Let HAProxy read its configuration.

        Returns:
            What it said, warnings included.

        Raises:
            RuntimeError: with what it said, if it refuses the configuration.
        """
        done = subprocess.run(
            [self.program, "-c", "-f", str(self.configuration)],
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        said = done.stdout + done.stderr
        if done.returncode != 0:
            raise RuntimeError(f"haproxy refuses {self.configuration}:\n{said}")
        return said

    def start(self) -> None:
        """Check the configuration, start, and wait until the port takes connections.

        Raises:
            RuntimeError: with what HAProxy said, if it refuses the configuration, ends, or does not listen within 20 s.
        """
        self.check()
        super().start()

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def states(self, socket_path: str, backend: str) -> dict[str, str]:
        """Ask the stats socket how the servers of a backend are.

        Args:
            socket_path: of a `stats socket` in the configuration.

        Returns:
            `UP`, `DOWN`, `UP 1/3` and the like, by name of the server.
        """
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(5)
            asking.connect(socket_path)
            asking.sendall(b"show stat\n")
            said = b"".join(iter(lambda: asking.recv(65_536), b"")).decode()
        rows = csv.DictReader(said.removeprefix("# ").splitlines())
        return {
            row["svname"]: row["status"]
            for row in rows
            if row["pxname"] == backend and row["svname"] not in ("FRONTEND", "BACKEND")
        }

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"haproxy ended with {self._process.returncode}; its log:\n{self.tail()}")
        with socket.create_connection((HOST, self.port), timeout=2):
            return True
