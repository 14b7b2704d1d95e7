"""Traces of a running server, received over OTLP as a collector receives them; and what is left of them when they are off.

The receiver is ours and speaks OTLP over HTTP with OpenTelemetry's own messages; no collector was to be had.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse

from tests.integration.ratelimit_client import ask, request
from tests.servers.redis_server import RedisServer

POLICY = """\
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/api/*"
  limits = ["3/day"]
[[api_keys]]
key = "policy-file-key-0001"
tier = "free"
"""
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
TRACED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
UNTRACED = {"traceparent": f"00-{TRACE}-{PARENT}-00"}


class Collector(ThreadingHTTPServer):
    """Receives spans on a free loopback port."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receive)
        self.exports: list[ExportTraceServiceRequest] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1/traces"

    def spans(self, name: str) -> list[Any]:
        return [
            span
            for export in self.exports
            for resource in export.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
            if span.name == name
        ]


class _Receive(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            import gzip

            body = gzip.decompress(body)
        self.server.exports.append(ExportTraceServiceRequest.FromString(body))
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        """Nothing: a test's output is its failures."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def traced(serve: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)

    def start(endpoint: str, **environment: str) -> Any:
        return serve(TIDEGATE_TRACING__ENDPOINT=endpoint, **environment)

    return start


def authorize(server: Any, **headers: str) -> httpx.Response:
    asked = {"X-API-Key": "policy-file-key-0001", "X-Original-URI": "/api/a", **headers}
    return httpx.get(f"{server.url}/v1/authorize", headers=asked)


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def test_a_check_is_a_span_of_its_callers_trace_with_the_store_inside(
    traced: Callable[..., Any], collector: Collector, redis_server: RedisServer
) -> None:
    server = traced(
        collector.url, TIDEGATE_COUNTERS__URL=redis_server.url, TIDEGATE_COUNTERS__TIMEOUT_MS="5000", TIDEGATE_TRACING__SAMPLE="0"
    )
    assert authorize(server, **TRACED, **{"X-Request-Id": "req-1"}).status_code == 204
    assert authorize(server, **UNTRACED).status_code == 204
    assert authorize(server).status_code == 204, "the sample is 0"
    assert authorize(server, **TRACED).status_code == 429
    assert authorize(server, **TRACED, **{"X-API-Key": "nobody-has-this-key"}).status_code == 401
    assert server.stop()[0] == 0, "what waits is sent at the end"
    passed, denied, refused = sorted(collector.spans("tidegate.check"), key=lambda span: span.start_time_unix_nano)
    for span in (passed, denied, refused):
        assert span.trace_id.hex() == TRACE
        assert span.parent_span_id.hex() == PARENT
        assert span.end_time_unix_nano > span.start_time_unix_nano
    assert attributes(passed) == {
        "tidegate.allowed": True,
        "tidegate.degraded": False,
        "tidegate.tier": "free",
        "tidegate.rule": "/api/*",
        "tidegate.remaining": 2,
        "http.request.id": "req-1",
        "http.request.method": "GET",
        "url.path": "/api/a",
    }
    assert attributes(denied)["tidegate.allowed"] is False
    assert attributes(refused)["error.type"] == "INVALID_API_KEY"
    stores = {span.parent_span_id: span for span in collector.spans("tidegate.store")}
    assert set(stores) == {passed.span_id, denied.span_id}, "who is not let in is not counted"
    inside = stores[passed.span_id]
    assert inside.trace_id == passed.trace_id
    assert passed.start_time_unix_nano <= inside.start_time_unix_nano
    assert inside.end_time_unix_nano <= passed.end_time_unix_nano
    resource = {each.key: each.value.string_value for each in collector.exports[0].resource_spans[0].resource.attributes}
    assert resource["service.name"] == "tidegate"
    assert resource["service.version"]


def test_a_sample_of_those_whose_caller_does_not_say(traced: Callable[..., Any], collector: Collector) -> None:
    server = traced(collector.url, TIDEGATE_TRACING__SAMPLE="0.5")
    with httpx.Client(base_url=server.url, headers={"X-API-Key": "policy-file-key-0001", "X-Original-URI": "/free"}) as client:
        for _ in range(100):
            assert client.get("/v1/authorize").status_code == 204
        for _ in range(20):
            client.get("/v1/authorize", headers=UNTRACED)
    server.stop()
    # Of 100 coins fewer than 20 or more than 80 fall on one side once in 10^9 times.
    assert 20 <= len(collector.spans("tidegate.check")) <= 80
    assert len({span.trace_id for span in collector.spans("tidegate.check")}) == len(collector.spans("tidegate.check"))


def test_a_batch_shows_each_check_and_the_one_call(traced: Callable[..., Any], collector: Collector) -> None:
    server = traced(collector.url)
    checks = [{"path": "/api/a", "api_key": "policy-file-key-0001"}] * 5
    answer = httpx.post(f"{server.url}/v1/check/batch", json={"checks": checks}, headers=TRACED)
    assert [each["allowed"] for each in answer.json()["decisions"]] == [True] * 3 + [False] * 2
    server.stop()
    assert len(collector.spans("tidegate.check")) == 5
    (call,) = collector.spans("tidegate.store")
    assert attributes(call) == {"tidegate.charges": 5}


@pytest.mark.parametrize("listens", [False, True])
def test_a_collector_that_is_unavailable_or_hangs_harms_no_check(traced: Callable[..., Any], listens: bool) -> None:
    with socket.socket() as hung:
        hung.bind(("127.0.0.1", 0))
        if listens:
            hung.listen()
        server = traced(f"http://127.0.0.1:{hung.getsockname()[1]}/v1/traces", TIDEGATE_TRACING__SAMPLE="1")
        statuses = [authorize(server).status_code for _ in range(20)]
        assert statuses == [204] * 3 + [429] * 17
        # The end of a process does not wait for its collector, which never answers: `stop` has a deadline of its own.
        code, _, err = server.stop()
    assert code == 0, err


def test_a_call_over_grpc_is_a_span_of_its_callers_trace(serve: Callable[..., Any], collector: Collector, tmp_path: Path) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    server = serve(grpc=True, TIDEGATE_TRACING__ENDPOINT=collector.url, TIDEGATE_TRACING__SAMPLE="0")
    address = f"127.0.0.1:{server.grpc_port}"
    asked = request([("api_key", "policy-file-key-0001"), ("path", "/api/a")])
    ask(address, asked, x_request_id="req-1", **TRACED)
    ask(address, asked, **UNTRACED)
    ask(address, asked)
    assert server.stop()[0] == 0
    (span,) = collector.spans("tidegate.check")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert attributes(span)["http.request.id"] == "req-1"
    assert attributes(span)["url.path"] == "/api/a"


def test_an_untrusted_peer_cannot_force_or_prevent_a_trace(traced: Callable[..., Any], collector: Collector) -> None:
    """Only a trusted proxy's `traceparent` is believed; of anybody else's checks the sample decides."""
    never = traced(collector.url, TIDEGATE_TRACING__SAMPLE="0", TIDEGATE_SERVER__TRUSTED_PROXIES="10.0.0.1")
    assert authorize(never, **TRACED).status_code == 204
    never.stop()
    assert collector.spans("tidegate.check") == []
    always = traced(collector.url, TIDEGATE_TRACING__SAMPLE="1", TIDEGATE_SERVER__TRUSTED_PROXIES="10.0.0.1")
    for sent in (TRACED, UNTRACED):
        assert authorize(always, **sent).status_code == 204
    always.stop()
    assert len(spans := collector.spans("tidegate.check")) == 2
    assert all(span.trace_id.hex() != TRACE and not span.parent_span_id for span in spans)


def test_off_it_is_not_even_imported() -> None:
    code = "import sys, tidegate.server.supervisor; print(sorted(name for name in sys.modules if 'opentelemetry' in name))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_without_the_extra_it_names_it(traced: Callable[..., Any], serve: Callable[..., Any], tmp_path: Path) -> None:
    blocked = tmp_path / "blocked" / "opentelemetry"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('not installed')")
    server = serve(wait=False, TIDEGATE_TRACING__ENDPOINT="http://127.0.0.1:1/v1/traces", PYTHONPATH=str(blocked.parent))
    code, _, err = server.stop_by_itself()
    assert code == 2
    assert "pip install 'tidegate[otel]'" in err
    assert "Traceback" not in err
