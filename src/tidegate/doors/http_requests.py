"""Requests of the data plane, read in full: every form that is accepted, and what is wrong with each other one.

`plain_requests` reads the form that most gateways send, at a fraction of the cost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeVar
from urllib.parse import parse_qsl

import msgspec

from tidegate.decision import Check
from tidegate.doors.client_address import TrustedProxies, peer_address
from tidegate.doors.key_sources import KeySources
from tidegate.doors.refusals import IDENTITY, BodyTooSlow, HeadersTooLarge, MethodNotAllowed, unsupported_encoding
from tidegate.doors.request_headers import RequestHeaders, read_attributes, single, single_path, utf8_path
from tidegate.errors import BadRequest, RequestTooLarge, clip
from tidegate.policy.attributes import MAX_ATTRIBUTES, NO_ATTRIBUTES, AttributeSource
from tidegate.policy.paths import PathRules
from tidegate.wire import MAX_BATCH, BatchRequest, CheckRequest, whole_cost

MAX_CHECK_BYTES: Final = 64 * 1024
MAX_HEADER_BYTES: Final = 8 * 1024
BODY_TIMEOUT_S: Final = 10.0

AUTHORIZE: Final = "/v1/authorize"
AUTHORIZE_ENVOY: Final = "/v1/authorize/envoy"
"""`/v1/authorize` as Envoy's ext_authz needs it: it uses the method of the original request, and accepts only 200 as allowed.

With `path_prefix` Envoy appends the path of the request: what follows is decided on then.
"""

_T = TypeVar("_T")

_CHECK: Final = msgspec.json.Decoder(CheckRequest)
_BATCH: Final = msgspec.json.Decoder(BatchRequest)


class SizedHeaders(RequestHeaders, Protocol):
    """The headers of a request, with their size."""

    @property
    def size(self) -> int:
        """Bytes of all names and values."""
        ...

    def get(self, key: str, default: Any = None) -> Any:
        """The first value of a name, or the default."""
        ...


class Scope(Protocol):
    """What is known of a request before its body: the part of RSGI's scope that the data plane reads."""

    proto: str
    method: str

    @property
    def path(self) -> str:
        """Of the request line, not decoded, one character a byte."""
        ...

    @property
    def query_string(self) -> str:
        """What the request line has behind the `?`."""
        ...

    @property
    def client(self) -> str:
        """Address and port of the peer."""
        ...

    @property
    def peer_names(self) -> tuple[str, ...]:
        """Names in the certificate of the peer; empty without mutual TLS."""
        ...

    @property
    def headers(self) -> SizedHeaders:
        """All headers."""
        ...


class AuthorizeRequest(NamedTuple):
    """The fields of a request to `/v1/authorize`, not yet validated."""

    uri: str
    method: str
    api_key: str | None
    ip: str | None
    attributes: Mapping[str, str]


def is_envoy(path: str) -> bool:
    """Whether a path is `AUTHORIZE_ENVOY`, with or without the path of a request behind it."""
    return path == AUTHORIZE_ENVOY or path.startswith(f"{AUTHORIZE_ENVOY}/")


def allow_methods(scope: Scope, methods: tuple[str, ...]) -> None:
    """Refuse every other method.

    Raises:
        MethodNotAllowed: naming those that are allowed.
    """
    if scope.method not in methods:
        raise MethodNotAllowed(f"{scope.path} answers {' and '.join(methods)} only", allow=list(methods))


def bound_headers(headers: SizedHeaders) -> None:
    """Refuse headers above `MAX_HEADER_BYTES`.

    Raises:
        HeadersTooLarge: naming their size.
    """
    size = headers.size
    if size > MAX_HEADER_BYTES:
        raise HeadersTooLarge(f"the headers have {size} bytes: at most {MAX_HEADER_BYTES} are read")


def read_authorize(
    scope: Scope, trusted: TrustedProxies, for_envoy: bool, sources: Sequence[AttributeSource], keys: KeySources
) -> AuthorizeRequest:
    """Read the request of a gateway.

    Args:
        trusted: whose forwarding headers are believed.
        for_envoy: whether it was sent to `AUTHORIZE_ENVOY`.
        sources: where trusted proxies send attributes.
        keys: where requests carry API keys; the query is that of the request to decide.

    Returns:
        The request.

    Raises:
        BadRequest: naming the header that is missing or cannot be read.
    """
    headers = scope.headers
    peer = peer_address(scope.client)
    is_trusted = trusted.trusts(peer)
    if for_envoy and len(scope.path) > len(AUTHORIZE_ENVOY):
        # Envoy's path_prefix: the request's own path and method are here, and its headers may be the client's.
        uri: str | None = utf8_path(scope.path[len(AUTHORIZE_ENVOY) :])
        method: str | None = scope.method
    else:
        uri = single_path(headers, "x-original-uri") or (single_path(headers, "x-forwarded-uri") if is_trusted else None)
        method = single(headers, "x-original-method") or (single(headers, "x-forwarded-method") if is_trusted else None)
    if uri is None:
        raise BadRequest("the path to decide is missing: send it as X-Original-URI, or as X-Forwarded-Uri from a trusted proxy")
    if method is None:
        method = scope.method if for_envoy else "GET"
    ip = trusted.client(peer, headers)
    attributes = read_attributes(headers, sources) if is_trusted and sources else NO_ATTRIBUTES
    query = uri.partition("?")[2] or (scope.query_string if for_envoy else "")
    return AuthorizeRequest(uri, method, keys.read(headers, query), ip, attributes)


def read_usage_query(query: str) -> tuple[dict[str, str], str | None]:
    """Read `attribute=user=42` (may be repeated) and `tier=pro` of the query of `/v1/usage`. Other names are not read.

    Returns:
        The attributes and the tier; None where it is absent.

    Raises:
        BadRequest: if one is malformed or came twice.
    """
    if not query:
        return {}, None
    attributes: dict[str, str] = {}
    tier: str | None = None
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=4 * MAX_ATTRIBUTES)
    except ValueError:
        raise BadRequest("the query cannot be read: percent-encode it as UTF-8, and leave out what is not needed") from None
    for key, value in pairs:
        if key == "tier":
            if tier is not None:
                raise BadRequest("tier came twice in the query: send it once", field="tier")
            tier = value
        elif key == "attribute":
            name, equals, text = value.partition("=")
            if not equals or name in attributes:
                raise BadRequest(f"attribute {clip(value)} in the query is malformed or came twice: write attribute=user=42")
            attributes[name] = text
    return attributes, tier


def read_check(body: bytes) -> CheckRequest:
    """Read the body of `POST /v1/check`.

    Raises:
        BadRequest: if it is not one.
    """
    return decoded(_CHECK, body, "a check")


def read_batch(body: bytes) -> tuple[CheckRequest, ...]:
    """Read the body of `POST /v1/check/batch`.

    Raises:
        BadRequest: if it is not one.
    """
    checks = decoded(_BATCH, body, "a batch of checks").checks
    bound_batch(checks)
    return tuple(checks)


def bound_batch(checks: Sequence[object]) -> None:
    """Refuse an empty batch, and one of more than `MAX_BATCH` checks.

    Raises:
        BadRequest: naming their number.
    """
    if not 1 <= len(checks) <= MAX_BATCH:
        raise BadRequest(f"the batch has {len(checks)} checks: send 1 to {MAX_BATCH}", checks=len(checks))


def decoded(decoder: msgspec.json.Decoder[_T], body: bytes, kind: str) -> _T:
    """A body as a record.

    Args:
        decoder: of the record.
        kind: what the body should be, for the message.

    Raises:
        BadRequest: if it is not one.
    """
    try:
        return decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise BadRequest(f"the body is not {kind}: {error}") from None
    except UnicodeDecodeError:
        raise BadRequest(f"the body is not {kind}: it is not UTF-8") from None


def check_of(sent: CheckRequest, header_key: str | None, paths: PathRules) -> Check:
    """Validate a check of a body.

    Args:
        sent: what the body says.
        header_key: the X-API-Key header; None where none came.
        paths: which spellings of a path are let through.

    Returns:
        The check.

    Raises:
        BadRequest: naming the field, its value and the remedy.
    """
    api_key = sent.api_key
    if header_key is not None:
        if api_key is not None and api_key != header_key:
            raise BadRequest("api_key and the X-API-Key header differ: send one of them", field="api_key")
        api_key = header_key
    cost = whole_cost(sent.cost)
    method = "GET" if sent.method is None else sent.method
    return Check.of(sent.path, method, api_key, sent.ip, cost, paths, attributes=sent.attributes, tier=sent.tier)


async def read_body(headers: SizedHeaders, proto: Any, most: int, timeout_s: float) -> bytes:
    """The whole body, bounded in size and time.

    Args:
        proto: gives the body, as RSGI's protocol does.
        most: bytes.
        timeout_s: how long it may take to arrive, s.

    Returns:
        The body.

    Raises:
        UnsupportedEncoding: if it is compressed.
        RequestTooLarge: if it has more bytes.
        BodyTooSlow: if it took longer.
    """
    encoding = headers.get("content-encoding")
    if encoding is not None and encoding.strip().lower() not in IDENTITY:
        raise unsupported_encoding(encoding)
    length = headers.get("content-length")
    if length is not None and length.isdecimal() and int(length) > most:
        raise RequestTooLarge(f"the body has {length} bytes: at most {most} are read", most=most)
    if proto.complete:
        body: bytes = await proto()
        if len(body) > most:
            raise RequestTooLarge(f"the body has more than {most} bytes", most=most)
        return body
    try:
        async with asyncio.timeout(timeout_s):
            if length is not None:
                return await proto()  # type: ignore[no-any-return]
            chunks: list[bytes] = []
            size = 0
            async for chunk in proto:
                size += len(chunk)
                if size > most:
                    raise RequestTooLarge(f"the body has more than {most} bytes", most=most)
                chunks.append(chunk)
            return b"".join(chunks)
    except TimeoutError:
        raise BodyTooSlow(f"the body did not arrive within {timeout_s:g} s") from None
