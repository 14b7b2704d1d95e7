"""Throttle classes for Django REST framework: those of `rest_framework.throttling` by name and settings, counted by Tidegate.

    REST_FRAMEWORK = {
        "DEFAULT_THROTTLE_CLASSES": ["tidegate.drf.AnonRateThrottle", "tidegate.drf.UserRateThrottle"],
        "DEFAULT_THROTTLE_RATES": {"anon": "100/day", "user": "1000/day; 60/minute"},
    }

They count exactly across processes and need no cache; `counters` and `trusted_proxies` are read from the setting `TIDEGATE`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from rest_framework.settings import api_settings
from rest_framework.throttling import BaseThrottle

from tidegate.decision import Decision
from tidegate.doors.exceeded import RateLimitExceeded
from tidegate.doors.limit import limit
from tidegate.doors.wsgi_requests import DjangoRequest
from tidegate.errors import TidegateError

__all__ = ["AnonRateThrottle", "RateThrottle", "ScopedRateThrottle", "UserRateThrottle"]


class RateThrottle(BaseThrottle):  # type: ignore[misc]
    """Base of the classes below, and of your own: set `scope` or `rate`, and override `get_key`.

    Attributes:
        scope: name of the rate in `DEFAULT_THROTTLE_RATES`, and of the counters.
        rate: limits as `limit` takes them, in place of those of the scope; None for no limit.
        algorithm: as for `limit`.
    """

    scope: str | None = None
    rate: str | None = None
    algorithm = "sliding_window"
    _limits: ClassVar[dict[tuple[type, str, str], limit]] = {}

    def __init__(self) -> None:
        self.decision: Decision | None = None

    def get_key(self, request: Any, view: Any) -> str | None:
        """Whom to count; None for requests that this throttle does not count."""
        raise NotImplementedError(f"{type(self).__name__} needs a method get_key(request, view)")

    def get_rate(self, view: Any) -> str | None:  # noqa: ARG002 - for subclasses
        """The limits of a request; None for no limit."""
        if self.rate is not None:
            return self.rate
        if self.scope is None:
            raise ImproperlyConfigured(f"{type(self).__name__} needs a scope or a rate")
        return _rate_of(self.scope, type(self).__name__)

    def allow_request(self, request: Any, view: Any) -> bool:
        """See REST framework."""
        rate = self.get_rate(view)
        key = None if rate is None else self.get_key(request, view)
        if rate is None or key is None:
            return True
        viewed = DjangoRequest(request._request)
        scope = self.scope or type(self).__qualname__
        try:
            self.decision = self._limit(rate, scope, request).check_blocking(_Keyed(viewed, key), scope)
        except RateLimitExceeded as error:
            self.decision = error.decision
            return False
        return True

    def wait(self) -> float | None:
        """Seconds until the next request passes: the `Retry-After` of the response."""
        return None if self.decision is None else self.decision.retry_after

    def get_ident(self, request: Any) -> str:
        """The client: its address, with `NUM_PROXIES` of REST framework as its own throttles have it."""
        return str(super().get_ident(request))

    def _limit(self, rate: str, scope: str, request: Any) -> limit:  # noqa: ARG002 - one limit serves all requests
        cached = (type(self), rate, scope)
        found = self._limits.get(cached)
        if found is None:
            shared = getattr(settings, "TIDEGATE", {})
            try:
                found = limit(
                    rate,
                    key=lambda request: request._tidegate_key,
                    scope=f"drf.{scope}",
                    algorithm=self.algorithm,
                    counters=shared.get("counters"),
                )
            except TidegateError as error:
                raise ImproperlyConfigured(f"{type(self).__name__}: rate {rate!r}: {error}") from None
            self._limits[cached] = found
        return found


class AnonRateThrottle(RateThrottle):
    """Counts requests without a user, by address; the rate `anon`."""

    scope: str | None = "anon"

    def get_key(self, request: Any, view: Any) -> str | None:  # noqa: ARG002
        """See `RateThrottle`."""
        if request.user and request.user.is_authenticated:
            return None
        return f"ip {self.get_ident(request)}"


class UserRateThrottle(RateThrottle):
    """Counts users, and requests without one by address; the rate `user`."""

    scope: str | None = "user"

    def get_key(self, request: Any, view: Any) -> str | None:  # noqa: ARG002
        """See `RateThrottle`."""
        if request.user and request.user.is_authenticated:
            return f"user {request.user.pk}"
        return f"ip {self.get_ident(request)}"


class ScopedRateThrottle(UserRateThrottle):
    """The rate that the view's `throttle_scope` names; views without one are not limited."""

    def get_rate(self, view: Any) -> str | None:
        """See `RateThrottle`."""
        self.scope = getattr(view, "throttle_scope", None)
        return None if not self.scope else _rate_of(self.scope, type(self).__name__)


class _Keyed(DjangoRequest):
    """A request with the key that the throttle gave."""

    __slots__ = ()

    def __init__(self, view: DjangoRequest, key: str) -> None:
        super().__init__(view.native)
        view.native._tidegate_key = key


def _rate_of(scope: str, name: str) -> str | None:
    rates = api_settings.DEFAULT_THROTTLE_RATES
    if scope not in rates:
        raise ImproperlyConfigured(f"{name}: DEFAULT_THROTTLE_RATES has no rate for the scope {scope!r}")
    return None if rates[scope] is None else str(rates[scope])
