"""`Client` for blocking code, `AsyncClient` for asyncio. Both drive the steps of `asking`; they send and sleep differently."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self, TypeVar

from tidegate.breaker import BreakerOptions
from tidegate.client.answer import Answer
from tidegate.client.connections import AsyncConnections, Connections
from tidegate.client.core import BREAKER, Asking, OnFailure
from tidegate.client.steps import Pause, Steps
from tidegate.decision import Check
from tidegate.errors import TidegateError
from tidegate.policy.paths import DEFERRED
from tidegate.wire import UsageBody

T = TypeVar("T")


class Client:
    """Asks Tidegate servers, blocking. One for the whole program: any number of threads may use it at once.

        client = Client("http://127.0.0.1:8080")
        answer = client.check("/api/v1/items", "GET", api_key="demo-free-key-0001", ip="203.0.113.7")

    Args:
        urls: of a server's data plane, or of several, which are asked in this order: the next one only where the one before
            cannot have counted the check.
        deadline_s: for a call, 0.001 to 3600 s, from its beginning to the last byte of its answer, all servers together. Only the
            look-up of a server's name is the system's to bound.
        on_failure: what holds for checks when no server is heard: `allow`, `deny`, or `raise`.
        breaker: when a server that fails is left alone, and for how long: 5 failures within 10 s, for 5 s.
        max_connections: open at once, 1 or more; further calls wait for one, within their deadline.
        keepalive_s: how long an unused connection is kept, s; less than the 10 s after which the server ends it.
        ssl_context: for https; what the system trusts where not given.

    Raises:
        SettingsError: if a URL or another argument makes no sense.
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
    ) -> None:
        self._asking = Asking(urls, deadline_s, on_failure, breaker, max_connections)
        self._connections = Connections(max_connections, keepalive_s, _trust(self._asking, ssl_context))

    def check(
        self, path: str, method: str = "GET", *, api_key: str | None = None, ip: str | None = None, cost: int = 1
    ) -> Answer:
        """Ask whether a request may pass, and charge it if so.

        Args:
            path: path of the request, percent-encoded as it came; a query is cut off.
            method: its HTTP method.
            api_key: the caller's key.
            ip: the caller's address.
            cost: units, 0 (only look) to 1,000,000,000.

        Returns:
            The answer. Where no server was heard it is `failed`, and `on_failure` has decided.

        Raises:
            BadRequest: if the check makes no sense; nothing was charged.
            MissingApiKey, InvalidApiKey, ApiKeyRevoked, ApiKeyExpired: as the server says; `status` is 401 or 403.
            StoreUnavailable: if the counter store fails and the rule says deny; `status` is 503.
            LimiterUnavailable: if no server was heard and `on_failure` is `raise`.
        """
        return self._run(self._asking.check(Check.of(path, method, api_key, ip, cost, DEFERRED)))

    def check_many(self, checks: Iterable[Check]) -> list[Answer | TidegateError]:
        """Ask for several requests, each decided on its own; a call for each 1000 of them, one after the other.

        Args:
            checks: of `Check.of(path, method, api_key, ip, cost)`.

        Returns:
            In order, for each its answer, or the error that `check` would have raised.
        """
        return self._run(self._asking.check_many(list(checks)))

    def usage(self, api_key: str | None = None, ip: str | None = None) -> UsageBody:
        """Look at what is left to a caller under each rule; consumes nothing.

        Args:
            api_key: the caller's key.
            ip: the caller's address; believed if the server trusts this host as a proxy, which it does on loopback.

        Returns:
            What `GET /v1/usage` tells.

        Raises:
            MissingApiKey, InvalidApiKey, ApiKeyRevoked, ApiKeyExpired, BadRequest, StoreUnavailable: as the server says.
            LimiterUnavailable: if no server was heard, whatever `on_failure` is.
        """
        return self._run(self._asking.usage(api_key, ip))

    def wait(
        self,
        path: str,
        method: str = "GET",
        *,
        api_key: str | None = None,
        ip: str | None = None,
        cost: int = 1,
        at_most_s: float = 30.0,
    ) -> Answer:
        """Ask again and again, each time after the `retry_after` of the denial and a bit, until the request may pass.

        Args:
            path: as for `check`; so are the next four.
            method: its HTTP method.
            api_key: the caller's key.
            ip: the caller's address.
            cost: units.
            at_most_s: how long to wait in all, s.

        Returns:
            The answer that allows it; or the last denial, at once, where its `retry_after` is beyond that time, or None because
            the cost can never pass.

        Raises:
            TidegateError: as for `check`.
        """
        return self._run(self._asking.wait(Check.of(path, method, api_key, ip, cost, DEFERRED), at_most_s))

    def close(self) -> None:
        """Close all connections. The client is of no use afterwards."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._asking!r})"

    def _run(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                if isinstance(step, Pause):
                    time.sleep(step.seconds)
                    step = steps.send(None)
                else:
                    step = steps.send(self._connections.send(step))
        except StopIteration as done:
            result: T = done.value
            return result


class AsyncClient:
    """Asks Tidegate servers, on asyncio. One for the whole program, within one event loop.

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
    ) -> None:
        self._asking = Asking(urls, deadline_s, on_failure, breaker, max_connections)
        self._connections = AsyncConnections(max_connections, keepalive_s, _trust(self._asking, ssl_context))

    async def check(
        self, path: str, method: str = "GET", *, api_key: str | None = None, ip: str | None = None, cost: int = 1
    ) -> Answer:
        """As `Client.check`."""
        return await self._run(self._asking.check(Check.of(path, method, api_key, ip, cost, DEFERRED)))

    async def check_many(self, checks: Iterable[Check]) -> list[Answer | TidegateError]:
        """As `Client.check_many`."""
        return await self._run(self._asking.check_many(list(checks)))

    async def usage(self, api_key: str | None = None, ip: str | None = None) -> UsageBody:
        """As `Client.usage`."""
        return await self._run(self._asking.usage(api_key, ip))

    async def wait(
        self,
        path: str,
        method: str = "GET",
        *,
        api_key: str | None = None,
        ip: str | None = None,
        cost: int = 1,
        at_most_s: float = 30.0,
    ) -> Answer:
        """As `Client.wait`."""
        return await self._run(self._asking.wait(Check.of(path, method, api_key, ip, cost, DEFERRED), at_most_s))

    async def close(self) -> None:
        """As `Client.close`."""
        await self._connections.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self._asking!r})"

    async def _run(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                if isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                    step = steps.send(None)
                else:
                    step = steps.send(await self._connections.send(step))
        except StopIteration as done:
            result: T = done.value
            return result


def _trust(asking: Asking, given: ssl.SSLContext | None) -> ssl.SSLContext | None:
    # Made only where it is needed: it takes 20 ms.
    return ssl.create_default_context() if given is None and asking.tls else given
