"""Whether the parts answer: one probe a second a part, however many ask, and never a second one behind one that hangs."""

from __future__ import annotations

import asyncio
import datetime
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec

from tidegate.errors import TidegateError

logger = logging.getLogger(__name__)

PROBE_TTL_S: Final = 1.0
PROBE_TIMEOUT_S: Final = 2.0


class Component(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one part is.

    Args:
        status: healthy or unhealthy.
        latency_ms: how long its answer took.
        reason: why it is unhealthy, without addresses: `/health` is open to everybody, the log says more.
    """

    status: str
    latency_ms: float
    reason: str | None = None


class Report(msgspec.Struct, frozen=True):
    """How all parts are.

    Args:
        status: the worst of the components.
        components: by name.
        timestamp: ISO 8601, UTC.
    """

    status: str
    components: dict[str, Component]
    timestamp: str


class _Probe:
    def __init__(self, name: str, ping: Callable[[], Awaitable[None]]) -> None:
        self.name = name
        self._ping = ping
        self._last: tuple[float, Component] | None = None
        self._running: asyncio.Task[Component] | None = None

    async def look(self) -> Component:
        if self._last is not None and time.monotonic() - self._last[0] < PROBE_TTL_S:
            return self._last[1]
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        started = time.monotonic()
        done, _ = await asyncio.wait({self._running}, timeout=PROBE_TIMEOUT_S)
        if done:
            return next(iter(done)).result()
        # The hung ping goes on; whoever asks next waits for it too instead of sending another.
        return Component("unhealthy", (time.monotonic() - started) * 1e3, f"no answer within {PROBE_TIMEOUT_S:g} s")

    async def _run(self) -> Component:
        started = time.monotonic()
        try:
            await self._ping()
            component = Component("healthy", round((time.monotonic() - started) * 1e3, 3))
            if self._last is not None and self._last[1].status != "healthy":
                logger.info("%s is healthy again", self.name)
        except Exception as error:  # noqa: BLE001 - whatever a part throws at its probe makes it unhealthy
            component = Component("unhealthy", round((time.monotonic() - started) * 1e3, 3), _kind_of(error))
            if self._last is None or self._last[1].status == "healthy":
                logger.warning("%s is unhealthy: %s: %s", self.name, type(error).__name__, error)
        finally:
            self._running = None  # also of a probe that was cancelled: the next one is not to wait for it
        self._last = (time.monotonic(), component)
        return component


def _kind_of(error: Exception) -> str:
    """What kind of error it is: Tidegate's own code with its reason in a word, else the name of the class."""
    if not isinstance(error, TidegateError):
        return type(error).__name__
    reason = error.details.get("reason")
    return error.code if reason is None else f"{error.code} ({reason})"


class Health:
    """Probes the parts of one instance.

    Args:
        failing: gives the background tasks of this process that are failing, each with its error.
    """

    def __init__(self, failing: Callable[[], Sequence[str]] = tuple) -> None:
        self._probes: list[_Probe] = []
        self._failing = failing

    def add(self, name: str, ping: Callable[[], Awaitable[None]]) -> None:
        """Probe one more part.

        Args:
            name: of the component.
            ping: returns if the part answers, raises if it does not.
        """
        self._probes.append(_Probe(name, ping))

    async def report(self) -> Report:
        """Ask every part, or what it said less than a second ago.

        Returns:
            The report; `rate_limiter`, which is this process, is healthy while none of its background tasks is failing.
        """
        looked = await asyncio.gather(*(probe.look() for probe in self._probes))
        components = {probe.name: component for probe, component in zip(self._probes, looked, strict=True)}
        failing = self._failing()
        components["rate_limiter"] = (
            Component("unhealthy", 0.0, f"background tasks failed and were restarted: {'; '.join(failing)}")
            if failing
            else Component("healthy", 0.0)
        )
        worst = "unhealthy" if any(each.status == "unhealthy" for each in components.values()) else "healthy"
        return Report(worst, components, datetime.datetime.now(datetime.UTC).isoformat())
