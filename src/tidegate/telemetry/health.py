"""Health of the components.

Each component is probed at most once per second, whatever the number of requests; while a probe hangs, no second one is started.
"""

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
    """Health of one component.

    Args:
        status: healthy or unhealthy.
        latency_ms: duration of the probe, ms.
        reason: why it is unhealthy, without addresses: `/health` is public, details are in the log.
    """

    status: str
    latency_ms: float
    reason: str | None = None


class Report(msgspec.Struct, frozen=True):
    """Health of all components.

    Args:
        status: the worst of the components.
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

    async def result(self) -> Component:
        if self._last is not None and time.monotonic() - self._last[0] < PROBE_TTL_S:
            return self._last[1]
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        started = time.monotonic()
        done, _ = await asyncio.wait({self._running}, timeout=PROBE_TIMEOUT_S)
        if done:
            return next(iter(done)).result()
        # The hung ping continues; the next caller waits for it instead of starting another.
        return Component("unhealthy", (time.monotonic() - started) * 1e3, f"no answer within {PROBE_TIMEOUT_S:g} s")

    async def _run(self) -> Component:
        started = time.monotonic()
        try:
            await self._ping()
            component = Component("healthy", round((time.monotonic() - started) * 1e3, 3))
            if self._last is not None and self._last[1].status != "healthy":
                logger.info("%s is healthy again", self.name)
        except Exception as error:  # noqa: BLE001 - any exception of a probe means unhealthy
            component = Component("unhealthy", round((time.monotonic() - started) * 1e3, 3), _kind_of(error))
            if self._last is None or self._last[1].status == "healthy":
                logger.warning("%s is unhealthy: %s: %s", self.name, type(error).__name__, error)
        finally:
            self._running = None  # also after cancellation: the next caller starts a new probe
        self._last = (time.monotonic(), component)
        return component


def _kind_of(error: Exception) -> str:
    """The error code of Tidegate with its reason, or the class name of any other exception."""
    if not isinstance(error, TidegateError):
        return type(error).__name__
    reason = error.details.get("reason")
    return error.code if reason is None else f"{error.code} ({reason})"


class Health:
    """Probes the components of one instance.

    Args:
        failing: returns the failing background tasks of this process, each with its error.
    """

    def __init__(self, failing: Callable[[], Sequence[str]] = tuple) -> None:
        self._probes: list[_Probe] = []
        self._failing = failing

    def add(self, name: str, ping: Callable[[], Awaitable[None]]) -> None:
        """Add a component; `ping` returns if it is healthy and raises if it is not."""
        self._probes.append(_Probe(name, ping))

    async def report(self) -> Report:
        """Probe every component, or use its last result if that is less than a second old.

        The component `rate_limiter` is this process: healthy while none of its background tasks is failing.
        """
        results = await asyncio.gather(*(probe.result() for probe in self._probes))
        components = {probe.name: component for probe, component in zip(self._probes, results, strict=True)}
        failing = self._failing()
        components["rate_limiter"] = (
            Component("unhealthy", 0.0, f"background tasks failed and were restarted: {'; '.join(failing)}")
            if failing
            else Component("healthy", 0.0)
        )
        worst = "unhealthy" if any(each.status == "unhealthy" for each in components.values()) else "healthy"
        return Report(worst, components, datetime.datetime.now(datetime.UTC).isoformat())
