"""For Flask: `limit` works on views as it is; `RateLimits` adds default limits, settings of the app and JSON errors.

from flask import Flask
from tidegate.flask import RateLimits, exempt, limit

app = Flask(__name__)
RateLimits(app, ["100/minute", "5000/day"])

@app.get("/search")
@limit("10/minute")
def search(): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from inspect import unwrap
from typing import Any, Final

import flask

from tidegate.counters import CounterStore
from tidegate.doors.exceeded import RateLimitExceeded
from tidegate.doors.limit import limit
from tidegate.doors.limit_call import LimitCall
from tidegate.doors.limited_functions import EXEMPT, LIMITS, exempt
from tidegate.doors.responses import encode, error_body
from tidegate.doors.wsgi_requests import FlaskRequest
from tidegate.errors import PolicyError, SettingsError, TidegateError

__all__ = ["RateLimitExceeded", "RateLimits", "exempt", "limit"]

DEFAULT: Final = "RATELIMIT_DEFAULT"
STORAGE: Final = "RATELIMIT_STORAGE_URI"
"""Keys of `app.config` that are read, beside `RATELIMIT_ENABLED`; the same as those of flask-limiter."""


class RateLimits:
    """Limits for all views of an app that have no `limit` of their own and are not `exempt`; each view counts by itself. Static
    files of the app and of its blueprints are not limited.

    `app.config` may have `RATELIMIT_DEFAULT` (limits), `RATELIMIT_STORAGE_URI` and `RATELIMIT_ENABLED`; arguments come first.

    Args:
        app: the app; or call `init_app` later.
        default_limits: as `limit` takes them; none where not given: then only errors and headers are added.
        key: whom to count, as for `limit`.
        counters: as for `limit`.
        trusted_proxies: as for `limit`; not needed with werkzeug's `ProxyFix`.
        options: further arguments of `limit` for the default limits.

    Raises:
        PolicyError: if an argument is not valid.
    """

    def __init__(
        self,
        app: flask.Flask | None = None,
        default_limits: str | Sequence[str] | Callable[..., Any] | None = None,
        *,
        key: str | Callable[..., Any] = "ip",
        counters: str | CounterStore | None = None,
        trusted_proxies: Iterable[str] = (),
        **options: Any,
    ) -> None:
        if app is not None and not isinstance(app, flask.Flask):
            raise SettingsError(f"the first argument of RateLimits is the app, not a {type(app).__name__}; or leave it out")
        self._arguments: dict[str, Any] = {"key": key, "counters": counters, "trusted_proxies": trusted_proxies, **options}
        self._default_limits = default_limits
        if default_limits is not None:
            limit(default_limits, **self._arguments)  # a mistake fails here, not in init_app
        if app is not None:
            self.init_app(app)

    def init_app(self, app: flask.Flask) -> None:
        """Add the limits to an app.

        Args:
            app: whose `config` is read now.
        """
        app.register_error_handler(TidegateError, _answer)
        arguments = dict(self._arguments)
        if arguments["counters"] is None:
            arguments["counters"] = app.config.get(STORAGE)
        limits = self._default_limits if self._default_limits is not None else app.config.get(DEFAULT)
        if not limits:
            return
        default = limit(limits, **arguments)
        named: dict[str, str | None] = {}

        def check() -> None:
            name: str | None = "all"
            if (endpoint := flask.request.endpoint) is not None:
                if endpoint not in named:
                    named[endpoint] = _name_of(app, endpoint)
                name = named[endpoint]
            if name is None:
                return
            if not default.needs_end:
                default.check_blocking(FlaskRequest(flask), name)
                return
            # Before the decision, so that it runs before the headers are added.
            flask.after_this_request(charge)
            flask.g._tidegate_default = default.begin_blocking(FlaskRequest(flask), name)

        def charge(response: flask.Response) -> flask.Response:
            call: LimitCall | None = flask.g.pop("_tidegate_default", None)
            if call is not None:
                default.end_blocking(call, response)
            return response

        def abandon(error: BaseException | None) -> None:
            call: LimitCall | None = flask.g.pop("_tidegate_default", None)
            if call is not None:
                default.abandon_blocking(call, error)

        app.before_request(check)
        if default.needs_end:
            app.teardown_request(abandon)  # of requests that end without a response


def _name_of(app: flask.Flask, endpoint: str) -> str | None:
    """Name under which a view counts; None where it is exempt, has limits of its own, or sends the app's static files."""
    view = app.view_functions[endpoint]
    inner = unwrap(view)
    blueprint, _, last = endpoint.rpartition(".")
    files = app.blueprints.get(blueprint) if blueprint else app
    if last == "static" and files is not None and files.has_static_folder:
        return None
    methods = [getattr(getattr(view, "view_class", None), method, None) for method in ("get", "post", "put", "patch", "delete")]
    for each in (view, inner, getattr(view, "view_class", None), *methods):
        if getattr(each, EXEMPT, False) or getattr(each, LIMITS, None):
            return None
    return f"flask.{endpoint}|default"


def _answer(error: TidegateError) -> Any:
    """Errors of limits as JSON; `RateLimitExceeded` brings its own answer. A mistake in the program is a 500, and logged."""
    if isinstance(error, PolicyError):
        raise error
    if isinstance(error, RateLimitExceeded):
        return flask.Response(error.body(), 429, error.limit_headers, content_type="application/json")
    return flask.Response(encode(error_body(error)), error.status, content_type="application/json")
