"""A worker: one of several server processes behind one port, started by `supervisor`.

A worker has a slot, numbered from 1, and a socket pair to the supervisor. The worker reports on it that it listens, the
supervisor that the drain is to be skipped, and each detects by its end that the other process has ended.

A scrape reaches any one worker, which collects from the others over sockets in a directory that only this user can enter, and
answers for all. Before a worker answers, it writes its metrics to a file of its slot. The file is used while the slot has no
process, and the slot's next process counts on from it: no counter decreases. What a killed worker counted after the last scrape
is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Final, Self

import msgspec
import uvloop

from tidegate.errors import SettingsError
from tidegate.server.instance import Instance
from tidegate.server.run import reloading, started
from tidegate.settings import Settings
from tidegate.telemetry.merge_workers import combine

logger = logging.getLogger(__name__)

FETCH_TIMEOUT_S: Final = 0.5
SLOT_VARIABLE: Final = "TIDEGATE_WORKER"
READY: Final = b"r"
"""From a worker to the supervisor: it listens."""
SKIP_DRAIN: Final = b"h"
"""From the supervisor to a worker: end without waiting for requests in flight."""
_END: Final = b"# EOF\n"


class WorkerSlot(msgspec.Struct, frozen=True):
    """A worker's number among the workers of one supervisor, and how they communicate.

    Args:
        number: 1 to `[server] workers`.
        channel: descriptor of the socket to the supervisor.
        directory: where the workers keep their sockets and metrics files.
        unix_sockets: descriptors of the listening unix sockets, by address; all workers share them.
    """

    number: int
    channel: int
    directory: str
    unix_sockets: dict[str, int] = {}

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str]) -> Self | None:
        """The slot of this process, or None if it was not started as a worker.

        Args:
            environment: variables; the one that has the slot is removed.

        Raises:
            SettingsError: if the variable was not set by a supervisor.
        """
        text = environment.pop(SLOT_VARIABLE, None)
        if text is None:
            return None
        try:
            slot = msgspec.json.decode(text, type=cls)
            for descriptor in (slot.channel, *slot.unix_sockets.values()):
                os.set_inheritable(descriptor, False)
        except (msgspec.DecodeError, OSError):
            raise SettingsError(
                f"the environment variable {SLOT_VARIABLE} is reserved for the workers that tidegate starts: unset it"
            ) from None
        return slot

    def path(self, ending: str, number: int | None = None) -> Path:
        """A file of a slot.

        Args:
            ending: of the file's name.
            number: of the slot; this one by default.
        """
        return Path(self.directory, f"{number or self.number}.{ending}")


class WorkerMetrics:
    """A worker's own metrics, and those that it collects from the other workers.

    Args:
        slot: of this worker.
        workers: number of slots, 1 or more.
        live: returns this process's exposition.
    """

    def __init__(self, slot: WorkerSlot, workers: int, live: Callable[[], Awaitable[bytes]]) -> None:
        self._slot = slot
        self._workers = workers
        self._live = live
        # Of two concurrent scrapes the later one is written last: otherwise counters would decrease after a kill.
        self._write_lock = asyncio.Lock()
        self._earlier = self._saved(slot.number)
        self._server: asyncio.AbstractServer | None = None

    async def listen(self) -> None:
        """Answer scrapes of the other workers until `close`."""
        path = self._slot.path("sock")
        path.unlink(missing_ok=True)  # left by a worker that was killed on this slot
        self._server = await asyncio.start_unix_server(self._answer, path)

    async def collect(self) -> bytes:
        """The exposition of all slots, in Prometheus' text format 0.0.4."""
        others = [number for number in range(1, self._workers + 1) if number != self._slot.number]
        answers = await asyncio.gather(*(_fetch(self._slot.path("sock", number)) for number in others))
        live = [await self.own(), *(answer for answer in answers if answer is not None)]
        saved = [self._saved(number) for number, answer in zip(others, answers, strict=True) if answer is None]
        # In a thread: parsing takes milliseconds that no check should wait for.
        return await asyncio.to_thread(combine, live, saved, len(live))

    async def own(self) -> bytes:
        """Write this slot's metrics to its file, so that they outlive this process.

        Returns:
            The exposition, including what earlier workers of this slot counted.
        """
        async with self._write_lock:
            live = await self._live()
            text = combine([live], [self._earlier]) if self._earlier else live
            path = self._slot.path("new")
            try:
                path.write_bytes(text)
                path.replace(self._slot.path("prom"))
            except OSError as error:
                logger.warning("cannot write this worker's metrics to %s: %s", self._slot.directory, error.strerror)
        return text

    def close(self) -> None:
        """Stop answering scrapes."""
        if self._server is not None:
            self._server.close()
            self._slot.path("sock").unlink(missing_ok=True)

    async def _answer(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            writer.write(await self.own() + _END)
            await writer.drain()

    def _saved(self, number: int) -> bytes:
        try:
            return self._slot.path("prom", number).read_bytes()
        except OSError:
            return b""


async def _fetch(path: Path) -> bytes | None:
    """The exposition of the worker at a socket; None if there is none, it hangs, or it ended while answering."""
    try:
        async with asyncio.timeout(FETCH_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(path)
            with contextlib.closing(writer):
                text = await reader.read()
    except (OSError, TimeoutError):
        return None
    return text.removesuffix(_END) if text.endswith(_END) else None


def work(settings: Settings, slot: WorkerSlot, ready: Callable[[Instance], None]) -> None:
    """Run a worker until SIGTERM, SIGINT, or the end of its supervisor.

    Args:
        slot: of this worker.
        ready: called once it listens.

    Raises:
        TidegateError: if it cannot start.
    """
    uvloop.run(_work(settings, slot, ready))


async def _work(settings: Settings, slot: WorkerSlot, ready: Callable[[Instance], None]) -> None:
    loop = asyncio.get_running_loop()
    stop, skip_drain = asyncio.Event(), asyncio.Event()
    with socket.socket(fileno=slot.channel) as channel:
        channel.setblocking(False)
        orphaned = False

        def receive() -> None:
            nonlocal orphaned
            try:
                message = channel.recv(1)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            if message:
                skip_drain.set()
                return
            orphaned = True
            loop.remove_reader(channel)
            stop.set()

        loop.add_reader(channel, receive)
        # A second signal does not skip a worker's drain: service managers signal every process, the supervisor forwards its own.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        instance = Instance(settings, shares_port=True, unix_sockets=slot.unix_sockets)
        metrics = WorkerMetrics(slot, settings.server.workers, instance.metrics.exposition)
        instance.exposition = metrics.collect
        with reloading(instance.reload):
            if not await started(instance, stop):
                loop.remove_reader(channel)
                return
            await metrics.listen()
            ready(instance)
            with contextlib.suppress(OSError):  # the reader above detects the supervisor's end
                channel.send(READY)
            await stop.wait()
            await instance.drain(skip_drain)
        await metrics.own()
        metrics.close()
        loop.remove_reader(channel)
        if orphaned:
            _remove_files(slot)


def _remove_files(slot: WorkerSlot) -> None:
    """Remove this slot's files, which a killed supervisor no longer removes; the last worker removes the directory."""
    for ending in ("sock", "prom", "new"):
        slot.path(ending).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # other workers still use it
        Path(slot.directory).rmdir()
