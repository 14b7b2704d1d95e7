"""What may pass: `Tier`, `ApiKey` and the whole `Policy`. Frozen records, validated here and nowhere else.

Rules are in `rules`, their limits in `limits`, the form of API keys in `key_format`.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from typing import Final

import msgspec

from tidegate.errors import PolicyError
from tidegate.policy.access_entries import AccessEntry
from tidegate.policy.attributes import AttributeSource, CallerPolicy, CallerRules
from tidegate.policy.customers import Customer, customer_attributes
from tidegate.policy.fields import short
from tidegate.policy.jwt_policy import JwtPolicy
from tidegate.policy.limits import Algorithm, Limit, fit_limits
from tidegate.policy.namespaces import Namespace
from tidegate.policy.notify import NotifyTarget
from tidegate.policy.overrides import Override, SubjectOverride
from tidegate.policy.quotas import Overage, Quota, fit_quotas, require_quotas
from tidegate.policy.rules import Rule

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)


class KeyStatus(enum.StrEnum):
    """Whether an API key is let in."""

    ACTIVE = "active"
    REVOKED = "revoked"


class Tier(msgspec.Struct, frozen=True, gc=False):
    """A class of callers and its rules.

    Args:
        name: 1 to 64 of `[A-Za-z0-9_.-]`.
        rules: in the order of the policy; names unique.
        limits: over all endpoints of the tier, counted for each caller with sliding_window, charged with the rule's.
        managed_by_file: whether the policy file owns it.
        quotas: over all endpoints, in fixed periods, charged with the rule's limits by every check; the shortest first.
        overage: what passes above its quotas; None for nothing.
        overrides: other limits for some subjects of its rules; rules and subjects unique together.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    limits: tuple[Limit, ...] = ()
    managed_by_file: bool = False
    quotas: tuple[Quota, ...] = ()
    overage: Overage | None = None
    overrides: tuple[SubjectOverride, ...] = ()

    @classmethod
    def make(
        cls,
        name: str,
        rules: Iterable[Rule] = (),
        limits: Iterable[Limit | str] = (),
        quotas: Iterable[Quota | str] = (),
        overage: object = None,
    ) -> Tier:
        """Validate a tier.

        Args:
            name: see the class; so are all others.
            rules: validated rules.
            limits: limits or their texts.
            quotas: quotas or their texts.
            overage: an `Overage`, or what `Overage.parse` reads.

        Raises:
            PolicyError: naming what is wrong and the remedy.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise PolicyError(f"tier name {short(name)} must be 1 to 64 of letters, digits, '_', '.', '-'")
        seen: dict[str, Rule] = {}
        ordered = tuple(rules)
        for rule in ordered:
            if rule.name in seen:
                raise PolicyError(
                    f"tier {name!r} has two rules named {rule.name!r}: "
                    "remove one, or give the second a 'name' and other 'methods' or 'mode'"
                )
            seen[rule.name] = rule
        parsed = tuple(limit if isinstance(limit, Limit) else Limit.parse(limit) for limit in limits)
        if parsed:
            fit_limits(Algorithm.SLIDING_WINDOW, parsed)
        sold = fit_quotas(quotas)
        above = overage if isinstance(overage, Overage) else Overage.parse(overage)
        require_quotas(above, sold)
        return cls(name=name, rules=ordered, limits=parsed, quotas=sold, overage=above)


class ApiKey(msgspec.Struct, frozen=True, gc=False):
    """An API key as the catalog knows it: never the key itself.

    Args:
        sha256: lower-case hex digest of the key.
        status: active or revoked.
        name: a label for people.
        expires_at_us: µs since the epoch (UTC) from which the key is refused; None for never.
        overrides: other limits for this key.
        managed_by_file: whether the policy file owns it.
        counts_as: id of the key that it replaced, whose counters it goes on with; empty where it replaced none.
        customer: name of the customer that owns it; empty for none.
        inherits_tier: whether its tier is that of its customer, also when that changes.
    """

    sha256: str
    tier: str
    status: KeyStatus = KeyStatus.ACTIVE
    name: str = ""
    expires_at_us: int | None = None
    overrides: tuple[Override, ...] = ()
    managed_by_file: bool = False
    counts_as: str = ""
    customer: str = ""
    inherits_tier: bool = False

    @property
    def id(self) -> str:
        """The key's public name: the first 24 hex digits of its digest. Logs use it."""
        return self.sha256[:24]

    @property
    def owner(self) -> str:
        """The id that counters use: that of the first key of its owner, however often it was rotated since."""
        return self.counts_as or self.id


class Policy(msgspec.Struct, frozen=True, gc=False):
    """A whole policy, valid in itself.

    Args:
        tiers: names unique.
        api_keys: digests unique; each tier exists.
        anonymous_tier: tier of checks that bring no key; None refuses them.
        attributes: where gateways' requests carry attributes; names unique.
        callers: who a caller without an API key is; None where only `anonymous_tier` says it.
        jwt: which bearer tokens of other issuers are accepted; None for none.
        namespaces: names unique.
        access: who is allowed or denied before anything is counted.
        customers: names, external ids and attribute values unique; each tier exists.
        notify: who is notified of thresholds, API keys and blocks; one secret for each URL.
    """

    tiers: tuple[Tier, ...]
    api_keys: tuple[ApiKey, ...] = ()
    anonymous_tier: str | None = None
    attributes: tuple[AttributeSource, ...] = ()
    callers: CallerRules | None = None
    jwt: JwtPolicy | None = None
    namespaces: tuple[Namespace, ...] = ()
    access: tuple[AccessEntry, ...] = ()
    customers: tuple[Customer, ...] = ()
    notify: tuple[NotifyTarget, ...] = ()

    @property
    def caller_policy(self) -> CallerPolicy:
        """What it says of callers without an API key."""
        owned = customer_attributes(self.customers)
        return CallerPolicy(
            self.anonymous_tier, self.callers, self.attributes, self.jwt, self.namespaces, self.access, owned, self.notify
        )
