"""The way of one check: who asks → which rule → may its cost be charged → the answer. Knows no transport and no store."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, Self, TypeAlias

import msgspec

from tidegate.catalog.cache_level import Caller
from tidegate.catalog.cached import CachedCatalog
from tidegate.counters import Charge, ChargeOutcome, CounterStore, ImmediateCounterStore
from tidegate.decision import MAX_COST, Check, Decision, Observation, Usage, client_of, clip, ipv6_client
from tidegate.errors import BadRequest, MissingApiKey, StoreUnavailable, TidegateError
from tidegate.gate.callers import LOOKUP_TIMEOUT_S, CallerLookup
from tidegate.gate.charging import ChargeResult, CheckPlan, charge_all_or_none, charge_independently
from tidegate.gate.request_limits import RequestLimits
from tidegate.gate.usage import caller_usage, own_limits, reset_counters
from tidegate.policy.limits import LimitSet
from tidegate.policy.matching import CompiledRule, subject_of
from tidegate.policy.model import Mode, Subject
from tidegate.time_slice import TimeSlice

_clock_ns: Final = time.perf_counter_ns
Observer: TypeAlias = Callable[[Observation], None]


class DescriptorCheck(msgspec.Struct, frozen=True, gc=False):
    """A descriptor without a path that asks whether it may pass.

    Args:
        entries: values by key.
        api_key: the caller's key; None for the anonymous tier.
        cost: 0 (peek) to 1,000,000,000.
        ip: client address in canonical text, or None where nobody knows it.
    """

    entries: Mapping[str, str]
    api_key: str | None
    cost: int
    ip: str | None = None


class Gate:
    """Decides checks.

    Args:
        catalog: who may do what.
        counters: what was consumed.
        observe: is told of every check, synchronously; must not raise.
        wall_clock_ns: gives ns since the epoch; only the expiry of API keys is held against it.
        lookup_timeout_s: how long the callers of several checks of one request may take to be looked up together, s.

    Attributes:
        request_limits: decides checks that name their own limits.
    """

    def __init__(
        self,
        catalog: CachedCatalog,
        counters: CounterStore,
        observe: Observer | None = None,
        wall_clock_ns: Callable[[], int] = time.time_ns,
        lookup_timeout_s: float = LOOKUP_TIMEOUT_S,
    ) -> None:
        self.catalog = catalog
        self.counters = counters
        self._observe = observe
        self.request_limits = RequestLimits(counters, observe=observe)
        self._callers = CallerLookup(catalog, wall_clock_ns, lookup_timeout_s)
        self._caller = self._callers.find
        self._find_cached = self._callers.find_cached
        self._charge_now = counters.charge_all if counters.immediate and isinstance(counters, ImmediateCounterStore) else None

    async def check(self, check: Check) -> Decision:
        """Decide one check, and charge it if it passes.

        Args:
            check: what is asked.

        Returns:
            The decision.

        Raises:
            MissingApiKey: no key came and there is no anonymous tier.
            InvalidApiKey: the key is mistyped or unknown.
            TooManyUnknownKeys: the key is not cached, and its address has sent too many unknown ones.
            ApiKeyRevoked: the key was revoked.
            ApiKeyExpired: the key's time is over.
            BadRequest: the rule counts by ip and none is known.
            CatalogUnavailable: the catalog fails and nothing cached can stand in.
            StoreUnavailable: the counter store fails and the rule says deny.
        """
        answer = self.check_now(check)
        return answer if isinstance(answer, Decision) else await answer

    def check_now(
        self, check: Check, shadow_outcomes: list[ChargeOutcome] | None = None
    ) -> Decision | Coroutine[Any, Any, Decision]:
        """As `check`, but decided before this returns where the caller is cached and the counters are in memory.

        Args:
            check: what is asked.
            shadow_outcomes: receives the outcomes of shadow rules.

        Returns:
            The decision, or what gives it when awaited; until then nothing is done.

        Raises:
            TidegateError: as `check`, where that is known before anything has to be awaited.
        """
        charge = self._charge_now
        if charge is None:
            return self._check_later(check, shadow_outcomes)
        started_ns = _clock_ns()
        try:
            caller = self._find_cached(check.api_key)
            if caller is None:
                return self._check_later(check, shadow_outcomes)
            ip = check.ip
            if ip is not None and ":" in ip:
                ip = ipv6_client(ip)
            tier = caller.tier
            if tier.has_shadow_rules:
                plan = self._plan_of(check, caller, ip)
                charged = [charge(each.counters, each.cost) for each in plan.charges]
                if shadow_outcomes is not None:
                    shadow_outcomes.extend(plan.shadow_outcomes(charged))
                told = self._tell(plan, charged, _clock_ns() - started_ns)
                assert isinstance(told, Decision), "an immediate store always answers"
                return told
            counters = _counters_of(check, caller, tier.match(check.method, check.path), ip)
        except TidegateError as error:
            self._tell_error(error, _clock_ns() - started_ns)
            raise
        decision = charge(counters, check.cost) if counters else Decision(True, unlimited_tier=tier.tier.name)
        if self._observe is not None:
            latency_ns = _clock_ns() - started_ns
            if counters and decision.allowed:
                self._observe(Observation(decision, None, latency_ns, (), counters[0][1]))
            else:
                self._observe(_observation(decision, counters, latency_ns))
        return decision

    async def _check_later(self, check: Check, shadow_outcomes: list[ChargeOutcome] | None = None) -> Decision:
        started_ns = _clock_ns()
        try:
            ip = check.ip
            if ip is not None and ":" in ip:
                ip = ipv6_client(ip)
            plan = self._plan_of(check, self._find_cached(check.api_key) or await self._caller(check.api_key, ip), ip)
            charged = await self.counters.charge(plan.charges) if plan.charges else ()
            if shadow_outcomes is not None:
                shadow_outcomes.extend(plan.shadow_outcomes(charged))
        except TidegateError as error:
            self._tell_error(error, _clock_ns() - started_ns)
            raise
        told = self._tell(plan, charged, _clock_ns() - started_ns)
        if isinstance(told, StoreUnavailable):
            raise told
        return told

    async def check_many(self, checks: Sequence[Check]) -> list[Decision | TidegateError]:
        """Decide checks each on its own, in order, with one call to the counter store.

        Callers that are not cached are looked up side by side, within `lookup_timeout_s` for all of them. While rules are
        matched, other requests get their turn at least every 2 ms (see `TimeSlice`).

        Args:
            checks: what is asked; any number.

        Returns:
            For each check its decision, or the error that `check` would have raised.
        """
        started_ns = _clock_ns()
        plans = [plan for plan in await self.plan_many(checks) if plan is not None]
        settled = await charge_independently(self.counters, plans)
        self._tell_all(plans, settled, started_ns)
        return [each.outcome for each in settled]

    async def decide(self, plans: Sequence[CheckPlan | TidegateError], whole: bool = True) -> list[ChargeResult]:
        """Decide the checks of one request.

        Args:
            plans: what `plan` made of each check, or the error that it raised; a door may make plans of its own.
            whole: whether they are charged all or, where one is denied, none; otherwise each is on its own.

        Returns:
            For each what became of it.
        """
        started_ns = _clock_ns()
        settled = await (charge_all_or_none if whole else charge_independently)(self.counters, plans)
        self._tell_all(plans, settled, started_ns)
        return settled

    async def usage(self, api_key: str | None = None, ip: str | None = None) -> Usage:
        """What is left to a caller, in each window of each rule. Charges nothing, and is not observed: it is no check.

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
            TooManyUnknownKeys: the key is not cached, and its address has sent too many unknown ones.
            ApiKeyRevoked: the key was revoked.
            ApiKeyExpired: the key's time is over.
            BadRequest: the key is no string, or the ip no address.
            CatalogUnavailable: the catalog fails and nothing cached can stand in.
        """
        _require_text(api_key, "api_key")
        client = None if ip is None else client_of(ip)
        caller = await self._caller(api_key or None, client)
        return await caller_usage(self.counters, caller, client)

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
            caller = await self._caller(api_key, None, refused_too=True)
            counters = [(limits, caller.subject) for limits in own_limits(caller.tier)]
        elif ip is not None:
            subject = f"i:{client_of(ip)}"
            counters = [(limits, subject) for limits in await self._sets_by_ip()]
        else:
            assert tier is not None
            compiled = await self.catalog.tier(tier)
            if compiled is None:
                raise BadRequest(f"there is no tier {clip(tier)}: see 'tidegate tiers'", field="tier")
            counters = [(rule.limits, f"t:{tier}") for rule in compiled.rules if rule.subject is Subject.TIER]
        return await reset_counters(self.counters, counters)

    async def _sets_by_ip(self) -> list[LimitSet]:
        """All that can count an ip: rules by ip of every tier, and what counts callers without a key."""
        anonymous = await self.catalog.anonymous()
        found = [] if anonymous is None else own_limits(anonymous.tier)
        for name in await self.catalog.tier_names():
            compiled = await self.catalog.tier(name)
            if compiled is not None:
                found.extend(rule.limits for rule in compiled.rules if rule.subject is Subject.IP)
        return found

    async def close(self) -> None:
        """Give back what the counter store holds; `async with` does it at the end."""
        await self.counters.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _tell_all(self, plans: Sequence[CheckPlan | TidegateError], settled: Sequence[ChargeResult], started_ns: int) -> None:
        share_ns = (_clock_ns() - started_ns) // max(len(plans), 1)
        for plan, each in zip(plans, settled, strict=True):
            if isinstance(plan, TidegateError):
                self._tell_error(plan, share_ns)
            elif each.charged and not isinstance(each.outcome, TidegateError):
                charged = each.shadow_outcomes if plan.answer is not None else (each.outcome, *each.shadow_outcomes)
                self._tell(plan, charged, share_ns)
            elif isinstance(each.outcome, StoreUnavailable):
                self._tell_error(each.outcome, share_ns)

    def _tell(self, plan: CheckPlan, charged: Sequence[ChargeOutcome], latency_ns: int) -> ChargeOutcome:
        """Tell telemetry what was decided; returns it."""
        answer = plan.answer
        decision = charged[0] if answer is None else answer
        if isinstance(decision, StoreUnavailable):
            self._tell_error(decision, latency_ns)
            return decision
        if self._observe is not None:
            shadow_denied: tuple[str, ...] = ()
            if len(charged) > 1 or answer is not None:
                shadow_outcomes = charged[1:] if answer is None else charged
                # What a shadow rule could not be asked about, it would not have denied.
                shadow_denied = tuple(
                    each.rule or "" for each in shadow_outcomes if isinstance(each, Decision) and not each.allowed
                )
            counters = () if answer is not None else plan.charges[0].counters
            self._observe(_observation(decision, counters, latency_ns, shadow_denied))
        return decision

    def _tell_error(self, error: TidegateError, latency_ns: int) -> TidegateError:
        if self._observe is not None:
            self._observe(Observation(None, error.code, latency_ns))
        return error

    async def plan(self, check: Check) -> CheckPlan:
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
        return self._plan_of(check, await self._caller(check.api_key, ip), ip)

    def _plan_of(self, check: Check, caller: Caller, ip: str | None) -> CheckPlan:
        tier = caller.tier
        counters = _counters_of(check, caller, tier.match(check.method, check.path), ip)
        charges = [Charge(counters, check.cost)] if counters else []
        if tier.has_shadow_rules and (shadow_rules := tier.shadow_rules(check.method, check.path)):
            caller_subject = _caller_subject(check, caller, ip)
            for watcher in shadow_rules:
                counted = subject_of(watcher.subject, caller_subject, ip, tier.tier.name)
                # A shadow rule that cannot be counted must not block the check that it only watches.
                if counted is not None:
                    charges.append(Charge(((watcher.limits, counted),), check.cost))
        return CheckPlan(None if counters else Decision(True, unlimited_tier=tier.tier.name), charges)

    async def plan_many(self, asked: Sequence[Check | DescriptorCheck]) -> list[CheckPlan | TidegateError | None]:
        """Find out what each check of one request is held against; charges nothing.

        Callers that are not cached are looked up side by side, within `lookup_timeout_s` for all of them; other requests get
        their turn while rules are matched.

        Args:
            asked: checks, and descriptors without a path; any number.

        Returns:
            For each its plan, for `decide`, or the error that `check` would have raised; None where nothing limits a descriptor.
        """
        clients = [ipv6_client(each.ip) if each.ip is not None and ":" in each.ip else each.ip for each in asked]
        pairs = [(each.api_key, None if each.api_key is None else client) for each, client in zip(asked, clients, strict=True)]
        callers = await self._callers.find_all(pairs)
        plans: list[CheckPlan | TidegateError | None] = []
        slice_ = TimeSlice()
        for each, client, pair in zip(asked, clients, pairs, strict=True):
            if slice_.over:
                await slice_.pause()
            caller = callers[pair]
            try:
                if isinstance(each, DescriptorCheck):
                    plans.append(None if isinstance(caller, MissingApiKey) else _plan_of_descriptor(each, caller))
                else:
                    plans.append(caller if isinstance(caller, TidegateError) else self._plan_of(each, caller, client))
            except TidegateError as error:
                plans.append(error)
        return plans


def _counters_of(check: Check, caller: Caller, rule: CompiledRule | None, ip: str | None) -> tuple[tuple[LimitSet, str], ...]:
    """What a check is charged to: the counter of the rule that answers it, and that of the tier's own limits."""
    tier = caller.tier
    tier_limits = tier.limits
    if rule is None and tier_limits is None:
        return ()
    subject = caller.subject or _caller_subject(check, caller, ip)
    if rule is None:
        assert tier_limits is not None
        return ((tier_limits, subject),)
    counted = subject
    if rule.subject is not Subject.API_KEY:
        found = subject_of(rule.subject, subject, ip, tier.tier.name)
        if found is None:
            raise _ip_needed(check, f"the rule {clip(rule.rule.name)} counts by ip")
        counted = found
    if tier_limits is None:
        return ((rule.limits, counted),)
    return ((rule.limits, counted), (tier_limits, subject))


def _caller_subject(check: Check, caller: Caller, ip: str | None) -> str:
    if caller.subject:
        return caller.subject
    if ip is None:
        raise _ip_needed(check, "a check without an API key is counted by ip")
    return f"i:{ip}"


def _observation(
    decision: Decision,
    counters: tuple[tuple[LimitSet, str], ...],
    latency_ns: int,
    shadow_denied: tuple[str, ...] = (),
) -> Observation:
    """What telemetry reads of a decision by these counters, the rule's first; by none where nothing limits the check."""
    if not counters:
        return Observation(decision, None, latency_ns, shadow_denied)
    if decision.allowed:
        return Observation(decision, None, latency_ns, shadow_denied, counters[0][1])
    denied_by, subject = counters[0]
    # A decision names the rule that answered; whose limit it was that denied, its binding limit tells.
    if len(counters) > 1 and decision.binding in counters[1][0].limits:
        denied_by, subject = counters[1]
    return Observation(decision, None, latency_ns, shadow_denied, subject, denied_by)


def _plan_of_descriptor(check: DescriptorCheck, caller: Caller | TidegateError) -> CheckPlan | None:
    """What a descriptor without a path is held against; None where nothing limits it."""
    if isinstance(caller, TidegateError):
        raise caller
    if not 0 <= check.cost <= MAX_COST:
        raise BadRequest(f"cost {clip(check.cost)} must be a whole number from 0 to {MAX_COST}", field="cost")
    entries = check.entries
    charges = [
        (each.compiled.rule.mode, Charge(((each.compiled.limits, each.subject(entries, caller.subject)),), check.cost))
        for each in caller.tier.match_entries(entries)
    ]
    enforced = next((charge for mode, charge in charges if mode is Mode.ENFORCE), None)
    shadow_outcomes = [charge for mode, charge in charges if mode is Mode.SHADOW]
    if enforced is None and not shadow_outcomes:
        return None
    if enforced is None:
        return CheckPlan(Decision(True, unlimited_tier=caller.tier.tier.name), shadow_outcomes)
    return CheckPlan(None, [enforced, *shadow_outcomes])


def _require_text(value: object, field: str) -> None:
    if value is not None and type(value) is not str:
        raise BadRequest(f"{field} must be a string", field=field)


def _ip_needed(check: Check, why: str) -> BadRequest:
    problem = "ip is needed" if check.bad_ip is None else f"ip {check.bad_ip} is not an IPv4 or IPv6 address"
    return BadRequest(f"{problem}: {why}", field="ip")
