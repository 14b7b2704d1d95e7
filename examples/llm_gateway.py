"""A proxy before an OpenAI-compatible API that limits tokens: it reserves the most a request may use, and settles what it used.

    pip install tidegate fastapi granian httpx
    export UPSTREAM_URL=https://api.openai.com UPSTREAM_KEY=sk-…
    granian --interface asgi --port 8000 --factory llm_gateway:app
    curl -N http://127.0.0.1:8000/v1/chat/completions -H 'Authorization: Bearer user-42' \\
        -d '{"model": "gpt-4o-mini", "max_tokens": 200, "stream": true, "messages": [{"role": "user", "content": "Hello"}]}'

Callers are counted by their bearer token: check it first, as your own authentication does. With several processes, give all of
them one Redis: TIDEGATE_COUNTERS__URL=redis://127.0.0.1:6379
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tidegate import BadRequest, Limiter, RateLimitExceeded, StoreUnavailable, TidegateError
from tidegate.doors.hold import AsyncHold

logger = logging.getLogger(__name__)

MAX_BODY = 1_000_000
MAX_CHOICES = 16
DEFAULT_MAX_TOKENS = 1_000
BYTES_PER_TOKEN = 4
HOLD_TTL_S = 300


class InvalidRequest(Exception):
    """A request that is refused before anything is reserved; the first argument is the status."""


def create_app(upstream: httpx.AsyncClient, limiter: Limiter, upstream_key: str = "") -> FastAPI:
    """The proxy.

    Args:
        upstream: client of the API, with its base URL.
        limiter: of tokens per caller.
        upstream_key: sent to the API as a bearer token, if not empty; callers never have it.
    """
    application = FastAPI()

    @application.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        try:
            asked = await read_request(request)
            hold = limiter.hold(asked.subject, asked.most_tokens, ttl_s=HOLD_TTL_S)
            # Not `async with`: a streamed answer goes on after this function has returned.
            await hold.__aenter__()
        except InvalidRequest as error:
            return error_response(error.args[0], "invalid_request_error", error.args[1])
        except RateLimitExceeded as error:
            denied = error.decision
            headers = token_headers(denied.limit, denied.remaining, denied.reset_after)
            headers.update(header for header in denied.headers if header[0] == "retry-after")
            return error_response(429, "rate_limit_exceeded", "too many tokens: try again later or lower max_tokens", headers)
        except BadRequest as error:
            return error_response(400, "invalid_request_error", str(error))
        except StoreUnavailable as error:
            return error_response(503, "rate_limiter_unavailable", str(error))
        try:
            headers = {"content-type": "application/json"}
            if upstream_key:
                headers["authorization"] = f"Bearer {upstream_key}"
            sent = upstream.build_request("POST", "/v1/chat/completions", content=asked.content, headers=headers)
            answer = await upstream.send(sent, stream=True)
            if answer.is_success and asked.streamed:
                return TokenStream(answer, hold, len(asked.content) // BYTES_PER_TOKEN)
            return await forward_whole(answer, hold)
        except httpx.RequestError as error:
            hold.cancel()
            await hold.__aexit__(None, None, None)
            return error_response(502, "upstream_unavailable", f"the model's API does not answer: {type(error).__name__}")
        except BaseException as error:
            # The caller left, or something unforeseen: nothing is charged.
            await hold.__aexit__(type(error), error, error.__traceback__)
            raise

    return application


class TokenRequest(NamedTuple):
    """A request for a completion.

    Args:
        subject: the caller.
        content: the body to send on.
        most_tokens: that it may use.
        streamed: whether the answer is.
    """

    subject: str
    content: bytes
    most_tokens: int
    streamed: bool


async def read_request(request: Request) -> TokenRequest:
    """Read and complete a request.

    Raises:
        InvalidRequest: naming what is wrong.
    """
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise InvalidRequest(401, "send 'Authorization: Bearer <your token>'")
    raw = bytearray()
    async for piece in request.stream():
        raw += piece
        if len(raw) > MAX_BODY:
            raise InvalidRequest(413, f"the body is longer than {MAX_BODY} bytes: shorten the messages")
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise InvalidRequest(400, "the body is not valid JSON") from None
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise InvalidRequest(400, "the body must be an object with a list 'messages'")
    choices = _whole_number(body, "n", 1, MAX_CHOICES)
    name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    # Sent on also where the caller sent none: without it the most that the request may use is unknown.
    body[name] = _whole_number(body, name, DEFAULT_MAX_TOKENS, 1_000_000)
    if body.get("stream"):
        options = body.get("stream_options")
        body["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
    try:
        content = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise InvalidRequest(400, "the body has numbers or characters that JSON in UTF-8 cannot represent") from None
    # A token is at least one byte long, so this is never too low for text. What is not used comes back.
    return TokenRequest(token.strip(), content, len(content) + choices * body[name], bool(body.get("stream")))


def _whole_number(body: dict[str, Any], name: str, default: int, most: int) -> int:
    value = body.get(name, default)
    if type(value) is not int or not 1 <= value <= most:
        raise InvalidRequest(400, f"{name} must be a whole number from 1 to {most}")
    return value


async def forward_whole(answer: httpx.Response, hold: AsyncHold) -> Response:
    """Send an answer on that is not streamed, after its tokens were settled. An error of the API costs nothing."""
    try:
        content = await answer.aread()
    finally:
        await answer.aclose()
    used = _used_tokens(content) if answer.is_success else 0
    if used is not None:
        hold.settle(used)
    await hold.__aexit__(None, None, None)
    kind = answer.headers.get("content-type", "application/json")
    return Response(content, answer.status_code, headers=hold_headers(hold), media_type=kind)


class TokenStream(StreamingResponse):
    """A streamed answer. However it ends, the tokens so far are settled, and the connection to the API is closed.

    Args:
        answer: of the API.
        hold: of the request; it ends with this response.
        prompt_tokens: estimate of the prompt, which is charged where the stream ends before the API reports its usage.
    """

    def __init__(self, answer: httpx.Response, hold: AsyncHold, prompt_tokens: int) -> None:
        super().__init__(self._lines(), answer.status_code, headers=hold_headers(hold), media_type="text/event-stream")
        self._answer = answer
        self._hold = hold
        self._used = prompt_tokens
        self._reported: int | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - as ASGI passes it
        # Not every server fails a `send` to a caller who has left, and none does while the API sends nothing.
        sending = asyncio.ensure_future(self.stream_response(send))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                with contextlib.suppress(OSError):  # the caller has left
                    await sending
        finally:
            sending.cancel()
            leaving.cancel()
            self._hold.settle(self._used if self._reported is None else self._reported)
            await self._hold.__aexit__(None, None, None)
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._answer.aclose()

    async def _lines(self) -> AsyncIterator[str]:
        loop = asyncio.get_running_loop()
        renew_at = loop.time() + HOLD_TTL_S / 2
        try:
            async for line in self._answer.aiter_lines():
                if line.startswith("data:") and not line.endswith("[DONE]"):
                    self._count(line[5:])
                yield line + "\n"
                if loop.time() >= renew_at:
                    renew_at += HOLD_TTL_S / 2
                    await self._renew()
        except httpx.RequestError as error:
            message = f"the model's API broke off: {type(error).__name__}"
            yield "data: " + json.dumps({"error": {"type": "upstream_unavailable", "message": message}}) + "\n\n"

    def _count(self, data: str) -> None:
        reported = _used_tokens(data)
        if reported is None:
            self._used += 1  # a chunk is about one token
        else:
            self._reported = reported

    async def _renew(self) -> None:
        try:
            await self._hold.renew(HOLD_TTL_S)
        except TidegateError as error:
            logger.warning("hold not renewed: %s", error)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _used_tokens(data: str | bytes) -> int | None:
    """What the API says was used; None where it says nothing."""
    try:
        used = json.loads(data)["usage"]["total_tokens"]
    except (ValueError, LookupError, TypeError):
        return None
    return used if type(used) is int and used >= 0 else None


def hold_headers(hold: AsyncHold) -> dict[str, str]:
    """The headers after a settlement; before it, those of the reservation."""
    if hold.settlement is not None:
        return token_headers(hold.settlement.limit, hold.settlement.remaining, (hold.settlement.reset_after_us or 0) / 1e6)
    decision = hold.decision
    return {} if decision is None else token_headers(decision.limit, decision.remaining, decision.reset_after)


def token_headers(limit: int | None, remaining: int | None, reset_after_s: float) -> dict[str, str]:
    """What the providers send, `reset` as `6m0s`, `1.5s` or `20ms`."""
    minutes, seconds = divmod(reset_after_s, 60)
    reset = f"{round(reset_after_s * 1000)}ms" if reset_after_s < 1 else f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
    return {
        "x-ratelimit-limit-tokens": str(limit),
        "x-ratelimit-remaining-tokens": str(remaining),
        "x-ratelimit-reset-tokens": f"{minutes:.0f}m{reset}" if minutes else reset,
    }


def error_response(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error in the form of the API."""
    return JSONResponse({"error": {"type": kind, "message": message}}, status, headers=headers)


def app() -> FastAPI:
    """The proxy as the environment configures it."""
    upstream = httpx.AsyncClient(base_url=os.environ.get("UPSTREAM_URL", "https://api.openai.com"), timeout=60)
    limiter = Limiter(
        os.environ.get("TOKEN_LIMIT", "60000/minute"),
        algorithm="token_bucket",
        counters=os.environ.get("TIDEGATE_COUNTERS__URL", "memory://"),
        name="tokens",
    )
    return create_app(upstream, limiter, os.environ.get("UPSTREAM_KEY", ""))
