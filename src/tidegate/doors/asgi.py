"""The door inside any ASGI app: Starlette, FastAPI, Litestar, Django, Quart and others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters import CounterStore
from tidegate.counters.factory import open_embedded
from tidegate.decision import Check, Decision
from tidegate.doors.bearer import refuse_bearer_key
from tidegate.doors.client_address import FORWARDING, TrustedProxies
from tidegate.doors.default_limits import App, DefaultLimits, Message, Receive, Scope, Send, refuse
from tidegate.doors.key_sources import DEFAULT_SOURCES, KeySources
from tidegate.doors.limit import limit
from tidegate.doors.request_headers import AsgiHeaders, read_attributes
from tidegate.doors.request_slot import RequestSlot
from tidegate.doors.responses import encode, error_body, exceeded_body, limit_headers, retry_headers
from tidegate.doors.token_attributes import with_asgi_token
from tidegate.errors import SettingsError, TidegateError
from tidegate.gate.gate import Gate, Observer
from tidegate.policy.attributes import NO_ATTRIBUTES
from tidegate.policy.model import Policy
from tidegate.policy.paths import PathRules, quote_path
from tidegate.policy.toml_reader import load_policy

EXPOSED_HEADERS: Final = (
    "RateLimit",
    "RateLimit-Policy",
    "Retry-After",
    "X-RateLimit-Limit",
    "X-RateLimit-Remaining",
    "X-RateLimit-Reset",
    "X-Tidegate-Error",
)
"""The headers that pages of other sites may read of an answer, for a CORS middleware's `expose_headers`."""

_EXPOSE: Final = ("access-control-expose-headers", ", ".join(EXPOSED_HEADERS))


class RateLimitMiddleware:
    """Checks each HTTP request with a gate and answers denied ones with 429.

        app.add_middleware(RateLimitMiddleware, policy="tidegate.policy.toml")

    Where the rule that answers limits requests in progress (`20 concurrent`), a request takes a slot until its last byte was
    sent. Where it counts failures, an attempt counts while it is in progress, and after it if its response has one of the
    rule's statuses.

    A WebSocket takes a slot until it is closed, where the rule that answers its GET limits requests in progress; other WebSockets
    pass untouched. So does the lifespan, at whose shutdown a store made from a URL is closed; with `default_limits` those of all
    limits of the program. Decided answers carry the limit
    headers; denials and errors have the error form.

    Without a policy, `default_limits` hold for each caller at each endpoint that has no `limit` of its own and is not `exempt`;
    WebSockets count when they connect:

        app.add_middleware(RateLimitMiddleware, default_limits=["100/minute", "5000/day"])

    Args:
        app: the ASGI app.
        gate: the gate; or give `policy` or `default_limits`.
        policy: path of a policy file, or a policy; a gate is made from it.
        counters: for `policy` and `default_limits`: URL or store of the counts.
        default_limits: limits as `limit` takes them, or a `limit`; empty to add the headers of the endpoints' own limits alone.
        key: for `default_limits`: whom to count, as for `limit`; the address where not given.
        trusted_proxies: whose `X-Real-IP` and `X-Forwarded-For` are believed.
        cost: gives the cost of a request from its ASGI scope; 1 for every request where not given.
        attributes: gives the attributes of a request's caller from its ASGI scope, such as `{"user": "42"}`; None and empty
            values count as absent. Where not given, trusted proxies' headers that `[attributes]` of the policy names. With
            `[jwt]` in the policy, the claims of a verified bearer token take precedence.
        observe: for `policy`: callback run for every check.
        pass_preflights: whether the preflights of browsers (CORS) go to the app uncounted: they never carry an API key. Not
            needed where a CORS middleware is outside of this one, as it should be: a page may read only answers that it saw.
        encoded_slashes: patterns with `*` for the paths that may have `%2F`, such as `/projects/*`; none where not given.
        key_sources: where requests carry API keys, such as `("header:X-API-Key", "bearer", "query:api_key")`; the first that a
            request has decides.
        decode_unreserved: whether `%7E` is read as `~`, and so on; refused where not given.
        leases: with a URL of Redis, whether units are leased; by default as `TIDEGATE_LEASES__ENABLED` says, else yes.
        window_headers: with `policy`, whether `RateLimit` has every limit of a request: each is read once more from the store.

    Raises:
        SettingsError: unless exactly one of `gate`, `policy` and `default_limits` is given, or for a pattern that no path can
            match.
        PolicyError: if the policy is refused.
    """

    def __init__(
        self,
        app: App,
        *,
        gate: Gate | None = None,
        policy: str | Path | Policy | None = None,
        counters: str | CounterStore = "memory://",
        trusted_proxies: Iterable[str] = (),
        cost: Callable[[Scope], int] | None = None,
        observe: Observer | None = None,
        pass_preflights: bool = False,
        encoded_slashes: Iterable[str] = (),
        decode_unreserved: bool = False,
        attributes: Callable[[Scope], Mapping[str, str | None]] | None = None,
        default_limits: str | Sequence[str] | limit | None = None,
        key: str | Callable[..., object] | None = None,
        key_sources: Iterable[str] = DEFAULT_SOURCES,
        leases: bool | None = None,
        window_headers: bool = False,
    ) -> None:
        if sum(each is not None for each in (gate, policy, default_limits)) != 1:
            raise SettingsError("RateLimitMiddleware needs exactly one of 'gate', 'policy' and 'default_limits'")
        self.app = app
        self._defaults: DefaultLimits | None = None
        if default_limits is not None:
            if default_limits and not isinstance(default_limits, limit):
                default_limits = limit(
                    default_limits, key=key or "ip", counters=counters, trusted_proxies=trusted_proxies, leases=leases
                )
            self._defaults = DefaultLimits(default_limits if isinstance(default_limits, limit) else None)
            return
        if policy is not None:
            loaded = policy if isinstance(policy, Policy) else load_policy(Path(policy))
            store = open_embedded(counters, leases) if isinstance(counters, str) else counters
            gate = Gate(CachedCatalog(PolicyCatalog(loaded)), store, observe, all_windows=window_headers)
        assert gate is not None
        self.gate = gate
        self._owns_counters = policy is not None and isinstance(counters, str)
        self._trusted = TrustedProxies(trusted_proxies)
        self._cost = cost
        self._attributes = attributes
        self._pass_preflights = pass_preflights
        self._paths = PathRules.of(encoded_slashes, decode_unreserved)
        self._keys = KeySources(key_sources)
        self._read = _READ | {name.encode() for name in self._keys.headers}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or let the app do so."""
        if self._defaults is not None:
            if scope["type"] == "lifespan":
                await self.app(scope, receive, _closing(send, self._defaults.close))
            else:
                await self._defaults.call(self.app, scope, receive, send)
            return
        if scope["type"] == "websocket":
            await self._call_websocket(scope, receive, send)
            return
        if scope["type"] != "http":
            closes = scope["type"] == "lifespan" and self._owns_counters
            await self.app(scope, receive, _closing(send, self.gate.close) if closes else send)
            return
        headers = AsgiHeaders(scope["headers"], self._read)
        if self._pass_preflights and _is_preflight(scope, headers):
            await self.app(scope, receive, send)
            return
        exposed = [_EXPOSE] if "origin" in headers else []
        try:
            check = self._check_of(scope, headers, await self._attributes_of(scope))
            if check.api_key is None and not self._keys.bearer:
                await refuse_bearer_key(self.gate, headers, check.ip)
            check = await with_asgi_token(self.gate, check, scope["headers"])
            opened = await self.gate.holds.open_slot(check) if self.gate.may_need_slot(check) else None
            decision = await self.gate.check(check) if opened is None else opened.decision
        except TidegateError as error:
            headers_sent = [("x-tidegate-error", error.code), *retry_headers(error), *exposed]
            await refuse(scope, send, error.status, headers_sent, encode(error_body(error)))
            return
        if opened is None:
            await self._answer(scope, receive, send, decision, exposed)
            return
        async with RequestSlot(self.gate.holds, opened) as slot:

            async def send_noting_status(message: Message) -> None:
                if message["type"] == "http.response.start":
                    slot.status = message["status"]
                await send(message)

            await self._answer(scope, receive, send_noting_status, decision, exposed)

    async def _call_websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the app serve a WebSocket: with a slot, if the rule that answers limits requests in progress."""
        headers = AsgiHeaders(scope["headers"], self._read)
        try:
            check = self._check_of(scope, headers, await self._attributes_of(scope))
            opened = None
            if self.gate.may_need_slot(check):
                check = await with_asgi_token(self.gate, check, scope["headers"])
                opened = await self.gate.holds.open_slot(check)
        except TidegateError as error:
            if error.status == 401:
                # Browsers cannot send headers with a WebSocket: it is the app that knows who connects.
                await self.app(scope, receive, send)
                return
            headers_sent = [("x-tidegate-error", error.code), *retry_headers(error)]
            await refuse(scope, send, error.status, headers_sent, encode(error_body(error)))
            return
        if opened is None:
            await self.app(scope, receive, send)
            return
        async with RequestSlot(self.gate.holds, opened):
            if opened.decision.allowed:
                await self.app(scope, receive, send)
            else:
                await refuse(scope, send, 429, limit_headers(opened.decision), encode(exceeded_body(opened.decision)))

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, decision: Decision, exposed: list[tuple[str, str]]
    ) -> None:
        """Refuse a request that was denied; let the app answer the others, with limit headers."""
        headers_sent = limit_headers(decision)
        if headers_sent:
            headers_sent += exposed
        if not decision.allowed:
            await refuse(scope, send, 429, headers_sent, encode(exceeded_body(decision)))
            return
        if not headers_sent:
            await self.app(scope, receive, send)
            return
        encoded = [(name.encode(), value.encode()) for name, value in headers_sent]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *encoded]
            await send(message)

        await self.app(scope, receive, send_with_headers)

    async def _attributes_of(self, scope: Scope) -> Mapping[str, str | None]:
        if self._attributes is not None:
            return self._attributes(scope)
        catalog = self.gate.catalog
        sources = (catalog.cached_caller_policy() or await catalog.caller_policy()).attributes
        if not sources or not self._trusted.trusts(_peer(scope)):
            return NO_ATTRIBUTES
        return read_attributes(AsgiHeaders(scope["headers"], frozenset(source.key_bytes for source in sources)), sources)

    def _check_of(self, scope: Scope, headers: AsgiHeaders, attributes: Mapping[str, str | None]) -> Check:
        peer = _peer(scope)
        ip = self._trusted.client(peer, headers)
        # The path as it was sent: once decoded, '%2F' and '/' look the same. Not every server gives it.
        raw = scope.get("raw_path")
        path = _text(raw).partition("?")[0] if raw else quote_path(scope["path"])
        cost = 1 if self._cost is None else self._cost(scope)
        api_key = self._keys.read(headers, scope.get("query_string", b"").decode("latin-1"))
        return Check.of(path, scope.get("method", "GET"), api_key, ip, cost, self._paths, strict_ip=False, attributes=attributes)


def _closing(send: Send, close: Callable[[], Awaitable[None]]) -> Send:
    async def send_closed(message: Message) -> None:
        if message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
            await close()
        await send(message)

    return send_closed


_READ: Final = FORWARDING | {b"x-api-key", b"authorization", b"origin", b"access-control-request-method"}


def _peer(scope: Scope) -> str:
    return scope["client"][0] if scope.get("client") else ""


def _is_preflight(scope: Scope, headers: AsgiHeaders) -> bool:
    """Whether a browser asks if a request of another site's page may be sent (Fetch standard, "CORS-preflight request")."""
    return scope["method"] == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers


def _text(path: bytes) -> str:
    """Raw UTF-8 in a path is one spelling with its escapes; what is not UTF-8 becomes lone surrogates, which are refused."""
    return path.decode("utf-8", "surrogateescape")
