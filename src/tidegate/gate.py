"""The way of one check: who asks → which rule → may its cost be charged → the answer. Knows no transport and no store."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Final, TypeAlias

from tidegate.catalog.cached import CachedCatalog, Caller
from tidegate.counters import Charge, CounterStore, Outcome
from tidegate.decision import MAX_COST, Check, Decision, Observation, RuleUsage, Usage, canonical_ip, clip
from tidegate.errors import (
    ApiKeyExpired,
    ApiKeyRevoked,
    BadRequest,
    InvalidApiKey,
    MissingApiKey,
    StoreUnavailable,
    TidegateError,
)
from tidegate.keys import is_possible_key
from tidegate.limits import LimitSet
from tidegate.matching import CompiledRule, CompiledTier, counted_by, subject_of
from tidegate.policy import KeyStatus, Mode, Subject
from tidegate.time_slice import TimeSlice
from tidegate.together import Plan, Settled, charge_each, charge_together

Observer: TypeAlias = Callable[[Observation], None]

IPV6_PREFIX: Final = 64
"""Bits of an IPv6 address that make one client: a subscriber is handed a /64 (RFC 6177), and could vary the rest at will."""


MAX_USAGE_RULES: Final = 1000
"""Most rules that one question for usage looks at: as many as a batch has checks."""

_RESET_AT_ONCE: Final = 1000


class Gate:
    """Decides checks.

    Args:
        catalog: who may do what.
        counters: what was consumed.
        observe: is told of every check, synchronously; must not raise.
        wall_clock_ns: gives ns since the epoch; only the expiry of API keys is held against it.
    """

    def __init__(
        self,
        catalog: CachedCatalog,
        counters: CounterStore,
        observe: Observer | None = None,
        wall_clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.catalog = catalog
        self.counters = counters
        self._observe = observe
        self._wall_clock_ns = wall_clock_ns

    async def check(self, check: Check) -> Decision:
        """Decide one check, and charge it if it passes.

        Args:
            check: what is asked.

        Returns:
            The decision.

        Raises:
            MissingApiKey: no key came and there is no anonymous tier.
            InvalidApiKey: the key is mistyped or unknown.
            ApiKeyRevoked: the key was revoked.
            ApiKeyExpired: the key's time is over.
            BadRequest: the rule counts by ip and none is known.
            CatalogUnavailable: the catalog fails and nothing cached can stand in.
            StoreUnavailable: the counter store fails and the rule says deny.
        """
        started_ns = time.perf_counter_ns()
        try:
            plan = await self.plan(check)
            charged = await self.counters.charge(plan.charges) if plan.charges else ()
        except TidegateError as error:
            self._tell_error(error, time.perf_counter_ns() - started_ns)
            raise
        told = self._tell(plan, charged, time.perf_counter_ns() - started_ns)
        if isinstance(told, StoreUnavailable):
            raise told
        return told

    async def check_many(self, checks: Sequence[Check]) -> list[Decision | TidegateError]:
        """Decide checks each on its own, in order, with one call to the counter store.

        While rules are matched, other requests get their turn at least every 2 ms (see `TimeSlice`).

        Args:
            checks: what is asked; any number.

        Returns:
            For each check its decision, or the error that `check` would have raised.
        """
        started_ns = time.perf_counter_ns()
        plans: list[Plan | TidegateError] = []
        slice_ = TimeSlice()
        for check in checks:
            if slice_.over:
                await slice_.pause()
            try:
                plans.append(await self.plan(check))
            except TidegateError as error:
                plans.append(error)
        settled = await charge_each(self.counters, plans)
        self._tell_all(plans, settled, started_ns)
        return [each.outcome for each in settled]

    async def decide(self, plans: Sequence[Plan | TidegateError], whole: bool = True) -> list[Settled]:
        """Decide the checks of one request.

        Args:
            plans: what `plan` made of each check, or the error that it raised; a door may make plans of its own.
            whole: whether they are charged all or, where one is denied, none; otherwise each is on its own.

        Returns:
            For each what became of it.
        """
        started_ns = time.perf_counter_ns()
        settled = await (charge_together if whole else charge_each)(self.counters, plans)
        self._tell_all(plans, settled, started_ns)
        return settled

    async def usage(self, api_key: str | None = None, ip: str | None = None) -> Usage:
        """What is left to a caller, with one call to the counter store. Charges nothing, and is not observed: it is no check.

        Args:
            api_key: the caller's key; None or empty for a caller without one.
            ip: IPv4 or IPv6 address of the client, or None where nobody knows it.

        Returns:
            The tier's own limits and its rules, shadow rules included; of more than `MAX_USAGE_RULES` rules the first ones by
            priority. A rule that counts by ip is left out where none is known; what the store could not say is degraded,
            without numbers.

        Raises:
            MissingApiKey: no key came and there is no anonymous tier.
            InvalidApiKey: the key is mistyped or unknown.
            ApiKeyRevoked: the key was revoked.
            ApiKeyExpired: the key's time is over.
            BadRequest: the key is no string, or the ip no address.
            CatalogUnavailable: the catalog fails and nothing cached can stand in.
        """
        _require_text(api_key, "api_key")
        client = None if ip is None else _client(ip)
        caller = await self._caller(api_key or None)
        tier, has_key = caller.tier, bool(caller.subject)
        looked_at: list[tuple[CompiledRule | None, LimitSet]] = [] if tier.limits is None else [(None, tier.limits)]
        looked_at += [(rule, rule.limits) for rule in tier.rules[:MAX_USAGE_RULES]]
        counted: list[tuple[CompiledRule | None, Subject, LimitSet]] = []
        charges: list[Charge] = []
        not_counted: list[str | None] = []
        for rule, limits in looked_at:
            kind = counted_by(Subject.API_KEY if rule is None else rule.subject, has_key)
            subject = subject_of(kind, caller.subject, client, tier.tier.name)
            if subject is None:
                not_counted.append(limits.rule)
                continue
            counted.append((rule, kind, limits))
            charges.append(Charge(((limits, subject),), cost=0))
        peeked = await self.counters.charge(charges) if charges else ()
        rules = [
            RuleUsage(None, None, Mode.ENFORCE, kind, limits.limits, decision)
            if rule is None
            else RuleUsage(rule.rule.name, rule.rule.endpoint, rule.rule.mode, kind, limits.limits, decision)
            for (rule, kind, limits), decision in zip(counted, map(_peeked, peeked, charges), strict=True)
        ]
        return Usage(tier.tier.name, tuple(rules), tuple(not_counted), len(tier.rules) > MAX_USAGE_RULES)

    async def reset(self, api_key: str | None = None, *, ip: str | None = None, tier: str | None = None) -> int:
        """Forget what one subject consumed, under every rule that could count it. Give exactly one argument.

        Args:
            api_key: a key, revoked and expired ones too: what its tier's rules by key and the tier's own limits counted.
            ip: an address; an IPv6 address stands for its /64: what the rules by ip of all tiers counted, and what the
                anonymous tier counted for callers without a key.
            tier: name of a tier: what its rules by tier counted.

        Returns:
            How many counters were reset, one for each rule and one for a tier's own limits, whether they held anything or not.

        Raises:
            InvalidApiKey: the key is mistyped or unknown.
            BadRequest: not exactly one argument was given, the ip is no address, or there is no such tier.
            CatalogUnavailable: the catalog fails and nothing cached can stand in; nothing was reset.
            StoreUnavailable: the counter store fails; some may have been reset: ask again.
        """
        if sum(given is not None for given in (api_key, ip, tier)) != 1:
            raise BadRequest("a reset needs exactly one of api_key, ip and tier")
        _require_text(api_key, "api_key")
        _require_text(tier, "tier")
        if api_key is not None:
            caller = await self._caller(api_key, refused_too=True)
            counters = [(limits, caller.subject) for limits in _own_sets(caller.tier)]
        elif ip is not None:
            subject = f"i:{_client(ip)}"
            counters = [(limits, subject) for limits in await self._sets_by_ip()]
        else:
            assert tier is not None
            compiled = await self.catalog.tier(tier)
            if compiled is None:
                raise BadRequest(f"there is no tier {clip(tier)}: see 'tidegate tiers'", field="tier")
            counters = [(rule.limits, f"t:{tier}") for rule in compiled.rules if rule.subject is Subject.TIER]
        for start in range(0, len(counters), _RESET_AT_ONCE):
            await self.counters.reset(counters[start : start + _RESET_AT_ONCE])
            # A store in memory never suspends: without this, many tiers would stop all checks until the last is through.
            await asyncio.sleep(0)
        return len(counters)

    async def _sets_by_ip(self) -> list[LimitSet]:
        """All that can count an ip: rules by ip of every tier, and what counts callers without a key."""
        anonymous = await self.catalog.anonymous()
        found = [] if anonymous is None else _own_sets(anonymous.tier)
        for name in await self.catalog.tier_names():
            compiled = await self.catalog.tier(name)
            if compiled is not None:
                found.extend(rule.limits for rule in compiled.rules if rule.subject is Subject.IP)
        return found

    def _tell_all(self, plans: Sequence[Plan | TidegateError], settled: Sequence[Settled], started_ns: int) -> None:
        share_ns = (time.perf_counter_ns() - started_ns) // max(len(plans), 1)
        for plan, each in zip(plans, settled, strict=True):
            if isinstance(plan, TidegateError):
                self._tell_error(plan, share_ns)
            elif each.charged and not isinstance(each.outcome, TidegateError):
                charged = each.watched if plan.answer is not None else (each.outcome, *each.watched)
                self._tell(plan, charged, share_ns)
            elif isinstance(each.outcome, StoreUnavailable):
                self._tell_error(each.outcome, share_ns)

    def _tell(self, plan: Plan, charged: Sequence[Outcome], latency_ns: int) -> Outcome:
        """Tell telemetry what was decided; returns it."""
        answer = plan.answer
        decision = charged[0] if answer is None else answer
        if isinstance(decision, StoreUnavailable):
            self._tell_error(decision, latency_ns)
            return decision
        if self._observe is not None:
            shadow_denied: tuple[str, ...] = ()
            if len(charged) > 1 or answer is not None:
                watched = charged[1:] if answer is None else charged
                # What a shadow rule could not be asked about, it would not have denied.
                shadow_denied = tuple(each.rule or "" for each in watched if isinstance(each, Decision) and not each.allowed)
            subject: str | None = None
            denied_by: LimitSet | None = None
            if answer is None:
                counters = plan.charges[0].counters
                subject = counters[0][1]
                if not decision.allowed:
                    denied_by = counters[0][0]
                    # A decision names the rule that answered; whose limit it was that denied, its binding limit tells.
                    if len(counters) > 1 and decision.binding in counters[1][0].limits:
                        denied_by, subject = counters[1]
            self._observe(Observation(decision, None, latency_ns, shadow_denied, subject, denied_by))
        return decision

    def _tell_error(self, error: TidegateError, latency_ns: int) -> TidegateError:
        if self._observe is not None:
            self._observe(Observation(None, error.code, latency_ns))
        return error

    async def plan(self, check: Check) -> Plan:
        """Find out whose limits a check is held against; charges nothing.

        Args:
            check: what is asked.

        Returns:
            The plan, for `decide`.

        Raises:
            TidegateError: as `check`, but for `StoreUnavailable`.
        """
        ip = check.ip
        if ip is not None and ":" in ip:
            ip = ipv6_client(ip)
        caller = await self._caller(check.api_key)
        tier = caller.tier
        subject = caller.subject
        rule = tier.match(check.method, check.path)
        watchers = tier.watchers(check.method, check.path)
        if not subject and (rule is not None or tier.limits is not None or watchers):
            if ip is None:
                raise BadRequest("ip is needed: a check that brings no API key is counted by ip", field="ip")
            subject = f"i:{ip}"
        counters: list[tuple[LimitSet, str]] = []
        if rule is not None:
            counted = subject if rule.subject is Subject.API_KEY else subject_of(rule.subject, subject, ip, tier.tier.name)
            if counted is None:
                raise BadRequest(f"ip is needed: the rule {rule.rule.name!r} counts by ip", field="ip")
            counters.append((rule.limits, counted))
        if tier.limits is not None:
            counters.append((tier.limits, subject))
        charges = [Charge(tuple(counters), check.cost)] if counters else []
        for watcher in watchers:
            counted = subject_of(watcher.subject, subject, ip, tier.tier.name)
            # A shadow rule that cannot be counted must not block the check that it only watches.
            if counted is not None:
                charges.append(Charge(((watcher.limits, counted),), check.cost))
        return Plan(None if counters else Decision(True, open_tier=tier.tier.name), charges)

    async def plan_entries(self, entries: Mapping[str, str], api_key: str | None, cost: int) -> Plan | None:
        """Find out what a descriptor without a path is held against; charges nothing.

        Args:
            entries: values by key.
            api_key: the caller's key; None for the anonymous tier.
            cost: 0 (peek) to 1,000,000,000.

        Returns:
            The plan, for `decide`; None where nothing limits it.

        Raises:
            TidegateError: as `check`, but for `StoreUnavailable` and `MissingApiKey`.
        """
        if not 0 <= cost <= MAX_COST:
            raise BadRequest(f"cost {clip(cost)} must be a whole number from 0 to {MAX_COST}", field="cost")
        if api_key is None and await self.catalog.anonymous() is None:
            return None
        caller = await self._caller(api_key)
        matched = caller.tier.match_entries(entries)
        charges = [
            (each.compiled.rule.mode, Charge(((each.compiled.limits, each.subject(entries, caller.subject)),), cost))
            for each in matched
        ]
        enforced = next((charge for mode, charge in charges if mode is Mode.ENFORCE), None)
        watched = [charge for mode, charge in charges if mode is Mode.SHADOW]
        if enforced is None and not watched:
            return None
        if enforced is None:
            return Plan(Decision(True, open_tier=caller.tier.tier.name), watched)
        return Plan(None, [enforced, *watched])

    async def _caller(self, api_key: str | None, refused_too: bool = False) -> Caller:
        """Who asks; with `refused_too` also whoever is not let in any more."""
        if api_key is None:
            anonymous = await self.catalog.anonymous()
            if anonymous is None:
                raise MissingApiKey("no API key came: send it as the X-API-Key header")
            return anonymous
        if not is_possible_key(api_key):
            raise InvalidApiKey("the API key is mistyped: copy it again")
        caller = await self.catalog.caller(hashlib.sha256(api_key.encode()).hexdigest())
        if caller is None:
            raise InvalidApiKey("the API key is unknown: check that it belongs to this service")
        record = caller.api_key
        if record is not None and not refused_too:
            if record.status is not KeyStatus.ACTIVE:
                raise ApiKeyRevoked("the API key was revoked: ask for a new one", key_id=record.id)
            if record.expires_at_us is not None and record.expires_at_us * 1000 <= self._wall_clock_ns():
                raise ApiKeyExpired("the API key has expired: ask for a new one", key_id=record.id)
        return caller


def _own_sets(tier: CompiledTier) -> list[LimitSet]:
    """What counts each caller of a tier by itself: by its key, or by its ip where it has none."""
    found = [rule.limits for rule in tier.rules if rule.subject is Subject.API_KEY]
    return found if tier.limits is None else [tier.limits, *found]


def _peeked(outcome: Outcome, charge: Charge) -> Decision:
    """What was seen of a counter; nothing, where the store did not answer."""
    if isinstance(outcome, StoreUnavailable):
        return Decision(False, limits=charge.counters[0][0], degraded=True)
    return outcome


def _require_text(value: object, field: str) -> None:
    if value is not None and type(value) is not str:
        raise BadRequest(f"{field} must be a string", field=field)


def _client(ip: str) -> str:
    """What counts as one client of any address, however it is written."""
    canonical = canonical_ip(ip)
    return ipv6_client(canonical) if ":" in canonical else canonical


@lru_cache(maxsize=65_536)
def ipv6_client(ip: str) -> str:
    """What counts as one client of an IPv6 address: its /64.

    Args:
        ip: the address, canonical.

    Returns:
        The network.

    Raises:
        ValueError: if it is no IPv6 address.
    """
    return str(ipaddress.IPv6Network((ip, IPV6_PREFIX), strict=False))
