"""The proxy of `examples/llm_gateway.py`, driven as an ASGI server drives it, before an API that these tests write."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.moments import PATIENCE_S
from tidegate import Limiter
from tidegate.counters.memory import MemoryCounters

_PATH = Path(__file__).parents[2] / "examples" / "llm_gateway.py"
_SPEC = importlib.util.spec_from_file_location("llm_gateway", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
gateway = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(gateway)

BODY = {"model": "m", "max_tokens": 500, "messages": [{"role": "user", "content": "How high is the tide?"}]}
CALLER = {"authorization": "Bearer user-42"}
LIMIT = 10_000
USAGE = {"usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}}
STREAMED = {**BODY, "stream": True}


class Chunks(httpx.AsyncByteStream):
    """An answer of the API: chunks, then either its end, an error, or nothing until it is closed."""

    def __init__(self, *chunks: str, stalls: bool = False, fails: bool = False) -> None:
        self.chunks, self.stalls, self.fails = chunks, stalls, fails
        self.closed = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            yield f"data: {chunk}\n\n".encode()
        if self.fails:
            raise httpx.ReadError("connection reset")
        if self.stalls:
            await self.closed.wait()

    async def aclose(self) -> None:
        self.closed.set()


class Proxy:
    """The proxy before an API that answers with `answer`."""

    def __init__(self, answer: Callable[[httpx.Request], httpx.Response]) -> None:
        self.counters = MemoryCounters(clock=lambda: 1_767_225_600_000_000)
        self.limiter = Limiter(f"{LIMIT}/minute", algorithm="token_bucket", counters=self.counters)
        upstream = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://api")
        self.app = gateway.create_app(upstream, self.limiter, "sk-upstream")
        self.caller = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://proxy")

    async def post(self, body: Any, headers: dict[str, str] = CALLER) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body)
        return await self.caller.post("/v1/chat/completions", content=content, headers=headers)

    async def used(self) -> int:
        """Tokens that count for the caller; no hold may be open any more."""
        assert self.counters.open_holds == 0
        remaining = (await self.limiter.check("user-42", 0)).remaining
        assert remaining is not None
        return LIMIT - remaining


async def test_what_was_used_is_settled_and_is_in_the_headers() -> None:
    forwarded: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        forwarded.append(request)
        return httpx.Response(200, json={"choices": [], **USAGE})

    proxy = Proxy(answer)
    reply = await proxy.post(BODY)
    assert (reply.status_code, reply.json()["usage"]["total_tokens"]) == (200, 12)
    assert reply.headers["x-ratelimit-limit-tokens"] == "10000"
    assert reply.headers["x-ratelimit-remaining-tokens"] == "9988"
    assert reply.headers["x-ratelimit-reset-tokens"] == "72ms"
    assert forwarded[0].headers["authorization"] == "Bearer sk-upstream", "the caller's own token stays here"
    assert await proxy.used() == 12


async def test_a_stream_passes_unchanged_and_its_usage_is_settled() -> None:
    sent: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return httpx.Response(200, stream=Chunks('{"choices": [1]}', json.dumps({"choices": [], **USAGE}), "[DONE]"))

    proxy = Proxy(answer)
    reply = await proxy.post(STREAMED)
    assert reply.text == 'data: {"choices": [1]}\n\ndata: ' + json.dumps({"choices": [], **USAGE}) + "\n\ndata: [DONE]\n\n"
    assert sent[0]["stream_options"] == {"include_usage": True}
    assert LIMIT - 1_000 < int(reply.headers["x-ratelimit-remaining-tokens"]) <= LIMIT - 500, "the reservation"
    assert await proxy.used() == 12


async def test_a_caller_who_leaves_in_mid_stream_frees_the_reservation() -> None:
    chunks = Chunks(*['{"choices": [1]}'] * 3, stalls=True)
    proxy = Proxy(lambda _: httpx.Response(200, stream=chunks))
    left, started = asyncio.Event(), asyncio.Event()
    requests = [{"type": "http.request", "body": json.dumps(STREAMED).encode(), "more_body": False}]
    received = 0

    async def receive() -> dict[str, Any]:
        if requests:
            return requests.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal received
        received += message.get("body", b"").count(b"data:")
        if received == 3:
            started.set()

    headers = [(b"authorization", b"Bearer user-42")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b""}
    running = asyncio.ensure_future(proxy.app({**scope, "asgi": {"version": "3.0"}, "http_version": "1.1"}, receive, send))
    await asyncio.wait_for(started.wait(), PATIENCE_S)
    assert proxy.counters.open_holds == 1
    left.set()
    await asyncio.wait_for(running, PATIENCE_S)
    prompt = len(json.dumps({**STREAMED, "stream_options": {"include_usage": True}})) // 4
    assert await proxy.used() == prompt + 3, "what was streamed is charged"
    assert chunks.closed.is_set(), "the API may stop too"


async def test_errors_of_the_api_cost_nothing() -> None:
    def unreachable(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    proxy = Proxy(unreachable)
    assert (await proxy.post(BODY)).status_code == 502
    assert await proxy.used() == 0
    for body in (BODY, STREAMED):
        proxy = Proxy(lambda _: httpx.Response(500, json={"error": {"message": "overloaded"}}))
        reply = await proxy.post(body)
        assert (reply.status_code, reply.json()["error"]["message"]) == (500, "overloaded")
        assert await proxy.used() == 0


async def test_a_stream_that_breaks_off_ends_with_an_error() -> None:
    proxy = Proxy(lambda _: httpx.Response(200, stream=Chunks('{"choices": [1]}', fails=True)))
    reply = await proxy.post(STREAMED)
    assert "upstream_unavailable" in reply.text.splitlines()[-2]
    assert 0 < await proxy.used() < 100


async def test_a_request_above_what_is_left_is_denied() -> None:
    proxy = Proxy(lambda _: httpx.Response(200, json={**USAGE, "usage": {"total_tokens": 9_700}}))
    assert (await proxy.post({**BODY, "max_tokens": 9_000})).status_code == 200
    denied = await proxy.post(BODY)
    assert (denied.status_code, denied.json()["error"]["type"]) == (429, "rate_limit_exceeded")
    assert denied.headers["x-ratelimit-remaining-tokens"] == "300"
    assert 0 < int(denied.headers["retry-after"]) <= 60
    assert await proxy.used() == 9_700


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not valid JSON"),
        (b"[" * 100_000, 400, "not valid JSON"),
        ([], 400, "'messages'"),
        ({**BODY, "max_tokens": "many"}, 400, "max_tokens must be a whole number"),
        ({**BODY, "n": 17}, 400, "n must be a whole number from 1 to 16"),
        ({**BODY, "max_tokens": 20_000}, 400, "reserve less"),
        (b'{"messages": [NaN]}', 400, "cannot represent"),
        (b'{"messages": ["\\ud800"]}', 400, "cannot represent"),
        (b" " * 1_000_001, 413, "longer than"),
    ],
)
async def test_refusals(body: Any, status: int, words: str) -> None:
    proxy = Proxy(lambda _: httpx.Response(200, json=USAGE))
    reply = await proxy.post(body)
    assert (reply.status_code, await proxy.used()) == (status, 0)
    assert words in reply.json()["error"]["message"]


async def test_callers_need_a_token() -> None:
    proxy = Proxy(lambda _: httpx.Response(200, json=USAGE))
    assert (await proxy.post(BODY, {})).status_code == 401


def test_durations_are_written_as_the_providers_do() -> None:
    written = [gateway.token_headers(1, 1, seconds)["x-ratelimit-reset-tokens"] for seconds in (0.02, 1.5, 59, 60, 360.25)]
    assert written == ["20ms", "1.5s", "59s", "1m0s", "6m0.25s"]
