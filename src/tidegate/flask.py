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
from tidegate.doors.limit import EXEMPT, LIMITS, exempt, limit
from tidegate.doors.python_requests import FlaskRequest
from tidegate.doors.responses import encode, error_body
from tidegate.errors import SettingsError, TidegateError

__all__ = ["RateLimitExceeded", "RateLimits", "exempt", "limit"]

DEFAULT: Final = "RATELIMIT_DEFAULT"
STORAGE: Final = "RATELIMIT_STORAGE_URI"
"""Keys of `app.config` that are read, beside `RATELIMIT_ENABLED`; the same as those of flask-limiter."""


class RateLimits:
    """Limits for all views of an app that have no `limit` of their own and are not `exempt`; each view counts by itself.

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
            endpoint = flask.request.endpoint
            if endpoint is None:
                default.check_blocking(FlaskRequest(flask), "all")
                return
            if endpoint not in named:
                named[endpoint] = _name_of(app.view_functions[endpoint], endpoint)
            name = named[endpoint]
            if name is not None:
                default.check_blocking(FlaskRequest(flask), name)

        app.before_request(check)


def _name_of(view: Callable[..., Any], endpoint: str) -> str | None:
    """Name under which a view counts; None where it is exempt or has limits of its own."""
    inner = unwrap(view)
    methods = [getattr(getattr(view, "view_class", None), method, None) for method in ("get", "post", "put", "patch", "delete")]
    for each in (view, inner, getattr(view, "view_class", None), *methods):
        if getattr(each, EXEMPT, False) or getattr(each, LIMITS, None):
            return None
    return f"flask.{endpoint}|default"


def _answer(error: TidegateError) -> Any:
    """Errors of limits as JSON; `RateLimitExceeded` brings its own answer."""
    if isinstance(error, RateLimitExceeded):
        return flask.Response(error.body(), 429, error.limit_headers, content_type="application/json")
    return flask.Response(encode(error_body(error)), error.status, content_type="application/json")
