"""What a worker, one of several processes behind one port, does besides serving. `supervisor` keeps them.

It has a seat, numbered from 1, and a socket pair to the supervisor: the worker says on it that it listens, the supervisor that
the drain is to hurry, and each sees by its end that the other is gone.

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

ASK_TIMEOUT_S: Final = 0.5
SLOT_VARIABLE: Final = "TIDEGATE_WORKER"
READY: Final = b"r"
"""What a worker says to the supervisor: it listens."""
SKIP_DRAIN: Final = b"h"
"""What the supervisor says to a worker: its drain is to hurry."""
_END: Final = b"# EOF\n"


class WorkerSlot(msgspec.Struct, frozen=True):
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
        text = environment.pop(SLOT_VARIABLE, None)
        if text is None:
            return None
        try:
            seat = msgspec.json.decode(text, type=cls)
            os.set_inheritable(seat.channel, False)
        except (msgspec.DecodeError, OSError):
            raise SettingsError(f"the variable {SLOT_VARIABLE} is for the workers that tidegate starts: unset it") from None
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


class WorkerMetrics:
    """What a worker tells of its own counts, and what it gathers from the others.

    Args:
        seat: of this worker.
        workers: how many seats there are, 1 or more.
        live: gives this process's exposition.
    """

    def __init__(self, seat: WorkerSlot, workers: int, live: Callable[[], Awaitable[bytes]]) -> None:
        self._seat = seat
        self._workers = workers
        self._live = live
        # Of two that are asked for at once the later one is noted last: else counters would go backwards where it is killed.
        self._noting = asyncio.Lock()
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
        live = [await self.own(), *(answer for answer in answers if answer is not None)]
        past = [self._noted(number) for number, answer in zip(others, answers, strict=True) if answer is None]
        # In a thread: parsing takes milliseconds that no check should wait for.
        return await asyncio.to_thread(combine, live, past, len(live))

    async def own(self) -> bytes:
        """Note what this seat counted until now, so that it is known when this process is gone.

        Returns:
            The exposition, with what earlier workers of this seat counted.
        """
        async with self._noting:
            live = await self._live()
            text = combine([live], [self._past]) if self._past else live
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
            writer.write(await self.own() + _END)
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


def work(settings: Settings, seat: WorkerSlot, ready: Callable[[Instance], None]) -> None:
    """Run a worker until SIGTERM, SIGINT, or the end of its supervisor.

    Args:
        settings: all of them.
        seat: of this worker.
        ready: is called once it listens.

    Raises:
        TidegateError: if it cannot start.
    """
    uvloop.run(_work(settings, seat, ready))


async def _work(settings: Settings, seat: WorkerSlot, ready: Callable[[Instance], None]) -> None:
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
        tally = WorkerMetrics(seat, settings.server.workers, instance.metrics.exposition)
        instance.exposition = tally.gather
        with reloading(instance.reload):
            if not await started(instance, stop):
                loop.remove_reader(channel)
                return
            await tally.listen()
            ready(instance)
            with contextlib.suppress(OSError):  # the reader above sees the supervisor's end
                channel.send(READY)
            await stop.wait()
            await instance.drain(hurry)
        await tally.own()
        tally.close()
        loop.remove_reader(channel)
        if alone:
            _forget(seat)


def _forget(seat: WorkerSlot) -> None:
    """Remove what a killed supervisor can no longer remove; the last worker removes the directory."""
    for ending in ("sock", "prom", "new"):
        seat.path(ending).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # others are still there
        Path(seat.directory).rmdir()
