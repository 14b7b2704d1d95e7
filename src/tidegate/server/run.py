"""A process with one instance: its signals and its event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterator

import uvloop

from tidegate.server.instance import Instance
from tidegate.settings import Settings

logger = logging.getLogger(__name__)


async def serve(settings: Settings, ready: Callable[[Instance], None] | None = None, *, demo: bool = False) -> None:
    """Run an instance until SIGTERM or SIGINT; a second signal skips the drain, SIGHUP reloads.

    Args:
        ready: called once it listens.
        demo: see `Instance`.

    Raises:
        TidegateError: if the instance cannot start.
    """
    instance = Instance(settings, demo=demo)
    stop, skip_drain = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def signalled() -> None:
        (skip_drain if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    with reloading(instance.reload):
        if not await started(instance, stop):
            return
        if ready is not None:
            ready(instance)
        await stop.wait()
        await instance.drain(skip_drain)


def ignore_signals() -> None:
    """Ignore SIGHUP, SIGUSR1 and SIGUSR2, which by default end a process at once, with violations and debts not written."""
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def reloading(reload: Callable[[], None]) -> Iterator[None]:
    """Within the block SIGHUP reloads, in the running event loop; before and after it is ignored."""
    ignore_signals()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, reload)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        ignore_signals()


async def started(instance: Instance, stop: asyncio.Event) -> bool:
    """Start an instance, unless it is stopped before it listens.

    Args:
        instance: to start; closed if it does not start.
        stop: set to stop it.

    Returns:
        Whether it started, and has to be drained.

    Raises:
        TidegateError: if the instance cannot start.
    """
    starting = asyncio.ensure_future(instance.start())
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done() and not instance.address:
            failed = await _cancelled(starting)
            await instance.close()
            logger.info("stopped during startup%s", f", which failed: {failed}" if failed else "")
            return False
        # Once it listens, requests may be in flight: they are for the drain to finish.
        await starting
    except BaseException:
        await _cancelled(starting)
        await instance.close()
        raise
    finally:
        stopping.cancel()
    return True


async def _cancelled(starting: asyncio.Future[None]) -> Exception | None:
    """Cancel a start and wait for its end; returns the error with which it failed instead of being cancelled."""
    starting.cancel()
    (ended,) = await asyncio.gather(starting, return_exceptions=True)
    return ended if isinstance(ended, Exception) else None


def run(settings: Settings, ready: Callable[[Instance], None] | None = None, *, demo: bool = False) -> None:
    """`serve` on an event loop of its own.

    Args:
        ready: called once it listens.
        demo: see `Instance`.

    Raises:
        TidegateError: if the instance cannot start.
    """
    uvloop.run(serve(settings, ready, demo=demo))


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Instance]:
    """An instance inside a program that has its own event loop and signals.

    Args:
        settings: all of them; port 0 takes a free port.

    Yields:
        The instance; `address` says where it listens.
    """
    instance = Instance(settings)
    try:
        await instance.start()
        yield instance
    except BaseException:
        await instance.close()
        raise
    skip_drain = asyncio.Event()
    await instance.drain(skip_drain)
