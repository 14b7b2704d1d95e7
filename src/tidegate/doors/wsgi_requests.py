"""Requests of Django, Flask and plain WSGI as a limit sees them. No framework is imported before it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from inspect import unwrap
from typing import Any, Final

from tidegate.decision import Decision
from tidegate.doors.client_address import FORWARDING
from tidegate.doors.exceeded import RateLimitExceeded, flask_error, loaded
from tidegate.doors.request_headers import RequestHeaders
from tidegate.doors.request_view import DECISION, stricter
from tidegate.doors.responses import encode, error_body, limit_headers
from tidegate.errors import TidegateError

_FORWARDING_WSGI: Final = {name: "HTTP_" + name.decode().upper().replace("-", "_") for name in FORWARDING}


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


def _add_flask_headers(response: Any) -> Any:
    flask = loaded("flask")
    headers = limit_headers(flask.g._tidegate_decision)
    if "ratelimit" in response.headers:
        for name, value in headers:
            response.headers[name] = value
    else:
        response.headers.extend(headers)
    return response
