"""Why a request gets its answer: each rule of the caller's tier with the reason, and the counters. Charges nothing.

The rules are compared one by one, by the same order and conditions that `policy.matching` finds them with: slower, but with a
reason for each. Other requests get their turn meanwhile, however many rules a tier has.
"""

from __future__ import annotations

from typing import Final

import msgspec

from tidegate.catalog.cache_level import Caller
from tidegate.counters import CounterStore
from tidegate.decision import Check, Decision
from tidegate.errors import BadRequest, Blocked
from tidegate.gate.access import AccessControl
from tidegate.gate.planning import counters_of
from tidegate.gate.subjects import shadow_subject
from tidegate.gate.usage import CounterUsage, peek_windows
from tidegate.ip_addresses import ipv6_client
from tidegate.policy.access_entries import AccessAction
from tidegate.policy.globs import Glob, endpoint_matcher
from tidegate.policy.limits import LimitSet
from tidegate.policy.matching import CompiledRule
from tidegate.policy.quotas import QuotaLimit
from tidegate.policy.rules import Mode
from tidegate.time_slice import TimeSlice

MAX_CANDIDATES: Final = 200
"""Maximum number of rules in one explanation: those whose endpoint matches first, then the others, in order of preference."""

ANSWERS: Final = "answers"
WATCHES: Final = "watches"
OUTRANKED: Final = "outranked"
NOT_MATCHED: Final = "not_matched"

_RANKS: Final = (
    "its priority {mine} is lower than {best}",
    "its endpoint has '*', that of the answering rule does not",
    "its endpoint has '{{…}}', that of the answering rule does not",
    "its endpoint has fewer literal characters",
    "its endpoint has more '*'",
    "its endpoint has more '{{…}}'",
    "it names no methods, the answering rule does",
    "its match has fewer attributes",
    "its match has more '*'",
    "it comes later in the tier",
)
"""Why one rule is preferred to another, by the parts of `rule_rank`."""


class Candidate(msgspec.Struct, frozen=True):
    """One rule of the caller's tier.

    Args:
        compiled: the rule.
        result: answers, watches (a shadow rule that matches), outranked, or not_matched.
        reason: why, one sentence.
        endpoint_matches: whether its endpoint matches the path.
    """

    compiled: CompiledRule
    result: str
    reason: str
    endpoint_matches: bool


class CounterNow(msgspec.Struct, frozen=True):
    """A counter that the request would be charged to.

    Args:
        limits: what counts.
        mode: whether it can block.
        subject: whom it counts; None where the request lacks what it counts by.
        problem: why there is no subject; None where there is one.
        decision: the answer to a check of cost 0; None without a subject.
        windows: the same for each limit by itself; none if the store did not answer.
    """

    limits: LimitSet
    mode: Mode
    subject: str | None
    problem: str | None = None
    decision: Decision | None = None
    windows: tuple[Decision, ...] = ()

    @property
    def left(self) -> int | None:
        """Units left under the limit with the least; None if the store did not answer."""
        return None if self.decision is None else self.decision.remaining

    def admits(self, cost: int) -> bool | None:
        """Whether a check of a cost would pass these limits now; None if the store did not answer."""
        if self.limits.soft:
            return True
        if not self.windows:
            return None
        return all(_room(window) >= cost for window in self.windows)


class Explanation(msgspec.Struct, frozen=True):
    """Why a request gets its answer.

    Args:
        rule: the enforcing rule that answers; None where none matches.
        candidates: rules of the tier, those whose endpoint matches first; at most `MAX_CANDIDATES`.
        left_out: further rules of the tier, none of which matches.
        counters: what the request would be charged to: the rule's limits and quotas, the tier's, and those of shadow rules.
        allowed: whether the check would pass now; None if it would be refused as invalid, or the store did not answer.
        problem: why it would be refused as invalid; None if it would not.
    """

    tier: str
    rule: CompiledRule | None
    candidates: tuple[Candidate, ...]
    left_out: int
    counters: tuple[CounterNow, ...]
    allowed: bool | None
    problem: str | None


async def explain(store: CounterStore, caller: Caller, check: Check) -> Explanation:
    """Explain the answer to a check of a caller. Charges nothing.

    Returns:
        The explanation. While the store is unavailable, its counters have no numbers.
    """
    tier = caller.tier
    rule = tier.match(check.method, check.path, check.attributes)
    candidates, left_out = await _candidates(caller, check, rule)
    ip = ipv6_client(check.ip) if check.ip is not None and ":" in check.ip else check.ip
    planned, problem = _enforced(check, caller, rule, ip)
    for each in tier.shadow_rules(check.method, check.path, check.attributes):
        counted = shadow_subject(check.attributes, caller, each, ip)
        if counted is None:
            lacks = "the request lacks what the rule counts by, so it is not counted"
            planned.append(CounterNow(each.limits, Mode.SHADOW, None, lacks))
        else:
            charged = each.counters(counted, caller.anchor, check.attributes)
            planned += [CounterNow(limits, Mode.SHADOW, subject) for limits, subject in charged]
    counters = await _with_usage(store, planned)
    allowed: bool | None = None
    if rule is not None and rule.action is AccessAction.DENY:
        allowed = False
    elif problem is None:
        fits = [each.admits(check.cost) for each in counters if each.mode is not Mode.SHADOW]
        allowed = None if None in fits else all(fits)
    return Explanation(tier.tier.name, rule, candidates, left_out, counters, allowed, problem)


async def access_of(access: AccessControl, check: Check, caller: Caller) -> tuple[str | None, bool]:
    """What the access lists say of a check.

    Returns:
        The message of the refusal, None if there is none; and whether the check is exempt from all limits.

    Raises:
        CatalogUnavailable: if the catalog fails, and the lists were never loaded.
    """
    await access.load()
    counts = access.denied, access.exempt
    try:
        return None, access.admit_caller(caller, access.admit(check.ip, check.attributes))
    except Blocked as error:
        return error.message, False
    finally:
        # This is no check: the metrics do not count it.
        access.denied, access.exempt = counts


async def _candidates(caller: Caller, check: Check, best: CompiledRule | None) -> tuple[tuple[Candidate, ...], int]:
    matching: list[Candidate] = []
    others: list[Candidate] = []
    slice_ = TimeSlice()
    left_out = 0
    for each in caller.tier.rules:
        if slice_.over:
            await slice_.pause()
        found = _candidate(each, check, best)
        if found.endpoint_matches:
            matching.append(found)
        elif len(others) < MAX_CANDIDATES:
            others.append(found)
        else:
            left_out += 1
    everything = [*matching, *others]
    return tuple(everything[:MAX_CANDIDATES]), left_out + max(0, len(everything) - MAX_CANDIDATES)


def _candidate(each: CompiledRule, check: Check, best: CompiledRule | None) -> Candidate:
    rule = each.rule
    if not _endpoint_holds(rule.endpoint, check.path):
        return Candidate(each, NOT_MATCHED, "the path does not match its endpoint", endpoint_matches=False)
    if each.methods is not None and check.method not in each.methods:
        reason = f"the method {check.method} is not one of its methods ({', '.join(sorted(each.methods))})"
        return Candidate(each, NOT_MATCHED, reason, endpoint_matches=True)
    for name, pattern in rule.required_entries:
        value = check.attributes.get(name)
        if value is None:
            return Candidate(each, NOT_MATCHED, f"the request has no attribute {name!r}", endpoint_matches=True)
        if not Glob(pattern).matches(value):
            reason = f"the attribute {name} = {value[:80]!r} does not match {pattern!r}"
            return Candidate(each, NOT_MATCHED, reason, endpoint_matches=True)
    if rule.mode is Mode.SHADOW:
        return Candidate(each, WATCHES, "it matches in shadow mode: it counts the request and never blocks it", True)
    if best is None or each is best:
        return Candidate(each, ANSWERS, "it matches, and no rule that matches is preferred to it", endpoint_matches=True)
    return Candidate(each, OUTRANKED, f"it matches, but {_why_outranked(each, best)}", endpoint_matches=True)


def _room(window: Decision) -> int:
    """Units that would pass under one limit now, with overage."""
    left, limit = window.remaining or 0, window.binding
    if not isinstance(limit, QuotaLimit):
        return left
    return limit.most - (limit.capacity - left + window.overage)


def _endpoint_holds(endpoint: str, path: str) -> bool:
    if "*" in endpoint or "{" in endpoint:
        return endpoint_matcher(endpoint)(path)
    return endpoint == path


def _why_outranked(each: CompiledRule, best: CompiledRule) -> str:
    part = next(place for place, (mine, other) in enumerate(zip(each.rank, best.rank, strict=True)) if mine != other)
    reason = _RANKS[part].format(mine=each.rule.priority, best=best.rule.priority)
    return f"{reason}: {best.rule.name!r} answers"


def _enforced(check: Check, caller: Caller, rule: CompiledRule | None, ip: str | None) -> tuple[list[CounterNow], str | None]:
    """What the check would be charged to, as the gate finds it; or why it would be refused."""
    mode = Mode.ENFORCE if rule is None else rule.rule.mode
    try:
        charged = counters_of(check, caller, rule, ip)
    except Blocked:
        return [], None
    except BadRequest as error:
        limits = caller.tier.limits if rule is None else rule.limits
        return ([] if limits is None else [CounterNow(limits, mode, None, error.message)]), error.message
    return [CounterNow(limits, mode if limits.rule else Mode.ENFORCE, subject) for limits, subject in charged], None


async def _with_usage(store: CounterStore, planned: list[CounterNow]) -> tuple[CounterNow, ...]:
    known = [((each.limits, each.subject),) for each in planned if each.subject is not None]
    used: list[CounterUsage] = await peek_windows(store, known)
    left = iter(used)
    found = []
    for each in planned:
        if each.subject is None:
            found.append(each)
        else:
            decision, windows = next(left)
            found.append(msgspec.structs.replace(each, decision=decision, windows=windows))
    return tuple(found)
