"""A model of the whole: two instances of gate, cache and guarded counters on one store and one catalog, under any order of
checks, changes and failures. Time is virtual, so a run is the same every time.

What must hold, whatever happens:
- what the store answers never admits more than a limit, of all instances together, and never denies where there is room;
- a denial and a peek consume nothing; `retry_after` is when the same cost passes; `remaining` is what is left;
- without the store an instance admits what its share holds, neither more nor less, and puts it back before it asks again;
- what was admitted counts at least once (lost replies may count twice), but for what a failover or a reset takes away;
- a revoked key is refused once the change was looked at; errors are those that are documented, and only where there is a cause.

By default the same runs are tried each time. `MODEL_EXAMPLES` sets how many new ones are, `MODEL_STEPS` how long each is at most.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from typing import Any

import msgspec
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.model.faults import KEY, LATE_S, TIER, TIMEOUT_S, Fault, FaultyCatalog, Link, SharedStore, Trouble
from tests.model.truth import Admitted, Truth, held_by
from tests.model.virtual_time import VirtualLoop
from tidegate.breaker import BreakerOptions
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.follower import CatalogFollower
from tidegate.catalog.loader import RETRY_S
from tidegate.counters import Charge, ChargeOutcome, degraded, guarded
from tidegate.counters.degraded import GuardOptions
from tidegate.counters.guarded import GuardedCounters
from tidegate.decision import Check, Decision
from tidegate.errors import StoreUnavailable, TidegateError
from tidegate.gate.gate import Gate
from tidegate.policy.key_format import hash_api_key
from tidegate.policy.limits import Algorithm, Limit, OnFailure
from tidegate.policy.model import ApiKey, KeyStatus, Policy, Tier
from tidegate.policy.rules import Rule

EPOCH_US = 1_700_000_000_000_000
INSTANCES = 2
OPEN_S = 5.0
KEYS = tuple(f"key-number-{number}-of-the-model" for number in range(4))
IP = "192.0.2.1"
RULES = {
    rule.name: rule
    for rule in (
        Rule.make("/fixed", ["4/10s"], algorithm=Algorithm.FIXED_WINDOW, name="fixed"),
        Rule.make("/sliding", ["6/10s"], name="sliding"),
        Rule.make("/log", ["3/10s", "6/30s"], algorithm=Algorithm.SLIDING_LOG, name="log"),
        Rule.make("/bucket", ["6/10s burst 4"], algorithm=Algorithm.TOKEN_BUCKET, name="bucket"),
        Rule.make("/leaky", ["10/10s burst 2"], algorithm=Algorithm.LEAKY_BUCKET, name="leaky"),
        Rule.make("/fixed", ["4/20s"], ["POST"], Algorithm.SLIDING_LOG, "tier", name="post"),
        Rule.make("/ip", ["4/10s"], subject="ip", algorithm=Algorithm.FIXED_WINDOW, name="ip"),
        Rule.make("/deny", ["4/10s"], algorithm=Algorithm.FIXED_WINDOW, on_failure="deny", name="deny"),
        Rule.make("/allow", ["4/10s"], algorithm=Algorithm.FIXED_WINDOW, on_failure="allow", name="allow"),
    )
}
ASKED = [
    ("GET", "fixed"),
    ("POST", "fixed"),
    *(("GET", name) for name in ("sliding", "log", "bucket", "leaky", "ip", "deny", "allow")),
]
TIERS = {"free": ("8/20s",), "pro": ()}
CODES = {
    "MISSING_API_KEY": 401,
    "INVALID_API_KEY": 401,
    "API_KEY_REVOKED": 403,
    "STORE_UNAVAILABLE": 503,
    "CATALOG_UNAVAILABLE": 503,
}

instances = st.integers(0, INSTANCES - 1)
keys = st.sampled_from(KEYS[:2] * 3 + KEYS)
costs = st.sampled_from([1, 1, 1, 1, 2, 3, 0, 5])
asks = st.tuples(st.sampled_from(ASKED[:2] * 2 + ASKED), keys, costs)


def first_policy() -> Policy:
    """Two tiers with the same rules; the last key is not known yet."""
    return Policy(
        tuple(Tier.make(name, RULES.values(), limits) for name, limits in TIERS.items()),
        tuple(ApiKey(hash_api_key(key), "pro" if number == 1 else "free") for number, key in enumerate(KEYS[:3])),
    )


class Watched:
    """Between a gate and its counters: what was asked, and what was answered."""

    immediate = False

    def __init__(self, guard: GuardedCounters) -> None:
        self.guard = guard
        self.seen: list[tuple[Charge, ChargeOutcome]] = []

    async def charge(self, charges: Sequence[Charge]) -> Sequence[ChargeOutcome]:
        outcomes = await self.guard.charge(charges)
        assert len(outcomes) == len(charges)
        self.seen += zip(charges, outcomes, strict=True)
        return outcomes

    async def reset(self, counters: Any) -> None:
        await self.guard.reset(counters)


class Instance:
    """One Tidegate."""

    def __init__(self, number: int, loop: VirtualLoop, store: SharedStore, catalog: FaultyCatalog, truth: Truth) -> None:
        self.number = number
        self.link = Link(store, number, INSTANCES, truth)
        options = GuardOptions(breaker=BreakerOptions(failures=3, window_s=10, open_s=OPEN_S), min_instances=INSTANCES)
        self.guard = GuardedCounters(self.link, options, f"instance-{number}")  # type: ignore[arg-type]
        self.counters = Watched(self.guard)
        self.cached = CachedCatalog(catalog, l1_ttl_s=20.0, clock=loop.time)  # type: ignore[arg-type]
        self.follower = CatalogFollower(catalog, self.cached, 1.0)  # type: ignore[arg-type]
        self.gate = Gate(self.cached, self.counters, wall_clock_ns=loop.time_module(EPOCH_US).time_ns)
        self.key_from: dict[str, int] = {}
        """A key is never served as it was before this version,"""
        self.seen_from = 0
        """and nothing as it was before this one, unless the catalog is in trouble."""


class Model(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.loop = VirtualLoop()
        self._time = guarded.time
        logging.disable(logging.CRITICAL)
        guarded.time = degraded.time = self.loop.time_module(EPOCH_US)
        self.store = SharedStore(lambda: self.loop.now_us() + EPOCH_US)
        self.truth = Truth(INSTANCES, self.store.clock)
        self.catalog = FaultyCatalog(first_policy())
        self.instances = [Instance(number, self.loop, self.store, self.catalog, self.truth) for number in range(INSTANCES)]
        self.troubled_until = 0.0
        self.late_until = 0.0
        for instance in self.instances:
            self.run(instance.guard.start())
        self.wait(0.01)

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        try:
            self.settle()
        finally:
            for instance in self.instances:
                self.run(instance.guard.close())
            # Questions to the catalog that nobody waits for any more.
            self.wait(1.0)
            self.loop.close()
            guarded.time = degraded.time = self._time
            logging.disable(logging.NOTSET)

    def run(self, work: Any) -> Any:
        self.note_trouble()
        try:
            return self.loop.run_until_complete(work)
        finally:
            self.note_trouble()

    def wait(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    # Failures.

    @rule(instance=instances, fault=st.sampled_from(Fault))
    def link_fails(self, instance: int, fault: Fault) -> None:
        self.instances[instance].link.fault = fault

    @rule()
    def links_are_well(self) -> None:
        for instance in self.instances:
            instance.link.fault = Fault.NONE

    @rule()
    def store_dies(self) -> None:
        self.store.alive = False

    @rule()
    def store_returns(self) -> None:
        self.store.alive = True

    @rule()
    def store_is_replicated(self) -> None:
        self.store.replicate()
        self.truth.replicate()

    @rule()
    def store_fails_over(self) -> None:
        self.store.fail_over()
        self.truth.fail_over()

    @rule(behind=st.integers(0, 5))
    def replicas_lag(self, behind: int) -> None:
        self.catalog.behind = behind

    @rule(trouble=st.sampled_from(Trouble))
    def catalog_is_in_trouble(self, trouble: Trouble) -> None:
        self.catalog.trouble = trouble
        self.note_trouble()

    @rule()
    def change_log_is_lost(self) -> None:
        self.catalog.log_from = self.catalog.head

    def note_trouble(self) -> None:
        if self.catalog.trouble is not Trouble.NONE:
            self.troubled_until = self.loop.time() + RETRY_S + 0.3

    # Time.

    @rule(seconds=st.sampled_from([0.001, 0.1, 0.7, 1.1, 3.0, 5.0, 9.999, 10.0, 21.0]))
    def time_passes(self, seconds: float) -> None:
        self.wait(seconds)

    # Changes.

    def change_key(self, key: str, **fields: Any) -> None:
        digest, policy = hash_api_key(key), self.catalog.policies[-1]
        kept = [each for each in policy.api_keys if each.sha256 != digest]
        old = next((each for each in policy.api_keys if each.sha256 == digest), ApiKey(digest, "free"))
        changed = msgspec.structs.replace(old, **fields)
        self.catalog.change(msgspec.structs.replace(policy, api_keys=(*kept, changed)), (KEY, digest))

    def change_tier(self, name: str, rules: Any, limits: Any = None) -> None:
        policy = self.catalog.policies[-1]
        old = next(tier for tier in policy.tiers if tier.name == name)
        changed = Tier.make(name, rules(old.rules), old.limits if limits is None else limits)
        kept = [tier for tier in policy.tiers if tier.name != name]
        self.catalog.change(msgspec.structs.replace(policy, tiers=(*kept, changed)), (TIER, name))

    @rule(key=keys)
    def key_is_revoked(self, key: str) -> None:
        self.change_key(key, status=KeyStatus.REVOKED)

    @rule(key=keys, tier=st.sampled_from(sorted(TIERS)))
    def key_is_created_or_moved(self, key: str, tier: str) -> None:
        self.change_key(key, status=KeyStatus.ACTIVE, tier=tier)

    @rule(
        tier=st.sampled_from(sorted(TIERS)),
        name=st.sampled_from(["fixed", "sliding", "log", "post"]),
        amount=st.integers(1, 9),
    )
    def limit_is_changed(self, tier: str, name: str, amount: int) -> None:
        self.change_tier(
            tier,
            lambda rules: [
                msgspec.structs.replace(
                    each, limits=tuple(msgspec.structs.replace(limit, amount=amount) for limit in each.limits)
                )
                if each.name == name
                else each
                for each in rules
            ],
        )

    @rule(tier=st.sampled_from(sorted(TIERS)), amount=st.integers(1, 12))
    def tier_limit_is_changed(self, tier: str, amount: int) -> None:
        self.change_tier(tier, list, [Limit.parse(f"{amount}/20s")] if amount > 1 else [])

    @rule(tier=st.sampled_from(sorted(TIERS)), name=st.sampled_from(sorted(RULES)))
    def rule_is_removed_or_added(self, tier: str, name: str) -> None:
        self.change_tier(
            tier,
            lambda rules: (
                [each for each in rules if each.name != name]
                + ([] if any(each.name == name for each in rules) else [RULES[name]])
            ),
        )

    @rule(instance=instances)
    def change_is_looked_at(self, instance: int) -> None:
        self.look(self.instances[instance])

    def look(self, instance: Instance) -> None:
        since = instance.cached.version
        if self.run(instance.follower.poll()):
            # What the log does not tell is asked for again; while the catalog fails what was known before is better than nothing.
            if since >= self.catalog.log_from:
                instance.key_from |= self.catalog.keys_changed(since)
            instance.seen_from = self.catalog.head
        else:
            assert self.catalog.trouble is Trouble.FAILS

    # Checks.

    @rule(instance=instances, ask=asks)
    def check(self, instance: int, ask: tuple[tuple[str, str], str, int]) -> None:
        self.ask(self.instances[instance], [ask])

    @rule(instance=instances, ask=asks, times=st.integers(2, 6))
    def checks_in_a_row(self, instance: int, ask: tuple[tuple[str, str], str, int], times: int) -> None:
        for number in range(times):
            self.ask(self.instances[(instance + number) % INSTANCES], [ask])

    @rule(
        instance=instances,
        ask=asks,
        fault=st.sampled_from([Fault.LOST, Fault.REPLY_LOST, Fault.LATE, Fault.DOWN]),
        times=st.integers(1, 4),
        away_s=st.sampled_from([0.0, OPEN_S]),
    )
    def outage_begins_and_ends(
        self, instance: int, ask: tuple[tuple[str, str], str, int], fault: Fault, times: int, away_s: float
    ) -> None:
        asked = self.instances[instance]
        asked.link.fault = fault
        for _ in range(times):
            self.ask(asked, [ask])
        self.wait(away_s)
        asked.link.fault, self.store.alive = Fault.NONE, True
        self.ask(asked, [ask])

    @rule(instance=instances, batch=st.lists(asks, min_size=2, max_size=6))
    def checks_at_once(self, instance: int, batch: list[tuple[tuple[str, str], str, int]]) -> None:
        self.ask(self.instances[instance], batch)

    @rule(instance=instances)
    def check_without_a_key(self, instance: int) -> None:
        answer = self.run(self.instances[instance].gate.check_many([Check.of("/fixed", ip=IP)]))[0]
        assert getattr(answer, "code", None) in ("MISSING_API_KEY", "CATALOG_UNAVAILABLE"), answer
        if answer.code == "CATALOG_UNAVAILABLE":
            self.trouble_explains(answer)

    @rule(instance=instances, ask=asks)
    def denial_ends_when_it_says(self, instance: int, ask: tuple[tuple[str, str], str, int]) -> None:
        """Nothing else happens until then."""
        asked = self.instances[instance]
        if not self.is_calm() or asked.seen_from != self.catalog.head:
            return
        answer = None
        for _ in range(10):
            answer = self.ask(asked, [ask])[0]
            if not isinstance(answer, Decision) or not answer.allowed or not ask[2]:
                break
        if isinstance(answer, Decision) and not answer.allowed and answer.retry_after_us is not None:
            self.wait((answer.at_us + answer.retry_after_us - self.store.clock() + 1) / 1e6)
            again = self.ask(asked, [ask])[0]
            assert isinstance(again, Decision), again
            assert again.allowed, f"{answer.retry_after_us} µs after {answer}: {again}"

    def is_calm(self) -> bool:
        return (
            self.store.alive
            and all(each.link.fault is Fault.NONE and not each.guard.breakers for each in self.instances)
            and not any(self.truth.debts(number, self.store.clock()) for number in range(INSTANCES))
            and self.loop.time() > self.late_until
            and self.catalog.trouble is Trouble.NONE
            and self.loop.time() > self.troubled_until
        )

    def ask(self, instance: Instance, batch: list[tuple[tuple[str, str], str, int]]) -> list[Decision | TidegateError]:
        if len(batch) > 1 and instance.guard.open_breakers:
            # The breaker's probe may be one of them: the others are then decided by shares before it puts these back, which is
            # right, but not in the order of the answers.
            return [self.ask(instance, [each])[0] for each in batch]
        if any(each.link.fault is Fault.LATE for each in self.instances):
            self.late_until = self.loop.time() + LATE_S + TIMEOUT_S
        checks = [Check.of(f"/{path}", method, key, IP, cost) for (method, path), key, cost in batch]
        self.truth.asked += 1
        well, breakers_open, sent_us = instance.link.well, bool(instance.guard.open_breakers), self.store.clock()
        instance.counters.seen = []
        if len(checks) == 1:
            try:
                answers: list[Decision | TidegateError] = [self.run(instance.gate.check(checks[0]))]
            except TidegateError as error:
                answers = [error]
        else:
            answers = self.run(instance.gate.check_many(checks))
        seen = iter(instance.counters.seen)
        for check, answer in zip(checks, answers, strict=True):
            note(f"{check} at {instance.number}: {answer!r}")
            charge = None
            if isinstance(answer, TidegateError):
                assert answer.status == CODES[answer.code], answer
            # Who is refused is not counted, nor who has no limit.
            if isinstance(answer, StoreUnavailable) or (isinstance(answer, Decision) and answer.limits is not None):
                charge, outcome = next(seen)
                assert outcome is answer
                assert charge.cost == check.cost
            self.must_fit_the_policy(instance, check, answer, charge)
            if charge is not None:
                healthy = well and not breakers_open
                self.must_fit_the_truth(instance, charge, answer, healthy, sent_us)  # type: ignore[arg-type]
        assert next(seen, None) is None
        return answers

    def must_fit_the_policy(
        self, instance: Instance, check: Check, answer: Decision | TidegateError, charge: Charge | None
    ) -> None:
        """Some version of key and tier that may be served says so."""
        stale = self.loop.time() <= self.troubled_until
        if isinstance(answer, TidegateError) and answer.code == "CATALOG_UNAVAILABLE":
            self.trouble_explains(answer)
            return
        digest = hash_api_key(check.api_key or "")
        expected: list[Any] = []
        for version in range(instance.key_from.get(digest, 0) if stale else instance.seen_from, self.catalog.head + 1):
            key = next((each for each in self.catalog.policies[version].api_keys if each.sha256 == digest), None)
            if key is None:
                expected.append("INVALID_API_KEY")
            elif key.status is KeyStatus.REVOKED:
                expected.append("API_KEY_REVOKED")
            else:
                for of_tier in range(0 if stale else instance.seen_from, self.catalog.head + 1):
                    tier = next(each for each in self.catalog.policies[of_tier].tiers if each.name == key.tier)
                    expected.append(self.counted(tier, key, check))
        if charge is None:
            got: Any = answer.code if isinstance(answer, TidegateError) else []
        else:
            got = [
                (limits.name, limits.algorithm, [limit.text for limit in limits.limits], subject)
                for limits, subject in charge.counters
            ]
        assert got in expected, f"{got} is none of {expected}"

    def counted(self, tier: Tier, key: ApiKey, check: Check) -> list[Any]:
        """What a check is counted by: the rule of its path and method, and the tier."""
        found = [each for each in tier.rules if each.endpoint == check.path and check.method in (each.methods or (check.method,))]
        # A rule that names its methods goes before one that does not.
        found.sort(key=lambda each: not each.methods)
        subjects = {"api_key": f"k:{key.id}", "ip": f"i:{IP}", "tier": f"t:{tier.name}"}
        counters: list[Any] = [
            (f"{tier.name}:{each.name}", each.algorithm, [limit.text for limit in each.limits], subjects[each.subject])
            for each in found[:1]
        ]
        if tier.limits:
            counters.append((tier.name, Algorithm.SLIDING_WINDOW, [limit.text for limit in tier.limits], f"k:{key.id}"))
        return counters

    def trouble_explains(self, error: TidegateError) -> None:
        assert self.loop.time() <= self.troubled_until, f"the catalog was well: {error!r}"

    def must_fit_the_truth(self, instance: Instance, charge: Charge, outcome: ChargeOutcome, healthy: bool, sent_us: int) -> None:
        held = held_by(charge)
        for each in held:
            self.truth.limit_of[each.place] = each
        if isinstance(outcome, StoreUnavailable):
            assert not healthy, "the store is well"
            assert charge.counters[0][0].on_failure is OnFailure.DENY
            return
        assert outcome.limit is not None
        assert outcome.remaining is not None
        assert 0 <= outcome.remaining <= outcome.limit
        assert outcome.reset_after_us >= 0
        coming = instance.guard._debts.on_the_way
        if outcome.degraded and any((limits.name, limits.algorithm, subject) in coming for limits, subject in charge.counters):
            # A debt that a slow store has not confirmed is neither in the share nor surely in the store.
            allows = charge.counters[0][0].on_failure is OnFailure.ALLOW
            assert outcome.allowed == (allows or not charge.cost), "while a debt is on its way nothing more is admitted"
            return
        if outcome.allowed:
            assert outcome.retry_after_us == 0
        else:
            assert charge.cost, "a peek is always allowed"
            never = any(charge.cost > (self.truth.share(each) if outcome.degraded else each.limit).capacity for each in held)
            assert (outcome.retry_after_us is None) == never
            assert outcome.retry_after_us is None or outcome.retry_after_us > 0
        if outcome.degraded:
            assert not healthy, "the store is well"
            self.must_fit_the_share(instance, charge, outcome)
        else:
            self.must_fit_the_store(instance, charge, outcome, sent_us)

    def must_fit_the_share(self, instance: Instance, charge: Charge, outcome: Decision) -> None:
        on_failure = charge.counters[0][0].on_failure
        assert on_failure is not OnFailure.DENY
        if on_failure is OnFailure.ALLOW:
            assert outcome.allowed
            return
        truth, held, now = self.truth, held_by(charge), outcome.at_us
        room = min(truth.share(each).capacity - truth.least_of_share(instance.number, each, now) - charge.cost for each in held)
        least = min(truth.share(each).capacity - truth.most_of_share(instance.number, each, now) - charge.cost for each in held)
        if instance.guard.late.remaining(charge.counters) is not None:
            # Close to a limit it is a share of what remained at the store's last answer.
            least = min(least, -1)
        assert not outcome.allowed or room >= 0 or not charge.cost, f"the share leaves {room}"
        assert outcome.allowed or (least < 0 and charge.cost), f"the share leaves {least}"
        if outcome.allowed:
            assert outcome.remaining is not None
            assert max(least, 0) <= outcome.remaining <= max(room, 0)
            for each in held if charge.cost else ():
                truth.drop_expired(instance.number, each, now)
                truth.owed[instance.number][each.place].append(Admitted(now, charge.cost, truth.asked))

    def must_fit_the_store(self, instance: Instance, charge: Charge, outcome: Decision, sent_us: int) -> None:
        truth, held, now = self.truth, held_by(charge), outcome.at_us
        assert sent_us - 1 <= now <= truth.now_us + 1 or not outcome.allowed
        if not outcome.allowed:
            # A remembered denial holds at some moment of the check.
            assert any(
                truth.most(each, moment) + charge.cost > each.limit.capacity
                for each in held
                for moment in (sent_us, truth.now_us, now)
            ), "there was room"
            return
        for each in held:
            late = [debt for debt in truth.owed[instance.number][each.place] if debt.asked < truth.asked]
            still_counts = truth.least_of_share(instance.number, each, now) > 0
            assert not (late and still_counts), f"{late} was not put back before the store was asked"
        if not charge.cost:
            room = [(truth.least(each, now), truth.most(each, now), each.limit.capacity) for each in held]
        else:
            room = [
                (truth.least(each, now) + charge.cost, truth.most(each, now) + charge.cost, each.limit.capacity) for each in held
            ]
            assert all(least <= capacity for least, _, capacity in room), f"above a limit: {room}"
            for each in held:
                truth.known[each.place].append((now, charge.cost))
                truth.unanswered[instance.number][each.place].clear()
        least_left = min(max(capacity - most, 0) for _, most, capacity in room)
        most_left = min(max(capacity - least, 0) for least, _, capacity in room)
        assert least_left <= outcome.remaining <= most_left, f"{room} and {outcome.remaining} left"  # type: ignore[operator]

    @rule(instance=instances, key=st.sampled_from(KEYS[:3]))
    def counters_are_reset(self, instance: int, key: str) -> None:
        asked = self.instances[instance]
        reset: list[Any] = []
        original = asked.counters.reset

        async def noted(counters: Any) -> None:
            reset.extend(counters)
            await original(counters)

        asked.counters.reset = noted  # type: ignore[method-assign]
        healthy, failed = asked.link.well, None
        try:
            self.run(asked.gate.reset(key))
            assert reset
        except TidegateError as error:
            failed = error
        finally:
            asked.counters.reset = original  # type: ignore[method-assign]
        if failed is not None and failed.code == "CATALOG_UNAVAILABLE":
            self.trouble_explains(failed)
        elif failed is not None and failed.code != "INVALID_API_KEY":
            assert failed.code == "STORE_UNAVAILABLE"
            assert not healthy
        self.truth.forget(instance, reset)

    # In the end.

    @rule()
    def settle(self) -> None:
        """All is well for a while: then all instances ask the store again, nothing is owed, and what is left is right."""
        self.store.alive = True
        self.catalog.trouble, self.catalog.behind = Trouble.NONE, 0
        for instance in self.instances:
            instance.link.fault = Fault.NONE
        self.wait(max(OPEN_S + 0.1, RETRY_S + 0.4))
        probe = ("GET", "bucket"), KEYS[0], 0
        for instance in self.instances:
            self.look(instance)
            self.ask(instance, [probe])
            charge = Charge(((next(iter(self.truth.limit_of.values())).limits, "probe"),), 0) if self.truth.limit_of else None
            if charge is not None:
                assert isinstance(self.run(instance.guard.charge([charge]))[0], Decision)
        self.wait(2.2)
        now = self.store.clock()
        for instance in self.instances:
            assert not instance.guard.open_breakers
            assert not instance.guard.owed
            assert not self.truth.debts(instance.number, now), "admitted and never put back"
        for place, each in self.truth.limit_of.items():
            charge = Charge(((each.limits, place.subject),), 0)
            outcome = self.run(self.instances[0].guard.charge([charge]))[0]
            assert isinstance(outcome, Decision)
            assert not outcome.degraded
            self.must_fit_the_store(self.instances[0], charge, outcome, now)

    @precondition(lambda self: hasattr(self, "instances"))
    @invariant()
    def memory_is_bounded(self) -> None:
        for instance in self.instances:
            assert len(instance.guard.breakers) <= 1
            assert instance.guard.instances == INSTANCES


Model.TestCase.settings = settings(
    max_examples=int(os.environ.get("MODEL_EXAMPLES", "150")),
    stateful_step_count=int(os.environ.get("MODEL_STEPS", "40")),
    derandomize="MODEL_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
TestModel = Model.TestCase
