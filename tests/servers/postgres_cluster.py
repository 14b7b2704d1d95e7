"""A PostgreSQL primary with replicas that stream from it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

from psycopg import sql

from tests.moments import wait_until
from tests.servers.lifetime import Started
from tests.servers.postgres import DATABASE, START_S, USER, Options, PostgresServer, run

FORM_S = 30.0


class PostgresReplica(PostgresServer):
    """A server that begins as a copy of another one and follows it; a context manager that starts and stops it.

    The copy is made when it starts for the first time: the primary must run then, not later.

    Args:
        primary: whom it follows.
        options: configuration parameters, as of `PostgresServer`.
        port: to listen on; a free one if None.

    Attributes:
        primary: whom it follows now, or has followed until it was promoted.
        name: by which it is known to its primary, in `pg_stat_replication.application_name`.
    """

    def __init__(self, primary: PostgresServer, options: Options | None = None, port: int | None = None) -> None:
        super().__init__(options, port)
        self.primary = primary
        self.name = f"replica_{self.port}"

    def follow(self, primary: PostgresServer, timeout_s: float = START_S) -> None:
        """Follow another primary from now on, and wait until its log comes in.

        Args:
            primary: one that runs and has all that this replica has: promote the replica that is ahead.
            timeout_s: for how long to wait.

        Raises:
            TimeoutError: if nothing comes in time.
        """
        self.execute(sql.SQL("ALTER SYSTEM SET primary_conninfo = {}").format(self._source(primary)), USER)
        self.execute("SELECT pg_reload_conf()", USER)
        self.primary = primary
        self.wait_streaming(timeout_s)

    def wait_streaming(self, timeout_s: float = START_S) -> None:
        """Wait until the replica receives its primary's log.

        Args:
            timeout_s: for how long to ask.

        Raises:
            TimeoutError: if it does not in time.
        """
        query = "SELECT status, sender_port FROM pg_stat_wal_receiver"
        self._wait(timeout_s, f"follows {self.primary!r}", [("streaming", self.primary.port)], query)

    def caught_up(self, primary: PostgresServer | None = None, timeout_s: float = START_S) -> None:
        """Wait until the replica shows all that its primary has written until now.

        Args:
            primary: whose log counts; the one it follows if None.
            timeout_s: for how long to ask.

        Raises:
            TimeoutError: if it does not in time, such as while its replay is paused.
        """
        ((written,),) = (primary or self.primary).execute("SELECT pg_current_wal_lsn()", USER)
        self._wait(
            timeout_s, f"has replayed until {written}", [(True,)], "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", [written]
        )

    def pause_replay(self) -> None:
        """Go on receiving, but show nothing that is newer; returns when that holds."""
        self.execute("SELECT pg_wal_replay_pause()", USER)
        self._wait(START_S, "has paused its replay", [("paused",)], "SELECT pg_get_wal_replay_pause_state()")

    def resume_replay(self) -> None:
        """Replay what has been received meanwhile and what comes; returns when that has begun."""
        self.execute("SELECT pg_wal_replay_resume()", USER)
        self._wait(START_S, "has resumed its replay", [("not paused",)], "SELECT pg_get_wal_replay_pause_state()")

    def promote(self) -> None:
        """Become a primary, whether the old one runs or not; returns when it takes writes.

        Raises:
            TimeoutError: if it does not within 20 s.
        """
        self.execute("SELECT pg_promote(wait => false)", USER)
        self._wait(START_S, "takes writes", [(False,)], "SELECT pg_is_in_recovery()")

    def _make_data(self) -> None:
        source = self._source(self.primary)
        run(
            self._programs / "pg_basebackup",
            *("--pgdata", self.data, "--dbname", source, "--write-recovery-conf"),
            *("--wal-method", "stream", "--checkpoint", "fast", "--no-sync"),
            cwd=self.directory,
        )

    def _source(self, primary: PostgresServer) -> str:
        return f"host={primary.host} port={primary.port} user={USER} application_name={self.name}"

    def _wait(
        self, timeout_s: float, what: str, rows: list[tuple[Any, ...]], query: str, parameters: Sequence[object] | None = None
    ) -> None:
        wait_until(lambda: self._gives(rows, query, parameters), timeout_s, f"{self!r} {what}")


class PostgresCluster(Started):
    """A primary and replicas that stream from it; a context manager that starts and stops all.

    Args:
        replicas: 1 or more.
        options: configuration parameters for all, as of `PostgresServer`.

    Attributes:
        primary: the primary of the beginning.
        replicas: the replicas of the beginning.
    """

    def __init__(self, replicas: int = 2, options: Options | None = None) -> None:
        self.primary = PostgresServer(options)
        self.replicas = [PostgresReplica(self.primary, options) for _ in range(replicas)]
        self.servers = [self.primary, *self.replicas]

    def url(self, database: str = DATABASE) -> str:
        """Name a database on whichever server takes writes, as libpq does.

        Returns:
            `postgresql://postgres@127.0.0.1:P1,127.0.0.1:P2,…/DATABASE?target_session_attrs=read-write`.
        """
        hosts = ",".join(f"{server.host}:{server.port}" for server in self.servers)
        return f"postgresql://{USER}@{hosts}/{quote(database, safe='')}?target_session_attrs=read-write"

    def replica_urls(self, database: str = DATABASE) -> list[str]:
        """Name a database on each of the replicas of the beginning.

        Returns:
            Their URLs, in the order of `replicas`.
        """
        return [replica.url(database) for replica in self.replicas]

    def start(self) -> None:
        """Start all and wait until the replicas show what the primary has.

        Raises:
            RuntimeError: if a server does not start.
            TimeoutError: if a replica does not follow within 30 s.
        """
        try:
            self.primary.start()
            with ThreadPoolExecutor() as threads:
                list(threads.map(PostgresReplica.start, self.replicas))
            for replica in self._following():
                replica.wait_streaming(FORM_S)
            self.wait_caught_up(FORM_S)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all, at the same time."""
        for server in self.servers:
            server.terminate()
        for server in self.servers:
            server.stop()

    def wait_caught_up(self, timeout_s: float = START_S) -> None:
        """Wait until every replica that runs shows all that the server it follows has written until now.

        Args:
            timeout_s: for how long to ask each.

        Raises:
            TimeoutError: if one does not in time.
        """
        for replica in self._following():
            replica.caught_up(timeout_s=timeout_s)

    def follow(self, replica: PostgresReplica, new_primary: PostgresServer) -> None:
        """Let a replica follow another primary, such as a replica that was promoted.

        Args:
            replica: that is to follow.
            new_primary: one that runs and has all that this replica has.

        Raises:
            TimeoutError: if it does not within 20 s.
        """
        replica.follow(new_primary)

    def _following(self) -> list[PostgresReplica]:
        return [one for one in self.replicas if one.alive and one.execute("SELECT pg_is_in_recovery()", USER) == [(True,)]]
