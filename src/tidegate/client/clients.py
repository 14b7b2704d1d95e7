"""`Client` for blocking code, `AsyncClient` for asyncio. Both run the steps of `core`; only sending and waiting differ."""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar

from tidegate.breaker import BreakerOptions
from tidegate.client.answer import Answer
from tidegate.client.bodies import limit_texts
from tidegate.client.connections import AsyncConnections, Connections
from tidegate.client.core import BREAKER, TOKEN_HEADER, ClientCore, OnFailure
from tidegate.client.holds import AsyncClientHold, ClientHold, hold_request
from tidegate.client.reserving import AsyncReservingClient, ReservingClient
from tidegate.client.steps import Steps
from tidegate.decision import Check
from tidegate.errors import TidegateError
from tidegate.policy.paths import DEFERRED
from tidegate.wire import LimitRequest, UsageBody

T = TypeVar("T")


class Client(ReservingClient):
    """Client of Tidegate servers for blocking code. Thread-safe: use one for the whole program.

        client = Client("http://127.0.0.1:8080")
        answer = client.check("/api/v1/items", "GET", api_key="demo-free-key-0001", ip="203.0.113.7")

    Args:
        urls: URL of a server's data plane, `http://…`, `https://…` or `unix:/path`, or several in order of preference: the next
            one is used only if the previous one cannot have counted the check.
        deadline_s: time limit of a call, 0.001 to 3600 s, from its start to the last byte of the response, for all servers
            together. It does not include DNS resolution, which the operating system limits.
        on_failure: decision for checks when no server is available: `allow`, `deny`, or `raise`.
        breaker: circuit breaker of each server; default: opens after 5 failures within 10 s, for 5 s.
        max_connections: 1 or more; further calls wait for a free connection, within their deadline.
        keepalive_s: how long an idle connection is kept, s; less than the 10 s after which the server closes it.
        ssl_context: for https; default: the certificate authorities of the system.
        token: of this caller, if the servers need one ([callers_auth]); default: environment variable TIDEGATE_TOKEN.
        token_header: header that carries it.

    Raises:
        SettingsError: if a URL or another argument is invalid.
    """

    def __init__(
        self,
        urls: str | Sequence[str] = "http://127.0.0.1:8080",
        *,
        deadline_s: float = 0.25,
        on_failure: OnFailure = "allow",
        breaker: BreakerOptions = BREAKER,
        max_connections: int = 100,
        keepalive_s: float = 5.0,
        ssl_context: ssl.SSLContext | None = None,
        token: str | None = None,
        token_header: str = TOKEN_HEADER,
    ) -> None:
        self._core = ClientCore(urls, deadline_s, on_failure, breaker, max_connections, token, token_header)
        self._connections = Connections(max_connections, keepalive_s, _tls_context(self._core, ssl_context))

    def check(
        self,
        path: str,
        method: str = "GET",
        *,
        api_key: str | None = None,
        ip: str | None = None,
        cost: int = 1,
        attributes: Mapping[str, str] | None = None,
        tier: str | None = None,
        bearer: str | None = None,
    ) -> Answer:
        """Check whether a request is allowed, and charge it if so.

        Args:
            path: path of the request, percent-encoded as received; a query is removed.
            method: HTTP method of the request.
            api_key: API key of the caller.
            ip: address of the caller.
            cost: units, 0 (reads without charging) to 1,000,000,000.
            attributes: what else is known of the caller, such as `{"user": "42"}`.
            tier: tier of the caller, for a caller without an API key; the policy decides if None.
            bearer: JSON Web Token of the caller, which the server verifies by `[jwt]` of its policy; its claims are attributes.

        Returns:
            The answer. If no server was available it is `failed`, and `on_failure` decided.

        Raises:
            BadRequest: if the check is invalid; nothing was charged.
            MissingApiKey, InvalidApiKey, ApiKeyRevoked, ApiKeyExpired: the server rejected the key; `status` is 401 or 403.
            StoreUnavailable: if the counter store fails and the rule says deny; `status` is 503.
            LimiterUnavailable: if no server was available and `on_failure` is `raise`.
        """
        check = Check.of(path, method, api_key, ip, cost, DEFERRED, attributes=attributes, tier=tier)
        return self._run(self._core.check(check, bearer))

    def check_many(self, checks: Iterable[Check]) -> list[Answer | TidegateError]:
        """Check several requests independently of each other, in batches of up to 1000, one after the other.

        Args:
            checks: made with `Check.of(path, method, api_key, ip, cost)`.

        Returns:
            In the order of `checks`: the answer, or the error that `check` would have raised.
        """
        return self._run(self._core.check_many(list(checks)))

    def limit(
        self,
        namespace: str,
        subject: str,
        limits: str | Sequence[str] = (),
        *,
        algorithm: str | None = None,
        cost: int = 1,
    ) -> Answer:
        """Count any subject by limits of this call, without a tier, an endpoint or an API key (`POST /v1/limit`).

        Args:
            namespace: 1 to 64 letters, digits, `_`, `.`, `-`; the same subject in another namespace is counted separately.
            subject: whom to count, 1 to 256 characters.
            limits: 1 to 16 limits such as `10/minute`, all of which must pass. Limits that the policy has for this namespace and
                subject take precedence; then they may be left out.
            algorithm: how the limits count; default: that of the namespace, else `sliding_window`.
            cost: units, 0 (reads without charging) to 1,000,000,000.

        Returns:
            The answer, whose `rule` is the namespace. If no server was available it is `failed`, and `on_failure` decided.

        Raises:
            BadRequest: if an argument is invalid; nothing was charged.
            Blocked: if the policy or an operator denies the subject.
            StoreUnavailable: if the counter store fails and the namespace says deny; `status` is 503.
            LimiterUnavailable: if no server was available and `on_failure` is `raise`.
        """
        return self._run(self._core.limit(LimitRequest(namespace, subject, limit_texts(limits), algorithm, cost)))

    def limit_many(self, requests: Iterable[LimitRequest]) -> list[Answer | TidegateError]:
        """Count several subjects independently of each other, in batches of up to 1000, one after the other.

        Args:
            requests: `LimitRequest(namespace, subject, limits, algorithm, cost)`, each as for `limit`.

        Returns:
            In the order of `requests`: the answer, or the error that `limit` would have raised.
        """
        return self._run(self._core.limit_many(list(requests)))

    def hold(
        self,
        path: str,
        method: str = "GET",
        *,
        api_key: str | None = None,
        ip: str | None = None,
        cost: int = 1,
        attributes: Mapping[str, str] | None = None,
        tier: str | None = None,
        bearer: str | None = None,
        ttl_s: int = 60,
        clamp: bool = False,
    ) -> ClientHold:
        """Reserve the most that a request may cost while it runs, and charge what it did cost when it ends (`POST /v1/holds`).

            with client.hold("/v1/chat/completions", "POST", api_key=key, cost=4000) as hold:
                if hold.allowed:
                    hold.settle(complete(prompt).usage.total_tokens)

        Without `settle` the reserved cost is charged at the end; nothing, where the block ends with an exception.

        Args:
            path: this and the next seven as for `check`; `cost` is the most that the request may cost.
            method: HTTP method of the request.
            api_key: API key of the caller.
            ip: address of the caller.
            cost: units.
            attributes: what else is known of the caller.
            bearer: JSON Web Token of the caller.
            ttl_s: seconds until the reservation expires, 1 to 3600, in case the process dies.
            clamp: whether a cost above the most that the limits ever admit is lowered to that; refused otherwise.

        Returns:
            The hold, for `with`, which raises what `check` raises. A denial raises nothing: see `allowed` and `answer`.

        Raises:
            BadRequest: if the check is invalid.
        """
        check = Check.of(path, method, api_key, ip, cost, DEFERRED, attributes=attributes, tier=tier)
        return ClientHold(self._core, hold_request(check, bearer, ttl_s, clamp), self._run)

    def usage(
        self,
        api_key: str | None = None,
        ip: str | None = None,
        *,
        attributes: Mapping[str, str] | None = None,
        tier: str | None = None,
    ) -> UsageBody:
        """Read the remaining quota of a caller under each rule; charges nothing.

        Args:
            api_key: API key of the caller.
            ip: address of the caller; like the next two used only if the server trusts this host as a proxy, as it does on
                loopback.
            attributes: what else is known of the caller, such as `{"user": "42"}`.
            tier: tier of the caller, for a caller without an API key.

        Returns:
            The response of `GET /v1/usage`.

        Raises:
            MissingApiKey, InvalidApiKey, ApiKeyRevoked, ApiKeyExpired, BadRequest, StoreUnavailable: as returned by the server.
            LimiterUnavailable: if no server was available, whatever `on_failure` is.
        """
        return self._run(self._core.usage(api_key, ip, attributes, tier))

    def close(self) -> None:
        """Close all connections. The client cannot be used afterwards."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._core!r})"

    def _run(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                step = steps.send(self._connections.send(step))
        except StopIteration as done:
            result: T = done.value
            return result


class AsyncClient(AsyncReservingClient):
    """Client of Tidegate servers for asyncio. Use one for the whole program, within one event loop.

        async with AsyncClient("http://127.0.0.1:8080") as client:
            answer = await client.check("/api/v1/items", "GET", api_key="demo-free-key-0001", ip="203.0.113.7")

    Arguments, methods and errors are those of `Client`.
    """

    def __init__(
        self,
        urls: str | Sequence[str] = "http://127.0.0.1:8080",
        *,
        deadline_s: float = 0.25,
        on_failure: OnFailure = "allow",
        breaker: BreakerOptions = BREAKER,
        max_connections: int = 100,
        keepalive_s: float = 5.0,
        ssl_context: ssl.SSLContext | None = None,
        token: str | None = None,
        token_header: str = TOKEN_HEADER,
    ) -> None:
        self._core = ClientCore(urls, deadline_s, on_failure, breaker, max_connections, token, token_header)
        super().__init__()
        self._connections = AsyncConnections(max_connections, keepalive_s, _tls_context(self._core, ssl_context))

    async def check(
        self,
        path: str,
        method: str = "GET",
        *,
        api_key: str | None = None,
        ip: str | None = None,
        cost: int = 1,
        attributes: Mapping[str, str] | None = None,
        tier: str | None = None,
        bearer: str | None = None,
    ) -> Answer:
        """As `Client.check`."""
        check = Check.of(path, method, api_key, ip, cost, DEFERRED, attributes=attributes, tier=tier)
        return await self._run(self._core.check(check, bearer))

    async def check_many(self, checks: Iterable[Check]) -> list[Answer | TidegateError]:
        """As `Client.check_many`."""
        return await self._run(self._core.check_many(list(checks)))

    async def limit(
        self,
        namespace: str,
        subject: str,
        limits: str | Sequence[str] = (),
        *,
        algorithm: str | None = None,
        cost: int = 1,
    ) -> Answer:
        """As `Client.limit`."""
        return await self._run(self._core.limit(LimitRequest(namespace, subject, limit_texts(limits), algorithm, cost)))

    async def limit_many(self, requests: Iterable[LimitRequest]) -> list[Answer | TidegateError]:
        """As `Client.limit_many`."""
        return await self._run(self._core.limit_many(list(requests)))

    def hold(
        self,
        path: str,
        method: str = "GET",
        *,
        api_key: str | None = None,
        ip: str | None = None,
        cost: int = 1,
        attributes: Mapping[str, str] | None = None,
        tier: str | None = None,
        bearer: str | None = None,
        ttl_s: int = 60,
        clamp: bool = False,
    ) -> AsyncClientHold:
        """As `Client.hold`, for `async with`."""
        check = Check.of(path, method, api_key, ip, cost, DEFERRED, attributes=attributes, tier=tier)
        return AsyncClientHold(self._core, hold_request(check, bearer, ttl_s, clamp), self._run)

    async def usage(
        self,
        api_key: str | None = None,
        ip: str | None = None,
        *,
        attributes: Mapping[str, str] | None = None,
        tier: str | None = None,
    ) -> UsageBody:
        """As `Client.usage`."""
        return await self._run(self._core.usage(api_key, ip, attributes, tier))

    async def close(self) -> None:
        """As `Client.close`."""
        await self._connections.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self._core!r})"

    async def _run(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                step = steps.send(await self._connections.send(step))
        except StopIteration as done:
            result: T = done.value
            return result


def _tls_context(core: ClientCore, context: ssl.SSLContext | None) -> ssl.SSLContext | None:
    # Created only if needed: it takes 20 ms.
    return ssl.create_default_context() if context is None and core.tls else context
