"""OpenTelemetry traces of checks: one span per check, with a child span for the counter store. Needs the extra `otel`.

A span is created after the check, from its observation: no check waits for it, and untraced checks cost nothing extra.
The caller's `traceparent` decides whether a check is traced; without one, the sample does. A thread sends the spans in batches;
while the collector is unavailable at most 2,048 spans wait (the default of OpenTelemetry), others are dropped.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Final

from tidegate._version import __version__
from tidegate.counters import Charge, ChargeOutcome, CounterStore
from tidegate.decision import Decision
from tidegate.errors import SettingsError
from tidegate.jitter import JITTER
from tidegate.observation import Observation
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
    raise SettingsError(
        "setting tracing.endpoint requires OpenTelemetry; run pip install 'tidegate[otel]', or remove the setting"
    ) from error

EXPORT_TIMEOUT_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 2.0
_POLL_S: Final = 0.01

# The store call of this task's check: start and end, ns since the epoch, and its number of charges.
_STORE_CALL: Final[ContextVar[tuple[int, int, int] | None]] = ContextVar("tidegate_store_call", default=None)


class Tracing:
    """Creates spans from the observations of the gate.

    Args:
        endpoint: URL that receives the spans, OTLP over HTTP.
        sample: share of the checks without `traceparent` that are traced, 0 to 1.
        exporter: receives the spans instead of the endpoint.

    Raises:
        SettingsError: if OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str, sample: float, exporter: SpanExporter | None = None) -> None:
        self._sample = sample
        # `create` also reads OTEL_RESOURCE_ATTRIBUTES.
        resource = Resource.create({"service.name": "tidegate", "service.version": __version__})
        # `observe` decides which checks are traced before a span is created, so the sampler keeps all.
        self._provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=EXPORT_TIMEOUT_S) if exporter is None else exporter)
        )
        self._tracer = self._provider.get_tracer("tidegate", __version__)

    def counters(self, store: CounterStore) -> CounterStore:
        """Wrap the store so that its charges appear in the spans."""
        return _TracedStore(store)

    def observe(self, observation: Observation) -> None:
        """Create the spans of one check if it is traced."""
        request = current()
        parent = None if request is None else request.parent
        if not (JITTER.random() < self._sample if parent is None else parent.recorded):
            return
        ended_ns = time.time_ns()
        store_call = _STORE_CALL.get()
        started_ns = ended_ns - observation.latency_ns
        if store_call is not None:
            # In a batch, the latency of each check is only its share of the time.
            started_ns = min(started_ns, store_call[0])
        span = self._tracer.start_span(
            "tidegate.check", _context_of(parent), trace.SpanKind.SERVER, _attributes(observation), start_time=started_ns
        )
        if request is not None and span.is_recording():
            span.set_attribute("http.request.id", request.id)
            if request.check is not None:
                span.set_attributes({"http.request.method": request.check.method, "url.path": request.check.path})
        if observation.decision is None:
            span.set_status(
                trace.StatusCode.ERROR if observation.error in _SERVER_ERRORS else trace.StatusCode.UNSET, observation.error
            )
        if store_call is not None:
            # In a batch, only the first check shows the shared store call.
            _STORE_CALL.set(None)
            within = trace.set_span_in_context(span)
            store = self._tracer.start_span("tidegate.store", within, trace.SpanKind.CLIENT, start_time=store_call[0])
            store.set_attribute("tidegate.charges", store_call[2])
            store.end(store_call[1])
        span.end(ended_ns)

    async def close(self) -> None:
        """Send the waiting spans, within `CLOSE_TIMEOUT_S`."""
        # In a daemon thread: a hanging collector must not delay the drain.
        shutdown = threading.Thread(target=self._provider.shutdown, name="tracing shutdown", daemon=True)
        shutdown.start()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while shutdown.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)


_SERVER_ERRORS: Final = frozenset({"CATALOG_UNAVAILABLE", "STORE_UNAVAILABLE"})


class _TracedStore:
    """A counter store that records each charge for the span of its check."""

    immediate = False

    def __init__(self, store: CounterStore) -> None:
        self._store = store

    async def charge(self, charges: Sequence[Charge]) -> Sequence[ChargeOutcome]:
        started_ns = time.time_ns()
        try:
            return await self._store.charge(charges)
        finally:
            _STORE_CALL.set((started_ns, time.time_ns(), len(charges)))

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
        # In a program with tracing of its own, its current span is the parent.
        return None
    span = trace.SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True, trace_flags=trace.TraceFlags(1))
    return trace.set_span_in_context(trace.NonRecordingSpan(span))


def _attributes(observation: Observation) -> dict[str, str | bool | int]:
    decision = observation.decision
    if decision is None:
        return {"error.type": observation.error or ""}
    attributes = {
        "tidegate.allowed": decision.allowed,
        "tidegate.degraded": decision.degraded,
        "tidegate.tier": decision.tier,
        "tidegate.rule": decision.rule,
        "tidegate.remaining": decision.remaining,
    }
    return {name: value for name, value in attributes.items() if value is not None}
