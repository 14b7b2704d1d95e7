"""Several processes behind one port: the supervisor that keeps them, and what a worker does besides serving.

The kernel spreads connections over the workers (SO_REUSEPORT); nothing stands between a client and the worker that answers. Each
worker has a seat, numbered from 1, and a socket pair to the supervisor: the worker says on it that it listens, the supervisor
that the drain is to hurry, and each sees by its end that the other is gone. So a worker that dies is started again, and no worker
outlives a supervisor that was killed.

A scrape reaches one worker by chance, which asks the others over sockets in a directory that only this user can enter, and
answers for all. A worker notes what it tells in a file of its seat before it tells it. The file stands in while the seat is
empty, and whoever takes the seat next counts on from it: no counter goes backwards. What a killed worker counted after the last
scrape is lost.
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
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Final, Self

import msgspec
import uvloop

from tidegate.errors import SettingsError
from tidegate.instance import Instance, require_shared_counters
from tidegate.listening import admin_address, free_address, grpc_address
from tidegate.server import started
from tidegate.settings import Settings, join_address
from tidegate.telemetry.combined import combine

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S: Final = 0.5
LEAST_PAUSE_S: Final = 0.1
MOST_PAUSE_S: Final = 5.0
SETTLED_S: Final = 30.0
"""A worker that lived so long had started well: the next one may start at once."""
GRACE_S: Final = 2.0
"""How long beyond drain_s a worker may take to end before it is killed."""

_SEAT_VARIABLE: Final = "TIDEGATE_WORKER"
_READY: Final = b"r"
_HURRY: Final = b"h"
_END: Final = b"# EOF\n"
_MOST_DIRECTORY_BYTES: Final = 90
"""A socket's path has room for 104 bytes or more, on every system; its name in the directory takes 10."""


class Seat(msgspec.Struct, frozen=True):
    """A worker's place among the workers of one supervisor.

    Args:
        number: 1 to `[server] workers`.
        channel: descriptor of the socket to the supervisor.
        directory: where the workers leave their sockets and what they counted.
    """

    number: int
    channel: int
    directory: str

    @classmethod
    def taken(cls, environment: MutableMapping[str, str]) -> Self | None:
        """Find out whether this process was started as a worker.

        Args:
            environment: variables; the one that says so is taken out.

        Returns:
            The seat, None for a process that was not.

        Raises:
            SettingsError: if the variable was set by somebody else.
        """
        text = environment.pop(_SEAT_VARIABLE, None)
        if text is None:
            return None
        try:
            seat = msgspec.json.decode(text, type=cls)
            os.set_inheritable(seat.channel, False)
        except (msgspec.DecodeError, OSError):
            raise SettingsError(f"the variable {_SEAT_VARIABLE} is for the workers that tidegate starts: unset it") from None
        return seat

    def path(self, ending: str, number: int | None = None) -> Path:
        """A file of a seat.

        Args:
            ending: of its name.
            number: of the seat, this one where not given.

        Returns:
            The path.
        """
        return Path(self.directory, f"{number or self.number}.{ending}")


class Tally:
    """What a worker tells of its own counts, and what it gathers from the others.

    Args:
        seat: of this worker.
        workers: how many seats there are, 1 or more.
        live: gives this process's exposition.
    """

    def __init__(self, seat: Seat, workers: int, live: Callable[[], bytes]) -> None:
        self._seat = seat
        self._workers = workers
        self._live = live
        self._past = self._noted(seat.number)
        self._server: asyncio.AbstractServer | None = None

    async def listen(self) -> None:
        """Answer the other workers until `close`."""
        path = self._seat.path("sock")
        path.unlink(missing_ok=True)  # of a worker that was killed on this seat
        self._server = await asyncio.start_unix_server(self._answer, path)

    async def gather(self) -> bytes:
        """Ask all workers.

        Returns:
            The exposition of all seats, in Prometheus' text format 0.0.4.
        """
        others = [number for number in range(1, self._workers + 1) if number != self._seat.number]
        answers = await asyncio.gather(*(_ask(self._seat.path("sock", number)) for number in others))
        live = [self.own(), *(answer for answer in answers if answer is not None)]
        past = [self._noted(number) for number, answer in zip(others, answers, strict=True) if answer is None]
        # In a thread: parsing takes milliseconds that no check should wait for.
        return await asyncio.to_thread(combine, live, past, len(live))

    def own(self) -> bytes:
        """Note what this seat counted until now, so that it is known when this process is gone.

        Returns:
            The exposition, with what earlier workers of this seat counted.
        """
        text = combine([self._live()], [self._past]) if self._past else self._live()
        path = self._seat.path("new")
        try:
            path.write_bytes(text)
            path.replace(self._seat.path("prom"))
        except OSError as error:
            logger.warning("what this worker counted cannot be noted in %s: %s", self._seat.directory, error.strerror)
        return text

    def close(self) -> None:
        """Answer no more."""
        if self._server is not None:
            self._server.close()
            self._seat.path("sock").unlink(missing_ok=True)

    async def _answer(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            writer.write(self.own() + _END)
            await writer.drain()

    def _noted(self, number: int) -> bytes:
        try:
            return self._seat.path("prom", number).read_bytes()
        except OSError:
            return b""


async def _ask(path: Path) -> bytes | None:
    """What the worker at a socket tells; None if there is none, it hangs, or it ended in the middle of its answer."""
    try:
        async with asyncio.timeout(ASK_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(path)
            with contextlib.closing(writer):
                text = await reader.read()
    except (OSError, TimeoutError):
        return None
    return text.removesuffix(_END) if text.endswith(_END) else None


def work(settings: Settings, seat: Seat, ready: Callable[[Instance], None]) -> None:
    """Run a worker until SIGTERM, SIGINT, or the end of its supervisor.

    Args:
        settings: all of them.
        seat: of this worker.
        ready: is called once it listens.

    Raises:
        TidegateError: if it cannot start.
    """
    uvloop.run(_work(settings, seat, ready))


async def _work(settings: Settings, seat: Seat, ready: Callable[[Instance], None]) -> None:
    loop = asyncio.get_running_loop()
    stop, hurry = asyncio.Event(), asyncio.Event()
    with socket.socket(fileno=seat.channel) as channel:
        channel.setblocking(False)
        alone = False

        def hear() -> None:
            nonlocal alone
            try:
                word = channel.recv(1)
            except BlockingIOError:
                return
            except OSError:
                word = b""
            if word:
                hurry.set()
                return
            alone = True
            loop.remove_reader(channel)
            stop.set()

        loop.add_reader(channel, hear)
        # A second signal does not hurry a worker: service managers signal every process, and the supervisor passes its own on.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        instance = Instance(settings, shares_port=True)
        tally = Tally(seat, settings.server.workers, instance.metrics.exposition)
        instance.exposition = tally.gather
        if not await started(instance, stop):
            loop.remove_reader(channel)
            return
        await tally.listen()
        ready(instance)
        with contextlib.suppress(OSError):  # the reader above sees the supervisor's end
            channel.send(_READY)
        await stop.wait()
        await instance.drain(hurry)
        tally.own()
        tally.close()
        loop.remove_reader(channel)
        if alone:
            _forget(seat)


def supervise(settings: Settings, arguments: Sequence[str], ready: Callable[[str], None]) -> int:
    """Run `[server] workers` workers until SIGTERM or SIGINT; a second signal hurries their drain.

    Args:
        settings: all of them.
        arguments: of `tidegate` for a worker.
        ready: is called once with the address, when all workers listen.

    Returns:
        The exit code: 0 after a signal, 2 if the first worker could not start; it has said why.

    Raises:
        SettingsError: if the workers cannot be started: counters that they cannot share, an address that is not free.
    """
    require_shared_counters(settings)
    host, port = free_address(settings.server.http, "server.http")
    admin = admin_address(settings, port)
    taken = {"TIDEGATE_SERVER__HTTP": join_address(host, port)}
    if admin is not None:
        taken["TIDEGATE_SERVER__ADMIN"] = join_address(*admin)
    grpc = grpc_address(settings, port, admin)
    if grpc is not None:
        taken["TIDEGATE_SERVER__GRPC"] = join_address(*grpc)
    try:
        made = tempfile.TemporaryDirectory(prefix="tidegate-", ignore_cleanup_errors=True)
    except OSError as error:
        raise SettingsError(f"workers need a directory for temporary files: {error.strerror}: set TMPDIR to one") from None
    with made as directory:
        if len(os.fsencode(directory)) > _MOST_DIRECTORY_BYTES:
            raise SettingsError(f"the path {directory} is too long to hold a socket: set TMPDIR to a shorter one")
        return asyncio.run(_Supervisor(settings, arguments, taken, directory, ready).run())


class _Worker:
    """One seat: its process, and the socket to it."""

    def __init__(self, number: int, command: Sequence[str], environment: Mapping[str, str], directory: str) -> None:
        self.number = number
        self._command = command
        self._environment = environment
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    @property
    def pid(self) -> int:
        return 0 if self._process is None else self._process.pid

    def start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            seat = Seat(self.number, theirs.fileno(), self._directory)
            try:
                self._process = subprocess.Popen(
                    self._command,
                    env={**self._environment, _SEAT_VARIABLE: msgspec.json.encode(seat).decode()},
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    process_group=0,  # Ctrl-C in a terminal reaches the supervisor alone, which passes it on in order
                )
            except OSError:
                ours.close()
                raise
        ours.setblocking(False)
        self._channel = ours

    async def listens(self) -> bool:
        """Wait until it listens, or ends."""
        return await self._hear() == _READY

    async def ended(self) -> int:
        """Wait until it ends; returns its exit code, negative for a signal."""
        while await self._hear():
            pass
        if self._channel is not None:
            self._channel.close()
        # The socket goes a moment before the process does.
        return 0 if self._process is None else await asyncio.to_thread(self._process.wait)

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def hurry(self) -> None:
        if self._channel is not None:
            with contextlib.suppress(OSError):  # it has ended
                self._channel.send(_HURRY)

    async def _hear(self) -> bytes:
        if self._channel is None:
            return b""
        try:
            return await asyncio.get_running_loop().sock_recv(self._channel, 1)
        except OSError:  # it ended with words of ours unread
            return b""


class _Supervisor:
    def __init__(
        self,
        settings: Settings,
        arguments: Sequence[str],
        addresses: Mapping[str, str],
        directory: str,
        ready: Callable[[str], None],
    ) -> None:
        # -m puts the working directory before the library: only where this process has it there as well.
        safe = () if {"", str(Path.cwd())} & set(sys.path) else ("-P",)
        command = (sys.executable, *safe, "-m", "tidegate", *arguments)
        environment = {**os.environ, **addresses}
        self._workers = [_Worker(number + 1, command, environment, directory) for number in range(settings.server.workers)]
        self._silent = {worker.number for worker in self._workers}
        self._address = addresses["TIDEGATE_SERVER__HTTP"]
        self._drain_s = settings.server.drain_s
        self._ready = ready
        self._stop = asyncio.Event()

    async def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signalled)
        # The first one alone: it brings the catalog up to date, and what hinders it would hinder all, and is said once.
        first = self._workers[0]
        try:
            first.start()
        except OSError as error:
            raise SettingsError(f"a worker cannot be started: {error}") from None
        if not await first.listens():
            code = await first.ended()
            if self._stop.is_set():
                return 0
            if code < 0:
                raise SettingsError(f"the first worker {_how(code)} before it listened: see the system's log")
            return 2
        self._listens(first)
        await asyncio.gather(self._keep(first, True), *(self._keep(worker, False) for worker in self._workers[1:]))
        logger.info("all workers have ended")
        return 0

    async def _keep(self, worker: _Worker, runs: bool) -> None:
        pause_s = LEAST_PAUSE_S
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                if not runs:
                    worker.start()
                    if await worker.listens():
                        self._listens(worker)
                runs = False
                said = _how(await worker.ended())
            except OSError as error:
                said = f"cannot be started: {error}"
            if self._stop.is_set():
                return
            if time.monotonic() - started >= SETTLED_S:
                pause_s = LEAST_PAUSE_S
            logger.warning("worker %d (pid %d) %s; another one starts in %.1f s", worker.number, worker.pid, said, pause_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause_s)
            pause_s = min(2 * pause_s, MOST_PAUSE_S)

    def _listens(self, worker: _Worker) -> None:
        logger.info("worker %d (pid %d) listens", worker.number, worker.pid)
        if self._silent:
            self._silent.discard(worker.number)
            if not self._silent:
                self._ready(self._address)

    def _signalled(self) -> None:
        if self._stop.is_set():
            for worker in self._workers:
                worker.hurry()
            return
        self._stop.set()
        for worker in self._workers:
            worker.signal(signal.SIGTERM)
        asyncio.get_running_loop().call_later(self._drain_s + GRACE_S, self._kill)

    def _kill(self) -> None:
        logger.error("workers that did not end within %g s are killed", self._drain_s + GRACE_S)
        for worker in self._workers:
            worker.signal(signal.SIGKILL)


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _forget(seat: Seat) -> None:
    """Remove what a killed supervisor can no longer remove; the last worker removes the directory."""
    for ending in ("sock", "prom", "new"):
        seat.path(ending).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # others are still there
        Path(seat.directory).rmdir()
