"""Deciding a log's requests in the log's own time, with the rules and counters of live traffic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeAlias

from tidegate.counters.memory import DEFAULT_MAX_SUBJECTS, MemoryCounters
from tidegate.errors import SettingsError
from tidegate.gate import ipv6_client
from tidegate.keys import hash_api_key
from tidegate.limits import LimitSet
from tidegate.matching import CompiledRule, CompiledTier, subject_of
from tidegate.paths import canonical_path
from tidegate.policy import Policy, Subject
from tidegate.simulate.log_formats import Request

MAX_SERIES: Final = 2_000
MAX_TOP: Final = 10_000
_MAX_REMEMBERED: Final = 50_000
_MINUTE_US: Final = 60_000_000


class RuleTally:
    """What one rule did.

    Args:
        tier: name of its tier.
        rule: its name, or what stands for it: `(tier)`, `(no rule)`.
        endpoint: its pattern; empty where there is none.
        mode: enforce, shadow or none.
    """

    __slots__ = ("allowed", "blocked", "endpoint", "mode", "rule", "tier")

    def __init__(self, tier: str, rule: str, endpoint: str, mode: str) -> None:
        self.tier = tier
        self.rule = rule
        self.endpoint = endpoint
        self.mode = mode
        self.allowed = 0
        self.blocked = 0


class Series:
    """Allowed and blocked over time, in at most 2,000 steps: when they are used up, two become one."""

    def __init__(self) -> None:
        self.step_us = _MINUTE_US
        self.steps: dict[int, list[int]] = {}

    def add(self, at_us: int, blocked: bool) -> None:
        """Count one request.

        Args:
            at_us: µs since the epoch.
            blocked: whether it was blocked.
        """
        step = self.steps.get(at_us // self.step_us)
        if step is None:
            step = self._new(at_us)
        step[blocked] += 1

    def _new(self, at_us: int) -> list[int]:
        while len(self.steps) >= MAX_SERIES:
            self.step_us *= 2
            merged: dict[int, list[int]] = {}
            for number, (allowed, blocked) in self.steps.items():
                step = merged.setdefault(number // 2, [0, 0])
                step[0] += allowed
                step[1] += blocked
            self.steps = merged
        return self.steps.setdefault(at_us // self.step_us, [0, 0])


class TopBlocked:
    """The subjects blocked most, in bounded memory.

    Exact up to 10,000 subjects that were blocked at all; beyond that the space-saving sketch (Metwally, Agrawal, El Abbadi
    2005): a newcomer takes the place and the count of the one blocked least, so a count may be too high, by at most that
    least count.
    """

    def __init__(self, most: int = MAX_TOP) -> None:
        self.exact = True
        self.counts: dict[tuple[str, str], int] = {}
        self._most = most

    def add(self, subject: str, rule: str) -> None:
        """Count one blocked request.

        Args:
            subject: who was blocked.
            rule: by which rule.
        """
        entry = (subject, rule)
        count = self.counts.get(entry)
        if count is None and len(self.counts) >= self._most:
            self._shed()
        self.counts[entry] = (count or self._floor) + 1

    _floor = 0

    def _shed(self) -> None:
        """Drop the lower half at once: each newcomer then starts at the highest count that was dropped."""
        self.exact = False
        ordered = sorted(self.counts.items(), key=lambda item: item[1], reverse=True)
        self._floor = ordered[len(ordered) // 2][1]
        self.counts = dict(ordered[: len(ordered) // 2])

    def top(self, most: int) -> list[tuple[str, str, int]]:
        """The subjects blocked most.

        Args:
            most: at most so many.

        Returns:
            Subject, rule and count, the highest first; equal counts by name.
        """
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return [(subject, rule, count) for (subject, rule), count in ordered[:most]]


class Replay:
    """Decides requests that come in time order.

    Args:
        policy: the policy.
        tier: tier of requests whose API key does not say one; None for the anonymous tier or the only one.
        by_ip: whether the caller of such a request is its ip; else the request's subject.
        max_subjects: most counters held.

    Raises:
        SettingsError: if the policy has no such tier, or the tier to take is not clear.
    """

    def __init__(self, policy: Policy, tier: str | None, by_ip: bool, max_subjects: int = DEFAULT_MAX_SUBJECTS) -> None:
        self.tiers = {each.name: CompiledTier(each) for each in policy.tiers}
        self.default_tier = self.tiers[_default_tier(policy, tier)]
        self.tallies: dict[tuple[str, str], RuleTally] = {}
        self.top = TopBlocked()
        self.series = Series()
        self.first_us: int | None = None
        self.now_us = 0
        self.decided = 0
        self.refused: list[tuple[str, str]] = []
        self.refused_count = 0
        self.without_subject = 0
        self.worst_minute: tuple[int, int] | None = None
        self.counters = MemoryCounters(max_subjects, clock=lambda: self.now_us)
        self._keys = {key.sha256: key for key in policy.api_keys}
        self._by_ip = by_ip
        self._callers: dict[str, tuple[str, CompiledTier] | None] = {}
        self._matches: dict[tuple[str, str, str], _Match | str] = {}
        self._minute = 0
        self._minute_blocked = 0

    def decide(self, request: Request) -> None:
        """Decide one request and count what came of it.

        Args:
            request: one earlier than the last is decided at the last one's moment.
        """
        at_us, ip, method, target, subject, api_key = request
        if at_us > self.now_us:
            self.now_us = at_us
            if self.first_us is None:
                self.first_us = at_us
        tier = self.default_tier
        known = self._caller_of(api_key) if api_key else None
        if ":" in ip:
            ip = _client(ip)
        if known is not None:
            caller, tier = known
        elif self._by_ip:
            caller = f"i:{ip}"
        elif subject:
            caller = f"k:{subject}"
        else:
            self.without_subject += 1
            caller = f"i:{ip}"
        remembered = (tier.tier.name, method, target)
        matched = self._matches.get(remembered)
        if matched is None:
            if len(self._matches) >= _MAX_REMEMBERED:
                self._matches.clear()
            matched = self._matches[remembered] = self._match(tier, method, target)
        if isinstance(matched, str):
            self.refused_count += 1
            if len(self.refused) < 5:
                self.refused.append((target, matched))
            return
        self.decided += 1
        rule, tally, watchers = matched
        blocked = self._enforce(tier, rule, caller, ip, tally)
        self.series.add(self.now_us, blocked)
        for watcher, watching in watchers:
            counted = subject_of(watcher.subject, caller, ip, tier.tier.name) or caller
            if self.counters.charge_all(((watcher.limits, counted),), 1).allowed:
                watching.allowed += 1
            else:
                watching.blocked += 1

    def finish(self) -> None:
        """Close the last minute."""
        self._close_minute()

    def _enforce(self, tier: CompiledTier, rule: CompiledRule | None, caller: str, ip: str, tally: RuleTally) -> bool:
        """Decide by the rule that answers and the tier's own limits; returns whether it was blocked."""
        own = tier.limits
        counted = caller
        if rule is not None:
            if rule.subject is not Subject.API_KEY:
                counted = subject_of(rule.subject, caller, ip, tier.tier.name) or caller
            counters: tuple[tuple[LimitSet, str], ...] = ((rule.limits, counted),)
            if own is not None:
                counters = ((rule.limits, counted), (own, caller))
        elif own is not None:
            counters = ((own, caller),)
        else:
            tally.allowed += 1
            return False
        if self.counters.charge_all(counters, 1).allowed:
            tally.allowed += 1
            return False
        tally.blocked += 1
        self.top.add(counted[2:], tally.rule)
        minute = self.now_us // _MINUTE_US
        if minute != self._minute:
            self._close_minute()
            self._minute = minute
        self._minute_blocked += 1
        return True

    def _close_minute(self) -> None:
        if self._minute_blocked and (self.worst_minute is None or self._minute_blocked > self.worst_minute[1]):
            self.worst_minute = (self._minute * _MINUTE_US, self._minute_blocked)
        self._minute_blocked = 0

    def _caller_of(self, api_key: str) -> tuple[str, CompiledTier] | None:
        """The caller and the tier of an API key that the policy knows."""
        if api_key in self._callers:
            return self._callers[api_key]
        if len(self._callers) >= _MAX_REMEMBERED:
            self._callers.clear()
        record = self._keys.get(hash_api_key(api_key))
        caller = None
        if record is not None:
            tier = self.tiers[record.tier]
            caller = (f"k:{record.id}", CompiledTier(tier.tier, record.overrides) if record.overrides else tier)
        self._callers[api_key] = caller
        return caller

    def _match(self, tier: CompiledTier, method: str, target: str) -> _Match | str:
        """The rules of a request with their tallies, or why the live door would refuse its path."""
        path, remedy = canonical_path(target.partition("?")[0])
        if path is None:
            return remedy
        rule = tier.match(method, path)
        if rule is not None:
            tally = self._tally(tier, rule.rule.name, rule.rule.endpoint, "enforce")
        elif tier.limits is not None:
            tally = self._tally(tier, "(tier)", "", "enforce")
        else:
            tally = self._tally(tier, "(no rule)", "", "none")
        watchers = tier.watchers(method, path)
        return rule, tally, tuple((each, self._tally(tier, each.rule.name, each.rule.endpoint, "shadow")) for each in watchers)

    def _tally(self, tier: CompiledTier, rule: str, endpoint: str, mode: str) -> RuleTally:
        name = tier.tier.name
        tally = self.tallies.get((name, rule))
        if tally is None:
            tally = self.tallies[(name, rule)] = RuleTally(name, rule, endpoint, mode)
        return tally


_Match: TypeAlias = tuple[CompiledRule | None, RuleTally, tuple[tuple[CompiledRule, RuleTally], ...]]


def _default_tier(policy: Policy, tier: str | None) -> str:
    names: Mapping[str, object] = {each.name: each for each in policy.tiers}
    if tier is not None:
        if tier not in names:
            raise SettingsError(f"the policy has no tier {tier!r}: there are {', '.join(names)}")
        return tier
    if policy.anonymous_tier is not None:
        return policy.anonymous_tier
    if len(names) == 1:
        return next(iter(names))
    raise SettingsError(f"which tier do the log's callers have? Give --tier: there are {', '.join(names)}")


def _client(ip: str) -> str:
    """A client as the gate counts it. What is no address (a host name, say) stays as it is."""
    try:
        return ipv6_client(ip)
    except ValueError:
        return ip
