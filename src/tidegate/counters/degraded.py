"""Decisions without the store: while a shard is down, its breaker is open, or its reply is late.

The rule's `on_failure` selects the decision: `local` counts in memory at this instance's share of the limit, `allow` admits,
`deny` fails with `StoreUnavailable`. All such decisions are degraded, and counted by reason. At a deadline of a shard that is
slow, `local` admits what the store will most probably charge (`late_answers`).
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from typing import Final

import msgspec

from tidegate.breaker import Breaker, BreakerOptions
from tidegate.counters import Charge, ChargeOutcome, Counters, GrantingDecision, LateAnswer
from tidegate.counters.denial_cache import DenialCache
from tidegate.counters.fallback import LocalShares
from tidegate.counters.late_answers import RETRY_US, LateAnswers
from tidegate.counters.recovery import Breakers, Debts
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import IN_PROGRESS, OnFailure

_SLOW: Final = frozenset(("migrating", "busy", "noscript"))
"""Reasons of a shard that is alive and could not charge within the deadline: its breaker stays closed."""


class GuardOptions(msgspec.Struct, frozen=True):
    """How a store is guarded.

    Args:
        on_failure: for limits that say `default`.
        breaker: when calls to a shard stop, and for how long.
        min_instances: lower bound of the number of instances that share the limits, 1 or more.
        max_subjects: most counters of the fallback.
    """

    on_failure: OnFailure = OnFailure.LOCAL
    breaker: BreakerOptions = BreakerOptions()
    min_instances: int = 1
    max_subjects: int = 1_000_000


class DegradedDecisions:
    """State and decisions while the store fails. Parameters: see `GuardedCounters`."""

    def __init__(self, store: RedisCounters, options: GuardOptions) -> None:
        self.store = store
        self.options = options
        self.instances = self.options.min_instances
        self.degraded: dict[str, int] = {}
        """Decisions made without the store, by reason."""
        self.denials = DenialCache()
        self._breakers = Breakers(store, self.options.breaker)
        self.breakers: dict[str, Breaker] = self._breakers.by_shard
        self._local = LocalShares(self.options.max_subjects, self._store_now_us)
        self._debts = Debts(store, self._local, self.breakers)
        self.late = LateAnswers(now_us, self._answered_late)
        self._offset_us = time.time_ns() // 1000 - time.monotonic_ns() // 1000
        self._latest_us = 0
        self._cleared_us = 0
        self.denial_ttl_us: int | None = None
        self.on_late_grant: Callable[[Charge, GrantingDecision, int], None] | None = None
        self.lease_usage: Callable[[Counters], int] | None = None
        self.take_lease_usage: Callable[[Counters], int] | None = None

    def _remember_denial(self, charge: Charge, decision: Decision, started_us: int) -> None:
        # Slots are freed when requests end, and a success clears: a denial because none was free is not remembered.
        slots = any(limits.algorithm in IN_PROGRESS for limits, _ in charge.counters)
        if started_us >= self._cleared_us and not slots:
            leased = all(limits.leasable for limits, _ in charge.counters)
            self.denials.remember(charge.counters, charge.cost, decision, started_us, self.denial_ttl_us if leased else None)

    def _denied_before(self, charge: Charge) -> Decision | None:
        """The store's last denial, where it could only be overtaken by units that others give back."""
        if not self.denials:
            return None
        return self.denials.find(charge.counters, charge.cost, now_us(), unanswered=True)

    def _shards(self, charge: Charge) -> list[str]:
        return list({self.store.shard_of(subject) for _, subject in charge.counters})

    def _failed(self, charge: Charge, error: StoreUnavailable, started_us: int) -> ChargeOutcome:
        """A call failed: the breaker of the shard that failed counts it, and the rule's fallback answers."""
        if isinstance(error, LateAnswer):
            return self._decide_at_deadline(charge, error, started_us)
        reason = str(error.details.get("reason", "error"))
        if reason in _SLOW:
            return self._decide_uncharged(charge, reason, error)
        shards = self._shards(charge) if self.breakers or "shard" not in error.details else []
        failed = error.details.get("shard")
        # The shard that was called; the subject's shard may be another one by now.
        for shard in [str(failed)] if failed else shards:
            self._breakers.failed(shard, error, time.monotonic())
        if failed:
            self._breakers.release([shard for shard in shards if shard != failed])
        return self._fallback(charge, reason, error)

    def _decide_uncharged(self, charge: Charge, reason: str, error: StoreUnavailable) -> ChargeOutcome:
        """The deadline passed before a shard that is not down could charge: admit as for a late answer, and owe it."""
        if self.breakers:
            self._breakers.release(self._shards(charge))
        denied = self._denied_before(charge)
        if denied is not None:
            return denied
        if self._on_failure(charge) is not OnFailure.LOCAL:
            return self._fallback(charge, reason, error)
        if not charge.cost or self._may_admit(charge):
            return self._fallback(charge, reason, error)
        self.degraded[reason] = self.degraded.get(reason, 0) + 1
        return self._within(charge, 0)

    def _decide_at_deadline(self, charge: Charge, late: LateAnswer, started_us: int) -> ChargeOutcome:
        """The shard has not answered yet: admit what it will most probably have charged, and process its reply later."""
        if self.breakers:
            self._breakers.release(self._shards(charge))
        admitted = False
        denied = self._denied_before(charge)
        if denied is not None:
            self.late.track(charge, late, admitted, started_us)
            return denied
        if self._on_failure(charge) is not OnFailure.LOCAL:
            outcome = self._fallback(charge, "timeout", late)
        else:
            self.degraded["timeout"] = self.degraded.get("timeout", 0) + 1
            share = self._local.charge(Charge(charge.counters, 0), self.instances)
            allowed = not charge.cost or self._may_admit(charge)
            admitted = allowed and charge.cost > 0
            outcome = msgspec.structs.replace(
                share,
                allowed=allowed,
                remaining=max((share.remaining or 0) - charge.cost, 0) if allowed else 0,
                retry_after_us=0 if allowed else RETRY_US,
            )
        self.late.track(charge, late, admitted, started_us)
        return outcome

    def _may_admit(self, charge: Charge) -> bool:
        leased = None if self.lease_usage is None or self.instances == 1 else self.lease_usage(charge.counters)
        return self.late.may_admit(charge, self.instances, self._local.used(charge, self.instances), leased)

    def _answered_late(self, charge: Charge, admitted: bool, started_us: int, answer: Decision | StoreUnavailable) -> None:
        """A reply after the deadline, or the error that none will come."""
        if isinstance(answer, StoreUnavailable):
            shard = answer.details.get("shard")
            if shard is not None:
                self._breakers.failed(str(shard), answer, time.monotonic())
        else:
            granting = answer if isinstance(answer, GrantingDecision) else None
            if not answer.allowed:
                self._remember_denial(charge, (granting and granting.following) or answer, started_us)
            if granting is not None and self.on_late_grant is not None:
                self.on_late_grant(charge, granting, started_us)
        if admitted and (isinstance(answer, StoreUnavailable) or not answer.allowed):
            self._local.owe(charge, self._store_now_us())

    def _on_failure(self, charge: Charge) -> OnFailure:
        own = charge.counters[0][0].on_failure
        return self.options.on_failure if own is OnFailure.DEFAULT else own

    def _fallback(self, charge: Charge, reason: str, error: StoreUnavailable | None = None) -> ChargeOutcome:
        denied = self._denied_before(charge)
        if denied is not None:
            return denied
        self.degraded[reason] = self.degraded.get(reason, 0) + 1
        limits = charge.counters[0][0]
        on_failure = self._on_failure(charge)
        if on_failure is OnFailure.DENY:
            return error or StoreUnavailable(
                'the counter store does not answer, and this rule has on_failure = "deny"', reason=reason
            )
        if on_failure is OnFailure.ALLOW:
            limit = limits.limits[0]
            return Decision(True, limit, max(limit.capacity - charge.cost, 0), 0, 0, self._store_now_us(), limits, degraded=True)
        if self._debts.on_the_way and any(
            (each.name, each.algorithm, s) in self._debts.on_the_way for each, s in charge.counters
        ):
            # What this instance admitted before is neither in its share nor known to be in the store: admit no more now.
            return self._within(charge, 0)
        if self.take_lease_usage is not None and (used := self.take_lease_usage(charge.counters)):
            # Charged in a store that may be lost: a lease and a share together admit no more than a share alone.
            self._local.count(charge, used, self.instances)
        remained = self.late.remaining(charge.counters)
        if remained is None:
            return self._local.charge(charge, self.instances)
        # Close to the limit a share of what remained is less than a share of the limit.
        return self._within(charge, max(remained // self.instances - self._local.used(charge, self.instances), 0))

    def _within(self, charge: Charge, units: int) -> Decision:
        """Decide a charge by the shares, and admit no more than some units."""
        if charge.cost <= units:
            decision = self._local.charge(charge, self.instances)
            return msgspec.structs.replace(decision, remaining=min(decision.remaining or 0, units - charge.cost))
        share = self._local.charge(Charge(charge.counters, 0), self.instances)
        # More than the share ever admits: no later attempt passes.
        retry_us = RETRY_US if charge.cost <= self._local.capacity(charge, self.instances) else None
        return msgspec.structs.replace(share, allowed=False, remaining=min(share.remaining or 0, units), retry_after_us=retry_us)

    def _store_now_us(self) -> int:
        """Estimate of the store's clock; never goes back."""
        self._latest_us = max(self._latest_us, time.monotonic_ns() // 1000 + self._offset_us)
        return self._latest_us


def instance_name() -> str:
    """A unique name for an instance."""
    return f"{os.uname().nodename}:{os.getpid()}:{secrets.token_hex(4)}"


def now_us() -> int:
    """Monotonic µs."""
    return time.monotonic_ns() // 1000
