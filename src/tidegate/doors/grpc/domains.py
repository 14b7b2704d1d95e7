"""Counts the descriptors of a domain from a file in the format of envoyproxy/ratelimit, as that program does.

Each descriptor is counted independently, even if another one denies the request, in fixed windows aligned to the epoch. Hits
beyond a limit are counted up to the limit, so that a request for one more is denied. A limit that Envoy sends with a descriptor
overrides that of the file. The counters are in the same `CounterStore` as those of the policy.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import msgspec

from tidegate.counters import Charge
from tidegate.decision import MAX_COST, Decision
from tidegate.doors.grpc.descriptor_tree import FileLimit, Node
from tidegate.doors.grpc.ratelimit_file import RateLimitFile
from tidegate.doors.grpc.replies import Part
from tidegate.doors.grpc.status import CallRefused, Status
from tidegate.doors.grpc.units import UNITS_S, window_limit
from tidegate.errors import BadRequest, clip
from tidegate.gate.charging import ChargeResult, CheckPlan
from tidegate.gate.gate import Gate
from tidegate.policy.descriptors import entries_subject
from tidegate.policy.limits import MAX_AMOUNT, MAX_WINDOW_US, Algorithm, Limit, LimitSet
from tidegate.time_slice import TimeSlice
from tidegate.timestamps import US_PER_S

MAX_OVERRIDES: Final = 1024
"""Size of the cache of limits that Envoy sends with descriptors."""

Entries = list[tuple[str, str]]


class FileDomain:
    """The limits of one domain."""

    def __init__(self, file: RateLimitFile) -> None:
        self.domain = file.domain
        self._root = file.root
        self._sets: dict[str, LimitSet] = {}
        self._prepare(file.root)
        self._override = lru_cache(maxsize=MAX_OVERRIDES)(self._make_override)
        # Stores cache what they compile for each set: the sets of overrides must be reused too.
        self._sent_set = lru_cache(maxsize=MAX_OVERRIDES)(self._limit_set)

    async def parts(self, descriptors: list[tuple[Entries, int, tuple[int, int, int] | None]]) -> list[Part]:
        """See `DomainLimits.parts`."""
        found = []
        slice_ = TimeSlice()
        for entries, _, override in descriptors:
            if slice_.over:
                await slice_.pause()
            found.append(self._find(entries, override))
        replaced = {name for limit, _ in found if limit is not None for name in limit.replaces}
        return [
            self._part(None if limit is not None and limit.name in replaced else limit, subject, cost)
            for (limit, subject), (_, cost, _) in zip(found, descriptors, strict=True)
        ]

    async def settle(self, gate: Gate, parts: list[Part]) -> list[ChargeResult]:
        """See `DomainLimits.settle`."""
        plans = [part.plan for part in parts if part.plan is not None]
        results = await gate.decide(plans, whole=False)
        rest: list[Charge] = []
        for number, plan in enumerate(plans):
            counted = _counted(results[number])
            if isinstance(plan, CheckPlan) and plan.charges and counted is not None and not counted.allowed and counted.remaining:
                rest.append(Charge(plan.charges[0].counters, counted.remaining))
                results[number] = _emptied(results[number], counted)
        if rest:
            await gate.counters.charge(rest)
        return results

    def _find(self, entries: Entries, override: tuple[int, int, int] | None) -> tuple[FileLimit | None, str]:
        """The limit and the subject of a descriptor: its entries, with a shared wildcard in place of the value."""
        if override is not None:
            return self._override(tuple(key for key, _ in entries), *override), entries_subject(entries)
        node: Node | None = self._root
        counted: Entries = []
        for key, value in entries:
            node = None if node is None else node.child(key, value)
            if node is None:
                return None, ""
            counted.append((key, node.shared or value))
        return (None if node is None else node.rate_limit), entries_subject(counted)

    def _part(self, limit: FileLimit | None, subject: str, cost: int) -> Part:
        if limit is None:
            return Part(None, cost)
        if limit.limit is None:
            return Part(None, cost, unlimited=True)
        if cost > MAX_COST:
            return Part(BadRequest(f"hits_addend = {cost} is too large; send at most {MAX_COST}", field="hits_addend"), cost)
        limits = self._sets.get(limit.path) or self._sent_set(limit)
        if limits.limits[0].amount == 0:
            plan = CheckPlan(_refusal(limits, limit.passes), (), cost)
        else:
            charge = Charge(((limits, subject),), cost)
            plan = CheckPlan(Decision(True, unlimited_tier=self.domain) if limit.passes else None, (charge,), cost)
        return Part(plan, cost, limit.name, quota=limit.quota and not limit.shadow)

    def _prepare(self, node: Node) -> None:
        if node.rate_limit is not None and node.rate_limit.limit is not None:
            self._sets[node.rate_limit.path] = self._limit_set(node.rate_limit)
        for each in node.children():
            self._prepare(each)

    def _limit_set(self, limit: FileLimit) -> LimitSet:
        assert limit.limit is not None
        # Tier names cannot contain '/', so no rule of the policy shares these counters. Domains that contain it are escaped.
        domain = self.domain.replace("%", "%25").replace("/", "%2F")
        return LimitSet(
            f"envoy/{domain}/{limit.path}",
            Algorithm.FIXED_WINDOW,
            (limit.limit,),
            rule=limit.path,
            tier=self.domain,
        )

    def _make_override(self, keys: tuple[str, ...], amount: int, unit: int, multiplier: int) -> FileLimit:
        seconds = UNITS_S.get(unit, 0) * multiplier
        if not 1 <= seconds <= MAX_WINDOW_US // US_PER_S or amount > MAX_AMOUNT:
            raise CallRefused(
                Status.INVALID_ARGUMENT,
                f"a descriptor has an invalid limit of {amount} requests per {multiplier} of unit {unit}; "
                f"send 0 to {MAX_AMOUNT} requests, a unit from {min(UNITS_S)} to {max(UNITS_S)}, and at most 366 days",
            )
        return FileLimit(window_limit(amount, unit, multiplier), f"sent along: {', '.join(clip(key) for key in keys)}")


def _counted(result: ChargeResult) -> Decision | None:
    """The decision that was counted, including that of a limit in shadow or quota mode; None if nothing was."""
    outcome = result.shadow_outcomes[0] if result.shadow_outcomes else result.outcome
    return outcome if isinstance(outcome, Decision) else None


def _emptied(result: ChargeResult, counted: Decision) -> ChargeResult:
    """The same result with 0 remaining."""
    empty = msgspec.structs.replace(counted, remaining=0)
    return ChargeResult(result.outcome, (empty,)) if result.shadow_outcomes else ChargeResult(empty)


def _refusal(limits: LimitSet, passes: bool) -> Decision:
    """The decision of a limit of 0, which needs no counter."""
    limit: Limit = limits.limits[0]
    return Decision(passes, limit, 0, limit.window_us, 0 if passes else None, 0, limits)
