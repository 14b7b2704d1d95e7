"""A request to decide (`Check`), the answer (`Decision`), and what a caller has left (`Usage`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from tidegate.errors import BadRequest, clip
from tidegate.ip_addresses import canonical_ip
from tidegate.policy.attributes import NO_ATTRIBUTES, attributes_by_name, checked_attributes
from tidegate.policy.limits import Limit, LimitSet
from tidegate.policy.paths import STRICT, PathRules, canonical_path
from tidegate.policy.rules import Mode
from tidegate.timestamps import US_PER_S

MAX_COST: Final = 1_000_000_000
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
