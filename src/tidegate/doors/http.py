"""The HTTP data plane: an RSGI app without a framework.

Every answer that is not 2xx or 429 has the error form `{"error": {"code", "message", "details"}}`; `/v1/authorize` answers
204, 401, 403 and 429 without a body, and says the error's code in `X-Tidegate-Error`. Gateways that know no other refusal than
401 and 403 get every other one as 403, if they ask for it. A check never gets a bare 500: what nobody foresaw is logged and
answered 503. Bodies, headers, and the time a body may take are bounded.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final, Protocol

import msgspec

from tidegate.decision import Check, Decision, Observation
from tidegate.doors.bearer import refuse_bearer_key
from tidegate.doors.client_address import TrustedProxies, address_or_none, peer_address
from tidegate.doors.http_exchange import Exchange
from tidegate.doors.plain_requests import plain_authorize, plain_check
from tidegate.doors.refusals import (
    IDENTITY,
    BodyTooSlow,
    HeadersTooLarge,
    InternalError,
    MethodNotAllowed,
    NotFound,
    UnsupportedEncoding,
    unsupported_encoding,
)
from tidegate.doors.request_headers import RequestHeaders, single, single_path, utf8_path
from tidegate.doors.responses import (
    NO_STORE,
    Headers,
    decision_body,
    denial_cache_headers,
    edge_cache_headers,
    encode,
    error_body,
    limit_headers,
    limit_lines,
    retry_headers,
    usage_body,
)
from tidegate.errors import BadRequest, RequestTooLarge, TidegateError
from tidegate.gate.gate import Gate, Observer
from tidegate.policy.paths import STRICT, PathRules
from tidegate.telemetry.access import AccessLog
from tidegate.telemetry.requests import CURRENT, REQUEST_ID, Request, current, note
from tidegate.time_slice import TimeSlice
from tidegate.wire import MAX_BATCH, MAX_BATCH_BYTES, BatchRequest, CheckRequest

logger = logging.getLogger(__name__)

MAX_CHECK_BYTES: Final = 64 * 1024
MAX_HEADER_BYTES: Final = 8 * 1024
BODY_TIMEOUT_S: Final = 10.0
DENIED_STATUS: Final = "x-tidegate-denied-status"
"""The request header by which a gateway asks for 403 in place of every refusal but 401."""

_AUTHORIZE: Final = "/v1/authorize"
_CHECK_PATH: Final = "/v1/check"
AUTHORIZE_ENVOY: Final = "/v1/authorize/envoy"
"""`/v1/authorize` as Envoy's ext_authz needs it: it asks with the method of the request, and takes 200 alone for a yes.

With `path_prefix` Envoy appends the path of the request: what follows is decided on then.
"""

_UNHANDLED: Final = "unhandled exception while a request was answered"
_JSON: Final = ("content-type", "application/json")


class Response(msgspec.Struct, frozen=True):
    """An answer that no check is behind: health, metrics, OpenAPI.

    Args:
        status: HTTP status.
        content_type: of the body.
        body: the bytes.
    """

    status: int
    content_type: str
    body: bytes


class _SizedHeaders(RequestHeaders, Protocol):
    @property
    def size(self) -> int: ...

    def get(self, key: str, default: Any = None) -> Any: ...


class _Scope(Protocol):
    proto: str
    method: str

    @property
    def path(self) -> str: ...  # of the request line, not decoded, one character a byte
    @property
    def client(self) -> str: ...
    @property
    def headers(self) -> _SizedHeaders: ...


_CHECK: Final = msgspec.json.Decoder(CheckRequest)
_BATCH: Final = msgspec.json.Decoder(BatchRequest)


class DataPlane:
    """The app.

    Args:
        gate: decides.
        pages: path → what answers `GET` there: health, metrics and the like.
        observe: is told of requests that were refused before the gate.
        trusted: whose forwarding headers are believed.
        body_timeout_s: how long a body may take.
        access: writes about a sample of the requests; None for no such log.
        paths: which spellings of a path are let through.
    """

    def __init__(
        self,
        gate: Gate,
        pages: Mapping[str, Callable[[], Awaitable[Response]]],
        observe: Observer | None = None,
        trusted: TrustedProxies | None = None,
        body_timeout_s: float = BODY_TIMEOUT_S,
        access: AccessLog | None = None,
        paths: PathRules = STRICT,
    ) -> None:
        self.draining = False
        self.in_flight = 0
        self.answered = 0
        self._gate = gate
        self._pages = pages
        self._observe = observe
        self._trusted = trusted or TrustedProxies()
        self._body_timeout_s = body_timeout_s
        self._access = access
        self._paths = paths

    async def __rsgi__(self, scope: _Scope, proto: Any) -> None:
        """Answer one request."""
        if scope.proto != "http":
            proto.close(404)
            return
        self.in_flight += 1
        request = Request(scope.headers, False, scope.client, self._trusts_client)
        # Granian runs each request in a task of its own: nobody else sees it, and nothing is to be put back.
        CURRENT.set(request)
        access = self._access
        # Probes and scrapes are nobody's requests.
        if access is not None and scope.path.startswith("/v1/") and access.is_sampled():
            request.sampled = True
            proto = _Noted(proto)
            started_ns = time.perf_counter_ns()
        try:
            path = scope.path
            if path == _AUTHORIZE:
                await self._authorize(scope, proto)
            elif path.startswith(AUTHORIZE_ENVOY) and _is_envoy(path):
                await self._authorize(scope, proto, for_envoy=True)
            elif path == _CHECK_PATH:
                await self._check(scope, proto)
            elif path == "/v1/check/batch":
                await self._batch(scope, proto)
            elif path == "/v1/usage":
                await self._usage(scope, proto)
            else:
                await self._page(scope, proto)
        except TidegateError as error:
            self._refuse(scope, proto, error)
        except Exception:
            logger.exception(_UNHANDLED)
            self._refuse(scope, proto, _internal_error(request))
        finally:
            self.in_flight -= 1
            self.answered += 1
            if access is not None and request.sampled:
                access.write(
                    request,
                    AUTHORIZE_ENVOY if _is_envoy(scope.path) else scope.path[:200],
                    proto.status,
                    time.perf_counter_ns() - started_ns,
                )
            request.over = True

    def answer_now(self, exchange: Exchange) -> Coroutine[Any, Any, None] | None:
        """Answer a plain request that has arrived; nothing is awaited where the gate decides at once.

        Args:
            exchange: a plain one that is complete.

        Returns:
            None where it was answered; else what answers it when awaited.
        """
        target = exchange.target
        check: Check | None = None
        if self._access is None:
            if target == _AUTHORIZE:
                if exchange.method in ("GET", "HEAD"):
                    check = plain_authorize(exchange, self._trusted, MAX_HEADER_BYTES)
            elif target == _CHECK_PATH and exchange.method == "POST":
                check = plain_check(exchange, MAX_HEADER_BYTES, MAX_CHECK_BYTES)
        if check is None:
            return self.__rsgi__(exchange, exchange)
        try:
            decision = self._gate.check_now(check)
            if not isinstance(decision, Decision):
                return self._answer_later(exchange, check, decision)
            self._answer_plain(exchange, decision)
        except Exception as error:  # noqa: BLE001 - raised again where the request is known to whoever logs it
            return self._answer_later(exchange, check, _fail(error))
        self.answered += 1
        return None

    async def _answer_later(self, exchange: Exchange, check: Check, decision: Awaitable[Decision]) -> None:
        self.in_flight += 1
        request = Request(exchange.headers, False, exchange.client, self._trusts_client)
        request.check = check
        CURRENT.set(request)
        try:
            self._answer_plain(exchange, await decision)
        except TidegateError as error:
            self._refuse(exchange, exchange, error)
        except Exception:
            logger.exception(_UNHANDLED)
            self._refuse(exchange, exchange, _internal_error(request))
        finally:
            self.in_flight -= 1
            self.answered += 1
            request.over = True

    def _answer_plain(self, exchange: Exchange, decision: Decision) -> None:
        """Answer a plain request with bytes made of a template, unless the connection ends or a cache has to know more."""
        is_authorize = exchange.target == _AUTHORIZE
        if self.draining or exchange.connection.closing or (is_authorize and not decision.allowed):
            if is_authorize:
                self._answer_authorize(exchange, exchange, decision)
            else:
                self._answer_check(exchange, decision)
        elif is_authorize:
            exchange.respond(204, limit_lines(decision) + b"cache-control: no-store\r\n\r\n")
        else:
            body = encode(decision_body(decision))
            exchange.respond(
                200 if decision.allowed else 429,
                b"%bcontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (limit_lines(decision), len(body), body),
            )

    async def _authorize(self, scope: _Scope, proto: Any, for_envoy: bool = False) -> None:
        if not for_envoy:
            self._allow_methods(scope, ("GET", "HEAD"))
        headers = scope.headers
        self._bound_headers(headers)
        peer = peer_address(scope.client)
        trusted = self._trusted.trusts(peer)
        try:
            behind_prefix = for_envoy and len(scope.path) > len(AUTHORIZE_ENVOY)
            if behind_prefix:
                # Envoy's path_prefix: the request's own path and method are here, and its headers may be the client's.
                uri: str | None = utf8_path(scope.path[len(AUTHORIZE_ENVOY) :])
                method: str | None = scope.method
            else:
                uri = single_path(headers, "x-original-uri") or (single_path(headers, "x-forwarded-uri") if trusted else None)
                method = single(headers, "x-original-method") or (single(headers, "x-forwarded-method") if trusted else None)
            if uri is None:
                raise BadRequest(
                    "the path to decide is missing: send it as X-Original-URI, or as X-Forwarded-Uri from a trusted proxy"
                )
            if method is None:
                method = scope.method if for_envoy else "GET"
            ip = self._trusted.client(peer, headers)
            api_key = single(headers, "x-api-key")
            if not api_key:
                await refuse_bearer_key(self._gate, headers, ip)
            check = Check.of(uri, method, api_key, ip, paths=self._paths, strict_ip=False)
        except TidegateError as error:
            raise self._seen(error) from None
        note(check)
        self._answer_authorize(scope, proto, await self._gate.check(check), for_envoy)

    def _answer_authorize(self, scope: _Scope, proto: Any, decision: Decision, for_envoy: bool = False) -> None:
        headers_out = limit_headers(decision)
        if decision.allowed:
            headers_out.append(NO_STORE)
            self._empty(proto, 200 if for_envoy else 204, headers_out)
            return
        headers_out += denial_cache_headers(decision)
        if scope.headers.get(DENIED_STATUS) == "403":
            headers_out += edge_cache_headers(decision)
            self._empty(proto, 403, [*headers_out, ("x-tidegate-error", "RATE_LIMIT_EXCEEDED"), ("x-tidegate-status", "429")])
        else:
            self._empty(proto, 429, headers_out)

    async def _check(self, scope: _Scope, proto: Any) -> None:
        self._allow_methods(scope, ("POST",))
        headers = scope.headers
        self._bound_headers(headers)
        body = await self._body(headers, proto, MAX_CHECK_BYTES)
        try:
            asked = _CHECK.decode(body)
            check = self._check_of(asked, single(headers, "x-api-key"))
            if check.api_key is None:
                await refuse_bearer_key(self._gate, headers, check.ip)
        except msgspec.MsgspecError as error:
            raise self._seen(BadRequest(f"the body is not a check: {error}")) from None
        except UnicodeDecodeError:
            raise self._seen(BadRequest("the body is not a check: it is not UTF-8")) from None
        except TidegateError as error:
            raise self._seen(error) from None
        note(check)
        self._answer_check(proto, await self._gate.check(check))

    def _answer_check(self, proto: Any, decision: Decision) -> None:
        headers_out = limit_headers(decision)
        headers_out.append(_JSON)
        self._bytes(proto, 200 if decision.allowed else 429, headers_out, encode(decision_body(decision)))

    async def _batch(self, scope: _Scope, proto: Any) -> None:
        self._allow_methods(scope, ("POST",))
        headers = scope.headers
        self._bound_headers(headers)
        body = await self._body(headers, proto, MAX_BATCH_BYTES)
        try:
            asked = _BATCH.decode(body).checks
            if not 1 <= len(asked) <= MAX_BATCH:
                raise BadRequest(f"the batch has {len(asked)} checks: send 1 to {MAX_BATCH}", checks=len(asked))
            header_key = single(headers, "x-api-key")
            if not header_key and not all(each.api_key for each in asked):
                await refuse_bearer_key(self._gate, headers, peer_address(scope.client))
        except msgspec.MsgspecError as error:
            raise self._seen(BadRequest(f"the body is not a batch of checks: {error}")) from None
        except UnicodeDecodeError:
            raise self._seen(BadRequest("the body is not a batch of checks: it is not UTF-8")) from None
        except TidegateError as error:
            raise self._seen(error) from None
        answers: list[Decision | TidegateError | None] = []
        checks: list[Check] = []
        slice_ = TimeSlice()
        for each in asked:
            if slice_.over:
                await slice_.pause()
            try:
                checks.append(self._check_of(each, header_key))
                answers.append(None)
            except BadRequest as error:
                answers.append(self._seen(error))
        decided = iter(await self._gate.check_many(checks))
        whole = [next(decided) if answer is None else answer for answer in answers]
        decisions = []
        for answer in whole:
            if slice_.over:
                await slice_.pause()
            decisions.append(error_body(answer) if isinstance(answer, TidegateError) else decision_body(answer))
        self._bytes(proto, 200, [_JSON], encode({"decisions": decisions}))

    async def _usage(self, scope: _Scope, proto: Any) -> None:
        self._allow_methods(scope, ("GET", "HEAD"))
        headers = scope.headers
        self._bound_headers(headers)
        peer = peer_address(scope.client)
        try:
            ip = address_or_none(self._trusted.client(peer, headers))
            api_key = single(headers, "x-api-key")
            if not api_key:
                await refuse_bearer_key(self._gate, headers, ip)
            usage = await self._gate.usage(api_key, ip)
        except TidegateError as error:
            raise self._seen(error) from None
        headers_out: Headers = [_JSON, NO_STORE]
        if scope.method == "HEAD":
            self._empty(proto, 200, headers_out)
        else:
            self._bytes(proto, 200, headers_out, encode(usage_body(usage)))

    async def _page(self, scope: _Scope, proto: Any) -> None:
        page = self._pages.get(scope.path)
        if page is None:
            raise NotFound(f"there is nothing at {scope.path[:200]!r}: see /openapi.json")
        self._allow_methods(scope, ("GET", "HEAD"))
        made = await page()
        headers = [("content-type", made.content_type), NO_STORE]
        if scope.method == "HEAD":
            self._empty(proto, made.status, headers)
        else:
            self._bytes(proto, made.status, headers, made.body)

    def _check_of(self, asked: CheckRequest, header_key: str | None) -> Check:
        api_key = asked.api_key
        if header_key is not None:
            if api_key is not None and api_key != header_key:
                raise BadRequest("api_key and the X-API-Key header differ: send one of them", field="api_key")
            api_key = header_key
        cost = asked.cost
        if type(cost) is not int:
            # In JSON 1.0 is the same number, and some languages write it so.
            cost = 1 if cost is None else int(cost) if float(cost).is_integer() else cost
        return Check.of(asked.path, "GET" if asked.method is None else asked.method, api_key, asked.ip, cost, self._paths)

    async def _body(self, headers: _SizedHeaders, proto: Any, most: int) -> bytes:
        """The whole body, bounded in size and time."""
        encoding = headers.get("content-encoding")
        if encoding is not None and encoding.strip().lower() not in IDENTITY:
            raise self._seen(unsupported_encoding(encoding))
        length = headers.get("content-length")
        if length is not None and length.isdecimal() and int(length) > most:
            raise self._seen(RequestTooLarge(f"the body has {length} bytes: at most {most} are read", most=most))
        if proto.complete:
            body: bytes = await proto()
            if len(body) > most:
                raise self._seen(RequestTooLarge(f"the body has more than {most} bytes", most=most))
            return body
        try:
            async with asyncio.timeout(self._body_timeout_s):
                if length is not None:
                    return await proto()  # type: ignore[no-any-return]
                chunks: list[bytes] = []
                size = 0
                async for chunk in proto:
                    size += len(chunk)
                    if size > most:
                        raise self._seen(RequestTooLarge(f"the body has more than {most} bytes", most=most))
                    chunks.append(chunk)
                return b"".join(chunks)
        except TimeoutError:
            raise self._seen(BodyTooSlow(f"the body did not arrive within {self._body_timeout_s:g} s")) from None

    def _bound_headers(self, headers: _SizedHeaders) -> None:
        size = headers.size
        if size > MAX_HEADER_BYTES:
            raise self._seen(HeadersTooLarge(f"the headers have {size} bytes: at most {MAX_HEADER_BYTES} are read"))

    def _allow_methods(self, scope: _Scope, methods: tuple[str, ...]) -> None:
        if scope.method not in methods:
            raise MethodNotAllowed(f"{scope.path} answers {' and '.join(methods)} only", allow=list(methods))

    def _trusts_client(self, client: str) -> bool:
        return self._trusted.trusts(peer_address(client))

    def _seen(self, error: TidegateError) -> TidegateError:
        """Tell telemetry of an error that the gate will not see."""
        seen = Observation(None, error.code, 0)
        if self._observe is not None:
            self._observe(seen)
        if self._access is not None:
            self._access.observe(seen)
        return error

    def _refuse(self, scope: _Scope, proto: Any, error: TidegateError) -> None:
        if scope.path == _AUTHORIZE or _is_envoy(scope.path):
            told: Headers = [("x-tidegate-error", error.code), NO_STORE, *retry_headers(error)]
            if error.status in (401, 403):
                self._empty(proto, error.status, told)
                return
            if scope.headers.get(DENIED_STATUS) == "403":
                self._empty(proto, 403, [*told, ("x-tidegate-status", str(error.status))])
                return
            if error.status == 429:
                self._empty(proto, 429, told)
                return
        headers = [_JSON, ("x-tidegate-error", error.code), *retry_headers(error)]
        if (request := current()) is not None:
            headers.append((REQUEST_ID, request.id))
        if isinstance(error, MethodNotAllowed):
            headers.append(("allow", ", ".join(error.details["allow"])))  # type: ignore[arg-type]
        if isinstance(error, UnsupportedEncoding):
            headers.append(("accept-encoding", "identity"))
        if isinstance(error, RequestTooLarge | BodyTooSlow):
            headers.append(("connection", "close"))
        self._bytes(proto, error.status, headers, encode(error_body(error)))

    def _bytes(self, proto: Any, status: int, headers: Headers, body: bytes) -> None:
        if self.draining:
            headers.append(("connection", "close"))
        proto.response_bytes(status, headers, body)

    def _empty(self, proto: Any, status: int, headers: Headers) -> None:
        if self.draining:
            headers.append(("connection", "close"))
        proto.response_empty(status, headers)


def _is_envoy(path: str) -> bool:
    return path == AUTHORIZE_ENVOY or path.startswith(f"{AUTHORIZE_ENVOY}/")


def _internal_error(request: Request) -> InternalError:
    return InternalError(f"internal error of the limiter: see its log for the request id {request.id}")


async def _fail(error: Exception) -> Decision:
    raise error


class _Noted:
    """The answering side of a request that somebody wants to know the status of."""

    def __init__(self, proto: Any) -> None:
        self._proto = proto
        self.status = 0

    @property
    def complete(self) -> bool:
        return self._proto.complete  # type: ignore[no-any-return]

    def __call__(self) -> Any:
        return self._proto()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._proto.__aiter__()  # type: ignore[no-any-return]

    def response_bytes(self, status: int, headers: Headers, body: bytes) -> None:
        self.status = status
        self._proto.response_bytes(status, headers, body)

    def response_empty(self, status: int, headers: Headers) -> None:
        self.status = status
        self._proto.response_empty(status, headers)
