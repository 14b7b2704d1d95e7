"""Which request a value is: of Starlette and FastAPI (ASGI), Django or Flask, and who its client is.

No framework is imported: a request is recognized by what it has, and Flask's only where the program has imported Flask.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, Final

from tidegate.doors.asgi_request import AsgiRequest
from tidegate.doors.client_address import TrustedProxies, counted_client
from tidegate.doors.exceeded import loaded
from tidegate.doors.request_view import RequestView
from tidegate.doors.wsgi_requests import DjangoRequest, FlaskRequest


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
