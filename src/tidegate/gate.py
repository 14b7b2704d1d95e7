"""The way of one check: who asks → which rule → may its cost be charged → the answer. Knows no transport and no store."""

from __future__ import annotations

import hashlib
import ipaddress
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, TypeAlias

from tidegate.catalog.cached import CachedCatalog, Caller
from tidegate.counters import Charge, CounterStore
from tidegate.decision import Check, Decision, Observation
from tidegate.errors import (
    ApiKeyExpired,
    ApiKeyRevoked,
    BadRequest,
    InvalidApiKey,
    MissingApiKey,
    TidegateError,
)
from tidegate.keys import is_possible_key
from tidegate.limits import LimitSet
from tidegate.matching import subject_of
from tidegate.policy import KeyStatus, Subject

Observer: TypeAlias = Callable[[Observation], None]

IPV6_PREFIX: Final = 64
"""Bits of an IPv6 address that make one client: a subscriber is handed a /64 (RFC 6177), and could vary the rest at will."""


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
            answer, charges = await self._plan(check)
            charged = await self.counters.charge(charges) if charges else []
        except TidegateError as error:
            self._tell_error(error, time.perf_counter_ns() - started_ns)
            raise
        return self._tell(answer, charges, charged, time.perf_counter_ns() - started_ns)

    async def check_many(self, checks: Sequence[Check]) -> list[Decision | TidegateError]:
        """Decide checks each on its own, in order, with one call to the counter store.

        Args:
            checks: what is asked; any number.

        Returns:
            For each check its decision, or the error that `check` would have raised.
        """
        started_ns = time.perf_counter_ns()
        plans: list[tuple[Decision | None, list[Charge]] | TidegateError] = []
        charges: list[Charge] = []
        for check in checks:
            try:
                plan = await self._plan(check)
            except TidegateError as error:
                plans.append(error)
            else:
                plans.append(plan)
                charges.extend(plan[1])
        charged: list[Decision] = []
        failed: TidegateError | None = None
        if charges:
            try:
                charged = await self.counters.charge(charges)
            except TidegateError as error:
                failed = error
        share_ns = (time.perf_counter_ns() - started_ns) // max(len(checks), 1)
        answers: list[Decision | TidegateError] = []
        at = 0
        for planned in plans:
            if isinstance(planned, TidegateError):
                answers.append(self._tell_error(planned, share_ns))
                continue
            answer, own = planned
            if own and failed is not None:
                answers.append(self._tell_error(failed, share_ns))
                continue
            answers.append(self._tell(answer, own, charged[at : at + len(own)], share_ns))
            at += len(own)
        return answers

    def _tell(self, answer: Decision | None, charges: list[Charge], charged: list[Decision], latency_ns: int) -> Decision:
        """Tell telemetry what was decided; returns the decision."""
        decision = charged[0] if answer is None else answer
        if self._observe is not None:
            shadow_denied: tuple[str, ...] = ()
            if len(charged) > 1 or answer is not None:
                watched = charged[1:] if answer is None else charged
                shadow_denied = tuple(each.rule or "" for each in watched if not each.allowed)
            subject = charges[0].counters[0][1] if answer is None else None
            self._observe(Observation(decision, None, latency_ns, shadow_denied, subject))
        return decision

    def _tell_error(self, error: TidegateError, latency_ns: int) -> TidegateError:
        if self._observe is not None:
            self._observe(Observation(None, error.code, latency_ns))
        return error

    async def _plan(self, check: Check) -> tuple[Decision | None, list[Charge]]:
        """Whose limits a check is held against.

        Returns the answer where nothing limits the check, else None; and the charges: first the one that decides (where there
        is no answer yet), then one for each shadow rule.
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
        return None if counters else Decision(True, open_tier=tier.tier.name), charges

    async def _caller(self, api_key: str | None) -> Caller:
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
        if record is not None:
            if record.status is not KeyStatus.ACTIVE:
                raise ApiKeyRevoked("the API key was revoked: ask for a new one", key_id=record.id)
            if record.expires_at_us is not None and record.expires_at_us * 1000 <= self._wall_clock_ns():
                raise ApiKeyExpired("the API key has expired: ask for a new one", key_id=record.id)
        return caller


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
