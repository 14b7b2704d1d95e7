"""Attributes that come from a verified bearer token: `jwt:…` in `[attributes]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tidegate.doors.request_headers import RequestHeaders, single
from tidegate.gate.gate import Gate
from tidegate.policy.attributes import NO_ATTRIBUTES, CallerPolicy
from tidegate.policy.jwt_policy import DEFAULT_HEADER
from tidegate.policy.key_format import KEY_PREFIX

_SCHEME: Final = "bearer"


async def token_attributes(gate: Gate, policy: CallerPolicy, headers: RequestHeaders, client: str | None) -> Mapping[str, str]:
    """Verify the bearer token of a request.

    Args:
        gate: knows the issuer's keys.
        policy: the active one.
        headers: of the request.
        client: address of who sent the token; failed tokens are bounded for each.

    Returns:
        Values by attribute; none where the policy has no `[jwt]`, or the request no such token.

    Raises:
        InvalidToken: naming the check that failed; also for a token that is no JSON Web Token.
        BadRequest: if the header came twice, or is not ASCII.
        TooManyTokens: the client sent too many that failed.
        TokenKeysUnavailable: the issuer's keys could not be loaded yet.
    """
    verifier = gate.tokens.verifier(policy)
    if verifier is None or policy.jwt is None:
        return NO_ATTRIBUTES
    name = policy.jwt.header.lower()
    value = single(headers, name)
    if not value:
        return NO_ATTRIBUTES
    scheme, separator, token = value.partition(" ")
    if not separator and name != DEFAULT_HEADER.lower():
        # In a header of its own the token may stand alone.
        token = scheme
    elif scheme.lower() != _SCHEME:
        return NO_ATTRIBUTES  # Basic and others are the API's own
    token = token.strip()
    if token.startswith(KEY_PREFIX):
        return NO_ATTRIBUTES  # an API key in the wrong header, which gets an error of its own
    return (await verifier.verify(token.encode("ascii"), client)).attributes
