"""Sessions of the console over HTTP: the cookie, and the checks against requests from other sites."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, MutableMapping
from typing import Any, Final

import msgspec

from tidegate.admin.sessions import LIFE_S, Sessions, csrf_token
from tidegate.errors import BadRequest, TidegateError

SESSION_PATH: Final = "/admin/v1/session"
CSRF_HEADER: Final = b"x-csrf-token"
POLL_HEADER: Final = b"x-tidegate-poll"
"""Sent with requests that no person caused: they do not make the session last longer."""
MAX_SIGN_IN_BYTES: Final = 8_192

_COOKIE: Final = "tidegate_session"
# Browsers accept this name only with Secure and Path=/, and from no other host.
_SECURE_COOKIE: Final = "__Host-tidegate_session"


class CrossSiteRequest(TidegateError):
    """A request that a page of another site may have caused."""

    code = "CROSS_SITE_REQUEST"
    status = 403


class SignIn(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a sign-in: a token; or `demo`, which `tidegate serve --demo` accepts on loopback."""

    token: str = ""
    demo: bool = False


class SessionCookies:
    """Sessions as browsers send them.

    Args:
        idle_s: how long a session lasts without use, s.
        secure: whether the listener uses TLS.
        demo_token: token with which a browser on this machine is signed in without one; None for none.
    """

    def __init__(self, sessions: Sessions, idle_s: float, *, secure: bool = False, demo_token: str | None = None) -> None:
        self.sessions = sessions
        self.idle_s = idle_s
        self.demo_token = demo_token
        self._secure = secure
        self._name = _SECURE_COOKIE if secure else _COOKIE

    def secret(self, scope: MutableMapping[str, Any]) -> str | None:
        """The session's secret in the cookies of a request; None if there is none."""
        for header in _values(scope, b"cookie"):
            for part in header.decode("latin-1").split(";"):
                name, equals, value = part.strip().partition("=")
                if name == self._name and equals and value:
                    return value
        return None

    def cookie(self, secret: str | None) -> str:
        """The value of `Set-Cookie`; None deletes the cookie."""
        kept = f"{self._name}={secret}; Max-Age={LIFE_S}" if secret else f"{self._name}=; Max-Age=0"
        return f"{kept}; Path=/; HttpOnly; SameSite=Strict" + ("; Secure" if self._secure else "")

    def require_csrf_token(self, scope: MutableMapping[str, Any], secret: str) -> None:
        """Refuse a change without the CSRF token of the session.

        Raises:
            CrossSiteRequest: if it is missing or wrong, or a page of another site sent the request.
        """
        require_same_site(scope)
        sent = _values(scope, CSRF_HEADER)
        if len(sent) != 1 or not hmac.compare_digest(sent[0], csrf_token(secret).encode()):
            raise CrossSiteRequest("the X-CSRF-Token header is missing or not that of this session: load the page again")

    def sign_in(self, scope: MutableMapping[str, Any], body: bytes, peer: str) -> str:
        """The token in the body of a sign-in.

        Raises:
            CrossSiteRequest: if a page of another site sent it.
            BadRequest: if there is no token in it.
        """
        require_same_site(scope)
        if not any(value.lower().startswith(b"application/json") for value in _values(scope, b"content-type")):
            raise BadRequest("the body must be JSON, sent with Content-Type: application/json")
        if len(body) > MAX_SIGN_IN_BYTES:
            raise BadRequest(f"the body has more than {MAX_SIGN_IN_BYTES} bytes: send the token alone")
        try:
            sent = msgspec.json.decode(body, type=SignIn)
        except (msgspec.MsgspecError, UnicodeError):
            raise BadRequest('the body is not a sign-in: send {"token": "…"}', field="token") from None
        if sent.demo and self.demo_token is not None and _is_local(scope, peer):
            return self.demo_token
        if not sent.token.strip():
            raise BadRequest('the token is missing: send {"token": "…"}', field="token")
        return sent.token.strip()


def require_same_site(scope: MutableMapping[str, Any]) -> None:
    """Refuse a request that a browser sent for a page of another origin.

    Raises:
        CrossSiteRequest: if so.
    """
    for value in _values(scope, b"sec-fetch-site"):
        if value not in (b"same-origin", b"none"):
            raise CrossSiteRequest("the request comes from a page of another site: open the console itself")
    hosts = _values(scope, b"host")
    for value in _values(scope, b"origin"):
        # `null` is the origin of sandboxed frames and files.
        if [value.partition(b"://")[2].lower()] != [host.lower() for host in hosts]:
            raise CrossSiteRequest("the Origin header names another site: open the console itself")


def _is_local(scope: MutableMapping[str, Any], peer: str) -> bool:
    """Whether a browser on this machine sent a request to this machine by its own name.

    The name keeps out pages of other sites whose name was made to resolve to 127.0.0.1.
    """
    names = [host.decode("latin-1").rpartition(":")[0].strip("[]") for host in _values(scope, b"host")]
    return (peer == "::1" or peer.startswith("127.")) and names in (["127.0.0.1"], ["localhost"], ["::1"])


def _values(scope: MutableMapping[str, Any], name: bytes) -> list[bytes]:
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    return [value for each, value in headers if each.lower() == name]
