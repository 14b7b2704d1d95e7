"""For Django: `limit` works on views as it is; `RateLimitMiddleware` adds default limits. Sync and async views; needs no cache.

    MIDDLEWARE = [..., "tidegate.django.RateLimitMiddleware"]
    TIDEGATE = {"default_limits": ["100/minute"], "counters": "redis://127.0.0.1:6379"}

`TIDEGATE` has the arguments of `limit`, `default_limits`, and `enabled`. `limit` of this module reads `counters`,
`trusted_proxies` and `enabled` from there where they are not given.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import iscoroutinefunction, unwrap
from typing import Any, Final

from asgiref.sync import markcoroutinefunction, sync_to_async
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest

from tidegate.doors.exceeded import RateLimitExceeded
from tidegate.doors.limit import limit as _limit
from tidegate.doors.limit_arguments import caller_place
from tidegate.doors.limited_functions import EXEMPT, LIMITS, exempt
from tidegate.doors.request_view import DECISION
from tidegate.doors.wsgi_requests import DjangoRequest, put_django_headers
from tidegate.errors import PolicyError, TidegateError

__all__ = ["RateLimitExceeded", "RateLimitMiddleware", "exempt", "limit"]

_CALL: Final = "tidegate.call"
_SHARED: Final = ("counters", "leases", "trusted_proxies")
_METHODS: Final = ("get", "post", "put", "patch", "delete", "head", "options", "dispatch")


def limit(limits: Any, **arguments: Any) -> _limit:
    """`tidegate.limit` with `counters`, `leases` and `trusted_proxies` of the setting `TIDEGATE`.

    Args:
        limits: see `tidegate.limit`.
        arguments: see `tidegate.limit`.

    Returns:
        The decorator, for views and, below `method_decorator`, for methods of class-based views.

    Raises:
        PolicyError: at import, naming the place, if an argument is not valid.
    """
    shared = _settings()
    place = caller_place(1)
    if not shared.get("enabled", True):
        arguments["exempt_when"] = lambda: True
    return _limit(limits, place=place, **({name: shared[name] for name in _SHARED if name in shared} | arguments))


class RateLimitMiddleware:
    """Default limits for all views that have no `limit` of their own and are not `exempt`, and limit headers.

    Args:
        get_response: see Django's middleware.

    Raises:
        ImproperlyConfigured: if the setting `TIDEGATE` is not valid.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        self._limit: _limit | None = None
        arguments = dict(_settings())
        limits = arguments.pop("default_limits", None)
        if arguments.pop("enabled", True) and limits:
            try:
                self._limit = _limit(limits, **{"key": "ip", **arguments})
            except (TidegateError, TypeError) as error:
                raise ImproperlyConfigured(f"setting TIDEGATE: {error}") from None
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> Any:
        """Answer a request."""
        if iscoroutinefunction(self.get_response):
            return self._call_async(request)
        return _finished(request, self.get_response(request))

    async def _call_async(self, request: HttpRequest) -> Any:
        response = await self.get_response(request)
        if _CALL in request.META:
            # Counting may wait for Redis.
            return await sync_to_async(_finished)(request, response)
        return _finished(request, response)

    def process_view(self, request: HttpRequest, view: Callable[..., Any], *_: object) -> Any:
        """Check a request before its view; Django runs this in a thread where views are async.

        Args:
            view: that will answer it.

        Returns:
            The response to a denied request; None to go on.
        """
        if self._limit is None or _has_its_own(view):
            return None
        viewed = DjangoRequest(request)
        name = f"{view.__module__}.{getattr(view, '__qualname__', type(view).__name__)}|default"
        try:
            call = self._limit.begin_blocking(viewed, name)
        except PolicyError:
            raise  # a mistake in the program, not the client's
        except TidegateError as error:
            return viewed.answer(error)
        if call.unfinished:
            request.META[_CALL] = self._limit, call
        return None


def _settings() -> dict[str, Any]:
    found = getattr(settings, "TIDEGATE", {})
    if not isinstance(found, dict):
        raise ImproperlyConfigured("setting TIDEGATE must be a dict such as {'default_limits': ['100/minute']}")
    return found


def _has_its_own(view: Callable[..., Any]) -> bool:
    """Whether a view, its class or a method of its class is exempt or has a limit."""
    inner = unwrap(view)
    kind = getattr(view, "view_class", None) or getattr(view, "cls", None)
    parts = (view, inner, kind, *(getattr(kind, method, None) for method in _METHODS))
    return any(getattr(each, EXEMPT, False) or getattr(each, LIMITS, None) for each in parts)


def _finished(request: HttpRequest, response: Any) -> Any:
    """A response with the limit headers; the slot of its request is free when it was sent."""
    default, call = request.META.pop(_CALL, (None, None))
    if default is not None:
        default.end_blocking(call, response)
    decision = request.META.get(DECISION)
    if decision is not None and "RateLimit" not in response.headers:
        put_django_headers(response, decision)
    return response
