"""One nginx as a process of its own, with a given configuration on loopback ports.

What Debian starts by itself when it installs the package is neither used nor touched, nor is anything below /etc/nginx.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence

from tests.servers.ports import HOST
from tests.servers.process_tree import has_ended, kill_tree, tree_of
from tests.servers.prometheus import Service

_MAIN = """\
{user}
worker_processes 1;
daemon off;
pid {directory}/nginx.pid;
error_log stderr {level};
events {{ worker_connections 1024; }}
http {{
    default_type application/octet-stream;
    access_log {directory}/access.log;
    client_body_temp_path {directory}/client_body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    scgi_temp_path {directory}/scgi;
    uwsgi_temp_path {directory}/uwsgi;
{http}
}}
"""


class Nginx(Service):
    """An nginx; a context manager that checks the configuration, starts one master with one worker, and stops both.

    As root, the worker is `www-data`, as Debian's own is. What it logs is in `log` (errors) and `access_log`.

    Args:
        http: what stands inside `http { … }`: a file of /etc/nginx/conf.d. It must listen on `port`.
        port: that answers when it is ready, choose it with `free_port()`.
        files: further files by name, put into `directory`; `http` includes them by name.
        level: from which on errors are logged.
    """

    def __init__(self, http: str, port: int, files: Mapping[str, str] | None = None, level: str = "info") -> None:
        super().__init__("nginx", "/", port)
        # Made for root alone; the worker must come through.
        self.directory.chmod(0o755)
        self.access_log = self.directory / "access.log"
        self.configuration = self.directory / "nginx.conf"
        self._http, self._level = http, level
        self.add("")
        for name, text in (files or {}).items():
            path = self.directory / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    def add(self, http: str, first: bool = False) -> None:
        """Let more stand inside `http { … }`; holds from the next start or reload on.

        Args:
            http: a further file of /etc/nginx/conf.d.
            first: whether it stands before the others.
        """
        self._http = http + self._http if first else self._http + http
        user = "user www-data;" if os.geteuid() == 0 else ""
        self.configuration.write_text(_MAIN.format(user=user, directory=self.directory, level=self._level, http=self._http))

    def change(self, changes: Mapping[str, str]) -> None:
        """Replace parts of what stands inside `http { … }`; holds from the next start or reload on.

        Args:
            changes: what stands there, and what to put in its place.

        Raises:
            ValueError: if one of the parts is not there.
        """
        for old, new in changes.items():
            if old not in self._http:
                raise ValueError(f"{old!r} is not in the configuration of this nginx")
            self._http = self._http.replace(old, new)
        self.add("")

    def arguments(self) -> Sequence[str]:
        return "-p", str(self.directory), "-c", str(self.configuration), "-e", "stderr"

    def check(self) -> str:
        """Let nginx read its configuration.

        Returns:
            What it said, warnings included.

        Raises:
            RuntimeError: with what it said, if it refuses the configuration.
        """
        done = subprocess.run(
            [self.program, "-t", *self.arguments()], cwd=self.directory, capture_output=True, text=True, timeout=30, check=False
        )
        said = done.stdout + done.stderr
        if done.returncode != 0:
            raise RuntimeError(f"nginx refuses {self.configuration}:\n{said}")
        return said

    def start(self) -> None:
        """Check the configuration, start, and wait until the port takes connections.

        Raises:
            RuntimeError: with what nginx said, if it refuses the configuration, ends, or does not listen within 20 s.
        """
        self.check()
        super().start()

    def stop(self) -> None:
        """End master and worker, by force after 5 s; nothing happens if they do not run."""
        if self._process is None:
            return
        tree = tree_of(self._process.pid)
        super().stop()
        # A killed master leaves its worker behind.
        for pid in tree:
            if not has_ended(pid):
                os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """SIGKILL to master and worker at once."""
        assert self._process is not None
        kill_tree(self._process)

    def reload(self) -> None:
        """Let it read its configuration again; workers of before finish what they are at."""
        assert self._process is not None
        self.check()
        self._process.send_signal(signal.SIGHUP)

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"nginx ended with {self._process.returncode}; its log:\n{self.tail()}")
        with socket.create_connection((HOST, self.port), timeout=2):
            return True
