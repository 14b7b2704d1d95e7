"""OpenTelemetry traces of checks: one span a check, with the call to the counter store inside it. Needs the extra `otel`.

A span is made when the check is over, from what the gate tells: no check waits for it, and what is not traced costs what it did.
Whether a check is traced, the caller decides by its `traceparent`, else the sample. Spans are handed to a thread that sends them
in batches; while the collector is away they are dropped, at most 2,048 wait (OpenTelemetry's own default).
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Final

from tidegate._version import __version__
from tidegate.counters import Charge, ChargeOutcome, CounterStore
from tidegate.decision import Decision, Observation
from tidegate.errors import SettingsError
from tidegate.policy.limits import LimitSet
from tidegate.telemetry.requests import Parent, current

try:
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON
except ImportError as error:
    raise SettingsError("tracing.endpoint needs OpenTelemetry: pip install 'tidegate[otel]', or leave it out") from error

EXPORT_TIMEOUT_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 2.0
_LOOK_S: Final = 0.01

# When the store was asked for this task's check and when it had answered, ns since the epoch; and how many charges went together.
_ASKED: Final[ContextVar[tuple[int, int, int] | None]] = ContextVar("tidegate_store_call", default=None)


class Tracing:
    """Makes spans of what the gate observes.

    Args:
        endpoint: where they go, OTLP over HTTP.
        sample: share of the checks to trace where the caller does not say, 0 to 1.
        exporter: takes the spans in place of the endpoint.

    Raises:
        SettingsError: if OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str, sample: float, exporter: SpanExporter | None = None) -> None:
        self._sample = sample
        # A resource of our own and none of the environment's detectors would lose OTEL_RESOURCE_ATTRIBUTES: `create` reads them.
        resource = Resource.create({"service.name": "tidegate", "service.version": __version__})
        # Which checks are traced is decided here, before any span is made: the sampler takes all that is left.
        self._provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=EXPORT_TIMEOUT_S) if exporter is None else exporter)
        )
        self._tracer = self._provider.get_tracer("tidegate", __version__)

    def counters(self, store: CounterStore) -> CounterStore:
        """The store as a gate whose checks are traced asks it.

        Args:
            store: what counts.

        Returns:
            The same store; each call is noted.
        """
        return _Noted(store)

    def observe(self, seen: Observation) -> None:
        """Make the spans of one check, if it is to be traced.

        Args:
            seen: what the gate saw.
        """
        request = current()
        parent = None if request is None else request.parent
        if not (random.random() < self._sample if parent is None else parent.recorded):
            return
        ended_ns = time.time_ns()
        asked = _ASKED.get()
        started_ns = ended_ns - seen.latency_ns
        if asked is not None:
            # Of a batch the gate tells each check a share of the time only.
            started_ns = min(started_ns, asked[0])
        span = self._tracer.start_span(
            "tidegate.check", _context_of(parent), trace.SpanKind.SERVER, _attributes(seen), start_time=started_ns
        )
        if request is not None and span.is_recording():
            span.set_attribute("http.request.id", request.id)
            if request.check is not None:
                span.set_attributes({"http.request.method": request.check.method, "url.path": request.check.path})
        if seen.decision is None:
            span.set_status(trace.StatusCode.ERROR if seen.error in _FAULTS else trace.StatusCode.UNSET, seen.error)
        if asked is not None:
            # Of a batch's checks the first one shows the call that they shared.
            _ASKED.set(None)
            within = trace.set_span_in_context(span)
            store = self._tracer.start_span("tidegate.store", within, trace.SpanKind.CLIENT, start_time=asked[0])
            store.set_attribute("tidegate.charges", asked[2])
            store.end(asked[1])
        span.end(ended_ns)

    async def close(self) -> None:
        """Send what waits, for `CLOSE_TIMEOUT_S` at most."""
        # In a thread that the process does not wait for: a collector that hangs must not hold up the drain.
        ending = threading.Thread(target=self._provider.shutdown, name="end of tracing", daemon=True)
        ending.start()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while ending.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_S)


_FAULTS: Final = frozenset({"CATALOG_UNAVAILABLE", "STORE_UNAVAILABLE"})


class _Noted:
    """A counter store whose calls are noted for the span of the check that made them."""

    def __init__(self, store: CounterStore) -> None:
        self._store = store

    async def charge(self, charges: Sequence[Charge]) -> Sequence[ChargeOutcome]:
        started_ns = time.time_ns()
        try:
            return await self._store.charge(charges)
        finally:
            _ASKED.set((started_ns, time.time_ns(), len(charges)))

    async def windows(self, counters: Sequence[tuple[LimitSet, str]]) -> Sequence[Sequence[Decision] | None]:
        return await self._store.windows(counters)

    async def reset(self, counters: Sequence[tuple[LimitSet, str]]) -> None:
        await self._store.reset(counters)

    async def ping(self) -> None:
        await self._store.ping()

    async def close(self) -> None:
        await self._store.close()


def _context_of(parent: Parent | None) -> Context | None:
    if parent is None:
        # Inside a program that traces by itself its own span is the parent.
        return None
    span = trace.SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True, trace_flags=trace.TraceFlags(1))
    return trace.set_span_in_context(trace.NonRecordingSpan(span))


def _attributes(seen: Observation) -> dict[str, str | bool | int]:
    decision = seen.decision
    if decision is None:
        return {"error.type": seen.error or ""}
    told = {
        "tidegate.allowed": decision.allowed,
        "tidegate.degraded": decision.degraded,
        "tidegate.tier": decision.tier,
        "tidegate.rule": decision.rule,
        "tidegate.remaining": decision.remaining,
    }
    return {name: each for name, each in told.items() if each is not None}
