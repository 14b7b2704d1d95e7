"""The path of one check: caller → rule → charge → decision. Independent of transports and stores."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

from msgspec.structs import force_setattr, replace

from tidegate.catalog.cache_level import Caller
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters import Charge, ChargeOutcome, Counters, CounterStore, ImmediateCounterStore, LeasingCounterStore
from tidegate.counters.factory import open_embedded
from tidegate.decision import Check, Decision, Usage, require_tier
from tidegate.errors import BadRequest, MissingApiKey, StoreUnavailable, TidegateError
from tidegate.gate.access import AccessControl
from tidegate.gate.adjusting import OUTCOME, adjust
from tidegate.gate.callers import LOOKUP_TIMEOUT_S, CallerLookup, Sender
from tidegate.gate.charging import ChargeResult, CheckPlan, charge_all_or_none, charge_independently
from tidegate.gate.customers import customer_counters
from tidegate.gate.holds import Holds
from tidegate.gate.planning import counters_of, exempt_plan, observation_of, plan_of_descriptor, rule_of
from tidegate.gate.quotas import key_counters
from tidegate.gate.request_limits import RequestLimits
from tidegate.gate.reservations import Reservations
from tidegate.gate.reset import counters_by_attributes, counters_by_ip, counters_by_tier
from tidegate.gate.shadow import shadow_counters, shadow_denials
from tidegate.gate.subjects import DescriptorCheck, shadow_subject
from tidegate.gate.usage import caller_usage, reset_counters
from tidegate.gate.windows import with_windows
from tidegate.ip_addresses import client_of, ipv6_client
from tidegate.jwt.tokens import Tokens
from tidegate.observation import Observation, PassedCheck
from tidegate.policy.attributes import NO_ATTRIBUTES, checked_attributes
from tidegate.policy.limits import LimitSet
from tidegate.policy.toml_reader import load_policy
from tidegate.time_slice import TimeSlice

_clock_ns: Final = time.perf_counter_ns
Observer: TypeAlias = Callable[[Observation], None]
PassedObserver: TypeAlias = Callable[[Sequence[PassedCheck]], None]


class Gate:
    """Decides checks.

    Args:
        catalog: who may do what.
        counters: what was consumed.
        observe: callback run for every check, synchronously; must not raise.
        wall_clock_ns: returns ns since the epoch; only the expiry of API keys is compared with it.
        lookup_timeout_s: how long the callers of several checks of one request may take to be looked up together, s.
        observe_passed: callback run at the end of each turn for the checks of it that passed, in place of `observe`; see
            `begin_turn`.
        all_windows: whether decisions have what remains of every limit, for headers: each check then calls the store twice, also
            where a lease could decide it. Not those of `check_many`, which have no headers.

    Attributes:
        access: denies checks, and exempts them from limits, before anything is counted.
        request_limits: decides checks that name their own limits.
        holds: reserves costs that are known later.
        reservations: gives the moment at which a caller may go.
        tokens: verifies bearer tokens of other issuers.
    """

    def __init__(
        self,
        catalog: CachedCatalog,
        counters: CounterStore,
        observe: Observer | None = None,
        wall_clock_ns: Callable[[], int] = time.time_ns,
        lookup_timeout_s: float = LOOKUP_TIMEOUT_S,
        observe_passed: PassedObserver | None = None,
        *,
        all_windows: bool = False,
    ) -> None:
        self.catalog = catalog
        self.counters = counters
        self._observe = observe
        self._observe_passed = observe_passed
        self._passed: list[PassedCheck] | None = None
        self.tokens = Tokens()
        self.access = AccessControl(catalog, lookup_timeout_s)
        self._lists = self.access.lists
        self.all_windows = all_windows
        self.request_limits = RequestLimits(counters, catalog.namespaces, observe, self.access, all_windows=all_windows)
        self.holds = Holds(counters, self.plan, self._tell, self._tell_error, all_windows=all_windows)
        self.reservations = Reservations(counters, self.plan, self._tell, self._tell_error, all_windows=all_windows)
        self._callers = CallerLookup(catalog, wall_clock_ns, lookup_timeout_s)
        self._caller = self._callers.find
        self._find_cached = self._callers.find_cached
        self._charge_now: Callable[[tuple[tuple[LimitSet, str], ...], int], Decision | None] | None = None
        if all_windows:
            pass  # Every check waits for the second call.
        elif counters.immediate and isinstance(counters, ImmediateCounterStore):
            self._charge_now = counters.charge_all
        elif isinstance(counters, LeasingCounterStore):
            self._charge_now = counters.charge_now

    async def check(self, check: Check) -> Decision:
        """Decide one check, and charge it if it passes.

        Returns:
            The decision.

        Raises:
            MissingApiKey: no key came and there is no anonymous tier.
            InvalidApiKey: the key is mistyped or unknown.
            TooManyUnknownKeys: the key is not cached, and its address has sent too many unknown ones.
            ApiKeyRevoked: the key was revoked.
            ApiKeyExpired: the key's time is over.
            Blocked: the policy or an operator denies the client.
            BadRequest: the rule counts by ip and none is known.
            CatalogUnavailable: the catalog fails and no usable entry is cached.
            StoreUnavailable: the counter store fails and the rule says deny.
        """
        answer = self.check_now(check)
        return answer if isinstance(answer, Decision) else await answer

    def begin_turn(self) -> None:
        """Have the checks that pass until `end_turn` observed together, which costs a third. Nothing is awaited in between."""
        if self._observe_passed is not None:
            self._passed = []

    def end_turn(self) -> None:
        """Have them observed now."""
        passed, self._passed = self._passed, None
        if passed and self._observe_passed is not None:
            self._observe_passed(passed)

    def check_now(
        self, check: Check, shadow_outcomes: list[ChargeOutcome] | None = None
    ) -> Decision | Coroutine[Any, Any, Decision]:
        """As `check`, but decided before this returns where the caller is cached and the counters, or a lease, are in memory.

        Args:
            shadow_outcomes: receives the outcomes of shadow rules.

        Returns:
            The decision, or what gives it when awaited; until then nothing is done.

        Raises:
            TidegateError: as `check`, where that is known before anything has to be awaited.
        """
        charge = self._charge_now
        started_ns = _clock_ns()
        try:
            lists, exempt, api_key = self._lists, False, check.api_key
            if lists.active:
                if lists.policy is None:
                    return self._check_later(check, shadow_outcomes)
                exempt = self.access.admit(check.ip, check.attributes)
            caller = self._cached_caller_of(check) if api_key is None else self._find_cached(api_key)
            if caller is None:
                return self._check_later(check, shadow_outcomes)
            tier = caller.tier
            if lists.active and (exempt or lists.names_callers):
                exempt = self.access.admit_caller(caller, exempt)
            if exempt:
                counters: Counters = ()
            elif tier.has_shadow_rules:
                if charge is None or not self.counters.immediate:
                    return self._check_later(check, shadow_outcomes)
                plan = self._plan_of(check, caller, _counted_ip(check))
                charged = [charge(each.counters, each.cost) or _unanswered() for each in plan.charges]
                if shadow_outcomes is not None:
                    shadow_outcomes.extend(plan.shadow_outcomes(charged))
                decided = self._tell(plan, charged, _clock_ns() - started_ns)
                assert isinstance(decided, Decision), "an immediate store always answers"
                return decided
            else:
                rule = rule_of(check, tier) if check.attributes else tier.match_path(check.method, check.path)
                last = caller.last_counters
                if last is not None and last[0] is rule:
                    counters = last[1]
                else:
                    counters = counters_of(check, caller, rule, _counted_ip(check))
        except TidegateError as error:
            self._tell_error(error, _clock_ns() - started_ns)
            raise
        cost, identity = check.cost, caller.identity
        if not counters:
            decision = Decision(True, unlimited_tier=tier.tier.name)
        elif charge is None or (charged_now := charge(counters, cost)) is None:
            return self._charge_later(counters, cost, caller, started_ns)
        else:
            decision = charged_now
        if identity is not None:
            # Each decision is made for one check, so nothing else refers to it.
            force_setattr(decision, "caller", identity)
        if self._passed is not None and decision.allowed and counters and not decision.degraded:
            self._passed.append((decision, _clock_ns() - started_ns, cost, counters[0][1], caller))
            return decision
        observe = self._observe
        if observe is not None:
            latency_ns = _clock_ns() - started_ns
            if counters and decision.allowed:
                subject = counters[0][1]
                observe(
                    Observation(decision, None, latency_ns, (), subject, None, cost, caller.key_id, caller.customer, (), caller)
                )
            else:
                observe(observation_of(decision, counters, latency_ns, (), cost, caller.key_id))
        return decision

    async def _charge_later(self, counters: Counters, cost: int, caller: Caller, started_ns: int) -> Decision:
        """Charge a check that has no shadow rules at a store that has to be awaited."""
        try:
            decision = (await self.counters.charge((Charge(counters, cost),)))[0]
        except TidegateError as error:
            self._tell_error(error, _clock_ns() - started_ns)
            raise
        latency_ns = _clock_ns() - started_ns
        if isinstance(decision, StoreUnavailable):
            self._tell_error(decision, latency_ns)
            raise decision
        if self.all_windows:
            [decision] = await with_windows(self.counters, ((decision, counters),))
        if caller.identity is not None:
            force_setattr(decision, "caller", caller.identity)
        observe = self._observe
        if observe is not None:
            if decision.allowed:
                subject = counters[0][1]
                observe(
                    Observation(decision, None, latency_ns, (), subject, None, cost, caller.key_id, caller.customer, (), caller)
                )
            else:
                observe(observation_of(decision, counters, latency_ns, (), cost, caller.key_id))
        return decision

    async def _check_later(self, check: Check, shadow_outcomes: list[ChargeOutcome] | None = None) -> Decision:
        started_ns = _clock_ns()
        try:
            plan = await self._plan(check, _counted_ip(check))
            charged = await self.counters.charge(plan.charges) if plan.charges else ()
            if shadow_outcomes is not None:
                shadow_outcomes.extend(plan.shadow_outcomes(charged))
        except TidegateError as error:
            self._tell_error(error, _clock_ns() - started_ns)
            raise
        decided = self._tell(plan, charged, _clock_ns() - started_ns)
        if isinstance(decided, StoreUnavailable):
            raise decided
        if self.all_windows and plan.decides:
            [decided] = await with_windows(self.counters, ((decided, plan.charges[0].counters),))
        return decided

    def may_need_slot(self, check: Check) -> bool:
        """Whether the rule that answers a check may limit requests in progress: False only where that is certain."""
        caller = self._cached_caller_of(check)
        return caller is None or caller.tier.has_slots

    async def check_many(self, checks: Sequence[Check]) -> list[Decision | TidegateError]:
        """Decide checks each on its own, in order, with one call to the counter store.

        Callers that are not cached are looked up side by side, within `lookup_timeout_s` for all of them. While rules are
        matched, other requests get their turn at least every 2 ms (see `TimeSlice`).

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
        if self.all_windows:
            charged = [plan.charges[0].counters if isinstance(plan, CheckPlan) and plan.decides else () for plan in plans]
            outcomes = [each.outcome for each in settled]
            outcomes = await with_windows(self.counters, tuple(zip(outcomes, charged, strict=True)))
            settled = [replace(each, outcome=outcome) for each, outcome in zip(settled, outcomes, strict=True)]
        return settled

    async def adjust(self, plans: Sequence[tuple[CheckPlan | TidegateError, int]]) -> list[ChargeResult]:
        """Record checks whose hits are charged whatever the limits say, or given back; see `adjusting.adjust`.

        Refunds are not reported to telemetry: what was charged before was reported as allowed.
        """
        started_ns = _clock_ns()
        settled = await adjust(self.counters, plans)
        charged = [number for number, (_, sign) in enumerate(plans) if sign > 0]
        reported = [_one_unit(*plans[number]) for number in charged]
        self._tell_all(reported, [settled[number] for number in charged], started_ns)
        return settled

    async def usage(
        self,
        api_key: str | None = None,
        ip: str | None = None,
        *,
        attributes: Mapping[str, str] | None = None,
        tier: str | None = None,
        count_holds: bool = False,
    ) -> Usage:
        """What is left to a caller, in each window of each rule. Charges nothing, and is not observed: it is no check.

        Args:
            api_key: the caller's key; None or empty for a caller without one.
            ip: IPv4 or IPv6 address of the client, or None where it is not known.
            attributes: of the caller, by name; see `Check.of`.
            tier: of a caller without a key; None where the policy is to decide.
            count_holds: see `caller_usage`.

        Returns:
            The tier's own limits and its rules, shadow rules included; of more than `MAX_USAGE_RULES` rules the first ones by
            priority. A rule that counts by an address or an attribute is left out where that is not known, and one whose match
            does not hold; what the store could not say is degraded, without numbers.

        Raises:
            MissingApiKey: no key came and there is no anonymous tier.
            InvalidApiKey: the key is mistyped or unknown.
            TooManyUnknownKeys: the key is not cached, and its address has sent too many unknown ones.
            ApiKeyRevoked: the key was revoked.
            ApiKeyExpired: the key's time is over.
            BadRequest: the key is no string, or the ip no address.
            CatalogUnavailable: the catalog fails and no usable entry is cached.
        """
        _require_text(api_key, "api_key")
        require_tier(tier, api_key)
        client = None if ip is None else client_of(ip)
        given = checked_attributes(attributes) if attributes else NO_ATTRIBUTES
        if api_key:
            caller = await self._caller(api_key, client)
        else:
            caller = await self._callers.find_unkeyed(tier or None, given)
        return await caller_usage(self.counters, caller, client, given, count_holds=count_holds)

    async def unkeyed_caller(self, tier: str | None, attributes: Mapping[str, str]) -> Caller:
        """The caller of checks without an API key; see `CallerLookup.find_unkeyed`."""
        return await self._callers.find_unkeyed(tier, attributes)

    async def reset(
        self,
        api_key: str | None = None,
        *,
        ip: str | None = None,
        tier: str | None = None,
        subject: str | None = None,
        customer: str | None = None,
    ) -> int:
        """Forget what one subject consumed, under every rule that could count it. Give exactly one argument.

        Args:
            api_key: a key, revoked and expired ones too: what its tier's rules by key and the tier's own limits counted, and its
                quotas if it has no customer: those of a customer count all its keys.
            ip: an address; an IPv6 address counts as its /64: what the rules by ip of all tiers counted, and what the
                anonymous tier counted for callers without a key.
            tier: name of a tier: what its rules by tier counted.
            subject: attributes such as `user=42`, or `org=acme&user=42`: what the rules of all tiers counted that count exactly
                these.
            customer: name of a customer: its quotas, and what the rules by customer of all tiers counted. What counts its keys
                alone stays.

        Returns:
            How many counters were reset, one for each rule and one for a tier's own limits, whether they had consumption or not.

        Raises:
            InvalidApiKey: the key is mistyped or unknown.
            BadRequest: not exactly one argument was given, the ip is no address, or there is no such tier or
                customer.
            CatalogUnavailable: the catalog fails and no usable entry is cached; nothing was reset.
            StoreUnavailable: the counter store fails; some may have been reset: retry.
        """
        if sum(given is not None for given in (api_key, ip, tier, subject, customer)) != 1:
            raise BadRequest("a reset needs exactly one of api_key, ip, tier, subject and customer")
        _require_text(api_key, "api_key")
        _require_text(tier, "tier")
        _require_text(subject, "subject")
        _require_text(customer, "customer")
        if api_key is not None:
            counters = list(key_counters(await self._caller(api_key, None, refused_too=True)))
        elif customer is not None:
            counters = await customer_counters(self.catalog, customer)
        elif subject is not None:
            counters = await counters_by_attributes(self.catalog, subject)
        elif ip is not None:
            counters = await counters_by_ip(self.catalog, ip)
        else:
            assert tier is not None
            counters = await counters_by_tier(self.catalog, tier)
        return await reset_counters(self.counters, counters)

    async def close(self) -> None:
        """Give back what the counter store holds; `async with` does it at the end."""
        await self.tokens.close()
        await self.counters.close()

    @classmethod
    def from_policy(
        cls,
        path: str | Path,
        *,
        counters: str | CounterStore = "memory://",
        observe: Observer | None = None,
        leases: bool | None = None,
    ) -> Self:
        """A gate for a policy file, which is read once.

        Args:
            counters: URL or a store.
            observe: callback run for every check.
            leases: with a URL of Redis, whether units are leased; by default as `TIDEGATE_LEASES__ENABLED` says, else yes.

        Raises:
            PolicyError: if the policy is refused.
            SettingsError: if the URL is not understood.
        """
        store = open_embedded(counters, leases) if isinstance(counters, str) else counters
        return cls(CachedCatalog(PolicyCatalog(load_policy(Path(path)))), store, observe)

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
        """Report a decision to telemetry; returns it."""
        answer = plan.answer
        decision = charged[0] if answer is None else answer
        if isinstance(decision, StoreUnavailable):
            self._tell_error(decision, latency_ns)
            return decision
        if plan.caller is not None:
            force_setattr(decision, "caller", plan.caller)
        if self._observe is not None:
            denials = shadow_denials(plan, charged) if len(charged) > 1 or answer is not None else ()
            shadow_denied = tuple(each.rule for each in denials)
            counters = () if answer is not None else plan.charges[0].counters
            observed = observation_of(decision, counters, latency_ns, shadow_denied, plan.cost, plan.key_id)
            if denials:
                force_setattr(observed, "shadow_denials", denials)
            if plan.held:
                force_setattr(observed, "held", True)
            self._observe(observed)
        return decision

    def _tell_error(self, error: TidegateError, latency_ns: int) -> TidegateError:
        if self._observe is not None:
            self._observe(Observation(None, error.code, latency_ns))
        return error

    async def plan(self, check: Check) -> CheckPlan:
        """Find the limits that apply to a check; charges nothing.

        Returns:
            The plan, for `decide`.

        Raises:
            TidegateError: as `check`, but for `StoreUnavailable`.
        """
        return await self._plan(check, _counted_ip(check))

    async def _plan(self, check: Check, ip: str | None) -> CheckPlan:
        exempt = False
        if self._lists.active:
            await self.access.load()
            exempt = self.access.admit(check.ip, check.attributes)
        caller = self._cached_caller_of(check) or await self._caller_of(check, ip)
        if self._lists.active and self.access.admit_caller(caller, exempt):
            return exempt_plan(check, caller)
        return self._plan_of(check, caller, ip)

    def _cached_caller_of(self, check: Check) -> Caller | None:
        if check.api_key is None and (check.attributes or check.tier is not None):
            return self._callers.find_cached_unkeyed(check.tier, check.attributes)
        return self._find_cached(check.api_key)

    async def _caller_of(self, check: Check, ip: str | None) -> Caller:
        if check.api_key is None:
            return await self._callers.find_unkeyed(check.tier, check.attributes)
        return await self._caller(check.api_key, ip)

    def _plan_of(self, check: Check, caller: Caller, ip: str | None) -> CheckPlan:
        tier = caller.tier
        counters = counters_of(check, caller, rule_of(check, tier), ip)
        charges = [Charge(counters, check.cost)] if counters else []
        if tier.has_shadow_rules:
            for watcher in tier.shadow_rules(check.method, check.path, check.attributes):
                counted = shadow_subject(check.attributes, caller, watcher, ip)
                # A shadow rule that cannot be counted must not block the check that it only watches.
                if counted is not None:
                    charges.append(Charge(shadow_counters(watcher, counted, caller, check.attributes), check.cost))
        answer = None if counters else Decision(True, unlimited_tier=tier.tier.name)
        return CheckPlan(answer, charges, check.cost, caller.key_id, caller.identity)

    async def plan_many(self, checks: Sequence[Check | DescriptorCheck]) -> list[CheckPlan | TidegateError | None]:
        """Find the limits that apply to each check of one request; charges nothing.

        Callers that are not cached are looked up side by side, within `lookup_timeout_s` for all of them; other requests get
        their turn while rules are matched.

        Args:
            checks: checks, and descriptors without a path; any number.

        Returns:
            For each its plan, for `decide`, or the error that `check` would have raised; None where nothing limits a descriptor.
        """
        clients = [ipv6_client(each.ip) if each.ip is not None and ":" in each.ip else each.ip for each in checks]
        active = self._lists.active
        admitted: Sequence[bool | TidegateError] = await self.access.admit_all(checks) if active else [False] * len(checks)
        senders = [
            sent if isinstance(each, bool) else each
            for sent, each in zip(await self._callers.senders(checks, clients), admitted, strict=True)
        ]
        callers = await self._callers.find_all([each for each in senders if isinstance(each, Sender)])
        plans: list[CheckPlan | TidegateError | None] = []
        slice_ = TimeSlice()
        for each, client, sender, exempt in zip(checks, clients, senders, admitted, strict=True):
            if slice_.over:
                await slice_.pause()
            caller = callers[sender] if isinstance(sender, Sender) else sender
            try:
                if active and isinstance(caller, Caller) and self.access.admit_caller(caller, bool(exempt)):
                    plans.append(exempt_plan(each, caller))
                    continue
                if isinstance(each, DescriptorCheck):
                    plans.append(None if isinstance(caller, MissingApiKey) else plan_of_descriptor(each, caller, client))
                else:
                    plans.append(caller if isinstance(caller, TidegateError) else self._plan_of(each, caller, client))
            except TidegateError as error:
                plans.append(error)
        return plans


def _one_unit(plan: CheckPlan | TidegateError, sign: int) -> CheckPlan | TidegateError:
    """A plan as telemetry counts it: an outcome is one unit, whatever its status."""
    return replace(plan, cost=1) if sign == OUTCOME and isinstance(plan, CheckPlan) else plan


def _counted_ip(check: Check) -> str | None:
    """What counts as one client of the address of a check; None where none is known."""
    ip = check.ip
    return ipv6_client(ip) if ip is not None and ":" in ip else ip


def _unanswered() -> Decision:
    raise AssertionError("an immediate store always answers")


def _require_text(value: object, field: str) -> None:
    if value is not None and type(value) is not str:
        raise BadRequest(f"{field} must be a string", field=field)
