"""Requests of Python frameworks as a limit sees them: Starlette and FastAPI (ASGI), Django, Flask and plain WSGI.

No framework is imported: a request is recognized by what it has, and Flask's only where the program has imported Flask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from functools import cache
from inspect import unwrap
from typing import Any, Final, Protocol

from tidegate.decision import Decision
from tidegate.doors.client_address import FORWARDING, TrustedProxies, counted_client
from tidegate.doors.exceeded import RateLimitExceeded, flask_error, litestar_error, loaded, starlette_error, use_json_answer
from tidegate.doors.outward import outward
from tidegate.doors.request_headers import AsgiHeaders, RequestHeaders
from tidegate.doors.responses import encode, error_body, limit_headers, raw_limit_headers
from tidegate.errors import TidegateError

DECISION: Final = "tidegate.decision"
"""Key of the ASGI scope and the WSGI environment under which the decision of a request is kept, for its headers."""
_FORWARDING_WSGI: Final = {name: "HTTP_" + name.decode().upper().replace("-", "_") for name in FORWARDING}


class RequestView(Protocol):
    """One request. `native` is the framework's object, which functions of the user get."""

    native: Any
    enabled: bool
    """Whether the application's settings let limits work."""

    @property
    def method(self) -> str:
        """HTTP method, upper-case; `WEBSOCKET` for a WebSocket."""
        ...

    def peer(self) -> str:
        """Address of whoever connected; empty where there is none."""
        ...

    def header(self, name: str) -> str | None:
        """The first value of a header; name in lower case."""
        ...

    def forwarding(self) -> RequestHeaders:
        """The headers that proxies set."""
        ...

    def attribute(self, name: str) -> object:
        """What the application keeps under a name for this request: `request.state`, `flask.g`, the request itself."""
        ...

    def keep(self, decision: Decision) -> Decision:
        """Remember a decision and return the strictest one so far: its headers are sent where the framework lets us."""
        ...

    def add_headers(self, result: Any, decision: Decision) -> None:
        """Add the limit headers to what a view returned, if that is a response."""
        ...

    def on_close(self, result: Any, close: Callable[[], None], function: Callable[..., Any] | None) -> bool:
        """Have a function called when the last byte of the response was sent, or it was abandoned.

        Args:
            result: what a view returned, or the response of the framework.
            close: the function.
            function: the view; None for the response of the framework.

        Returns:
            Whether it will be called: not where the result is no response whose end is known.
        """
        ...

    def denied(self, decision: Decision, message: str | None, scope: str) -> RateLimitExceeded:
        """The exception that the framework answers with 429."""
        ...

    def answer(self, error: TidegateError) -> Any:
        """What a view returns in place of raising; None where the exception is raised."""
        ...

    def failure(self, error: TidegateError) -> Exception:
        """For an error that is not a denial, such as a store that does not answer: the exception that the framework answers
        with its status; the error itself where there is none."""
        ...


class AsgiRequest:
    """A request or WebSocket of Starlette or FastAPI, or any object with an ASGI `scope`."""

    __slots__ = ("_scope", "native")
    enabled = True

    def __init__(self, native: Any) -> None:
        self.native = native
        self._scope: MutableMapping[str, Any] = native.scope

    @property
    def method(self) -> str:
        """See `RequestView`."""
        return str(self._scope.get("method", "WEBSOCKET"))

    def peer(self) -> str:
        """See `RequestView`."""
        client = self._scope.get("client")
        return client[0] if client else ""

    def header(self, name: str) -> str | None:
        """See `RequestView`."""
        wanted = name.encode("latin-1")
        for each, value in self._scope["headers"]:
            if each.lower() == wanted:
                return str(value, "latin-1")
        return None

    def forwarding(self) -> RequestHeaders:
        """See `RequestView`."""
        return AsgiHeaders(self._scope["headers"], FORWARDING)

    def attribute(self, name: str) -> object:
        """See `RequestView`."""
        state = self._scope.get("state")
        found = state.get(name) if isinstance(state, Mapping) else getattr(state, name, None)
        return found if found is not None else self._scope.get("path_params", {}).get(name)

    def keep(self, decision: Decision) -> Decision:
        """See `RequestView`."""
        known = self._scope.get(DECISION)
        kept = self._scope[DECISION] = decision if known is None else stricter(known, decision)
        return kept

    def add_headers(self, result: Any, decision: Decision) -> None:
        """See `RequestView`."""
        if hasattr(result, "raw_headers"):  # a response of Starlette
            put_starlette_headers(result, self._scope.get(DECISION, decision))

    def on_close(self, result: Any, close: Callable[[], None], function: Callable[..., Any] | None) -> bool:  # noqa: ARG002
        """See `RequestView`: a decorated endpoint ends when it returns."""
        return False

    def denied(self, decision: Decision, message: str | None, scope: str) -> RateLimitExceeded:
        """See `RequestView`."""
        if "litestar_app" in self._scope:
            return litestar_error(decision, message, scope)
        if loaded("starlette") is None:
            return RateLimitExceeded(decision, message, scope)
        use_json_answer(self._scope)
        return starlette_error(decision, message, scope)

    def answer(self, error: TidegateError) -> None:
        """See `RequestView`."""

    def failure(self, error: TidegateError) -> Exception:
        """See `RequestView`."""
        message, _ = outward(error)
        made: Exception
        if "litestar_app" in self._scope:
            from litestar.exceptions import HTTPException

            made = HTTPException(detail=message, status_code=error.status, headers={"x-tidegate-error": error.code})
            return made
        exceptions = loaded("starlette.exceptions")
        if exceptions is None:
            return error
        made = exceptions.HTTPException(error.status, message, {"x-tidegate-error": error.code})
        return made


class DjangoRequest:
    """A request of Django or Django REST framework."""

    __slots__ = ("native",)
    enabled = True

    def __init__(self, native: Any) -> None:
        self.native = native

    @property
    def method(self) -> str:
        """See `RequestView`."""
        return str(self.native.method)

    def peer(self) -> str:
        """See `RequestView`."""
        return self.native.META.get("REMOTE_ADDR") or ""

    def header(self, name: str) -> str | None:
        """See `RequestView`."""
        found: str | None = self.native.META.get("HTTP_" + name.upper().replace("-", "_"))
        return found

    def forwarding(self) -> RequestHeaders:
        """See `RequestView`."""
        return EnvironHeaders(self.native.META)

    def attribute(self, name: str) -> object:
        """See `RequestView`; `user` is the primary key of a user who is logged in."""
        found: Any = getattr(self.native, name, None)
        if hasattr(found, "is_authenticated"):
            return found.pk if found.is_authenticated else None
        if found is None and (match := getattr(self.native, "resolver_match", None)) is not None:
            return match.kwargs.get(name)
        return found

    def keep(self, decision: Decision) -> Decision:
        """See `RequestView`."""
        meta = self.native.META
        known = meta.get(DECISION)
        kept: Decision = decision if known is None else stricter(known, decision)
        meta[DECISION] = kept
        return kept

    def add_headers(self, result: Any, decision: Decision) -> None:
        """See `RequestView`."""
        if hasattr(result, "headers") and hasattr(result, "status_code"):
            put_django_headers(result, self.native.META.get(DECISION, decision))

    def on_close(self, result: Any, close: Callable[[], None], function: Callable[..., Any] | None) -> bool:  # noqa: ARG002
        """See `RequestView`: servers close each response."""
        closers = getattr(result, "_resource_closers", None)
        if not isinstance(closers, list):
            return False
        # To replace its `close` would make a cycle: a response that a middleware drops would keep its slot.
        closers.append(close)
        return True

    def denied(self, decision: Decision, message: str | None, scope: str) -> RateLimitExceeded:
        """See `RequestView`."""
        return RateLimitExceeded(decision, message, scope)

    def answer(self, error: TidegateError) -> Any:
        """See `RequestView`: Django has no exception for 429."""
        from django.http import HttpResponse

        if isinstance(error, RateLimitExceeded):
            return HttpResponse(error.body(), status=429, headers=error.limit_headers, content_type="application/json")
        return HttpResponse(encode(error_body(error)), status=error.status, content_type="application/json")

    def failure(self, error: TidegateError) -> Exception:
        """See `RequestView`."""
        return error


class FlaskRequest:
    """The request that Flask is answering."""

    __slots__ = ("_flask", "enabled", "native")

    def __init__(self, flask: Any) -> None:
        self._flask = flask
        # The request itself: each attribute of the proxy costs as much as the proxy's whole look-up.
        self.native = flask.request._get_current_object()
        self.enabled: bool = flask.current_app.config.get("RATELIMIT_ENABLED", True)

    @property
    def method(self) -> str:
        """See `RequestView`."""
        return str(self.native.method)

    def peer(self) -> str:
        """See `RequestView`."""
        return self.native.remote_addr or ""

    def header(self, name: str) -> str | None:
        """See `RequestView`."""
        found: str | None = self.native.headers.get(name)
        return found

    def forwarding(self) -> RequestHeaders:
        """See `RequestView`."""
        return EnvironHeaders(self.native.environ)

    def attribute(self, name: str) -> object:
        """See `RequestView`."""
        found = self._flask.g.get(name)
        return found if found is not None else (self.native.view_args or {}).get(name)

    def keep(self, decision: Decision) -> Decision:
        """See `RequestView`."""
        kept_here = self._flask.g._get_current_object()
        known = kept_here.get("_tidegate_decision")
        kept_here._tidegate_decision = kept = decision if known is None else stricter(known, decision)
        if known is None:
            self._flask.after_this_request(_add_flask_headers)
        return kept

    def add_headers(self, result: Any, decision: Decision) -> None:
        """See `RequestView`: `keep` does it."""

    def on_close(self, result: Any, close: Callable[[], None], function: Callable[..., Any] | None) -> bool:
        """See `RequestView`: servers close each response. Of a function that is no view the end is its return."""
        if function is None:
            result.call_on_close(close)
            return True
        if not self._answers(function):
            return False

        def keep(response: Any) -> Any:
            response.call_on_close(close)
            return response

        self._flask.after_this_request(keep)
        return True

    def _answers(self, function: Callable[..., Any]) -> bool:
        """Whether a function is the view of the request, a method of its class, or called before views."""
        app = self._flask.current_app
        view = app.view_functions.get(self.native.endpoint)
        kind = getattr(view, "view_class", None)
        methods = [getattr(kind, name, None) for name in (self.native.method.lower(), "dispatch_request")]
        before = [each for functions in app.before_request_funcs.values() for each in functions]
        inner = unwrap(function)
        return any(each is not None and unwrap(each) is inner for each in (view, *methods, *before))

    def denied(self, decision: Decision, message: str | None, scope: str) -> RateLimitExceeded:
        """See `RequestView`."""
        return flask_error(decision, message, scope)

    def answer(self, error: TidegateError) -> None:
        """See `RequestView`."""

    def failure(self, error: TidegateError) -> Exception:
        """See `RequestView`."""
        from werkzeug.exceptions import HTTPException

        made = HTTPException(
            response=self._flask.Response(
                encode(error_body(error)), error.status, {"x-tidegate-error": error.code}, content_type="application/json"
            )
        )
        made.code = error.status
        return made


class WsgiRequest:
    """A WSGI environment."""

    __slots__ = ("native",)
    enabled = True

    def __init__(self, environ: dict[str, Any]) -> None:
        self.native = environ

    @property
    def method(self) -> str:
        """See `RequestView`."""
        return str(self.native["REQUEST_METHOD"])

    def peer(self) -> str:
        """See `RequestView`."""
        return self.native.get("REMOTE_ADDR") or ""

    def header(self, name: str) -> str | None:
        """See `RequestView`."""
        found: str | None = self.native.get("HTTP_" + name.upper().replace("-", "_"))
        return found

    def forwarding(self) -> RequestHeaders:
        """See `RequestView`."""
        return EnvironHeaders(self.native)

    def attribute(self, name: str) -> object:
        """See `RequestView`: a key of the environment."""
        return self.native.get(name)

    def keep(self, decision: Decision) -> Decision:
        """See `RequestView`."""
        self.native[DECISION] = decision
        return decision

    def add_headers(self, result: Any, decision: Decision) -> None:
        """See `RequestView`: the middleware does it."""

    def on_close(self, result: Any, close: Callable[[], None], function: Callable[..., Any] | None) -> bool:  # noqa: ARG002
        """See `RequestView`: the middleware settles the hold then."""
        return True

    def denied(self, decision: Decision, message: str | None, scope: str) -> RateLimitExceeded:
        """See `RequestView`."""
        return RateLimitExceeded(decision, message, scope)

    def answer(self, error: TidegateError) -> None:
        """See `RequestView`."""

    def failure(self, error: TidegateError) -> Exception:
        """See `RequestView`."""
        return error


class WsgiResponse:
    """What functions of the response get where the app is of no framework.

    Args:
        status: such as `404 Not Found`.
        headers: pairs of name and value.
    """

    __slots__ = ("headers", "status_code")

    def __init__(self, status: str, headers: list[tuple[str, str]]) -> None:
        self.status_code = int(status[:3])
        self.headers = headers


class EnvironHeaders:
    """The forwarding headers of a WSGI environment. Servers join headers of one name with commas."""

    __slots__ = ("_environ",)

    def __init__(self, environ: Mapping[str, Any]) -> None:
        self._environ = environ

    def get_all(self, key: str) -> list[str]:
        """See `RequestHeaders`."""
        value = self._environ.get(_FORWARDING_WSGI[key.encode()])
        return [] if value is None else [value.encode("latin-1", "replace").decode("utf-8", "surrogateescape").strip(" \t")]

    def __contains__(self, key: str) -> bool:
        return _FORWARDING_WSGI[key.encode()] in self._environ


def view_of(value: Any) -> RequestView | None:
    """The request that an argument of a function is.

    Args:
        value: any argument.

    Returns:
        A view of it; None where it is not a request.
    """
    kind = type(value)
    make = _VIEWS.get(kind, _UNKNOWN)
    if make is _UNKNOWN:
        if len(_VIEWS) >= _MAX_KINDS:
            _VIEWS.clear()
        make = _VIEWS[kind] = _kind_of(value)
    return None if make is None else make(value)


_MAX_KINDS: Final = 1000
_UNKNOWN: Final[Any] = object()
_VIEWS: Final[dict[type, Callable[[Any], RequestView] | None]] = {}
"""By the class of an argument: how a request of it is viewed; None for what is not a request."""


def _kind_of(value: Any) -> Callable[[Any], RequestView] | None:
    if isinstance(getattr(value, "META", None), MutableMapping) and hasattr(value, "method"):
        return DjangoRequest
    scope = getattr(value, "scope", None)
    return AsgiRequest if isinstance(scope, MutableMapping) and "type" in scope and "headers" in scope else None


def flask_view() -> RequestView | None:
    """The request that Flask is answering now; None outside of one, and where the program does not use Flask."""
    flask = loaded("flask")
    if flask is None or not flask.has_request_context():
        return None
    return FlaskRequest(flask)


def client_ip(view: RequestView, trusted: TrustedProxies) -> str:
    """What counts as one client: an IPv4 address, the /64 of an IPv6 address, or the name of a peer without an address.

    Args:
        trusted: whose forwarding headers are believed.

    Raises:
        BadRequest: if a trusted proxy's headers cannot be read.
    """
    peer = view.peer()
    return counted_client(trusted.client(peer, view.forwarding()) if trusted.trusts(peer) else peer or "unix", peer or "unix")


def put_starlette_headers(response: Any, decision: Decision) -> None:
    """Put the limit headers of a decision on a response of Starlette, in place of those of another limit."""
    raw = response.raw_headers
    for name, _ in raw:
        if name == b"ratelimit":
            response.headers.update(dict(limit_headers(decision)))
            return
    # Setting them one by one costs three times as much.
    raw.extend(raw_limit_headers(decision))


def put_django_headers(response: Any, decision: Decision) -> None:
    """Put the limit headers of a decision on a response of Django, in place of those of another limit."""
    headers = response.headers
    kind: Callable[..., Any] = type(headers)
    if _keeps_pairs(kind):
        # Setting one by the other costs more than all else that a limit does: Django encodes each name and value and searches
        # it for line breaks. These are ASCII, and `header_parts` has searched them.
        headers._store.update({name: (name, value) for name, value in limit_headers(decision)})
    else:
        for name, value in limit_headers(decision):
            headers[name] = value


@cache
def _keeps_pairs(kind: Callable[..., Any]) -> bool:
    """Whether headers of a class are kept as pairs of name and value, by name in lower case, as in Django 3.2 to 5.2."""
    try:
        probe: Any = kind({})
        probe["A-b"] = "c"
        return bool(probe._store == {"a-b": ("A-b", "c")})
    except (AttributeError, TypeError, ValueError):
        return False


def stricter(one: Decision, other: Decision) -> Decision:
    """Of two decisions for one request the one whose headers are sent: a denial, else the one with less left."""
    if one.allowed != other.allowed:
        return other if one.allowed else one
    if one.remaining is None or other.remaining is None:
        return other if one.remaining is None else one
    return other if other.remaining <= one.remaining else one


def _add_flask_headers(response: Any) -> Any:
    flask = loaded("flask")
    headers = limit_headers(flask.g._tidegate_decision)
    if "ratelimit" in response.headers:
        for name, value in headers:
            response.headers[name] = value
    else:
        response.headers.extend(headers)
    return response
