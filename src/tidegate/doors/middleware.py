"""The door inside any ASGI app: Starlette, FastAPI, Litestar, Django, Quart and others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any, Final, TypeAlias

from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.policy_file import PolicyCatalog, load_policy
from tidegate.counters import CounterStore
from tidegate.counters.factory import open_counters
from tidegate.decision import Check
from tidegate.doors.answers import Headers, encode, error_body, exceeded_body, limit_headers, retry_headers
from tidegate.doors.client_address import TrustedProxies
from tidegate.errors import BadRequest, SettingsError, TidegateError
from tidegate.gate import Gate, Observer
from tidegate.paths import PathRules, quote_path
from tidegate.policy import Policy

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


class RateLimitMiddleware:
    """Asks a gate before each HTTP request and gives 429 itself.

        app.add_middleware(RateLimitMiddleware, policy="tidegate.policy.toml")

    Websockets and lifespan pass untouched. Decided answers carry the limit headers; denials and errors have the error form.

    Args:
        app: the ASGI app.
        gate: a gate to ask; or give `policy`.
        policy: path of a policy file, or a policy; a gate is made from it.
        counters: for `policy`: URL or store of the counts.
        trusted_proxies: whose `X-Real-IP` and `X-Forwarded-For` are believed.
        cost: gives the cost of a request from its ASGI scope; 1 for every request where not given.
        observe: for `policy`: is told of every check.
        encoded_slashes: patterns with `*` for the paths that may have `%2F`, such as `/projects/*`; none where not given.
        decode_unreserved: whether `%7E` is read as `~`, and so on; refused where not given.

    Raises:
        SettingsError: unless exactly one of `gate` and `policy` is given, or for a pattern that no path can match.
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
        encoded_slashes: Iterable[str] = (),
        decode_unreserved: bool = False,
    ) -> None:
        if (gate is None) == (policy is None):
            raise SettingsError("RateLimitMiddleware needs exactly one of 'gate' and 'policy'")
        if policy is not None:
            loaded = policy if isinstance(policy, Policy) else load_policy(Path(policy))
            store = open_counters(counters) if isinstance(counters, str) else counters
            gate = Gate(CachedCatalog(PolicyCatalog(loaded)), store, observe)
        assert gate is not None
        self.app = app
        self.gate = gate
        self._trusted = TrustedProxies(trusted_proxies)
        self._cost = cost
        self._paths = PathRules.of(encoded_slashes, decode_unreserved)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or let the app do so."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            decision = await self.gate.check(self._check_of(scope))
        except TidegateError as error:
            told = [("x-tidegate-error", error.code), *retry_headers(error)]
            await _answer(send, error.status, told, encode(error_body(error)))
            return
        headers = limit_headers(decision)
        if not decision.allowed:
            await _answer(send, 429, headers, encode(exceeded_body(decision)))
            return
        if not headers:
            await self.app(scope, receive, send)
            return
        encoded = [(name.encode(), value.encode()) for name, value in headers]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *encoded]
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _check_of(self, scope: Scope) -> Check:
        headers: dict[bytes, list[str]] = {}
        for name, value in scope["headers"]:
            if name in _READ:
                headers.setdefault(name, []).append(value.decode("latin-1"))
        keys = headers.get(b"x-api-key", [])
        if len(keys) > 1:
            raise BadRequest(f"{len(keys)} X-API-Key headers came: send one", field="X-API-Key")
        peer = scope["client"][0] if scope.get("client") else ""
        real_ip = headers.get(b"x-real-ip", [None])[-1]
        forwarded_for = ",".join(headers.get(b"x-forwarded-for", [])) or None
        ip = self._trusted.client(peer, real_ip, forwarded_for)
        # The path as it was sent: once decoded, '%2F' and '/' look the same. Not every server gives it.
        raw = scope.get("raw_path")
        path = raw.decode("latin-1").partition("?")[0] if raw else quote_path(scope["path"])
        cost = 1 if self._cost is None else self._cost(scope)
        return Check.of(path, scope["method"], keys[0] if keys else None, ip or None, cost, self._paths)


_READ: Final = frozenset((b"x-api-key", b"x-real-ip", b"x-forwarded-for"))


async def _answer(send: Send, status: int, headers: Headers, body: bytes) -> None:
    headers = [*headers, ("content-type", "application/json"), ("content-length", str(len(body)))]
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.encode(), value.encode()) for name, value in headers],
        }
    )
    await send({"type": "http.response.body", "body": body})
