"""Deciding a log's requests in the log's own time, with the rules and counters of live traffic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final

import msgspec

from tidegate.counters.memory import MemoryCounters
from tidegate.counters.memory_storage import DEFAULT_MAX_SUBJECTS
from tidegate.decision import client_of
from tidegate.errors import BadRequest, SettingsError
from tidegate.policy.attributes import NO_ATTRIBUTES, OnMissing
from tidegate.policy.key_format import hash_api_key, is_possible_key
from tidegate.policy.limits import LimitSet
from tidegate.policy.matching import CompiledRule, CompiledTier, attribute_subject, subject_of
from tidegate.policy.model import ApiKey, KeyStatus, Policy, Subject, Tier
from tidegate.policy.paths import STRICT, PathRules, canonical_path
from tidegate.policy.periods import DEFAULT_ANCHOR
from tidegate.tools.simulate.log_formats import Request
from tidegate.tools.simulate.tallies import MAX_TOP, MINUTE_US, RuleTally, Series
from tidegate.violations.space_saving import SpaceSaving

MAX_EXAMPLES: Final = 5
_MAX_REMEMBERED: Final = 50_000
_REMEMBERED_LENGTH: Final = 256
_NEVER: Final = 1 << 62


class _Caller(msgspec.Struct, frozen=True):
    """A caller with an API key of the policy, which is rejected from `refused_from_us` on (µs since the epoch)."""

    subject: str
    tier: CompiledTier
    refused_from_us: int
    customer: str


class _Match(msgspec.Struct, frozen=True):
    """What applies to a method and a path in a tier: limits and quotas of the matching rule and of the tier, and shadow rules."""

    tally: RuleTally
    limits: tuple[LimitSet, ...]
    rule: CompiledRule | None
    kind: Subject
    own: tuple[LimitSet, ...]
    quotas: tuple[LimitSet, ...]
    shadow_rules: tuple[tuple[CompiledRule, RuleTally], ...]


class Replay:
    """Decides requests that come in time order.

    Args:
        policy: the policy.
        tier: tier of requests without an API key of the policy; None for the anonymous tier or the only one.
        by_ip: whether the caller of such a request is its IP address; otherwise the request's subject.
        max_subjects: maximum number of counters.
        paths: which encodings of a path are accepted.
        attributes: names of the values in the `attributes` of each request.

    Raises:
        SettingsError: if the policy has no such tier, or the default tier is ambiguous.
    """

    def __init__(
        self,
        policy: Policy,
        tier: str | None,
        by_ip: bool,
        max_subjects: int = DEFAULT_MAX_SUBJECTS,
        paths: PathRules = STRICT,
        attributes: Sequence[str] = (),
    ) -> None:
        self.tallies: dict[tuple[str, str], RuleTally] = {}
        self.top: SpaceSaving[tuple[str, str]] = SpaceSaving(MAX_TOP)
        self.series = Series()
        self.first_us: int | None = None
        self.now_us = -1
        self.refused: list[tuple[str, str]] = []
        self.refused_count = 0
        self.refused_keys = 0
        self.unknown_keys = 0
        self.without_subject = 0
        self.refused_attributes = 0
        self.worst_minute: tuple[int, int] | None = None
        self.counters = MemoryCounters(max_subjects, clock=lambda: self.now_us)
        self._tiers = {each.name: CompiledTier(_lasting(each)) for each in policy.tiers}
        self._attribute_names = tuple(attributes)
        # As live: a tier that is named comes before `[callers] tier_from`.
        self._tier_from = policy.caller_policy.tier_from if tier is None else ""
        self._matched_names: dict[CompiledTier, tuple[str, ...]] = {}
        self._default_tier = self._tiers[_default_tier(policy, tier)]
        self._add_rows(self._default_tier)
        self._records = {key.sha256: key for key in policy.api_keys}
        self._records_by_id = {key.id: key for key in policy.api_keys}
        self._customer_tiers = {customer.name: customer.tier for customer in policy.customers}
        # A tier that is named applies to all callers without a key of the policy.
        self._reads_tiers = tier is None
        self._callers_by_id: dict[str, _Caller] = {}
        self._labels: dict[str, str] = {}
        self._by_ip = by_ip
        self._paths = paths
        self._callers: dict[str, _Caller | None] = {}
        self._matches: dict[tuple[CompiledTier, str, str, tuple[str | None, ...]], _Match] = {}
        self._minute = 0
        self._minute_blocked = 0

    def decide(self, request: Request) -> None:
        """Decide one request and count the result. If it is earlier than the previous one, the previous time is used."""
        at_us, ip, method, path, subject, api_key, values, named = request
        if at_us > self.now_us:
            self.now_us = at_us
            if self.first_us is None:
                self.first_us = at_us
        if ":" in ip:
            ip = _client(ip)
        tier = self._default_tier
        attributes: Mapping[str, str] = NO_ATTRIBUTES
        if values:
            attributes = {name: value for name, value in zip(self._attribute_names, values, strict=True) if value}
            tier = self._planned_tier(attributes)
        caller_record = self._caller_of(api_key) if api_key else None
        customer = key_id = ""
        if named and caller_record is None:
            key_id, name, tier_name = named
            caller_record = self._caller_of_id(key_id)
            tier = self._named_tier(name, tier_name) or tier
            customer = f"c:{name}" if name else ""
        if caller_record is not None:
            if caller_record.refused_from_us <= self.now_us:
                self.refused_keys += 1
                return
            caller, tier, customer = caller_record.subject, caller_record.tier, caller_record.customer or customer
        elif subject and not self._by_ip:
            caller = f"k:{subject}"
        elif key_id:
            caller = f"k:{key_id}"
        else:
            caller = f"i:{ip}"
            if not subject and not attributes:
                self.without_subject += 1
        matched = tuple(map(attributes.get, self._names_in_matches(tier))) if attributes else ()
        match = self._matches.get((tier, method, path, matched)) or self._match(tier, method, path, matched, attributes)
        if match is None:
            return
        main: str | None = caller
        if match.rule is not None and match.kind is not Subject.API_KEY:
            main = _counted(match.rule, tier, caller, ip, attributes, customer)
            if main is None:
                self.refused_attributes += 1
                return
        blocked = not self._charge(match, main or caller, caller, customer or caller, attributes)
        self.series.add(self.now_us, blocked)
        for shadow_rule, tally in match.shadow_rules:
            counted = _counted(shadow_rule, tier, caller, ip, attributes, customer)
            if counted is None:
                continue
            if self.counters.charge_all(shadow_rule.counters(counted, attributes=attributes), 1).allowed:
                tally.allowed += 1
            else:
                tally.blocked += 1

    def finish(self) -> None:
        """Close the last minute."""
        self._close_minute()

    def label(self, subject: str) -> str:
        """Name of a subject in reports: of an API key (or its id), `tier NAME`, or the caller as logged."""
        if subject.startswith("t:"):
            return f"tier {subject[2:]}"
        return self._labels.get(subject) or subject[2:]

    def _planned_tier(self, attributes: Mapping[str, str]) -> CompiledTier:
        """The tier that `[callers] tier_from` names, else the default one."""
        if not self._tier_from:
            return self._default_tier
        tier = self._tiers.get(attributes.get(self._tier_from, ""))
        if tier is None:
            return self._default_tier
        self._add_rows(tier)
        return tier

    def _names_in_matches(self, tier: CompiledTier) -> tuple[str, ...]:
        """The attributes that decide which rule of a tier answers."""
        names = self._matched_names.get(tier)
        if names is None:
            names = tuple(dict.fromkeys(name for rule in tier.tier.rules for name, _ in rule.required_entries))
            self._matched_names[tier] = names
        return names

    def _charge(self, match: _Match, counted: str, caller: str, owner: str, attributes: Mapping[str, str]) -> bool:
        """Decide by the matching rule and the tier's own limits and quotas, in one step as the gate does.

        Args:
            match: what applies.
            counted: whom the rule counts.
            caller: whom the tier's limits count.
            owner: whom the tier's quotas count: the customer, else the caller.
            attributes: of the request.
        """
        if match.rule is not None and match.rule.overrides is not None:
            own = match.rule.counters(counted, attributes=attributes)
        else:
            own = tuple((limits, counted) for limits in match.limits)
        counters = (*own, *((limits, caller) for limits in match.own), *((limits, owner) for limits in match.quotas))
        if not counters:
            match.tally.allowed += 1
            return True
        if self.counters.charge_all(counters, 1).allowed:
            match.tally.allowed += 1
            return True
        match.tally.blocked += 1
        self.top.add((counted, match.tally.rule))
        minute = self.now_us // MINUTE_US
        if minute != self._minute:
            self._close_minute()
            self._minute = minute
        self._minute_blocked += 1
        return False

    def _close_minute(self) -> None:
        if self._minute_blocked and (self.worst_minute is None or self._minute_blocked > self.worst_minute[1]):
            self.worst_minute = (self._minute * MINUTE_US, self._minute_blocked)
        self._minute_blocked = 0

    def _caller_of(self, api_key: str) -> _Caller | None:
        """The caller of an API key; None (and counted) if the policy does not contain it."""
        try:
            caller_record = self._callers[api_key]
        except KeyError:
            caller_record = self._look_up(api_key)
            if len(api_key) <= _REMEMBERED_LENGTH:
                if len(self._callers) >= _MAX_REMEMBERED:
                    self._callers.clear()
                self._callers[api_key] = caller_record
        if caller_record is None:
            self.unknown_keys += 1
        return caller_record

    def _look_up(self, api_key: str) -> _Caller | None:
        record = self._records.get(hash_api_key(api_key)) if is_possible_key(api_key) else None
        return None if record is None else self._caller_for(record)

    def _caller_of_id(self, key_id: str) -> _Caller | None:
        """The caller of a key's id; None if the policy does not contain the key."""
        found = self._callers_by_id.get(key_id)
        if found is None and (record := self._records_by_id.get(key_id)) is not None:
            return self._caller_for(record)
        return found

    def _named_tier(self, customer: str, tier_name: str) -> CompiledTier | None:
        """The tier of a caller whose key the policy does not contain: its customer's in the policy, else as logged."""
        name = self._customer_tiers.get(customer) or tier_name
        tier = self._tiers.get(name) if self._reads_tiers else None
        if tier is not None:
            self._add_rows(tier)
        return tier

    def _caller_for(self, record: ApiKey) -> _Caller:
        caller_record = self._callers_by_id.get(record.id)
        if caller_record is None:
            tier = self._tiers[record.tier]
            self._add_rows(tier)
            # Whether an override that ends applied at the time of a request is not known.
            lasting = [override for override in record.overrides if override.until_us is None]
            own = CompiledTier(tier.tier, lasting, tier) if lasting else tier
            refused_from_us = 0 if record.status is not KeyStatus.ACTIVE else record.expires_at_us
            caller_record = _Caller(
                f"k:{record.owner}",
                own,
                _NEVER if refused_from_us is None else refused_from_us,
                f"c:{record.customer}" if record.customer else "",
            )
            self._callers_by_id[record.id] = caller_record
            self._labels[caller_record.subject] = record.name
        return caller_record

    def _match(
        self, tier: CompiledTier, method: str, path: str, matched: tuple[str | None, ...], attributes: Mapping[str, str]
    ) -> _Match | None:
        """The rules of a request; None (and counted) if a live check would reject the encoding of its path."""
        canonical, remedy = canonical_path(path, self._paths)
        if canonical is None:
            self.refused_count += 1
            if len(self.refused) < MAX_EXAMPLES:
                self.refused.append((path, remedy))
            return None
        rule = tier.match(method, canonical, attributes)
        if rule is not None:
            tally = self._tally(tier, rule.rule.name, rule.rule.endpoint, rule.rule.mode.value)
        elif tier.limits is not None or tier.quotas is not None:
            tally = self._tally(tier, "(tier)", "", "enforce")
        else:
            tally = self._tally(tier, "(no rule)", "", "none")
        match = _Match(
            tally,
            () if rule is None else tuple(limits for limits, _ in rule.counters("")),
            rule,
            Subject.API_KEY if rule is None else rule.subject,
            () if tier.limits is None else (tier.limits,),
            () if tier.quotas is None else (tier.quotas.of(DEFAULT_ANCHOR),),
            tuple(
                (each, self._tally(tier, each.rule.name, each.rule.endpoint, "shadow"))
                for each in tier.shadow_rules(method, canonical, attributes)
            ),
        )
        # Long paths are seldom repeated, and clients that send them must not fill the memory.
        if len(path) <= _REMEMBERED_LENGTH:
            if len(self._matches) >= _MAX_REMEMBERED:
                self._matches.clear()
            self._matches[(tier, method, path, matched)] = match
        return match

    def _add_rows(self, tier: CompiledTier) -> None:
        """Add a row for each rule of a tier, including those that no request will match."""
        for rule in tier.tier.rules:
            self._tally(tier, rule.name, rule.endpoint, rule.mode.value)

    def _tally(self, tier: CompiledTier, rule: str, endpoint: str, mode: str) -> RuleTally:
        name = tier.tier.name
        tally = self.tallies.get((name, rule))
        if tally is None:
            tally = self.tallies[(name, rule)] = RuleTally(name, rule, endpoint, mode)
        return tally


def _default_tier(policy: Policy, tier: str | None) -> str:
    names = [each.name for each in policy.tiers]
    if not names:
        raise SettingsError("the policy has no tier: add one")
    if tier is not None:
        if tier not in names:
            raise SettingsError(f"the policy has no tier {tier!r}; expected one of {', '.join(names)}")
        return tier
    default = policy.caller_policy.default_tier
    if default is not None:
        return default
    if len(names) == 1:
        return names[0]
    raise SettingsError(f"the tier of callers without an API key is ambiguous: give --tier, one of {', '.join(names)}")


def _counted(
    rule: CompiledRule, tier: CompiledTier, caller: str, ip: str, attributes: Mapping[str, str], customer: str
) -> str | None:
    """Whom a rule counts; None where a live check would be refused because an attribute is missing."""
    if rule.subject is Subject.ATTRIBUTES:
        counted = attribute_subject(rule.parts, attributes, caller if caller.startswith("k:") else "", ip or None)
        if counted is not None or rule.rule.on_missing is OnMissing.DENY:
            return counted
    return subject_of(rule.subject, caller, ip or None, tier.tier.name, customer) or caller


@lru_cache(maxsize=65_536)
def _client(ip: str) -> str:
    """A client as live checks count it. Text that is not an address, e.g. a host name, is returned unchanged."""
    try:
        return client_of(ip)
    except BadRequest:
        return ip


def _lasting(tier: Tier) -> Tier:
    """A tier without the overrides for subjects that end: whether one applied at the time of a request is not known."""
    return msgspec.structs.replace(tier, overrides=tuple(each for each in tier.overrides if each.until_us is None))
