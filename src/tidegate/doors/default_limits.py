"""Default limits of an ASGI app: for all endpoints that have no limits of their own and are not exempt, without a policy."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from inspect import unwrap
from typing import Any, Final, Protocol, TypeAlias

from tidegate.doors.exceeded import RateLimitExceeded, loaded
from tidegate.doors.limit import limit
from tidegate.doors.limited_functions import EXEMPT, LIMITS
from tidegate.doors.request_view import DECISION
from tidegate.doors.responses import Headers, encode, error_body, limit_headers
from tidegate.doors.stores import close_shared
from tidegate.errors import PolicyError, TidegateError

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

ALL: Final = "all"
"""Name under which requests count that belong to no endpoint: unknown paths, and apps whose routes are not known."""
_WEBSOCKET_CLOSE: Final = 1008


class ConnectionScope(Protocol):
    """What has an ASGI scope."""

    scope: Scope


class PlainConnection:
    """What functions of the user get where the app is not of Starlette."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope


class DefaultLimits:
    """Checks requests and WebSockets before the app, and adds the headers of its limits to responses.

    Args:
        limits: what holds for each endpoint; None for headers alone.
    """

    def __init__(self, limits: limit | None) -> None:
        if limits is not None:
            limits.require_cost_before("the middleware")
        self._limits = limits
        self._known: Any = None
        self._size = 0
        self._routes: list[FlatRoute] = []

    async def call(self, app: App, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let the app do so.

        Args:
            app: behind this.
            scope: of an HTTP request or a WebSocket.
            receive: see ASGI.
            send: see ASGI.
        """
        limits, call = self._limits, None
        if limits is not None:
            name = self._name_of(scope)
            if name is not None:
                try:
                    call = await limits.begin(_connection(scope), name)
                except RateLimitExceeded as error:
                    await refuse(scope, send, 429, [*error.limit_headers.items()], error.body())
                    return
                except PolicyError:
                    raise  # a mistake in the program, not the client's
                except TidegateError as error:
                    await refuse(scope, send, error.status, [("x-tidegate-error", error.code)], encode(error_body(error)))
                    return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start" and (decision := scope.get(DECISION)) is not None:
                headers = list(message.get("headers", ()))
                if all(bytes(name).lower() != b"ratelimit" for name, _ in headers):
                    headers += [(name.encode(), value.encode()) for name, value in limit_headers(decision)]
                    message["headers"] = headers
            await send(message)

        if limits is None or call is None or call.hold is None:
            await app(scope, receive, send_with_headers)
            return
        try:
            await app(scope, receive, send_with_headers)
        finally:
            await limits.end(call)

    async def close(self) -> None:
        """Close the connections of all limits of the program, those of endpoints among them: the app ends."""
        await close_shared()

    def _name_of(self, scope: Scope) -> str | None:
        """Name of the endpoint of a request; None where it is exempt or has limits of its own."""
        routes = getattr(scope.get("app"), "routes", None)
        if not routes:
            return ALL
        if self._known is not routes or len(routes) != self._size:
            self._known, self._size, self._routes = routes, len(routes), list(flat_routes(routes))
        path, root = scope["path"], scope.get("root_path", "")
        if root and path.startswith(root):
            path = path[len(root) :]
        return _find(self._routes, path, scope.get("method", ""))


class FlatRoute:
    """A route of Starlette or FastAPI, with the prefix of the router that includes it.

    Args:
        route: as the framework has it.
    """

    __slots__ = ("children", "dependant", "endpoint", "limited", "methods", "name", "path", "regex")

    def __init__(self, route: Any) -> None:
        self.regex: Any = route.path_regex
        self.path = str(getattr(route, "path_format", None) or getattr(route, "path", ""))
        self.methods: Iterable[str] = getattr(route, "methods", None) or ()
        inner = getattr(route, "routes", None)
        self.children = list(flat_routes(inner)) if inner else []
        self.endpoint: Any = getattr(route, "endpoint", None)
        self.limited = bool(getattr(self.endpoint, LIMITS, None)) or _depends_on_limit(getattr(route, "dependant", None))
        exempt = self.endpoint is not None and bool(
            getattr(self.endpoint, EXEMPT, False) or getattr(unwrap(self.endpoint), EXEMPT, False)
        )
        self.name = None if self.limited or exempt else _named(self.endpoint, self.path)


def flat_routes(routes: Iterable[Any]) -> Iterator[FlatRoute]:
    """All routes of an app, those of included routers among them; mounted apps keep theirs as children."""
    for route in routes:
        contexts = getattr(route, "effective_route_contexts", None)  # FastAPI's routers that were included
        for each in [route] if contexts is None else contexts():
            found = getattr(each, "starlette_route", None) or each
            if getattr(found, "path_regex", None) is not None:
                yield FlatRoute(found)


def _find(routes: Iterable[FlatRoute], path: str, method: str) -> str | None:
    """Name of the first route that answers a request; see `DefaultLimits._name_of`."""
    for route in routes:
        match = route.regex.match(path)
        if match is None or (route.methods and method and method not in route.methods):
            continue
        return _find(route.children, "/" + match.group("path"), method) if route.children else route.name
    return ALL


async def refuse(scope: Scope, send: Send, status: int, headers: Headers, body: bytes) -> None:
    """Answer a request without the app; refuse a WebSocket.

    Args:
        send: see ASGI.
        status: of the response.
        headers: of the response, beside those of the body.
    """
    kind = "http.response"
    if scope["type"] == "websocket":
        kind = "websocket.http.response"
        if kind not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": _WEBSOCKET_CLOSE, "reason": "rate limit exceeded"})
            return
    sent = [*headers, ("content-type", "application/json"), ("content-length", str(len(body)))]
    encoded = [(name.encode(), value.encode()) for name, value in sent]
    await send({"type": f"{kind}.start", "status": status, "headers": encoded})
    await send({"type": f"{kind}.body", "body": body})


def _depends_on_limit(dependant: Any) -> bool:
    if dependant is None:
        return False
    return any(isinstance(each.call, limit) or _depends_on_limit(each) for each in dependant.dependencies)


def _named(endpoint: Any, path: str) -> str:
    if endpoint is None:
        return path or ALL
    return f"{endpoint.__module__}.{getattr(endpoint, '__qualname__', type(endpoint).__name__)}|default"


def _connection(scope: Scope) -> ConnectionScope:
    """The object that functions of the user get: Starlette's, where the program uses Starlette."""
    requests = loaded("starlette.requests")
    made: ConnectionScope = PlainConnection(scope) if requests is None else requests.HTTPConnection(scope)
    return made
