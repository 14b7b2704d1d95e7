"""Deciding a log's requests in the log's own time, with the rules and counters of live traffic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import msgspec

from tidegate.catalog.cache_level import Caller
from tidegate.counters import Counters
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.memory_storage import DEFAULT_MAX_SUBJECTS
from tidegate.errors import BadRequest, SettingsError
from tidegate.ip_addresses import client_of
from tidegate.policy.attributes import NO_ATTRIBUTES, OnMissing
from tidegate.policy.matching import CompiledRule, CompiledTier, attribute_subject, subject_of
from tidegate.policy.model import Policy
from tidegate.policy.paths import STRICT, PathRules, canonical_path
from tidegate.policy.rules import Subject
from tidegate.tools.simulate.callers import PolicyCallers, is_refused
from tidegate.tools.simulate.in_progress import RequestsInProgress, takes_slots
from tidegate.tools.simulate.log_formats import Request
from tidegate.tools.simulate.tallies import MAX_TOP, MINUTE_US, RuleTally, Series
from tidegate.violations.space_saving import SpaceSaving

MAX_EXAMPLES: Final = 5
_MAX_REMEMBERED: Final = 50_000
_REMEMBERED_LENGTH: Final = 256


class _Match(msgspec.Struct, frozen=True):
    """What applies to a method and a path in a tier: the matching rule, shadow rules, whether one limits requests in progress."""

    tally: RuleTally
    rule: CompiledRule | None
    shadow_rules: tuple[tuple[CompiledRule, RuleTally], ...]
    has_slots: bool


class _Charged(msgspec.Struct, frozen=True, gc=False):
    """Whom a request is charged to.

    Args:
        caller: who sent it.
        counted: whom the rule counts.
        own: whom the tier's limits count.
        owner: whom quotas count: the customer, else the caller.
    """

    caller: Caller
    counted: str
    own: str
    owner: str
    attributes: Mapping[str, str]


class _Taken(NamedTuple):
    """What a request takes of its limits.

    Args:
        cost: units.
        duration_us: how long it takes; below 0 if that is not known.
        ends_us: when it ends.
    """

    cost: int
    duration_us: int
    ends_us: int


class Replay:
    """Decides requests that come in time order.

    Args:
        tier: tier of requests without an API key of the policy; None for the anonymous tier or the only one.
        by_ip: whether the caller of such a request is its IP address; otherwise the request's subject.
        max_subjects: maximum number of counters.
        paths: which encodings of a path are accepted.
        attributes: names of the values in the `attributes` of each request.
        durations: whether requests say how long they took; otherwise limits of requests in progress are not applied.

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
        durations: bool = False,
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
        self.in_progress = RequestsInProgress(self.counters) if durations else None
        self.without_duration = 0
        self._found = PolicyCallers(policy)
        self._attribute_names = tuple(attributes)
        # As live: a tier that is named comes before `[callers] tier_from`.
        self._tier_from = policy.caller_policy.tier_from if tier is None else ""
        self._matched_names: dict[CompiledTier, tuple[str, ...]] = {}
        self._default_tier = _default_tier(policy, tier)
        self.not_applied = sorted(
            f"{each.name}: {rule.name}"
            for each in policy.tiers
            for rule in each.rules
            if rule.failures is not None or (not durations and any(limit.concurrent for limit in rule.limits))
        )
        """Rules with limits that are not applied: of failures, and of requests in progress without durations."""
        self._add_rows(self._found.tiers[self._default_tier].compiled)
        # A tier that is named applies to all callers without a key of the policy.
        self._reads_tiers = tier is None
        self._by_ip = by_ip
        self._paths = paths
        self._matches: dict[tuple[CompiledTier, str, str, tuple[str | None, ...]], _Match] = {}
        self._minute = 0
        self._minute_blocked = 0

    def decide(self, request: Request) -> None:
        """Decide one request and count the result. If it is earlier than the previous one, the previous time is used."""
        at_us, ip, method, path, subject, api_key, values, named, cost, duration_us = request
        if self.in_progress is not None:
            self.in_progress.end_until(at_us)
        if at_us > self.now_us:
            self.now_us = at_us
            if self.first_us is None:
                self.first_us = at_us
        if ":" in ip:
            ip = _client(ip)
        attributes: Mapping[str, str] = NO_ATTRIBUTES
        if values:
            attributes = {name: value for name, value in zip(self._attribute_names, values, strict=True) if value}
        caller, customer = self._caller(api_key, named, attributes)
        if is_refused(caller, self.now_us):
            self.refused_keys += 1
            return
        caller.end_overrides(self.now_us)
        if caller.subject:
            counted = caller.subject
        elif subject and not self._by_ip:
            counted = f"k:{subject}"
        elif named and named[0]:
            counted = f"k:{named[0]}"
        else:
            counted = f"i:{ip}"
            if not subject and not attributes:
                self.without_subject += 1
        tier = caller.tier
        matched = tuple(map(attributes.get, self._names_in_matches(tier))) if attributes else ()
        match = self._matches.get((tier, method, path, matched)) or self._match(tier, method, path, matched, attributes)
        if match is None:
            return
        main: str | None = counted
        if match.rule is not None and match.rule.subject is not Subject.API_KEY:
            main = _counted(match.rule, tier, counted, ip, attributes, customer)
            if main is None:
                self.refused_attributes += 1
                return
        if duration_us < 0 and match.has_slots and self.in_progress is not None:
            self.without_duration += 1
        charged = _Charged(caller, main or counted, counted, customer or counted, attributes)
        took = _Taken(cost, duration_us, at_us + duration_us)
        blocked = not self._charge(match, charged, took)
        self.series.add(self.now_us, blocked)
        for shadow_rule, tally in match.shadow_rules:
            watched = _counted(shadow_rule, tier, counted, ip, attributes, customer)
            if watched is None:
                continue
            charged = _Charged(caller, watched, counted, customer or counted, attributes)
            self._decide(tally, self._rule_counters(shadow_rule, charged), took)

    def finish(self) -> None:
        """Close the last minute."""
        self._close_minute()

    def label(self, subject: str) -> str:
        """Name of a subject in reports: of an API key (or its id), `tier NAME`, or the caller as logged."""
        if subject.startswith("t:"):
            return f"tier {subject[2:]}"
        return self._found.labels.get(subject) or subject[2:]

    def _caller(self, api_key: str | None, named: tuple[str, ...], attributes: Mapping[str, str]) -> tuple[Caller, str]:
        """Who a request is from, and whom rules by customer count; empty for the caller itself.

        Args:
            api_key: as logged.
            named: id of the key, name of the customer and tier, as Tidegate named them to the gateway.
        """
        caller = self._found.of_key(api_key) if api_key else None
        if api_key and caller is None:
            self.unknown_keys += 1
        key_id, name, tier_name = named if named else ("", "", "")
        if caller is None and key_id:
            caller = self._found.of_id(key_id)
        if caller is not None:
            self._add_rows(caller.tier)
            return caller, caller.customer_subject or (f"c:{name}" if name else "")
        customer = self._found.customers.get(name) if name else self._found.owner(attributes) if attributes else None
        tier = self._default_tier
        if self._reads_tiers:
            planned = attributes.get(self._tier_from, "") if self._tier_from else ""
            own = "" if customer is None else customer.record.tier
            # The first that the policy has.
            tier = next((each for each in (planned, own, tier_name) if each in self._found.tiers), tier)
        caller = self._found.unkeyed(tier, customer)
        if tier != self._default_tier:
            self._add_rows(caller.tier)
        return caller, caller.customer_subject or (f"c:{name}" if name else "")

    def _names_in_matches(self, tier: CompiledTier) -> tuple[str, ...]:
        """The attributes that decide which rule of a tier answers."""
        names = self._matched_names.get(tier)
        if names is None:
            names = tuple(dict.fromkeys(name for rule in tier.tier.rules for name, _ in rule.required_entries))
            self._matched_names[tier] = names
        return names

    def _charge(self, match: _Match, charged: _Charged, took: _Taken) -> bool:
        """Decide by the matching rule and the tier's own limits and quotas, in one step as the gate does."""
        caller = charged.caller
        counters = () if match.rule is None else self._rule_counters(match.rule, charged)
        if caller.tier.limits is not None:
            counters = (*counters, (caller.tier.limits, charged.own))
        if caller.quotas is not None:
            counters = (*counters, (caller.quotas, charged.owner))
        if self._decide(match.tally, counters, took):
            return True
        self.top.add((charged.counted, match.tally.rule))
        minute = self.now_us // MINUTE_US
        if minute != self._minute:
            self._close_minute()
            self._minute = minute
        self._minute_blocked += 1
        return False

    def _decide(self, tally: RuleTally, counters: Counters, took: _Taken) -> bool:
        """Charge a request to counters, and count whether it is allowed."""
        in_progress = self.in_progress
        if in_progress is None or not takes_slots(counters):
            allowed = not counters or self.counters.charge_all(counters, took.cost).allowed
            tally.add(allowed, took.cost)
            return allowed
        if took.duration_us < 0:
            # As a check: denied while no slot is free, and takes none.
            allowed = self.counters.charge_all(counters, took.cost).allowed
        else:
            allowed = in_progress.admit(counters, took.cost, self.now_us, took.ends_us)
        tally.add(allowed, took.cost)
        if not allowed and not in_progress.has_free_slots(counters):
            tally.blocked_in_progress += 1
        return allowed

    def _rule_counters(self, rule: CompiledRule, charged: _Charged) -> Counters:
        """What a rule charges a request to: its limits and slots, and its quotas by the anchor of the caller."""
        if rule.action is not None:
            return ()
        counters: Counters = ((rule.limits_of(charged.counted, charged.attributes), charged.counted),) if rule.limited else ()
        if rule.slots is not None and self.in_progress is not None:
            counters = (*counters, (rule.slots, charged.counted))
        if rule.quotas is None:
            return counters
        owner = charged.owner if rule.subject is Subject.API_KEY else charged.counted
        return (*counters, (rule.quotas.of(charged.caller.anchor), owner))

    def _close_minute(self) -> None:
        if self._minute_blocked and (self.worst_minute is None or self._minute_blocked > self.worst_minute[1]):
            self.worst_minute = (self._minute * MINUTE_US, self._minute_blocked)
        self._minute_blocked = 0

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
        shadow_rules = tuple(
            (each, self._tally(tier, each.rule.name, each.rule.endpoint, "shadow"))
            for each in tier.shadow_rules(method, canonical, attributes)
        )
        watched = [each for each, _ in shadow_rules]
        has_slots = any(each.slots is not None for each in ([rule, *watched] if rule is not None else watched))
        match = _Match(tally, rule, shadow_rules, has_slots)
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
