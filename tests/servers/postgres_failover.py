"""PostgreSQL under pg_auto_failover: a monitor, and nodes one of which is the primary; made by the scripts of deploy/postgres."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest

from tests.moments import wait_until
from tests.servers import postgres
from tests.servers.lifetime import Started
from tests.servers.ports import HOST, free_port
from tests.servers.postgres import DATABASE, START_S, USER, as_server, new_directory, run
from tests.servers.process_tree import freeze, kill_tree, thaw, tree_of

FORM_S = 60.0
STOP_S = 10.0
SCRIPTS = Path(__file__).parents[2] / "deploy/postgres"

_SOCKETS = Path("/var/run/postgresql")
"""Where Debian's PostgreSQL has them, and where pg_autoctl looks for its own server."""

_OPTIONS = "listen_addresses = '127.0.0.1'\nshared_buffers = '32MB'\nfsync = off\ndynamic_shared_memory_type = mmap\n"
"""For a server of a few minutes, after what deploy/postgres says."""


def need() -> None:
    """Skip the test where pg_auto_failover is missing, saying which packages hold it."""
    postgres.need()
    if shutil.which("pg_autoctl") is None or not list(Path("/usr/lib/postgresql").glob("*/lib/pgautofailover.so")):
        pytest.skip("pg_auto_failover is missing: Debian's pg-auto-failover-cli and postgresql-15-auto-failover (13: -17-)")
    if os.geteuid() != 0 and not os.access(_SOCKETS, os.W_OK):
        pytest.skip(f"pg_auto_failover needs to make sockets in {_SOCKETS}: run the tests as root, or as a user who may")


class Keeper:
    """A `pg_autoctl run` and all below it: a PostgreSQL, and what keeps it as the monitor wants it.

    Args:
        name: `monitor`, or a node's.
        home: directory for everything of the installation.

    Attributes:
        port: of its PostgreSQL.
    """

    def __init__(self, name: str, home: Path) -> None:
        self.name = name
        self.port = free_port()
        self.pgdata = home / name
        self._home = home
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False
        self._last_semaphore: str | None = None

    def __repr__(self) -> str:
        return f"<{self.name} on port {self.port} {'alive' if self.alive else 'not alive'}>"

    @property
    def alive(self) -> bool:
        """Whether it runs, paused or not."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of `pg_autoctl`."""
        assert self._process is not None, "it was never started"
        return self._process.pid

    @property
    def pids(self) -> list[int]:
        """Of all its processes."""
        return tree_of(self._process.pid) if self._process is not None and self.alive else []

    def url(self, database: str = DATABASE) -> str:
        """Name a database on this server alone, as libpq does.

        Returns:
            `postgresql://postgres@127.0.0.1:PORT/DATABASE`.
        """
        return f"postgresql://{USER}@{HOST}:{self.port}/{quote(database, safe='')}"

    def create(self, script: str, *arguments: str) -> None:
        """Make its data directory.

        Args:
            script: of deploy/postgres.
            arguments: those around PGDATA PORT HOST: what goes before them, and what goes after.

        Raises:
            RuntimeError: with what it said, if it fails.
        """
        before, after = arguments[:1], arguments[1:]
        run(
            self._home / SCRIPTS.name / script,
            *before,
            self.pgdata,
            str(self.port),
            HOST,
            *after,
            cwd=self._home,
            environment=environment(self._home),
        )
        with (self.pgdata / "postgresql.conf").open("a") as configuration:
            configuration.write(_OPTIONS)

    def start(self) -> None:
        """Let it run, without waiting; nothing happens if it does."""
        if self.alive:
            return
        command = ["pg_autoctl", "run", "--pgdata", str(self.pgdata)]
        with self.log.open("ab") as log:
            process: subprocess.Popen[bytes] = subprocess.Popen(
                command,
                cwd=self._home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **as_server(environment(self._home)),
            )
        weakref.finalize(self, kill_tree, process)
        self._process = process

    @property
    def log(self) -> Path:
        """What pg_autoctl says."""
        return self._home / f"{self.name}.log"

    def kill(self) -> None:
        """End pg_autoctl, its PostgreSQL and all below them at once by SIGKILL, as if the machine were gone.

        It can be started again.
        """
        if self._process is None:
            return
        semaphore = self._semaphore() or self._last_semaphore
        kill_tree(self._process)
        self._process = self._last_semaphore = None
        self._paused = False
        # pg_autoctl has one for its log lines, which outlives it.
        if semaphore is not None:
            subprocess.run(["ipcrm", "--semaphore-id", semaphore], capture_output=True, check=False)
        for left in _SOCKETS.glob(f".s.PGSQL.{self.port}*"):
            left.unlink(missing_ok=True)

    def terminate(self) -> None:
        """Tell it to end in good order, without waiting."""
        if self._process is not None and self.alive:
            self._last_semaphore = self._semaphore()  # the file goes when it ends, the semaphore may stay
            self.resume()
            self._process.send_signal(signal.SIGINT)

    def stop(self) -> None:
        """End it: in good order, and after 10 s by force."""
        self.terminate()
        if self._process is not None:
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                pass
        self.kill()

    def pause(self) -> None:
        """Stop all its processes by SIGSTOP, as if the machine froze."""
        if self._process is not None and self.alive:
            self._paused = True
            freeze(self._process.pid)

    def resume(self) -> None:
        """Let it go on; nothing happens if it is not paused."""
        if self._process is not None and self.alive and self._paused:
            thaw(self._process.pid)
        self._paused = False

    def _semaphore(self) -> str | None:
        """The fifth line of pg_autoctl's own pid file, which lies at the path of the data directory."""
        path = self._home / "run/pg_autoctl" / self.pgdata.relative_to("/") / "pg_autoctl.pid"
        try:
            return path.read_text().splitlines()[4]
        except (OSError, IndexError):
            return None


class PostgresFailover(Started):
    """A monitor and nodes; a context manager that starts and stops all.

    Args:
        nodes: 2 or more; of 3, the primary waits for one of two standbys at each commit.

    Attributes:
        monitor: that decides who the primary is.
        nodes: all of them, `node-1` is the primary of the beginning.
    """

    def __init__(self, nodes: int = 3) -> None:
        need()
        self.directory = new_directory()
        weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
        # The user who runs the servers may not be able to read where Tidegate's own files are.
        shutil.copytree(SCRIPTS, self.directory / SCRIPTS.name)
        self.monitor = Keeper("monitor", self.directory)
        self.nodes = [Keeper(f"node-{number}", self.directory) for number in range(1, nodes + 1)]

    def url(self, database: str = DATABASE) -> str:
        """Name a database on whichever node takes writes: what Tidegate gets as `catalog.url`.

        Returns:
            `postgresql://postgres@127.0.0.1:P1,127.0.0.1:P2,…/DATABASE`.
        """
        hosts = ",".join(f"{HOST}:{node.port}" for node in self.nodes)
        return f"postgresql://{USER}@{hosts}/{quote(database, safe='')}"

    def replica_urls(self, database: str = DATABASE) -> list[str]:
        """Name a database on each node: what Tidegate gets as `catalog.replicas`, since any of them may be one.

        Returns:
            Their URLs, in the order of `nodes`.
        """
        return [node.url(database) for node in self.nodes]

    def start(self) -> None:
        """Make and start all, and wait until one is the primary and the others follow it.

        Raises:
            RuntimeError: with what was said, if a part cannot be made.
            TimeoutError: with the monitor's view, if they do not find together within 60 s.
        """
        try:
            self.monitor.create("create-monitor")
            self.monitor.start()
            self._wait_answers(self.monitor, "pg_auto_failover")
            with _asking(self.monitor.url("pg_auto_failover")) as connection:
                connection.execute((SCRIPTS / "monitor.sql").read_bytes())
            self._add(self.nodes[0])
            wait_until(lambda: self._writable(self.nodes[0]), FORM_S, f"{self.nodes[0]!r} takes writes")
            with ThreadPoolExecutor() as threads:
                list(threads.map(self._add, self.nodes[1:]))
            self.wait_whole()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all: the monitor first, so that it promotes nobody meanwhile."""
        self.monitor.stop()
        for node in self.nodes:
            node.terminate()
        for node in self.nodes:
            node.stop()

    def states(self) -> dict[str, tuple[str, str]]:
        """Ask the monitor.

        Returns:
            The reported and the assigned state of each node by name, such as `{"node-1": ("primary", "primary")}`.

        Raises:
            ConnectionError: if the monitor is away.
        """
        query = "SELECT nodename, reportedstate::text, goalstate::text FROM pgautofailover.node"
        with _asking(self.monitor.url("pg_auto_failover")) as connection:
            return {name: (reported, goal) for name, reported, goal in connection.execute(query).fetchall()}

    def primary(self, among: Sequence[Keeper] | None = None) -> Keeper:
        """Find the node that takes writes.

        Args:
            among: nodes to ask; those that run if None.

        Returns:
            The node.

        Raises:
            ConnectionError: if none does at this moment.
        """
        for node in among if among is not None else [each for each in self.nodes if each.alive]:
            if self._writable(node):
                return node
        raise ConnectionError(f"none of {self.nodes} takes writes")

    def wait_whole(self, timeout_s: float = FORM_S) -> None:
        """Wait until one node is the primary and all others follow it.

        Args:
            timeout_s: for how long to ask.

        Raises:
            TimeoutError: with the monitor's view, if that does not come about in time.
        """
        wanted = sorted([("primary", "primary"), *[("secondary", "secondary")] * (len(self.nodes) - 1)])
        try:
            wait_until(lambda: sorted(self.states().values()) == wanted, timeout_s, "one is the primary, the others follow")
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {self.states() if self.monitor.alive else 'the monitor is away'}") from None

    def _add(self, node: Keeper) -> None:
        node.create("create-node", node.name, self._monitor_uri)
        node.start()

    @property
    def _monitor_uri(self) -> str:
        return f"postgresql://autoctl_node@{HOST}:{self.monitor.port}/pg_auto_failover"

    def _wait_answers(self, keeper: Keeper, database: str) -> None:
        def answers() -> bool:
            with _asking(keeper.url(database)) as connection:
                return connection.execute("SELECT 1").fetchall() == [(1,)]

        wait_until(answers, START_S, f"{keeper!r} answers")

    def _writable(self, node: Keeper) -> bool:
        try:
            with _asking(node.url()) as connection:
                return connection.execute("SELECT pg_is_in_recovery()").fetchall() == [(False,)]
        except ConnectionError:
            return False


def _asking(url: str) -> psycopg.Connection:
    try:
        return psycopg.connect(url, autocommit=True, connect_timeout=2)
    except psycopg.OperationalError as error:
        raise ConnectionError(str(error)) from None  # so that `wait_until` goes on asking


def environment(home: Path) -> dict[str, str]:
    """What pg_autoctl and the scripts are told by their environment: to write below one directory, and to trust loopback.

    Args:
        home: the directory.

    Returns:
        Names and values.
    """
    return {
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / "config"),
        "XDG_DATA_HOME": str(home / "share"),
        "XDG_RUNTIME_DIR": str(home / "run"),
        "PATH": os.environ["PATH"],
        # Whoever cleans up after a killed test or stack knows its processes by this.
        "TMPDIR": tempfile.gettempdir(),
        "AUTH": "trust",
        "TLS": "--no-ssl",
        "LISTEN": HOST,
        "LC_ALL": "C.UTF-8",
    }
