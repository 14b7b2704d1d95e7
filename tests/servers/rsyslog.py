"""rsyslogd with the shipped configuration, of which only paths are changed, run as `tidegate-shipper.service` runs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import weakref
from pathlib import Path

import pytest

from tests.moments import wait_until
from tests.servers.lifetime import Started

DEPLOY = Path(__file__).parents[2] / "deploy/logging/rsyslog"
START_S = 60.0


class Shipper(Started):
    """rsyslogd in a directory of its own; the directory is kept over stops and starts, and goes with the object.

    Args:
        url: of the server to send to.
        user: and
        password: to say there.
        changes: to the configuration: what to put for a text that must be in it.

    Attributes:
        logs: the directory whose `*.log` are shipped.
        state: where queues and what was refused are kept.
    """

    def __init__(self, url: str, user: str = "", password: str = "", changes: dict[str, str] | None = None) -> None:
        program = shutil.which("rsyslogd", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None or not any(Path("/usr/lib").glob("*/rsyslog/omelasticsearch.so")):
            pytest.skip(
                "rsyslogd or its module omelasticsearch is missing: they are in the packages rsyslog and rsyslog-elasticsearch"
            )
        self._program = program
        self.directory = Path(tempfile.mkdtemp(prefix="tidegate-rsyslog-"))
        weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
        self.logs = self.directory / "logs"
        self.state = self.directory / "state"
        self.logs.mkdir()
        self.state.mkdir()
        self._log = self.directory / "server.log"
        self._configuration = self.directory / "tidegate-shipper.conf"
        text = (DEPLOY / self._configuration.name).read_text()
        paths = {"/var/log/tidegate/": f"{self.logs}/", "/var/lib/tidegate-shipper": str(self.state)}
        for old, new in {**paths, **(changes or {})}.items():
            assert old in text, old
            text = text.replace(old, new)
        self._configuration.write_text(text)
        self._environment = {
            **os.environ,
            "TIDEGATE_LOGS_URL": url,
            "TIDEGATE_LOGS_USER": user,
            "TIDEGATE_LOGS_PASSWORD": password,
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None
        return self._process.pid

    def check(self) -> str:
        """Let rsyslogd read the configuration without running it.

        Returns:
            What it says of it.
        """
        command = [self._program, "-N1", "-f", str(self._configuration), "-i", str(self.directory / "pid")]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def start(self) -> None:
        """Start the process and wait until it reads, as far as one can see that: it opens its log files.

        Raises:
            RuntimeError: with what it logged, if it ends instead.
            TimeoutError: if it does not within 60 s.
        """
        for path in self.state.glob("imfile-state*"):
            path.unlink()  # as the unit does
        marker = self.logs / "started.log"
        marker.touch()  # something to open, where no log is yet
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, "-n", "-f", str(self._configuration), "-i", "NONE"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

        def reads() -> bool:
            assert self._process is not None
            if self._process.poll() is not None:
                raise RuntimeError(f"rsyslogd ended with {self._process.returncode}:\n{self.said()}")
            opened = Path(f"/proc/{self._process.pid}/fd")
            return any(os.path.realpath(one) == str(marker) for one in opened.iterdir())

        try:
            wait_until(reads, START_S, "rsyslogd opens its log files")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill it, as the unit does; nothing happens if it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def send_to(self, url: str) -> None:
        """Let the next start, and `resend`, send elsewhere."""
        self._environment["TIDEGATE_LOGS_URL"] = url

    def resend(self) -> subprocess.CompletedProcess[str]:
        """Run `resend` on its state.

        Returns:
            How it ended and what it said.
        """
        environment = {**self._environment, **({"SHIPPER_PID": str(self.pid)} if self._process else {})}
        command = [DEPLOY / "resend", self.state]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    def kept(self, name: str) -> str:
        """What stands in one of its files.

        Args:
            name: `failed.json` or `refused.json`.

        Returns:
            The text; empty if there is no such file.
        """
        path = self.state / name
        return path.read_text() if path.exists() else ""

    def queued(self) -> int:
        """How many bytes its queues have on disk."""
        return sum(path.stat().st_size for path in self.state.glob("tidegate*.0*"))

    def said(self) -> str:
        """The end of what it logged of itself."""
        return self._log.read_text(errors="replace")[-4000:]
