"""Commands on the shard that counts a subject: connecting, finding the shard, following redirections, deadlines."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import hiredis

from tidegate.counters import LateAnswer
from tidegate.counters.redis.connection import Connection
from tidegate.counters.redis.error_replies import follow_redirection, reply_by, shown
from tidegate.counters.redis.keyspace import hash_tag, slot_of_tag
from tidegate.counters.redis.pipeline import MAX_LATE, STALL_S, ConnectionOptions, reply_whenever
from tidegate.counters.redis.resp import encode_command
from tidegate.counters.redis.scripts import Script
from tidegate.counters.redis.topology import NO_SHARD, Topology, open_topology
from tidegate.counters.redis.url import RedisUrl, parse_redis_url
from tidegate.errors import SettingsError, StoreUnavailable

logger = logging.getLogger(__name__)

LATE_TIMEOUT_S: Final = STALL_S * MAX_LATE
"""Deadline of commands that no check waits for; a connection with a reply overdue for longer is dropped."""
Command = tuple[bytes, bytes, Script | None]
"""A command: the hash tag of its keys, its bytes, and the script that it runs."""


class RedisCommands:
    """The servers of one URL. Parameters: see `RedisCounters`."""

    def __init__(self, url: str | RedisUrl, timeout_s: float, max_in_flight: int, name: str) -> None:
        self.url = parse_redis_url(url) if isinstance(url, str) else url
        self.timeout_s = timeout_s
        self._options = ConnectionOptions(
            timeout_s, max_in_flight, self.url.credentials, self.url.db, self.url.tls_context(), name
        )
        self._topology: Topology | None = None
        self._starting: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def started(self) -> bool:
        """Whether it has begun to connect, in the running event loop."""
        return self._topology is not None and self._loop is asyncio.get_running_loop()

    async def start(self) -> None:
        """Connect, in the running event loop; anew where it is another one than before. Returns when the servers are there, or
        without them after a second.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._leave_loop()
            self._loop = loop
        if self._topology is None:
            self._topology = open_topology(self.url, self._options)
            self._starting = asyncio.ensure_future(self._topology.start(max(1.0, self.timeout_s)))
        if self._starting is not None:
            await asyncio.shield(self._starting)

    def reload_certificates(self) -> None:
        """Read the PEM files of the URL again, for connections made from now on; logs those that cannot be used."""
        if self._options.tls is not None:
            try:
                self.url.load_certificates(self._options.tls)
            except SettingsError as error:
                logger.error("certificates not reloaded, the previous ones stay active: %s", error)

    def shards(self) -> set[str]:
        """The servers that count now, by address."""
        return {str(connection.endpoint) for connection in self.connections()}

    @property
    def complete(self) -> bool:
        """Whether every subject has a server that counts it, as far as is known."""
        return self._topology is None or self._topology.complete

    def shard_of(self, subject: str) -> str:
        """Which server counts a subject now.

        Args:
            subject: as in a `Charge`.

        Returns:
            Its address; changes when another server takes its place.
        """
        try:
            return str(self._connection(hash_tag(subject)).endpoint)
        except StoreUnavailable:
            return NO_SHARD

    def connections(self) -> Sequence[Connection]:
        """The connections to the servers that count, in no order; none before `start`."""
        return () if self._topology is None else self._topology.connections()

    def subscribe(
        self, channel: str, on_push: Callable[[list[Any]], None], on_change: Callable[[Connection], None]
    ) -> Connection:
        """A new connection that listens on a channel; the caller closes it.

        Args:
            on_push: called with each push of the server.
            on_change: called when the connection came up or went down.

        Returns:
            The connection, which keeps itself connected.

        Raises:
            StoreUnavailable: before `start`.
        """
        return self._require_topology().subscribe(channel, on_push, on_change)

    async def call(self, tag: bytes, *parts: str | bytes) -> Any:
        """Run a command on the shard of a hash tag, redirections followed.

        Args:
            tag: of the command's keys.
            parts: the command.

        Raises:
            StoreUnavailable: if there is none.
        """
        return raise_first(await self._each([(tag, encode_command(*parts), None)]))[0]

    async def run(self, tag: bytes, work: Script, keys: Sequence[bytes], arguments: Sequence[str]) -> Any:
        """Run a script on the shard of a hash tag, redirections followed.

        Raises:
            StoreUnavailable: if there is none.
        """
        return await self._run_late(tag, work, encode_command("EVALSHA", work.sha, str(len(keys)), *keys, *arguments))

    async def _run_until(
        self, tag: bytes, work: Script, keys: Sequence[bytes], arguments: Sequence[bytes], deadline: float
    ) -> Any:
        """Run a script until a deadline."""
        command = encode_command("EVALSHA", work.sha, str(len(keys)), *keys, *arguments)
        connection = self._connection(tag)
        reply = await reply_by(connection.send(command), deadline, str(connection.endpoint))
        if isinstance(reply, hiredis.ReplyError):
            reply = await follow_redirection(self._require_topology(), slot_of_tag(tag), command, reply, work, deadline)
        return reply

    async def _run_soon(self, tag: bytes, work: Script, command: bytes) -> Any:
        """Run a script, whose command is ready, until the deadline of a check, which the connection keeps."""
        sent_at = time.monotonic()
        reply = await self._connection(tag).send(command)
        if type(reply) is not list and isinstance(reply, hiredis.ReplyError):
            topology = self._require_topology()
            reply = await follow_redirection(topology, slot_of_tag(tag), command, reply, work, sent_at + self.timeout_s)
        return reply

    async def _run_late(self, tag: bytes, work: Script, command: bytes) -> Any:
        """Run a script, whose command is ready, and wait for a late reply."""
        sent_at = time.monotonic()
        try:
            reply = await self._connection(tag).send(command)
        except LateAnswer as late:
            reply = await late.answer
        if type(reply) is not list and isinstance(reply, hiredis.ReplyError):
            reply = await self._follow(tag, command, reply, work, sent_at + LATE_TIMEOUT_S, True)
        return reply

    async def _each(self, sent: Iterable[Command], wait_late: bool = False) -> list[Any]:
        """Run commands, each on the shard of its tag. All are written before anything is waited for.

        Returns:
            For each the reply, or the `StoreUnavailable` that there is instead.
        """
        deadline = time.monotonic() + (LATE_TIMEOUT_S if wait_late else self.timeout_s)
        written: list[tuple[Command, asyncio.Future[Any] | StoreUnavailable]] = []
        for each in sent:
            try:
                written.append((each, self._connection(each[0]).send(each[1])))
            except StoreUnavailable as error:
                written.append((each, error))
        replies: list[Any] = []
        for (tag, command, work), waiting in written:
            if isinstance(waiting, StoreUnavailable):
                replies.append(waiting)
                continue
            try:
                reply = await (reply_whenever(waiting) if wait_late else waiting)
                if isinstance(reply, hiredis.ReplyError):
                    reply = await self._follow(tag, command, reply, work, deadline, wait_late)
            except StoreUnavailable as error:
                reply = error
            replies.append(reply)
        return replies

    async def _follow(self, tag: bytes, command: bytes, reply: Any, work: Script | None, deadline: float, wait_late: bool) -> Any:
        try:
            return await follow_redirection(self._require_topology(), slot_of_tag(tag), command, reply, work, deadline)
        except LateAnswer as late:
            if not wait_late:
                raise
            reply = await late.answer
            if isinstance(reply, hiredis.ReplyError):
                raise StoreUnavailable(f"late error reply from Redis: {shown(reply)}", reason="error") from None
            return reply

    async def close(self) -> None:
        """See `CounterStore.close`."""
        if self._loop is not asyncio.get_running_loop():
            self._leave_loop()
            return
        if self._starting is not None:
            self._starting.cancel()
            self._starting = None
        if self._topology is not None:
            await self._topology.close()
            self._topology = None

    def _leave_loop(self) -> None:
        """Release what belongs to another event loop: it cannot be awaited here; that loop closes it if it runs again."""
        loop, topology, self._topology, self._starting = self._loop, self._topology, None, None
        if loop is not None and topology is not None and not loop.is_closed():
            loop.call_soon_threadsafe(lambda: loop.create_task(topology.close()))

    def _deadline(self, started_ns: int) -> float:
        return (started_ns / 1e9 if started_ns else time.monotonic()) + self.timeout_s

    def _connection(self, tag: bytes) -> Connection:
        """The connection to the server that counts a hash tag."""
        topology = self._topology
        if topology is None:
            raise not_started()
        return topology.connection_of(slot_of_tag(tag) if topology.sharded else 0)

    def _require_topology(self) -> Topology:
        if self._topology is None:
            raise not_started()
        return self._topology


def not_started() -> StoreUnavailable:
    """The error of a command before `start` or after `close`."""
    return StoreUnavailable("not connected to Redis: the store has not started or is closed", reason="disconnected")


def raise_first(outcomes: list[Any]) -> list[Any]:
    """Raises the first failure among what `_each` gave."""
    for outcome in outcomes:
        if isinstance(outcome, StoreUnavailable):
            raise outcome
    return outcomes
