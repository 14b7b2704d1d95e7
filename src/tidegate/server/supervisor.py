"""The supervisor of several worker processes behind one port.

The kernel distributes connections over the workers (SO_REUSEPORT); there is no proxy in between. A worker that ends is restarted
with backoff, and workers end when their supervisor is killed: see `worker`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from tidegate.doors.http_server import BACKLOG
from tidegate.errors import SettingsError
from tidegate.listen_address import is_unix, join_address
from tidegate.server.addresses import admin_address, free_address, grpc_address, probes_address
from tidegate.server.handover import shared_address
from tidegate.server.listener import UnixSocket
from tidegate.server.run import reloading
from tidegate.server.wiring import require_shared_counters
from tidegate.server.worker import READY, SKIP_DRAIN, SLOT_VARIABLE, WorkerSlot
from tidegate.settings import Settings, unix_mode

logger = logging.getLogger(__name__)

MIN_PAUSE_S: Final = 0.1
MAX_PAUSE_S: Final = 5.0
SETTLED_S: Final = 30.0
"""A worker that ran this long is considered healthy: the restart backoff is reset."""
GRACE_S: Final = 2.0
"""Time beyond drain_s after which a worker that has not ended is killed."""
_MAX_DIRECTORY_BYTES: Final = 90
"""A Unix socket's path may have 104 bytes on every system; its name in the directory takes 10."""


def supervise(settings: Settings, arguments: Sequence[str], ready: Callable[[str], None]) -> int:
    """Run `[server] workers` workers until SIGTERM or SIGINT; a second signal skips their drain, SIGHUP reloads them.

    Args:
        arguments: of `tidegate` for a worker.
        ready: called once with the address, when all workers listen.

    Returns:
        The exit code: 0 after a signal, 2 if the first worker could not start and has reported why.

    Raises:
        SettingsError: if the workers cannot be started: counters that they cannot share, an address that is not free.
    """
    require_shared_counters(settings)
    find = shared_address if settings.server.reuse_port else free_address
    http = find(settings.server.http, "server.http")
    admin = admin_address(settings, http, find)
    grpc = grpc_address(settings, http, admin, find)
    probes = probes_address(settings, {"server.http": http, "server.admin": admin, "server.grpc": grpc}, find)
    found = {"HTTP": http, "ADMIN": admin, "GRPC": grpc, "PROBES": probes}
    taken = {f"TIDEGATE_SERVER__{name}": join_address(*address) for name, address in found.items() if address is not None}
    try:
        made = tempfile.TemporaryDirectory(prefix="tidegate-", ignore_cleanup_errors=True)
    except OSError as error:
        raise SettingsError(
            f"cannot create a temporary directory for the workers: {error.strerror}; set TMPDIR to a writable directory"
        ) from None
    with made as directory, contextlib.ExitStack() as stack:
        if len(os.fsencode(directory)) > _MAX_DIRECTORY_BYTES:
            raise SettingsError(
                f"the temporary directory {directory} is too long for the path of a Unix socket; set TMPDIR to a shorter path"
            )
        unix_sockets = {}
        for address in taken.values():
            if is_unix(address):
                bound = UnixSocket(address, unix_mode(settings.server))
                # Before a worker listens, connections wait in the queue of the socket.
                bound.listening.listen(BACKLOG)
                stack.callback(bound.listening.close)
                stack.callback(bound.remove)
                unix_sockets[address] = bound.listening.fileno()
        return asyncio.run(_Supervisor(settings, arguments, taken, directory, unix_sockets, ready).run())


class _Worker:
    """One worker slot: its process, and the socket to it."""

    def __init__(
        self,
        number: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        directory: str,
        unix_sockets: Mapping[str, int],
    ) -> None:
        self.number = number
        self.listening = False
        self._command = command
        self._environment = environment
        self._directory = directory
        self._unix_sockets = dict(unix_sockets)
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    @property
    def pid(self) -> int:
        return 0 if self._process is None else self._process.pid

    def start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            slot = WorkerSlot(self.number, theirs.fileno(), self._directory, self._unix_sockets)
            try:
                self._process = subprocess.Popen(
                    self._command,
                    env={**self._environment, SLOT_VARIABLE: msgspec.json.encode(slot).decode()},
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), *self._unix_sockets.values()),
                    process_group=0,  # Ctrl-C in a terminal reaches only the supervisor, which forwards it in order
                )
            except OSError:
                ours.close()
                raise
        ours.setblocking(False)
        self._channel = ours

    async def listens(self) -> bool:
        """Wait until it listens, or ends."""
        self.listening = await self._receive() == READY
        return self.listening

    async def ended(self) -> int:
        """Wait until it ends; returns its exit code, negative for a signal."""
        while await self._receive():
            pass
        self.listening = False
        if self._channel is not None:
            self._channel.close()
        # The socket closes a moment before the process ends.
        return 0 if self._process is None else await asyncio.to_thread(self._process.wait)

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def skip_drain(self) -> None:
        if self._channel is not None:
            with contextlib.suppress(OSError):  # it has ended
                self._channel.send(SKIP_DRAIN)

    async def _receive(self) -> bytes:
        if self._channel is None:
            return b""
        try:
            return await asyncio.get_running_loop().sock_recv(self._channel, 1)
        except OSError:  # it ended without reading our messages
            return b""


class _Supervisor:
    def __init__(
        self,
        settings: Settings,
        arguments: Sequence[str],
        addresses: Mapping[str, str],
        directory: str,
        unix_sockets: Mapping[str, int],
        ready: Callable[[str], None],
    ) -> None:
        # -m puts the working directory before the library: only where this process has it there as well.
        safe = () if {"", str(Path.cwd())} & set(sys.path) else ("-P",)
        command = (sys.executable, *safe, "-m", "tidegate", *arguments)
        environment = {**os.environ, **addresses}
        self._workers = [
            _Worker(number + 1, command, environment, directory, unix_sockets) for number in range(settings.server.workers)
        ]
        self._starting = {worker.number for worker in self._workers}
        self._address = addresses["TIDEGATE_SERVER__HTTP"]
        self._drain_s = settings.server.drain_s
        self._ready = ready
        self._stop = asyncio.Event()

    async def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signalled)
        with reloading(self._reload):
            return await self._run()

    async def _run(self) -> int:
        # The first one alone: it migrates the catalog, and an error that stops it would stop all; it is reported once.
        first = self._workers[0]
        try:
            first.start()
        except OSError as error:
            raise SettingsError(f"cannot start a worker: {error}") from None
        if not await first.listens():
            code = await first.ended()
            if self._stop.is_set():
                return 0
            if code < 0:
                raise SettingsError(f"the first worker {_how(code)} before it listened; see the system log")
            return 2
        self._listens(first)
        await asyncio.gather(self._keep(first, True), *(self._keep(worker, False) for worker in self._workers[1:]))
        logger.info("all workers ended")
        return 0

    async def _keep(self, worker: _Worker, runs: bool) -> None:
        pause_s = MIN_PAUSE_S
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                if not runs:
                    worker.start()
                    if await worker.listens():
                        self._listens(worker)
                runs = False
                ended = _how(await worker.ended())
            except OSError as error:
                ended = f"cannot be started: {error}"
            if self._stop.is_set():
                return
            if time.monotonic() - started >= SETTLED_S:
                pause_s = MIN_PAUSE_S
            logger.warning("worker %d (pid %d) %s, restarting in %.1f s", worker.number, worker.pid, ended, pause_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)

    def _listens(self, worker: _Worker) -> None:
        logger.info("worker %d (pid %d) is listening", worker.number, worker.pid)
        if self._starting:
            self._starting.discard(worker.number)
            if not self._starting:
                self._ready(self._address)

    def _reload(self) -> None:
        # A worker that does not listen yet reads the current files anyway.
        for worker in self._workers:
            if worker.listening:
                worker.signal(signal.SIGHUP)

    def _signalled(self) -> None:
        if self._stop.is_set():
            for worker in self._workers:
                worker.skip_drain()
            return
        self._stop.set()
        for worker in self._workers:
            worker.signal(signal.SIGTERM)
        asyncio.get_running_loop().call_later(self._drain_s + GRACE_S, self._kill)

    def _kill(self) -> None:
        logger.error("workers did not end within %g s, killing them", self._drain_s + GRACE_S)
        for worker in self._workers:
            worker.signal(signal.SIGKILL)


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
