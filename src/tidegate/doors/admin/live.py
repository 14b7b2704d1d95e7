"""/admin/v1/live: what GET answers for some paths, sent again whenever it changes, as server-sent events.

Each stream reads its paths in turn, through the same routes as any request, at most once in their interval. Streams of one
process that read the same path share the answer. Their number is bounded, and a stream ends with its session or token.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from functools import partial
from typing import Annotated, Any, Final, TypeAlias

import msgspec
from fastapi import Query, Request
from starlette.responses import Response

from tidegate.admin.models import Plain
from tidegate.admin.sessions import Sessions
from tidegate.admin.tokens import Principal, TokenCheck
from tidegate.doors.admin.common import AdminRouter
from tidegate.doors.admin.guard import INTERNAL, LIVE_PATH, InternalError, TooManyRequests
from tidegate.doors.responses import encode, error_body
from tidegate.errors import BadRequest, CatalogUnavailable, clip

logger = logging.getLogger(__name__)

MAX_STREAMS: Final = 64
"""Maximum number of streams of one process."""
MAX_STREAMS_PER_PRINCIPAL: Final = 16
MAX_PATHS: Final = 8
"""Maximum number of paths of one stream."""
MAX_BODY_BYTES: Final = 64 * 1024
"""Of a larger body a stream only reports that it changed."""
INTERVALS_S: Final = {
    r"/system|/usage|/explain|/what-if/[0-9a-z_-]{1,32}": 1.0,
    r"/tiers|/rate-limit-rules|/(?:api-keys|customers)(?:/[0-9A-Za-z_.-]{1,64})?|/blocks|/audit-log": 2.0,
    r"/violations|/violations/top|/traffic|/traffic/callers": 5.0,
}
"""Which paths can be streamed, and how often each is read, s."""

_INTERVALS: Final = tuple((re.compile(pattern), seconds) for pattern, seconds in INTERVALS_S.items())
_CONCURRENT_READS: Final = 4
_STEP_S: Final = 0.25
_HEARTBEAT_S: Final = 15.0
_PRINCIPAL_S: Final = 5.0
_RETRY_MS: Final = 2_000
_MAX_SHARED: Final = MAX_STREAMS * MAX_PATHS
_COPIED: Final = ("asgi", "http_version", "scheme", "root_path", "client", "server", "headers")

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
StreamPaths = Annotated[
    list[Annotated[str, Plain]],
    Query(alias="path", description=f"path and query below /admin/v1, such as /usage?ip=192.0.2.7; 1 to {MAX_PATHS}"),
]


class Answer(msgspec.Struct, frozen=True):
    """What GET answers for a path."""

    status: int
    body: bytes


class Watched(msgspec.Struct):
    """A path of a stream.

    Args:
        target: path and query below /admin/v1.
        interval_s: how often it is read, s.
        due_s: time of the event loop at which it is read next, s.
        sent: the last answer that was sent.
    """

    target: str
    interval_s: float
    due_s: float = 0.0
    sent: Answer | None = None


class LiveReads:
    """Reads paths for all streams of a process, and counts the streams."""

    def __init__(self) -> None:
        self.streams: Counter[str] = Counter()
        self._reading = asyncio.Semaphore(_CONCURRENT_READS)
        self._shared: dict[str, tuple[float, asyncio.Future[Answer]]] = {}

    def open(self, subject: str) -> None:
        """Count a stream that begins.

        Raises:
            TooManyRequests: if there are as many as there may be.
        """
        most = MAX_STREAMS_PER_PRINCIPAL
        if self.streams[subject] >= most or self.streams.total() >= MAX_STREAMS:
            raise TooManyRequests(
                f"more than {most} streams of this token or {MAX_STREAMS} of this process are open: close one, or poll instead",
                retry_after_s=10,
            )
        self.streams[subject] += 1

    def close(self, subject: str) -> None:
        """Count a stream that is over."""
        self.streams[subject] -= 1
        if self.streams[subject] <= 0:
            del self.streams[subject]

    async def read(self, scope: Scope, watched: Watched) -> Answer:
        """What GET answers now for a path of a stream; as another stream has read it, if that was less than its interval ago.

        Args:
            scope: of the request that opened the stream.
        """
        loop = asyncio.get_running_loop()
        shared = self._shared.get(watched.target)
        if shared is not None and loop.time() - shared[0] < watched.interval_s / 2:
            return await asyncio.shield(shared[1])
        if len(self._shared) >= _MAX_SHARED:
            self._shared.clear()
        # A task of its own: a stream that ends must not cancel what others wait for.
        reading = loop.create_task(self._answer(scope, watched.target))
        self._shared[watched.target] = loop.time(), reading
        return await asyncio.shield(reading)

    async def _answer(self, scope: Scope, target: str) -> Answer:
        path, _, query = target.partition("?")
        path = LIVE_PATH.rpartition("/")[0] + path
        inner: dict[str, Any] = {name: scope[name] for name in _COPIED if name in scope} | {
            "type": "http",
            "method": "GET",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "state": {"principal": scope["state"]["principal"]},
            INTERNAL: True,
        }
        status, body = 500, bytearray()

        async def receive() -> MutableMapping[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                body.extend(message.get("body", b""))

        try:
            async with self._reading:
                await scope["app"](inner, receive, send)
        except Exception:
            logger.exception("a stream cannot read %s", path)
            return Answer(500, encode(error_body(InternalError("internal error of the control plane: see its log"))))
        return Answer(status, bytes(body))


class EventStream(Response):
    """The response of a stream.

    Args:
        events: the stream, piece by piece; it is closed when the client leaves or the server stops.
        on_close: called once, when the stream is over.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], on_close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Send the events until there are no more, or the client has left."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for piece in self._events:
                if (await receive())["type"] == "http.disconnect":
                    break
                if piece:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except ConnectionResetError:
            logger.debug("the client of a stream has left")
        finally:
            self._on_close()
            await self._events.aclose()


def live_routes(tokens: TokenCheck, sessions: Sessions | None) -> AdminRouter:
    """The route of live answers.

    Args:
        sessions: of the console; None without a console.
    """
    routes = AdminRouter(tags=["system"])
    reads = LiveReads()

    @routes.get(
        "/live",
        summary="Stream what GET answers for some paths whenever it changes, as server-sent events",
        response_class=Response,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "A stream."}},
    )
    async def live(request: Request, path: StreamPaths) -> EventStream:
        watched = [watched_path(each) for each in dict.fromkeys(path)]
        if not 1 <= len(watched) <= MAX_PATHS:
            raise BadRequest(f"{len(watched)} paths: send 1 to {MAX_PATHS}", field="path")
        principal: Principal = request.scope["state"]["principal"]
        reads.open(principal.subject)
        return EventStream(events(request.scope, watched), partial(reads.close, principal.subject))

    async def events(scope: Scope, watched: list[Watched]) -> AsyncGenerator[bytes]:
        loop = asyncio.get_running_loop()
        yield f"retry: {_RETRY_MS}\n\n".encode()
        spoke = checked = loop.time()
        while True:
            if loop.time() - checked >= _PRINCIPAL_S:
                checked = loop.time()
                if not await still_valid(scope):
                    yield b"event: end\ndata: {}\n\n"
                    return
            for each in watched:
                if loop.time() < each.due_s:
                    continue
                answer = await reads.read(scope, each)
                each.due_s = loop.time() + each.interval_s
                if answer != each.sent:
                    each.sent = answer
                    spoke = loop.time()
                    yield event_of(each.target, answer)
            if loop.time() - spoke >= _HEARTBEAT_S:
                spoke = loop.time()
                yield b"event: heartbeat\ndata: {}\n\n"
            yield b""
            await asyncio.sleep(_STEP_S)

    async def still_valid(scope: Scope) -> bool:
        """Whether the session or the token of a stream is still valid; while the database does not answer, it is."""
        try:
            secret = scope["state"].get("session")
            if secret is not None and sessions is not None:
                return await sessions.principal(secret, used=False) is not None
            header = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
            return await tokens.principal(header.decode("latin-1").partition(" ")[2].strip()) is not None
        except CatalogUnavailable:
            return True

    return routes


def watched_path(target: str) -> Watched:
    """A path that a stream is to read.

    Raises:
        BadRequest: if it cannot be streamed.
    """
    path = target.partition("?")[0]
    if len(target) <= 4000 and target.isascii():
        for pattern, interval_s in _INTERVALS:
            if pattern.fullmatch(path) is not None:
                return Watched(target, interval_s)
    raise BadRequest(
        f"the path {clip(target)} cannot be streamed: send a path of at most 4000 ASCII characters below /admin/v1, such as "
        "/usage?ip=192.0.2.7; see GET /admin/v1/openapi.json",
        field="path",
    )


def event_of(target: str, answer: Answer) -> bytes:
    """The event that reports an answer. Its body is JSON, in which no line break is literal; of a large one only the status."""
    body = answer.body if len(answer.body) <= MAX_BODY_BYTES and b"\n" not in answer.body else b"null"
    return b'data: {"path":%b,"status":%d,"body":%b}\n\n' % (encode(target), answer.status, body or b"null")
