"""One PostgreSQL server: its process tree, its data directory, and a blocking call for tests to ask it with."""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from psycopg import sql

from tests.moments import wait_until
from tests.servers.lifetime import Started
from tests.servers.ports import HOST, free_port
from tests.servers.process_tree import freeze, kill_tree, thaw, tree_of

USER = "postgres"
"""The superuser, the database it administers others from, and where root starts servers, the system's user who runs them."""

DATABASE = "tidegate"
"""An empty database that every server has from the beginning."""

START_S = 90.0
STOP_S = 5.0
QUIT_S = 2.0
CALL_S = 5.0

Options = Mapping[str, object]

_PACKAGE = "the Debian package postgresql"
_VERSIONS = Path("/usr/lib/postgresql")
_databases = itertools.count(1)


def programs() -> Path | None:
    """Find the server's programs: the newest version that Debian has installed, else those of the search path.

    Returns:
        The directory with `postgres`, `initdb` and `pg_basebackup`; None where there is none.
    """
    # A version's directory may hold the client's programs alone.
    versions = [path.parent for path in _VERSIONS.glob("*/bin/postgres") if path.parts[-3].isdigit()]
    if versions:
        return max(versions, key=lambda path: int(path.parts[-2]))
    found = shutil.which("postgres")
    return Path(found).resolve().parent if found else None


def need() -> Path:
    """Find the server's programs or skip the test, saying which package is missing.

    Returns:
        Their directory.
    """
    path = programs()
    if path is None:
        pytest.skip(f"postgres is not installed: it comes with {_PACKAGE}")
    if os.geteuid() == 0 and _account() is None:
        pytest.skip(f"PostgreSQL refuses to run as root, and the user {USER} is missing: it comes with {_PACKAGE}")
    return path


class PostgresServer(Started):
    """A server with a data directory of its own; a context manager that starts and stops it.

    It listens on loopback and on a unix socket in its directory, and trusts everybody. What it commits survives `kill` and
    `restart`, but not a crash of the machine. The directory is kept over stops and starts, and goes with the object.

    Args:
        options: configuration parameters, such as `{"max_connections": 20}`; they go before our own.
        port: to listen on; a free one if None.
    """

    host = HOST

    def __init__(self, options: Options | None = None, port: int | None = None) -> None:
        self._programs = need()
        self.options = dict(options or {})
        self.port = port or free_port()
        self.directory = new_directory()
        weakref.finalize(self, _remove, self.directory)
        self.data = self.directory / "data"
        self.log = self.directory / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False
        # Beside the data, not in it: there a replica would have its primary's.
        self._configuration = self.directory / "postgresql.conf"
        self._configuration.write_text("".join(f"{name} = {_quoted(value)}\n" for name, value in self._parameters().items()))

    def __repr__(self) -> str:
        return f"<postgres {self.host}:{self.port} {'alive' if self.alive else 'not alive'}>"

    @property
    def pid(self) -> int:
        """Of the running server's first process, the parent of all others.

        Raises:
            RuntimeError: if none runs.
        """
        if self._process is None:
            raise RuntimeError(f"{self!r} does not run")
        return self._process.pid

    @property
    def pids(self) -> list[int]:
        """Of all processes of the running server, the first one first; empty if none runs."""
        return [] if self._process is None or self._process.poll() is not None else tree_of(self._process.pid)

    @property
    def alive(self) -> bool:
        """Whether the server runs and is not paused."""
        return self._process is not None and self._process.poll() is None and not self._paused

    def url(self, database: str = DATABASE) -> str:
        """Name a database as libpq does.

        Returns:
            `postgresql://postgres@127.0.0.1:PORT/DATABASE`.
        """
        return f"postgresql://{USER}@{self.host}:{self.port}/{quote(database, safe='')}"

    def start(self) -> None:
        """Start the server and wait until it answers; nothing happens if it runs.

        Raises:
            RuntimeError: with what the server logged, if it does not answer within 20 s.
        """
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start the server without waiting: several then start at the same time. The first time, its data directory is made."""
        if self._process is not None and self._process.poll() is None:
            return
        self._forget()
        if not self.data.exists():
            self._make_data()
        command = [str(self._programs / "postgres"), "-D", str(self.data), "-c", f"config_file={self._configuration}"]
        with self.log.open("ab") as log:
            process: subprocess.Popen[bytes] = subprocess.Popen(
                command, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, **as_server()
            )
        # They end before their directory goes: what is registered last is called first.
        weakref.finalize(self, kill_tree, process)
        self._process = process

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Wait until the server answers.

        Args:
            timeout_s: for how long to ask.

        Raises:
            RuntimeError: with what the server logged, if it ends or does not answer in time.
        """
        try:
            wait_until(self._answers, timeout_s, f"postgres on port {self.port} answers")
        except TimeoutError as error:
            self.kill()
            raise RuntimeError(f"{error}; its log:\n{self._last_words()}") from None

    def terminate(self) -> None:
        """Tell the server to end its sessions and itself (a fast shutdown), without waiting."""
        if self._process is None:
            return
        if self._paused:
            self.resume()  # a stopped process does not see SIGINT
        self._process.send_signal(signal.SIGINT)

    def stop(self) -> None:
        """End the server: a fast shutdown, after 5 s an immediate one, 2 s later by force; nothing happens if it does not run."""
        if self._process is None:
            return
        self.terminate()
        for patience_s in (STOP_S, QUIT_S):
            try:
                self._process.wait(patience_s)
            except subprocess.TimeoutExpired:
                self._process.send_signal(signal.SIGQUIT)
            else:
                break
        self.kill()

    def kill(self) -> None:
        """End all processes of the server at once by SIGKILL, paused or not; nothing happens if it does not run.

        When it returns, all are gone: the server can be started again and recovers from its log.
        """
        if self._process is not None:
            kill_tree(self._process)
        self._forget()

    def pause(self) -> None:
        """Stop all processes by SIGSTOP, as if the machine froze: connections stay, answers do not come, not even to new ones.

        Nothing happens if the server does not run.
        """
        if self._process is not None and self._process.poll() is None:
            self._paused = True
            freeze(self._process.pid)

    def resume(self) -> None:
        """Let a paused server go on; nothing happens if it does not run."""
        if self._process is not None:
            thaw(self._process.pid)
        self._paused = False

    def restart(self) -> None:
        """Stop and start on the same port, with the same data."""
        self.stop()
        self.start()

    def execute(
        self, query: str | sql.Composed, database: str = DATABASE, parameters: Sequence[object] | None = None
    ) -> list[tuple[Any, ...]]:
        """Ask one statement on a connection of its own, committed when it returns.

        Args:
            query: the statement, with `%s` for each parameter.
            database: where to ask it.

        Returns:
            Its rows; empty for a statement that has none.

        Raises:
            psycopg.OperationalError: if the server is not there, or does not take the connection within 5 s.
            psycopg.Error: if it refuses the statement.
        """
        with psycopg.connect(self.url(database), autocommit=True, connect_timeout=int(CALL_S)) as connection:
            cursor = connection.execute(query, parameters)
            return [] if cursor.description is None else cursor.fetchall()

    def create_database(self, name: str) -> None:
        """Make an empty database.

        Args:
            name: of one that is not there.

        Raises:
            psycopg.errors.DuplicateDatabase: if it is there.
        """
        # Nobody can be connected to template0, so that nothing holds this up.
        self.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)), USER)

    def new_database(self) -> str:
        """Make an empty database whose name no other has that this process made, on whichever server.

        Returns:
            Its URL.
        """
        name = f"{DATABASE}_{next(_databases)}"
        self.create_database(name)
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Remove a database and end its sessions; nothing happens if it is not there.

        Args:
            name: of the database.
        """
        self.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)), USER)

    def _make_data(self) -> None:
        run("cp", "--archive", _template(self._programs), self.data, cwd=self.directory)

    def _parameters(self) -> dict[str, object]:
        return {
            "listen_addresses": self.host,
            "port": self.port,
            "unix_socket_directories": self.directory,
            "fsync": "off",
            "max_connections": 200,
            "shared_buffers": "32MB",
            # Files in the data directory: segments in /dev/shm would outlive a kill.
            "dynamic_shared_memory_type": "mmap",
            "wal_level": "replica",
            "max_wal_senders": 10,
            "wal_keep_size": "512MB",
            "hot_standby": "on",
            # The default of 5 s is what a replica waits before it looks for its primary again.
            "wal_retrieve_retry_interval": "200ms",
            "timezone": "UTC",
            "lc_messages": "C",
            **self.options,
        }

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            # Not an OSError: waiting longer would not help.
            code = None if self._process is None else self._process.returncode
            self._forget()
            raise RuntimeError(f"postgres on port {self.port} ended with {code}; its log:\n{self._last_words()}")
        return self._gives([(1,)], "SELECT 1")

    def _gives(self, rows: list[tuple[Any, ...]], query: str, parameters: Sequence[object] | None = None) -> bool:
        try:
            return self.execute(query, USER, parameters) == rows
        except psycopg.OperationalError as error:
            raise ConnectionError(str(error)) from None  # so that `wait_until` goes on asking

    def _last_words(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def _forget(self) -> None:
        self._process = None
        self._paused = False


@functools.cache
def _template(directory_of_programs: Path) -> Path:
    """Make a data directory once, which takes most of the time of a start; all servers of this process begin with a copy.

    Args:
        directory_of_programs: as `need` gives it.

    Returns:
        The data directory.
    """
    directory = new_directory()
    atexit.register(_remove, directory)
    data = directory / "data"
    settings = ("--username", USER, "--auth", "trust", "--encoding", "UTF8", "--locale", "C.UTF-8", "--no-sync")
    run(directory_of_programs / "initdb", "--pgdata", data, *settings, cwd=directory)
    alone = ("--single", "-F", "-D", data, USER)
    run(directory_of_programs / "postgres", *alone, cwd=directory, told=f"CREATE DATABASE {DATABASE}\n")
    return data


def _account() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(USER)
    except KeyError:
        return None


def as_server(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Say how a server is started: as somebody whom PostgreSQL accepts.

    Args:
        environment: for it; ours without our own settings for PostgreSQL if None.

    Returns:
        Arguments of `subprocess`.
    """
    if environment is None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    account = _account() if os.geteuid() == 0 else None
    if account is None:
        return {"env": environment}
    return {"env": environment, "user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def run(*command: str | Path, cwd: Path, told: str = "", environment: Mapping[str, str] | None = None) -> None:
    """Run one of PostgreSQL's programs, as the user who runs the servers.

    Args:
        command: the program with its arguments.
        cwd: where to run it.
        told: what it reads.
        environment: as of `as_server`.

    Raises:
        RuntimeError: with what it said, if it fails.
    """
    ended = subprocess.run(command, cwd=cwd, input=told, capture_output=True, text=True, check=False, **as_server(environment))
    if ended.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}")


def new_directory() -> Path:
    """Make a directory for servers, which belongs to the user who runs them.

    Returns:
        Its path.
    """
    directory = Path(tempfile.mkdtemp(prefix="tidegate-postgres-"))
    account = _account()
    if os.geteuid() == 0 and account is not None:
        os.chown(directory, account.pw_uid, account.pw_gid)
    return directory


def _remove(directory: Path) -> None:
    """Remove a server's directory, and the one piece of shared memory that a killed server leaves in the system."""
    try:
        # Only after a kill. The seventh line has key and number, see LOCK_FILE_LINE_SHMEM_KEY in PostgreSQL's pidfile.h.
        segment = (directory / "data" / "postmaster.pid").read_text().splitlines()[6].split()[1]
        subprocess.run(["ipcrm", "--shmem-id", segment], capture_output=True, check=False)
    except (OSError, IndexError):
        pass
    shutil.rmtree(directory, ignore_errors=True)


def _quoted(value: object) -> str:
    return "'" + str(value).replace("'", "''") + "'"
