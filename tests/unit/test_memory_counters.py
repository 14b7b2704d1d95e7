"""Memory counters against a model that forgets nothing, and their bounds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests import oracles
from tests.conftest import Clock
from tidegate.counters import Charge, KeptCounters
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.memory_storage import LOG_ENTRIES_A_SUBJECT
from tidegate.policy.limits import Algorithm, Limit, LimitSet

START = 1_700_000_000_000_000


def limit_set(name: str, algorithm: Algorithm, *texts: str) -> LimitSet:
    return LimitSet(name, algorithm, [Limit.parse(text) for text in texts])


class CountersAgainstModel(RuleBasedStateMachine):
    """Any sequence of charges, peeks, resets, waits, sweeps and changed limits: the store answers as the whole history does."""

    @initialize(algorithm=st.sampled_from(list(Algorithm)))
    def begin(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        self.clock = Clock(START)
        self.store = MemoryCounters(clock=self.clock)
        burst = " burst 4" if algorithm.is_bucket else ""
        self.sets = {
            "one": limit_set("one", algorithm, f"4/minute{burst}"),
            "two": limit_set("two", algorithm, f"3/10s{' burst 3' if burst else ''}", f"6/2m{' burst 6' if burst else ''}"),
            "tier": limit_set("tier", algorithm, f"7/5m{' burst 7' if burst else ''}"),
        }
        self.history: dict[tuple[str, str, str], oracles.History] = {}

    def _past(self, name: str, subject: str, limit: Limit) -> oracles.History:
        return self.history.setdefault((name, subject, limit.window_name), [])

    @rule(
        names=st.lists(st.sampled_from(["one", "two", "tier"]), min_size=1, max_size=3, unique=True),
        subject=st.sampled_from("ab"),
        cost=st.integers(0, 5),
    )
    def charge(self, names: list[str], subject: str, cost: int) -> None:
        now = self.clock()
        asked = [(name, limit) for name in names for limit in self.sets[name].limits]
        passes = all(oracles.allowed(self.algorithm, limit, self._past(name, subject, limit), now, cost) for name, limit in asked)
        decision = self.store.charge_all(tuple((self.sets[name], subject) for name in names), cost)
        assert decision.allowed == passes
        if passes and cost:
            for name, limit in asked:
                self._past(name, subject, limit).append((now, cost))
        left = [
            (max(limit.capacity - oracles.used(self.algorithm, limit, self._past(name, subject, limit), now), 0), limit)
            for name, limit in asked
        ]
        assert decision.remaining == min(left, key=lambda each: each[0])[0]
        if not passes:
            # The retry holds for all limits together: denied just before it, allowed at it.
            retry = decision.retry_after_us
            if retry is None:
                assert any(cost > limit.capacity for _, limit in asked)
            else:
                for moment, expected in ((now + retry - 1, False), (now + retry, True)):
                    assert expected == all(
                        oracles.allowed(self.algorithm, limit, self._past(name, subject, limit), moment, cost)
                        for name, limit in asked
                    )

    @rule(step=st.one_of(st.integers(0, 5_000_000), st.integers(0, 700_000_000)))
    def wait(self, step: int) -> None:
        self.clock.now_us += step

    @rule(steps=st.integers(1, 50))
    def sweep(self, steps: int) -> None:
        self.store.sweep(steps)

    @rule(name=st.sampled_from(["one", "two", "tier"]), amount=st.integers(1, 9))
    def change_amounts(self, name: str, amount: int) -> None:
        if self.algorithm.is_bucket:
            return  # a changed bucket keeps its level, rounded up once: told apart from the history, and tested by itself
        windows = [limit.window_name for limit in self.sets[name].limits]
        self.sets[name] = limit_set(name, self.algorithm, *(f"{amount + extra}/{window}" for extra, window in enumerate(windows)))

    @rule(subject=st.sampled_from("ab"), name=st.sampled_from(["one", "two"]))
    def reset(self, subject: str, name: str) -> None:
        coroutine = self.store.reset([(self.sets[name], subject)])
        with pytest.raises(StopIteration):
            coroutine.send(None)
        for limit in self.sets[name].limits:
            self._past(name, subject, limit).clear()

    @invariant()
    def count_is_right(self) -> None:
        if hasattr(self, "store"):
            assert len(self.store) == sum(len(shard) for shard in self.store._shards)
            assert len(self.store) == sum(len(bucket) for bucket in self.store._due.values())
            assert self.store._log_entries == sum(
                self.store._newest[key[: key.index(":") + 1]].entries(held)
                for shard in self.store._shards
                for key, held in shard.items()
                if held
            )

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.clock.now_us += 40 * 86_400_000_000
            while self.store.sweep(100) == 100:
                pass
            assert len(self.store) == 0, "what has expired is forgotten"
            assert not self.store._due


TestCountersAgainstModel = CountersAgainstModel.TestCase
TestCountersAgainstModel.settings = settings(max_examples=150, stateful_step_count=30)


async def test_denied_check_changes_nothing_anywhere() -> None:
    clock = Clock(START)
    store = MemoryCounters(clock=clock)
    wide, narrow = limit_set("wide", Algorithm.SLIDING_LOG, "100/minute"), limit_set("narrow", Algorithm.FIXED_WINDOW, "1/minute")
    both = Charge(((wide, "u"), (narrow, "u")))
    assert [each.allowed for each in await store.charge([both, both, both])] == [True, False, False]
    assert store.charge_one(wide, "u", 0).remaining == 99
    assert store._log_entries == 1


async def test_changed_windows_carry_over_what_they_share() -> None:
    clock = Clock(START)
    store = MemoryCounters(clock=clock)
    before = limit_set("rule", Algorithm.SLIDING_WINDOW, "10/minute", "100/day")
    for _ in range(4):
        store.charge_all(((before, "u"),), 1)
    after = limit_set("rule", Algorithm.SLIDING_WINDOW, "50/day")
    assert store.charge_one(after, "u", 1).remaining == 45
    again = limit_set("rule", Algorithm.SLIDING_WINDOW, "10/minute", "100/day")
    assert store.charge_all(((again, "u"),), 0).remaining == 10, "the minute was not counted meanwhile"
    [windows] = await store.windows([(again, "u")])
    assert [window.remaining for window in windows] == [10, 95], "the day goes on from what the other windows counted"
    assert len(store) == sum(len(bucket) for bucket in store._due.values())


@pytest.mark.parametrize("algorithm", list(Algorithm))
async def test_windows_that_change_and_change_back_lose_no_consumption(algorithm: Algorithm) -> None:
    store = MemoryCounters(clock=Clock(START))
    day = "100/day burst 100" if algorithm.is_bucket else "100/day"
    wide, narrow = (day, "50/hour"), (day,)
    for charged, windows in enumerate((wide, narrow, wide, narrow, wide)):
        rule = limit_set("rule", algorithm, *windows)
        [left] = await store.windows([(rule, "u")])
        assert left[-1].remaining == 100 - charged
        store.charge_all(((rule, "u"),), 1)
        assert len(store) == sum(len(bucket) for bucket in store._due.values()) == 1 + min(charged, 1)
    await store.reset([(rule, "u")])
    [left] = await store.windows([(limit_set("rule", algorithm, *narrow), "u")])
    assert left[-1].remaining == 100, "a reset holds for all windows that the rule has had"


async def test_reset_forgets_under_every_shape_of_the_rule() -> None:
    store = MemoryCounters(clock=Clock(START))
    before = limit_set("rule", Algorithm.SLIDING_WINDOW, "10/minute", "100/day")
    store.charge_all(((before, "u"), (limit_set("x", Algorithm.FIXED_WINDOW, "5/day"), "u")), 3)
    after = limit_set("rule", Algorithm.SLIDING_WINDOW, "50/day")
    await store.reset([(after, "u")])
    assert store.charge_one(after, "u", 0).remaining == 50
    assert store.charge_all(((before, "u"),), 0).remaining == 10


def test_two_limits_of_one_name_share_their_count_and_others_do_not() -> None:
    store = MemoryCounters(clock=Clock(START))
    one, same, other = (limit_set(name, Algorithm.FIXED_WINDOW, "5/day") for name in ("a", "a", "b"))
    assert [store.charge_one(limits, "u", 1).remaining for limits in (one, same, other)] == [4, 3, 4]
    # Joined parts are unambiguous: a counter 'a' of 'b:c' is not the counter 'a:b' of 'c'.
    assert store.charge_one(limit_set("a:b", Algorithm.FIXED_WINDOW, "5/day"), "c", 1).remaining == 4
    assert store.charge_one(one, "b:c", 1).remaining == 4


def test_bound_holds_and_the_nearest_to_expiry_go_first() -> None:
    clock = Clock(START)
    store = MemoryCounters(max_subjects=100, clock=clock)
    long, short = limit_set("long", Algorithm.SLIDING_LOG, "5/day"), limit_set("short", Algorithm.SLIDING_LOG, "5/minute")
    for number in range(40):
        store.charge_one(long, f"l{number}", 1)
    for number in range(5_000):
        clock.now_us += 10
        store.charge_one(short, f"s{number}", 1)
        assert len(store) + store._log_entries // LOG_ENTRIES_A_SUBJECT <= 100
    assert store.evicted == 5_000 + 40 - len(store)
    assert all(store.charge_one(long, f"l{number}", 0).remaining == 4 for number in range(40)), "the long ones are all there"


def test_sliding_logs_weigh_by_their_length() -> None:
    clock = Clock(START)
    store = MemoryCounters(max_subjects=50, clock=clock)
    log = limit_set("log", Algorithm.SLIDING_LOG, "1000/minute")
    for number in range(2_000):
        clock.now_us += 1
        store.charge_one(log, f"u{number % 40}", 1)
        assert len(store) + store._log_entries // LOG_ENTRIES_A_SUBJECT <= 50


def test_eviction_inside_one_check_loses_no_bookkeeping() -> None:
    clock = Clock(START)
    store = MemoryCounters(max_subjects=2, clock=clock)
    sets = [limit_set(name, Algorithm.FIXED_WINDOW, f"9/{window}") for name, window in (("a", "10s"), ("b", "20s"), ("c", "30s"))]
    for number in range(300):
        clock.now_us += 700_000
        order = [sets[(number + place) % 3] for place in range(1 + number % 3)]
        store.charge_all(tuple((limits, f"u{number % 4}") for limits in order), 1)
        held = {key for shard in store._shards for key in shard}
        filed = [key for bucket in store._due.values() for key in bucket]
        assert sorted(filed) == sorted(held)
        assert len(store) == len(held) <= 2


def test_a_flood_of_subjects_grows_nothing_beyond_the_bound() -> None:
    clock = Clock(START)
    store = MemoryCounters(max_subjects=1_000, clock=clock)
    limits = limit_set("flood", Algorithm.SLIDING_WINDOW, "5/minute")
    for number in range(200_000):
        clock.now_us += 3
        store.charge_one(limits, f"attacker-{number}", 1)
    sizes = {
        "keys": sum(len(shard) for shard in store._shards),
        "filed": sum(len(bucket) for bucket in store._due.values()),
        "buckets": len(store._due),
        "ends": len(store._ends),
        "compiled limits": len(store._compiled) + len(store._newest) + len(store._tokens),
    }
    assert sizes["keys"] == sizes["filed"] == 1_000
    assert sizes["buckets"] == sizes["ends"] <= 200
    assert sizes["compiled limits"] == 3


@pytest.mark.parametrize("cost", [0, 6])
def test_what_is_not_charged_is_not_kept(cost: int) -> None:
    store = MemoryCounters(clock=Clock(START))
    limits = limit_set("peek", Algorithm.SLIDING_WINDOW, "5/minute")
    for number in range(1_000):
        store.charge_one(limits, f"u{number}", cost)
    assert len(store) == 0
    assert not store._due


def test_peek_reports_when_nothing_is_left() -> None:
    store = MemoryCounters(clock=Clock(START))
    limits = limit_set("peek", Algorithm.SLIDING_WINDOW, "2/minute")
    store.charge_one(limits, "u", 2)
    peek = store.charge_one(limits, "u", 0)
    assert (peek.allowed, peek.remaining, peek.retry_after_us) == (True, 0, 0)


def test_the_compiled_limits_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from tidegate.counters import memory_storage

    monkeypatch.setattr(memory_storage, "_MAX_COMPILED", 50)
    store = MemoryCounters(clock=Clock(START))
    for amount in range(1, 500):
        decision = store.charge_one(limit_set("rule", Algorithm.FIXED_WINDOW, f"{amount * 2}/day"), "u", 1)
        assert decision.remaining == amount * 2 - amount
        assert len(store._compiled) <= 50


def test_max_subjects_below_one_is_rejected() -> None:
    with pytest.raises(ValueError, match="max_subjects 0"):
        MemoryCounters(max_subjects=0)


def test_clock_does_not_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from tidegate.counters.memory_storage import store_clock

    clock = store_clock()
    before = clock()
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    assert clock() >= before
    assert abs(before - time.clock_gettime_ns(time.CLOCK_REALTIME) // 1000) < 60_000_000


def _states(store: MemoryCounters) -> dict[str, Any]:
    return {key: held for shard in store._shards for key, held in shard.items()}


def test_close_gives_everything_back() -> None:
    store = MemoryCounters(clock=Clock(START))
    store.charge_one(limit_set("x", Algorithm.FIXED_WINDOW, "5/day"), "u", 1)
    coroutine = store.close()
    with pytest.raises(StopIteration):
        coroutine.send(None)
    assert (len(store), _states(store)) == (0, {})


@pytest.mark.parametrize("texts", [("300/minute",), ("300/minute", "100000/hour")])
def test_a_denied_log_drops_its_expired_entries(texts: tuple[str, ...]) -> None:
    clock = Clock(START)
    store = MemoryCounters(clock=clock)
    limits = limit_set("log", Algorithm.SLIDING_LOG, *texts)
    for _ in range(300):
        clock.now_us += 1000
        assert store.charge_all(((limits, "s"),), 1).allowed
    clock.advance(59.9)
    before = store._log_entries
    denied = store.charge_all(((limits, "s"),), 300)
    assert not denied.allowed
    assert store._log_entries == before - 200
    assert store.charge_all(((limits, "s"),), 0).remaining == 200
    assert store.charge_all(((limits, "s"),), 300).retry_after_us == denied.retry_after_us


@settings(max_examples=150)
@given(
    st.sampled_from(list(Algorithm)),
    st.sampled_from(list(Algorithm)),
    st.lists(st.tuples(st.integers(0, 40_000_000), st.integers(0, 4), st.sampled_from(["k:a", "t:b"])), min_size=1, max_size=25),
)
def test_two_counters_are_decided_as_any_number_is(
    algorithm: Algorithm, other: Algorithm, steps: list[tuple[int, int, str]]
) -> None:
    """The way of a rule and its tier is written out; both ways decide and leave the same."""
    clock = Clock(START)
    limits, tier_limits = limit_set("rule", algorithm, "3/minute"), limit_set("tier", other, "5/minute")
    one, kept, two = MemoryCounters(clock=clock), MemoryCounters(clock=clock), MemoryCounters(clock=clock)
    known: dict[str, KeptCounters] = {}
    for elapsed_us, cost, tier_subject in steps:
        clock.now_us += elapsed_us
        counters = ((limits, "k:a"), (tier_limits, tier_subject))
        owned = known.setdefault(tier_subject, KeptCounters(counters))
        decision = two._charge_several(counters, cost)
        assert one.charge_all(counters, cost) == decision
        assert kept.charge_all(owned, cost) == decision
        assert _states(one) == _states(two) == _states(kept)
    assert not one._pairs


async def test_kept_counters_are_found_after_all_that_moves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resets, expiry, eviction, an emptied store and an emptied table of limits change no place that is remembered."""
    monkeypatch.setattr("tidegate.counters.memory.MAX_PAIRS", 2)
    clock = Clock(START)
    limits, tier_limits = (
        limit_set("rule", Algorithm.SLIDING_WINDOW, "3/minute"),
        limit_set("tier", Algorithm.FIXED_WINDOW, "9/day"),
    )
    store = MemoryCounters(clock=clock)
    kept = [KeptCounters(((limits, f"k:{number}"), (tier_limits, f"k:{number}"))) for number in range(3)]
    for each in kept * 3:
        assert store.charge_all(each, 1).allowed
    assert len(store._pairs) <= 2
    assert not store.charge_all(kept[0], 1).allowed
    await store.reset(kept[0])
    assert store.charge_all(kept[0], 1).remaining == 2
    clock.advance(200)
    assert store.charge_all(kept[1], 1).remaining == 2
    store._compiled.clear()
    assert store.charge_all(kept[1], 1).remaining == 1
    store.clear()
    assert store.charge_all(kept[1], 3).remaining == 0
    assert not store.charge_all(tuple(kept[1]), 1).allowed
    store.max_subjects = 2
    for number in range(10):
        store.charge_all(((limits, f"k:new{number}"),), 1)
    assert store.charge_all(kept[1], 1).allowed
