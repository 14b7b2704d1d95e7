"""Attributes that come from a verified bearer token: `jwt:…` in `[attributes]`.

A gateway or an ASGI server passes the client's token on in a header, a back end puts it into the body of its check. A verified
claim takes precedence over an attribute of the same name that came otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from tidegate.decision import Check
from tidegate.doors.request_headers import AsgiHeaders, RequestHeaders, single
from tidegate.errors import BadRequest
from tidegate.gate.gate import Gate
from tidegate.policy.attributes import MAX_ATTRIBUTES, NO_ATTRIBUTES, CallerPolicy
from tidegate.policy.jwt_policy import DEFAULT_HEADER
from tidegate.policy.key_format import KEY_PREFIX

_SCHEME: Final = "bearer"


async def token_attributes(gate: Gate, policy: CallerPolicy, headers: RequestHeaders, client: str | None) -> Mapping[str, str]:
    """Verify the bearer token of a request.

    Args:
        gate: knows the issuer's keys.
        policy: the active one.
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


async def with_body_token(gate: Gate, check: Check, bearer: str | None) -> Check:
    """The check of a back end with the claims of the token that its body names.

    Args:
        gate: knows the policy and the issuer's keys.
        check: as the body has it otherwise.
        bearer: the token, with or without `Bearer ` before it; None and empty for none.

    Returns:
        The check; its client address is the one whose failed tokens are bounded.

    Raises:
        InvalidToken, TooManyTokens, TokenKeysUnavailable: as `token_attributes`.
        BadRequest: the policy has no `[jwt]`, or the check has too many attributes with the claims.
        CatalogUnavailable: the catalog fails and no usable policy is cached.
    """
    if not bearer:
        return check
    catalog = gate.catalog
    policy = catalog.cached_caller_policy() or await catalog.caller_policy()
    verifier = gate.tokens.verifier(policy)
    if verifier is None:
        raise BadRequest("bearer came, but the policy has no [jwt] to verify it: add one, or leave bearer out", field="bearer")
    verified = await verifier.verify(bare_token(bearer), check.ip)
    return with_claims(check, verified.attributes)


async def with_asgi_token(gate: Gate, check: Check, headers: Iterable[tuple[bytes, bytes]]) -> Check:
    """The check of an ASGI request with the claims of its token, if the policy has `[jwt]`.

    Args:
        gate: knows the policy and the issuer's keys.
        check: as the request has it otherwise.

    Raises:
        TidegateError: as `token_attributes`.
        CatalogUnavailable: the catalog fails and no usable policy is cached.
    """
    catalog = gate.catalog
    policy = catalog.cached_caller_policy() or await catalog.caller_policy()
    if policy.jwt is None:
        return check
    own = AsgiHeaders(headers, frozenset((policy.jwt.header_bytes,)))
    return with_claims(check, await token_attributes(gate, policy, own, check.ip))


def with_claims(check: Check, claims: Mapping[str, str]) -> Check:
    """A check with the claims of its token among its attributes.

    Raises:
        BadRequest: if it has too many then.
    """
    if not claims:
        return check
    attributes = {**check.attributes, **claims} if check.attributes else claims
    if len(attributes) > MAX_ATTRIBUTES:
        raise BadRequest(
            f"the check has {len(attributes)} attributes with the token's claims: send at most {MAX_ATTRIBUTES} in all",
            field="attributes",
        )
    return msgspec.structs.replace(check, attributes=attributes)


def bare_token(bearer: str) -> bytes:
    """The bytes of a token that came with or without `Bearer ` before it; what is not ASCII is no token, and fails as one."""
    token = bearer[7:] if bearer[:7].lower() == "bearer " else bearer
    return token.strip().encode(errors="surrogatepass")
