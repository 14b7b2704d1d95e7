"""API keys that came as `Authorization: Bearer`, where no door reads them: refused, so that no caller is anonymous by mistake."""

from __future__ import annotations

import hashlib
from typing import Final

from tidegate.catalog.caller_tokens import CALLER_TOKEN_PREFIX
from tidegate.doors.client_address import counted_client
from tidegate.doors.key_sources import is_jwt
from tidegate.doors.request_headers import RequestHeaders
from tidegate.errors import CatalogUnavailable, MissingApiKey, TooManyUnknownKeys
from tidegate.gate.gate import Gate
from tidegate.policy.key_format import KEY_PREFIX, is_possible_key

_SCHEME: Final = "bearer"


async def refuse_bearer_key(gate: Gate, headers: RequestHeaders, ip: str | None) -> None:
    """Refuse a request without an API key whose bearer token is one. Any other token passes: the API may read it.

    Costs one search of the headers for a request without `Authorization`, and a look-up of the token, cached as any key, if it
    can be a key: at most 512 visible ASCII characters, and not a JWT.

    Args:
        gate: knows the keys.
        ip: the client's address, or None; look-ups of unknown tokens are bounded for each, apart from those of unknown keys.

    Raises:
        MissingApiKey: naming the header that is read.
    """
    for value in headers.get_all("authorization"):
        scheme, _, token = value.partition(" ")
        token = token.strip()
        if scheme.lower() == _SCHEME and await _is_key(gate, token, ip):
            raise MissingApiKey("an API key came as Authorization: Bearer, which is not read: send it as the X-API-Key header")


async def _is_key(gate: Gate, token: str, ip: str | None) -> bool:
    if token.startswith(KEY_PREFIX):
        return True  # also where it is mistyped: it was meant to be one
    if token.startswith(CALLER_TOKEN_PREFIX) or not is_possible_key(token) or is_jwt(token):
        return False
    try:
        client = None if ip is None else f"bearer:{counted_client(ip, ip)}"
        return await gate.catalog.caller(hashlib.sha256(token.encode()).hexdigest(), client) is not None
    except (CatalogUnavailable, TooManyUnknownKeys):
        # Most bearer tokens are none of ours: while that cannot be known, they are not refused.
        return False
