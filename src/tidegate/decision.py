"""A request to decide (`Check`), the answer (`Decision`), and what telemetry reads of both (`Observation`)."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Final

import msgspec

from tidegate.errors import BadRequest
from tidegate.policy.attributes import NO_ATTRIBUTES, attributes_by_name, checked_attributes
from tidegate.policy.limits import Limit, LimitSet
from tidegate.policy.model import Mode
from tidegate.policy.paths import STRICT, PathRules, canonical_path
from tidegate.timestamps import US_PER_S

MAX_COST: Final = 1_000_000_000
IPV6_PREFIX: Final = 64
"""Bits of an IPv6 address that make one client: a subscriber is handed a /64 (RFC 6177), and could vary the rest at will."""
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
"""RFC 6052."""
_LOCAL_NAT64: Final = ipaddress.IPv6Network("64:ff9b:1::/48")
"""RFC 8215."""
_SIIT: Final = ipaddress.IPv6Network("::ffff:0:0:0/96")
"""IPv4-translated addresses, RFC 2765."""
_COMPATIBLE: Final = ipaddress.IPv6Network("::/96")
"""IPv4-compatible addresses, RFC 4291."""

_METHOD: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}", re.ASCII)
USUAL_METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class Check(msgspec.Struct, frozen=True, gc=False):
    """A request to be decided. Make it with `Check.of`, which validates.

    Args:
        path: canonical path, without query.
        method: upper-case HTTP method.
        api_key: as it came, or None.
        ip: client address in canonical text, or None where nobody knows it.
        cost: 0 (peek) to 1,000,000,000.
        bad_ip: what came in place of an address, shortened; None where an address came, or nothing.
        attributes: what else is known of the caller, by name; see `tidegate.policy.attributes`.
        tier: the caller's tier, for a check without an API key; None where the policy is to decide.
    """

    path: str
    method: str = "GET"
    api_key: str | None = None
    ip: str | None = None
    cost: int = 1
    bad_ip: str | None = None
    attributes: Mapping[str, str] = NO_ATTRIBUTES
    tier: str | None = None

    @classmethod
    def of(
        cls,
        path: object,
        method: object = "GET",
        api_key: object = None,
        ip: object = None,
        cost: object = 1,
        paths: PathRules = STRICT,
        *,
        strict_ip: bool = True,
        attributes: Mapping[str, str | None] | Iterable[tuple[str, str | None]] | None = None,
        tier: object = None,
    ) -> Check:
        """Validate the fields of a request.

        Args:
            path: path of the request, percent-encoded; a query is cut off.
            method: HTTP method in any case.
            api_key: the key or None; an empty one counts as None.
            ip: IPv4 or IPv6 address as `canonical_ip` reads it, or None.
            cost: whole number.
            paths: which spellings of a path are let through.
            strict_ip: whether an ip that is no address is refused at once; else only where the check is counted by ip.
            attributes: values by name, or pairs of name and value; None and empty values count as absent.
            tier: name of the caller's tier; None where the policy is to decide. Not together with an API key.

        Returns:
            The check.

        Raises:
            BadRequest: naming the field, its value and the remedy.
        """
        if type(path) is not str or not path:
            raise BadRequest("path must be a non-empty string such as '/api/v1/items'", field="path")
        canonical, remedy = canonical_path(path.partition("?")[0] if "?" in path else path, paths)
        if canonical is None:
            raise BadRequest(f"path {clip(path)} is refused: {remedy}", field="path")
        if method not in USUAL_METHODS:
            if type(method) is not str or not _METHOD.fullmatch(method):
                raise BadRequest(f"method {clip(method)} is not an HTTP method such as 'GET'", field="method")
            method = method.upper()
        if type(cost) is not int or not 0 <= cost <= MAX_COST:
            raise BadRequest(f"cost {clip(cost)} must be a whole number from 0 to {MAX_COST}", field="cost")
        if api_key is not None and type(api_key) is not str:
            raise BadRequest("api_key must be a string", field="api_key")
        bad_ip = None
        try:
            address = None if ip is None else canonical_ip(ip)
        except BadRequest:
            if strict_ip:
                raise
            address, bad_ip = None, clip(ip)
        if not attributes and tier is None:
            return cls(canonical, method, api_key or None, address, cost, bad_ip)
        require_tier(tier, api_key)
        given = checked_attributes(attributes_by_name(attributes)) if attributes else NO_ATTRIBUTES
        return cls(canonical, method, api_key or None, address, cost, bad_ip, given, tier or None)  # type: ignore[arg-type]


def require_tier(tier: object, api_key: object) -> None:
    """Refuse a tier that is no text, or that comes beside an API key, which has a tier of its own.

    Raises:
        BadRequest: naming the remedy.
    """
    if tier is not None and type(tier) is not str:
        raise BadRequest("tier must be a string", field="tier")
    if tier and api_key:
        raise BadRequest("tier and api_key came together, and the key has a tier of its own: send one of them", field="tier")


class PeerName(str):
    """The name of a peer that has no address, such as a unix socket; it takes an address's place in a check."""

    __slots__ = ()


class CallerIdentity(msgspec.Struct, frozen=True, gc=False, cache_hash=True):
    """Who a check was from.

    Args:
        key_id: public id of the API key; None without one.
        customer: name of the customer; None without one.
    """

    key_id: str | None
    customer: str | None


class WindowLeft(msgspec.Struct, frozen=True, gc=False):
    """What remains of one limit of a check.

    Args:
        limit: the limit.
        remaining: units of cost left under it.
        reset_after_us: µs until nothing that was consumed under it counts any more.
    """

    limit: Limit
    remaining: int
    reset_after_us: int


class Decision(msgspec.Struct, frozen=True, gc=False):
    """The answer to a check. Times are integer µs inside; the properties give seconds.

    Args:
        allowed: whether the request may pass.
        binding: the limit with the least left (of those that deny, where it was denied); None where no rule applies.
        remaining: units of cost left under that limit.
        reset_after_us: µs until nothing that was consumed under that limit counts any more.
        retry_after_us: µs until the same cost passes without other requests; 0 when allowed, None when it never will.
        at_us: the counter store's clock at the decision, µs since the epoch.
        limits: the rule's limits; None where no rule applies.
        degraded: whether the counter store was unavailable and the fallback decided.
        unlimited_tier: name of the tier where none of its limits applies; None otherwise.
        overage: units of the check that pass above a quota or a soft limit, at most its cost, and 0 where none do; of a check of
            cost 0, all units above the quota so far.
        caller: who the check was from; None where neither an API key nor a customer is known.
        windows: what remains of every limit of the check, where headers name them all; empty where not.
    """

    allowed: bool
    binding: Limit | None = None
    remaining: int | None = None
    reset_after_us: int = 0
    retry_after_us: int | None = 0
    at_us: int = 0
    limits: LimitSet | None = None
    degraded: bool = False
    unlimited_tier: str | None = None
    overage: int = 0
    caller: CallerIdentity | None = None
    windows: tuple[WindowLeft, ...] = ()

    @property
    def limit(self) -> int | None:
        """The most that can be had at once under the binding limit."""
        return None if self.binding is None else self.binding.capacity

    @property
    def reset_after(self) -> float:
        """Seconds until the binding limit is fully replenished."""
        return self.reset_after_us / US_PER_S

    @property
    def retry_after(self) -> float | None:
        """Seconds until the same cost passes without other requests; 0 when allowed, None when it never will."""
        return None if self.retry_after_us is None else self.retry_after_us / US_PER_S

    @property
    def holds_until_us(self) -> int | None:
        """Until when the answer holds, on the store's clock: a denial until its retry, an allowance only now; None for ever."""
        return None if self.retry_after_us is None else self.at_us + self.retry_after_us

    @property
    def customer(self) -> str | None:
        """Name of the caller's customer."""
        return None if self.caller is None else self.caller.customer

    @property
    def rule(self) -> str | None:
        """Name of the rule that answered."""
        return None if self.limits is None else self.limits.rule

    @property
    def tier(self) -> str | None:
        """Name of the caller's tier; None for a `Limiter`, which has no tiers."""
        return self.unlimited_tier if self.limits is None else self.limits.tier

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The limit headers of an HTTP response, and `Retry-After` of a denial; names in lower case. None where no rule applies.

        `RateLimit-Policy` and `RateLimit` follow draft-ietf-httpapi-ratelimit-headers-10; `X-RateLimit-Reset` is in unix seconds.
        Seconds are rounded up: a client that waits for `Retry-After` is never early. `RateLimit` has the limit with the least
        left first, then the others where `windows` has them.
        """
        binding = self.binding
        if binding is None or self.limits is None:
            return []
        reset_us = self.reset_after_us
        policy, label, limit = header_parts(self.limits, binding)
        headers = [
            policy,
            ("ratelimit", f"{label};r={self.remaining};t={-(-reset_us // US_PER_S)}{self._other_windows(label)}"),
            limit,
            ("x-ratelimit-remaining", str(self.remaining)),
            ("x-ratelimit-reset", str(-(-(self.at_us + reset_us) // US_PER_S))),
        ]
        if not self.allowed and self.retry_after_us is not None:
            headers.append(("retry-after", str(-(-self.retry_after_us // US_PER_S))))
        return headers

    def _other_windows(self, label: str) -> str:
        """The members of `RateLimit` after the first one, whose name is given."""
        members = []
        for each in self.windows:
            name = f'"{each.limit.label or each.limit.text}"'
            if name != label and not any(character in name for character in "\r\n"):
                members.append(f", {name};r={each.remaining};t={-(-each.reset_after_us // US_PER_S)}")
        return "".join(members)


_HEADER_PARTS: Final[dict[LimitSet, tuple[Limit, tuple[tuple[str, str], str, tuple[str, str]]]]] = {}
"""For each set the parts of the limit that was binding last: as a rule it is the same one."""
_MAX_HEADER_PARTS: Final = 4096


def header_parts(limits: LimitSet, binding: Limit) -> tuple[tuple[str, str], str, tuple[str, str]]:
    """What the headers of all decisions by one limit have in common.

    Args:
        limits: of the decision.
        binding: its limit.

    Returns:
        The header `RateLimit-Policy`, the first part of the value of `RateLimit`, and the header `X-RateLimit-Limit`.

    Raises:
        ValueError: if a text has a line break: it would end the header.
    """
    known = _HEADER_PARTS.get(limits)
    if known is None or known[0] is not binding:
        quotas, label = limits.quotas, binding.label or binding.text
        if any(each in text for text in (quotas, label) for each in "\r\n"):
            raise ValueError("a limit has a line break in its text")
        if len(_HEADER_PARTS) >= _MAX_HEADER_PARTS:
            _HEADER_PARTS.clear()
        parts = ("ratelimit-policy", quotas), f'"{label}"', ("x-ratelimit-limit", str(binding.capacity))
        known = _HEADER_PARTS[limits] = (binding, parts)
    return known[1]


class ShadowDenial(msgspec.Struct, frozen=True, gc=False):
    """A check that a shadow rule would have denied.

    Args:
        at_us: the counter store's clock, µs since the epoch.
    """

    tier: str
    rule: str
    subject: str
    at_us: int


class UsageMemo:
    """What a caller's checks have used since the last write, under the rule and subject that it was counted for first.

    Kept by the cached caller, so that such a check is counted without a look-up, and without reading any memory that the check
    has not read already. Written and read by `tidegate.ledger.aggregate` alone.

    Attributes:
        key_id: id of the caller's API key; empty without one.
        customer: name of the customer that it belongs to; empty without one.
        usage_minute: `tidegate.ledger.aggregate.Minute` that the units belong to; None while there are none.
        usage_answer: what answered, as in the key of an entry.
        usage_subject: whom it counted.
        usage_admitted: units admitted.
        usage_blocked: units blocked.
        usage_over: of the admitted units, those above a quota or a soft limit.
        usage_others: entries of the same minute by what answered, where that was something else; None without any.
    """

    __slots__ = (
        "customer",
        "key_id",
        "usage_admitted",
        "usage_answer",
        "usage_blocked",
        "usage_minute",
        "usage_others",
        "usage_over",
        "usage_subject",
    )

    def __init__(self, key_id: str = "", customer: str = "") -> None:
        self.key_id = key_id
        self.customer = customer
        self.usage_minute: Any = None
        self.usage_answer: Any = None
        self.usage_subject: str | None = None
        self.usage_admitted = self.usage_blocked = self.usage_over = 0
        self.usage_others: dict[Any, Any] | None = None


class Observation(msgspec.Struct, frozen=True, gc=False):
    """What the gate saw while answering one check; telemetry reads it, nothing else does.

    Args:
        decision: the answer, or None where the check was refused.
        error: code of the error where it was refused, else None.
        latency_ns: time spent in the gate, ns; for a batch, its share.
        shadow_denied: names of the shadow rules that would have denied.
        subject: whom the rule counted, or whom the tier's own limits did, where these denied; None where nothing limits it.
        denied_by: the limits that denied: the rule's or the tier's own; None where the check passed.
        cost: units of the check.
        key_id: id of the caller's API key; empty without one.
        customer: name of the customer that the caller belongs to; empty without one.
        shadow_denials: what the shadow rules of `shadow_denied` would have denied, and to whom.
        memo: of the caller with this API key and customer; None where it is not cached.
        held: whether the cost is reserved by a hold, whose settlement reports what was charged.
    """

    decision: Decision | None
    error: str | None
    latency_ns: int
    shadow_denied: tuple[str, ...] = ()
    subject: str | None = None
    denied_by: LimitSet | None = None
    cost: int = 1
    key_id: str = ""
    customer: str = ""
    shadow_denials: tuple[ShadowDenial, ...] = ()
    memo: UsageMemo | None = None
    held: bool = False


class RuleUsage(msgspec.Struct, frozen=True, gc=False):
    """What is left to a caller under one rule.

    Args:
        rule: name of the rule; None for the tier's own limits.
        endpoint: its pattern; None for the tier's own limits, which hold everywhere.
        mode: whether it blocks.
        subject: whom it counts, several names joined by commas; for a caller without an API key or attribute that would be
            counted, `ip`.
        limits: all its limits, the shortest window first, then its quotas.
        decision: the answer to a check of cost 0, by the limit with the least left.
        windows: the same for each of the limits by itself, `overage` being all that is above a quota so far; none where the
            counter store could not say.
        holds: open holds of its limits; None where they were not counted.
    """

    rule: str | None
    endpoint: str | None
    mode: Mode
    subject: str
    limits: tuple[Limit, ...]
    decision: Decision
    windows: tuple[Decision, ...] = ()
    holds: int | None = None


class Usage(msgspec.Struct, frozen=True, gc=False):
    """What is left to a caller under every rule of its tier.

    Args:
        tier: name of the caller's tier.
        rules: the tier's own limits first, then the rules, the highest priority first.
        not_counted: names of the rules that count by ip, where none is known; None is the tier's own limits.
        truncated: whether the tier has more rules than are looked at.
    """

    tier: str
    rules: tuple[RuleUsage, ...]
    not_counted: tuple[str | None, ...] = ()
    truncated: bool = False


def canonical_ip(ip: object) -> str:
    """Spell an address in its one canonical way; an IPv4 address mapped into IPv6 becomes IPv4.

    Args:
        ip: IPv4 in four decimal parts, or IPv6; a port, brackets and a zone are dropped. A `PeerName` stays as it is.

    Returns:
        The canonical text. Costs 0.3 µs for IPv4.

    Raises:
        BadRequest: if it is no address.
    """
    if type(ip) is str and len(ip) <= _MAX_ADDRESS:
        if (address := _bare_address(ip)) is not None:
            return address
        match = _DECORATED.fullmatch(ip)
        if match is not None and (address := _bare_address(match[match.lastindex or 0])) is not None:
            return address
    elif type(ip) is PeerName:
        return ip
    raise BadRequest(f"ip {clip(ip)} is not an IPv4 or IPv6 address", field="ip")


_MAX_ADDRESS: Final = 96
# `[2001:db8::1%eth0]:443`, `192.0.2.1:443`, `fe80::1%eth0`
_DECORATED: Final = re.compile(
    r"\[([0-9A-Fa-f:.]+)(?:%[^\]\s%]{1,32})?\](?::[0-9]{1,5})?|([0-9.]+):[0-9]{1,5}|([0-9A-Fa-f]*:[0-9A-Fa-f:.]*)%[^\]\s%]{1,32}",
    re.ASCII,
)


def _bare_address(text: str) -> str | None:
    try:
        if ":" not in text:
            socket.inet_pton(socket.AF_INET, text)
            return text
        packed = socket.inet_pton(socket.AF_INET6, text)
    except (OSError, ValueError):
        return None
    if packed.startswith(b"\0" * 10 + b"\xff\xff"):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(socket.AF_INET6, packed)


def client_of(ip: object) -> str:
    """What counts as one client of an address, however it is written: itself, or see `ipv6_client`.

    Args:
        ip: IPv4 or IPv6 address.

    Returns:
        The client.

    Raises:
        BadRequest: if it is no address.
    """
    canonical = canonical_ip(ip)
    return ipv6_client(canonical) if ":" in canonical else canonical


@lru_cache(maxsize=65_536)
def ipv6_client(ip: str) -> str:
    """What counts as one client of an IPv6 address: its /64, or the IPv4 address that a translator or a tunnel put into it.

    A NAT64 gives all its IPv4 clients addresses in one /64, and a Teredo server does so too; a 6to4 client has 65,536 of them.

    Args:
        ip: the address, canonical.

    Returns:
        The network, or the address where that is one client.

    Raises:
        ValueError: if it is no IPv6 address.
    """
    address = ipaddress.IPv6Address(ip)
    embedded = embedded_ipv4(address)
    if embedded is not None:
        return str(embedded)
    if address in _LOCAL_NAT64:
        # Where the IPv4 address is, depends on the translator (RFC 6052); one address is one client of it.
        return str(address)
    return str(ipaddress.IPv6Network((int(address), IPV6_PREFIX), strict=False))


def embedded_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address of the client behind an IPv6 address; None where there is none."""
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    # ::/96 but neither :: nor ::1, which are the host's own.
    if address in _NAT64 or address in _SIIT or (address in _COMPATIBLE and int(address) > 1):
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped


def clip(value: object) -> str:
    """The representation of a value that came from outside, short enough for a message."""
    # Of a long text its beginning is enough; to escape all of it would cost its sender's peers.
    text = repr(value[:80] if type(value) is str else value)
    return text if len(text) <= 80 else text[:77] + "..."
