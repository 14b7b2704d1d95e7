"""Checks in the form that most gateways send them, read in one pass over the bytes of their headers.

A reader gives None for everything else: a header that came twice, bytes above 0x7F, a path that is not plainly canonical, a
missing fact. Those requests are read by `http`, which knows every form and says what is wrong with a request; here nothing is
refused, and nothing that `http` would refuse passes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import msgspec

from tidegate.decision import MAX_COST, USUAL_METHODS, Check, require_tier
from tidegate.doors.client_address import FORWARDING, TrustedProxies, counted_peer
from tidegate.doors.head_layouts import MAX_LAYOUT_BYTES, Facts, HeadLayouts
from tidegate.errors import BadRequest
from tidegate.ip_addresses import PeerName, canonical_ip
from tidegate.policy.attributes import (
    MAX_ATTRIBUTES,
    MAX_VALUE,
    NO_ATTRIBUTES,
    AttributeSource,
    CallerPolicy,
    SourceKind,
    checked_attributes,
)
from tidegate.policy.paths import MAX_PATH_BYTES
from tidegate.wire import CheckRequest

if TYPE_CHECKING:
    from tidegate.doors.http_exchange import PlainRequest
    from tidegate.gate.gate import Gate
    from tidegate.jwt.tokens import Tokens

_METHODS: Final = {method.encode(): method for method in USUAL_METHODS}
_PLAIN_URI: Final = re.compile(rb"/[A-Za-z0-9\-._~!$&'()*+,=:@/]*(?:\?[!-~]*)?").fullmatch
_PLAIN_PATH: Final = re.compile(r"/[A-Za-z0-9\-._~!$&'()*+,=:@/]*", re.ASCII).fullmatch
_MAX_ADDRESS: Final = 45
"""The longest text of an IPv6 address, with an IPv4 address at its end."""
_FACTS: Final = {
    b"x-api-key": rb"([!-~]++)",
    b"x-original-uri": rb"(/[A-Za-z0-9\-._~!$&'()*+,=:@/]*+)(?:\?[!-~]*+)?",
    b"x-original-method": rb"(%b)" % b"|".join(sorted(_METHODS)),
    b"x-real-ip": rb"([0-9A-Fa-f:.]{1,%d}+)" % _MAX_ADDRESS,
}
assert MAX_LAYOUT_BYTES <= MAX_PATH_BYTES, "a path that a layout has read is not too long"
_LISTS: Final = FORWARDING - {b"x-real-ip"}
_CHECK: Final = msgspec.json.Decoder(CheckRequest)


def plain_authorize(
    request: PlainRequest,
    trusted: TrustedProxies,
    max_header_bytes: int,
    policy: CallerPolicy,
    tokens: Tokens | None = None,
) -> Check | None:
    """The check of a plain `GET /v1/authorize`. Costs 2 µs.

    Args:
        trusted: whose forwarding headers are believed.
        max_header_bytes: most bytes of the names and values of its headers.
        policy: the active one: it says where trusted proxies send attributes.
        tokens: what verifies bearer tokens; None where the policy accepts none.

    Returns:
        The check; None where the request has to be read otherwise.
    """
    if request.head_bytes > max_header_bytes and request.headers.size > max_header_bytes:
        return None
    values = request.values
    peer = request.connection.peer
    is_trusted = trusted.trusts(peer)
    uri = values.get(b"x-original-uri")
    if not uri and is_trusted:
        uri = values.get(b"x-forwarded-uri")
    if uri is None or _PLAIN_URI(uri) is None:
        return None
    path = uri.decode()
    if "?" in path:
        path = path.partition("?")[0]
    if "//" in path or "/." in path or len(path) > MAX_PATH_BYTES:
        return None
    sent_method = values.get(b"x-original-method")
    if not sent_method and is_trusted:
        sent_method = values.get(b"x-forwarded-method")
    if sent_method is None:
        method = "GET"
    elif (usual_method := _METHODS.get(sent_method)) is not None:
        method = usual_method
    else:
        return None
    key = values.get(b"x-api-key")
    if key:
        if not key.isascii():
            return None
        api_key = key.decode()
    elif b"authorization" in values and (policy.jwt is None or policy.jwt.header_bytes != b"authorization"):
        return None
    else:
        api_key = None
    attributes = NO_ATTRIBUTES
    if policy.jwt is not None and tokens is not None and (token := values.get(policy.jwt.header_bytes)):
        recalled = tokens.recall(policy, token)
        if recalled is None:
            return None
        attributes = recalled
    ip: str | None
    if not is_trusted:
        ip = counted_peer(peer)
    elif real_ip := values.get(b"x-real-ip"):
        ip = _address(real_ip)
    elif _LISTS.isdisjoint(values):
        ip = counted_peer(peer)
    else:
        try:
            client = trusted.client(peer, request.headers)
        except BadRequest:
            return None
        # A peer's name is not to be kept under a text that a header may have too.
        ip = client if isinstance(client, PeerName) else _address(client)
    if ip is None:
        return None
    if policy.attributes and is_trusted:
        sent = _attributes(values, policy.attributes)
        if sent is None:
            return None
        attributes = {**sent, **attributes} if attributes else sent
    check = Check(path, method, api_key, ip, attributes=attributes)
    if request.repeats and policy.jwt is None:
        request.check, request.policy = check, policy
    return check


def authorize_layouts() -> HeadLayouts:
    """Layouts of the heads of plain `GET /v1/authorize`, for `read_facts`."""
    return HeadLayouts(b"/v1/authorize", _FACTS, _accepts)


def _accepts(names: frozenset[bytes]) -> bool:
    """Whether `_FACTS` are all that `plain_authorize` reads of a request with these headers, unless the policy reads others."""
    return (
        b"x-original-uri" in names
        and (b"x-original-method" in names or b"x-forwarded-method" not in names)
        and (b"x-api-key" in names or b"authorization" not in names)
        and (b"x-real-ip" in names or _LISTS.isdisjoint(names))
    )


def facts_check(request: PlainRequest, facts: Facts, trusted: TrustedProxies, policy: CallerPolicy) -> Check | None:
    """As `plain_authorize`, for a request whose head a layout has read. Costs 0.7 µs.

    Args:
        facts: of the request.
        trusted: whose forwarding headers are believed.
        policy: the active one; it reads neither attributes nor bearer tokens.

    Returns:
        The check; None where the request has to be read otherwise.
    """
    key, sent_path, sent_method, real_ip = facts
    path = sent_path.decode()
    if "//" in path or "/." in path:
        return None
    peer = request.connection.peer
    ip = _known_address(real_ip) if real_ip and trusted.trusts(peer) else counted_peer(peer)
    if ip is None:
        return None
    check = Check(path, _METHODS[sent_method] if sent_method else "GET", key.decode() if key else None, ip)
    if request.repeats:
        request.check, request.policy = check, policy
    return check


def plain_check(request: PlainRequest, max_header_bytes: int, max_body_bytes: int, gate: Gate) -> Check | None:
    """The check of a plain `POST /v1/check`. Costs 2 µs.

    Args:
        max_header_bytes: most bytes of the names and values of its headers.
        max_body_bytes: most bytes of its body.
        gate: recalls bearer tokens that were verified before.

    Returns:
        The check; None where the request has to be read otherwise.
    """
    body = request.body
    if body is None or len(body) > max_body_bytes:
        return None
    if request.head_bytes > max_header_bytes and request.headers.size > max_header_bytes:
        return None
    values = request.values
    if b"content-encoding" in values:
        return None
    try:
        sent = _CHECK.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    path = sent.path
    if _PLAIN_PATH(path) is None or "//" in path or "/." in path or len(path) > MAX_PATH_BYTES:
        return None
    method = "GET" if sent.method is None else sent.method
    if method not in USUAL_METHODS:
        return None
    api_key = sent.api_key or None
    key = values.get(b"x-api-key")
    if key is not None:
        if not key.isascii() or (sent.api_key is not None and sent.api_key != key.decode()):
            return None
        api_key = key.decode() or None
    if api_key is None and b"authorization" in values:
        return None
    cost = sent.cost
    if type(cost) is not int or not 0 <= cost <= MAX_COST:
        return None
    ip = None
    if sent.ip is not None:
        ip = _address(sent.ip)
        if ip is None:
            return None
    claims = NO_ATTRIBUTES
    if sent.bearer:
        policy = gate.catalog.cached_caller_policy()
        recalled = None if policy is None else gate.tokens.recall_text(policy, sent.bearer)
        if recalled is None:
            return None
        claims = recalled
    if not sent.attributes and sent.tier is None:
        check = Check(path, method, api_key, ip, cost, None, claims)
        if request.repeats and not sent.bearer:
            request.check = check
        return check
    try:
        require_tier(sent.tier, api_key)
        attributes = checked_attributes(sent.attributes) if sent.attributes else NO_ATTRIBUTES
    except BadRequest:
        return None
    if claims:
        attributes = {**attributes, **claims}
        if len(attributes) > MAX_ATTRIBUTES:
            return None
    return Check(path, method, api_key, ip, cost, None, attributes, sent.tier or None)


def _attributes(values: Mapping[bytes, bytes], sources: Sequence[AttributeSource]) -> Mapping[str, str] | None:
    """The attributes that headers carry; None if one is not plain."""
    found: dict[str, str] = {}
    for source in sources:
        if source.kind is not SourceKind.HEADER:
            continue
        value = values.get(source.key_bytes)
        if value:
            if len(value) > MAX_VALUE or not value.isascii():
                return None
            found[source.name] = value.decode()
    return found


def _address(sent: bytes | str) -> str | None:
    """The canonical address; None if it is not a plain one."""
    # Longer texts must not fill the cache: a client may choose them.
    return None if len(sent) > _MAX_ADDRESS else _known_address(sent)


@lru_cache(maxsize=16_384)
def _known_address(sent: bytes | str) -> str | None:
    try:
        return canonical_ip(sent if isinstance(sent, str) else sent.decode("ascii"))
    except (BadRequest, UnicodeDecodeError):
        return None
