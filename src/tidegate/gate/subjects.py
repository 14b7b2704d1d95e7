"""Whom a rule by attributes counts, and what happens where a check lacks one of them."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from tidegate.catalog.cache_level import Caller
from tidegate.decision import Check
from tidegate.errors import BadRequest, clip
from tidegate.policy.attributes import OnMissing
from tidegate.policy.matching import CompiledRule, DescriptorRule, attribute_subject, subject_of
from tidegate.policy.rules import Subject


class DescriptorCheck(msgspec.Struct, frozen=True, gc=False):
    """A descriptor without a path, to be decided.

    Args:
        entries: values by key.
        api_key: the caller's key; None for the anonymous tier.
        cost: 0 (peek) to 1,000,000,000.
        ip: client address in canonical text, or None where it is not known.
        tier: that a check without a key names; None for none.
    """

    entries: Mapping[str, str]
    api_key: str | None
    cost: int
    ip: str | None = None
    tier: str | None = None

    @property
    def attributes(self) -> Mapping[str, str]:
        """Its entries: they are its attributes."""
        return self.entries


def attributes_subject(check: Check | DescriptorCheck, caller: Caller, rule: CompiledRule, ip: str | None) -> str:
    """Whom a rule by attributes counts for a check.

    Args:
        rule: with the subject ATTRIBUTES.
        ip: the client of the check's address; None if it is not known.

    Returns:
        The subject: the values, or the address where one is missing and the rule counts such checks by it.

    Raises:
        BadRequest: naming the attribute or the address that is missing.
    """
    found = attribute_subject(rule.parts, check.attributes, caller.subject, ip)
    if found is not None:
        return found
    named = clip(rule.rule.name)
    missing = [part for part in rule.parts if part not in ("api_key", "ip") and part not in check.attributes]
    if not missing:
        raise ip_needed(check, f"the rule {named} counts by ip")
    if rule.rule.on_missing is OnMissing.DENY:
        raise BadRequest(f"attribute {missing[0]!r} is missing: the rule {named} counts by it", field="attributes")
    if ip is None:
        raise ip_needed(check, f"attribute {missing[0]!r} is missing, and the rule {named} counts such checks by ip")
    return f"i:{ip}"


def shadow_subject(attributes: Mapping[str, str], caller: Caller, rule: CompiledRule, ip: str | None) -> str | None:
    """Whom a shadow rule counts; None where it cannot: it must not block a check that it only watches."""
    if rule.subject is Subject.ATTRIBUTES:
        found = attribute_subject(rule.parts, attributes, caller.subject, ip)
        if found is not None or rule.rule.on_missing is OnMissing.DENY:
            return found
    elif rule.subject is Subject.CUSTOMER:
        return caller.customer_subject or caller.subject or (None if ip is None else f"i:{ip}")
    elif caller.subject or rule.subject is not Subject.API_KEY:
        return subject_of(rule.subject, caller.subject, ip, caller.tier.tier.name)
    return None if ip is None else f"i:{ip}"


def descriptor_subject(check: DescriptorCheck, caller: Caller, rule: DescriptorRule, client: str | None) -> str:
    """Whom a rule for descriptors counts.

    Args:
        client: of the check's address; None if it is not known.

    Raises:
        BadRequest: naming the attribute or the address that is missing.
    """
    if rule.compiled.subject is Subject.ATTRIBUTES:
        return attributes_subject(check, caller, rule.compiled, client)
    counted = caller.customer_subject or caller.subject if rule.compiled.subject is Subject.CUSTOMER else caller.subject
    return rule.subject(check.entries, counted)


def ip_needed(check: Check | DescriptorCheck, why: str) -> BadRequest:
    """The error of a check that is counted by an address that it lacks."""
    bad_ip = check.bad_ip if isinstance(check, Check) else None
    problem = "ip is needed" if bad_ip is None else f"ip {bad_ip} is not an IPv4 or IPv6 address"
    return BadRequest(f"{problem}: {why}", field="ip")
