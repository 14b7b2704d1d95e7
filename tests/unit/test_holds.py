"""Holds with counters in memory: through the store, the gate and the app."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import Clock
from tests.raw_http import RawAnswer
from tests.rsgi import call
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.blocking import BlockingMemory
from tidegate.counters.factory import open_blocking, open_counters
from tidegate.counters.holds import HoldHandle, new_id
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.redis.hold_ends import HoldEnds
from tidegate.decision import Check, Decision
from tidegate.doors.asgi import RateLimitMiddleware
from tidegate.doors.exceeded import RateLimitExceeded
from tidegate.doors.http import DataPlane
from tidegate.doors.limiter import Limiter, SyncLimiter
from tidegate.errors import BadRequest, HoldEnded, HoldNotFound, PolicyError, TooManyHolds
from tidegate.gate.gate import Gate
from tidegate.observation import Observation
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.policy.toml_reader import parse_policy
from tidegate.settings import CounterSettings

POLICY = """
[[tiers]]
name = "free"
quotas = ["10000/month"]
overage = { up_to = "20%" }
  [[tiers.rules]]
  endpoint = "/llm/*"
  name = "tokens"
  algorithm = "fixed_window"
  limits = ["1000/minute"]

[[api_keys]]
key = "demo-free-key-0001"
tier = "free"

[anonymous]
tier = "free"
"""
KEY = {"api_key": "demo-free-key-0001", "path": "/llm/chat", "method": "POST"}


def limits_of(algorithm: Algorithm, *texts: str) -> LimitSet:
    return LimitSet("holds", algorithm, [Limit.parse(text) for text in texts])


@pytest.fixture
def store(clock: Clock) -> MemoryCounters:
    return MemoryCounters(clock=clock)


@pytest.fixture
def app(store: MemoryCounters) -> DataPlane:
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), store)
    made = DataPlane(gate, {})
    made.gate = gate  # type: ignore[attr-defined]
    return made


async def post(app: DataPlane, path: str, body: Any) -> tuple[RawAnswer, Any]:
    answer = await call(app, path, method="POST", body=json.dumps(body).encode())
    return answer, json.loads(answer.body)


@pytest.mark.parametrize("algorithm", [each for each in Algorithm if each is not Algorithm.LEAKY_BUCKET])
def test_what_is_not_used_goes_back(store: MemoryCounters, algorithm: Algorithm) -> None:
    counters = ((limits_of(algorithm, "100/minute"), "s"),)
    decision, hold = store.open_hold_now(counters, 80, 60_000_000)
    assert (decision.allowed, decision.remaining) == (True, 20)
    assert hold is not None
    assert store.open_hold_now(counters, 30, 60_000_000)[1] is None
    settled = store.settle_hold_now(hold, 10)
    assert (settled.cost, settled.late, settled.remaining, settled.repeated) == (10, False, 90, False)
    assert store.settle_hold_now(hold, 70).cost == 10
    assert store.charge_all(counters, 0).remaining == 90


@pytest.mark.parametrize("algorithm", [each for each in Algorithm if each is not Algorithm.LEAKY_BUCKET])
def test_more_than_was_reserved_is_charged_above_the_limit(clock: Clock, store: MemoryCounters, algorithm: Algorithm) -> None:
    counters = ((limits_of(algorithm, "100/minute"), "s"),)
    _, hold = store.open_hold_now(counters, 80, 60_000_000)
    assert hold is not None
    assert store.settle_hold_now(hold, 250).remaining == 0
    assert not store.charge_all(counters, 1).allowed
    clock.advance(40)
    assert store.charge_all(counters, 1).allowed == (algorithm is Algorithm.FIXED_WINDOW)


@pytest.mark.parametrize("algorithm", [Algorithm.FIXED_WINDOW, Algorithm.SLIDING_LOG])
def test_an_expired_hold_gives_back_and_is_charged_late(clock: Clock, store: MemoryCounters, algorithm: Algorithm) -> None:
    counters = ((limits_of(algorithm, "100/minute"), "s"),)
    _, hold = store.open_hold_now(counters, 100, 5_000_000)
    assert hold is not None
    denied = store.charge_all(counters, 1)
    assert (denied.allowed, denied.retry_after_us) == (False, 5_000_000)
    clock.advance(5)
    assert store.charge_all(counters, 60).allowed
    assert store.expired_holds == 1
    with pytest.raises(HoldEnded):
        store.renew_hold_now(hold, 5_000_000)
    settled = store.settle_hold_now(hold, 70)
    assert (settled.late, settled.remaining) == (True, 0)
    assert store.settle_hold_now(hold, 1) == settled.__class__(70, True, 100, 0, settled.reset_after_us, True)


def test_renewed_holds_expire_later(clock: Clock, store: MemoryCounters) -> None:
    counters = ((limits_of(Algorithm.FIXED_WINDOW, "100/hour"), "s"),)
    _, hold = store.open_hold_now(counters, 100, 5_000_000)
    assert hold is not None
    for _ in range(4):
        clock.advance(4)
        store.renew_hold_now(hold, 5_000_000)
        assert not store.charge_all(counters, 1).allowed
    clock.advance(5)
    assert store.charge_all(counters, 100).allowed


def test_units_go_back_only_into_their_window(clock: Clock, store: MemoryCounters) -> None:
    counters = ((limits_of(Algorithm.FIXED_WINDOW, "100/minute"), "s"),)
    _, hold = store.open_hold_now(counters, 60, 600_000_000)
    clock.advance(60)
    assert store.charge_all(counters, 90).remaining == 10
    assert hold is not None
    assert store.settle_hold_now(hold, 0).remaining == 10


def test_a_bucket_returns_what_has_not_drained(clock: Clock, store: MemoryCounters) -> None:
    counters = ((limits_of(Algorithm.TOKEN_BUCKET, "60/minute"), "s"),)
    _, hold = store.open_hold_now(counters, 60, 600_000_000)
    clock.advance(30)
    # Others were admitted in place of what has drained.
    assert store.charge_all(counters, 30).allowed
    assert hold is not None
    assert store.settle_hold_now(hold, 0).remaining == 30


def test_a_reset_is_not_given_back_to(clock: Clock, store: MemoryCounters) -> None:
    counters = ((limits_of(Algorithm.FIXED_WINDOW, "100/minute"), "s"),)
    _, hold = store.open_hold_now(counters, 60, 60_000_000)
    store._reset(counters)
    assert store.charge_all(counters, 50).remaining == 50
    assert hold is not None
    assert store.settle_hold_now(hold, 0).remaining == 50


class GeneralHolds(MemoryCounters):
    """Without the short paths of common cases."""

    def _settle_plain(self, row: int, cost: int, now: int) -> None:
        return None

    def charge_all(self, counters: tuple[tuple[LimitSet, str], ...], cost: int) -> Decision:
        return self._charge_several(counters, cost)


@pytest.mark.parametrize("algorithm", Algorithm)
def test_the_short_paths_of_common_cases_do_what_the_long_ones_do(algorithm: Algorithm) -> None:
    other = LimitSet("tier", Algorithm.TOKEN_BUCKET, [Limit.parse("40/second")])
    steps = st.lists(
        st.tuples(
            st.sampled_from(["open", "open", "settle", "settle", "charge", "renew", "reset"]),
            st.one_of(st.integers(0, 40_000), st.integers(0, 3_000_000)),
            st.integers(0, 50),
            st.integers(0, 5),
        ),
        max_size=30,
    )

    @settings(max_examples=100)
    @given(steps, st.booleans())
    def compare(taken: list[tuple[str, int, int, int]], both: bool) -> None:
        clock = Clock(1_700_000_000_000_000)
        stores = (MemoryCounters(clock=clock), GeneralHolds(clock=clock))
        counters: tuple[tuple[LimitSet, str], ...] = ((limits_of(algorithm, "90/second"), "s"),)
        if both:
            counters += ((other, "s"),)
        known: list[tuple[HoldHandle | None, ...]] = []
        for what, advance_us, cost, which in taken:
            clock.now_us += advance_us
            if what == "open":
                opened = [each.open_hold_now(counters, cost, 2_000_000) for each in stores]
                assert opened[0][0] == opened[1][0]
                if opened[0][0].allowed:
                    known.append(tuple(handle for _, handle in opened))
            elif what == "charge":
                assert stores[0].charge_all(counters, cost) == stores[1].charge_all(counters, cost)
            elif what == "reset":
                for each in stores:
                    each._reset(counters)
            elif known:
                handles = known[which % len(known)]
                assert handles[0] is not None
                assert handles[1] is not None
                if what == "settle":
                    settled = [each.settle_hold_now(handle, cost) for each, handle in zip(stores, handles, strict=True) if handle]
                    assert settled[0] == settled[1]
                else:
                    ended = []
                    for each, handle in zip(stores, handles, strict=True):
                        try:
                            each.renew_hold_now(handle, 3_000_000)
                            ended.append(False)
                        except HoldEnded:
                            ended.append(True)
                    assert ended[0] == ended[1]
        assert stores[0].open_holds == stores[1].open_holds
        assert stores[0]._log_entries == stores[1]._log_entries

    compare()


def test_bounds(store: MemoryCounters, clock: Clock) -> None:
    counters = ((limits_of(Algorithm.FIXED_WINDOW, "100/minute"), "s"),)
    store.max_holds = 3
    for _ in range(3):
        store.open_hold_now(counters, 0, 60_000_000)
    with pytest.raises(TooManyHolds, match="3 holds are open"):
        store.open_hold_now(counters, 0, 60_000_000)
    clock.advance(60)
    held = [store.open_hold_now(counters, 0, 60_000_000)[1] for _ in range(3)]
    for hold in held:
        assert hold is not None
        store.settle_hold_now(hold, 0)
    with pytest.raises(HoldNotFound):
        store.settle_hold_now(HoldHandle(new_id(), 1), 1)
    clock.advance(7200)
    store.open_hold_now(counters, 0, 60_000_000)
    assert (store.open_holds, len(store._forget), len(store._held)) == (1, 0, 1)
    for _ in range(1000):
        opened = store.open_hold_now(counters, 1, 60_000_000)[1]
        assert opened is not None
        store.settle_hold_now(opened, 0)
    assert len(store._hold_ends) < 100
    assert len(store._rows.mark) < 1100


def test_the_setting_bounds_the_holds_of_one_counter() -> None:
    store = open_counters(CounterSettings(max_holds=2))
    blocking = open_blocking(CounterSettings(max_holds=2))
    assert isinstance(store, MemoryCounters)
    assert isinstance(blocking, BlockingMemory)
    counters = ((limits_of(Algorithm.FIXED_WINDOW, "100/minute"), "s"),)
    for each in (store, blocking):
        held = [each.open_hold_now(counters, 1, 60_000_000)[1] for _ in range(2)]
        with pytest.raises(TooManyHolds, match=r"2 holds are open for one subject, as many as counters\.max_holds"):
            each.open_hold_now(counters, 1, 60_000_000)
        # Another subject has its own; a settled hold makes room.
        assert each.open_hold_now(((counters[0][0], "other"),), 1, 60_000_000)[1] is not None
        assert held[0] is not None
        each.settle_hold_now(held[0], 1)
        assert each.open_hold_now(counters, 1, 60_000_000)[1] is not None


async def test_a_denied_hold_is_a_violation(store: MemoryCounters) -> None:
    denied: list[tuple[str | None, int]] = []

    def observe(observation: Observation) -> None:
        if observation.denied_by is not None:
            denied.append((observation.denied_by.rule, observation.cost))

    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), store, observe=observe)
    check = Check.of("/llm/x", "POST", "demo-free-key-0001", cost=800)
    assert (await gate.holds.open(check)).hold is not None
    assert (await gate.holds.open(check)).hold is None
    assert denied == [("tokens", 800)]


@settings(max_examples=60)
@given(
    st.sampled_from([Algorithm.FIXED_WINDOW, Algorithm.SLIDING_LOG]),
    st.lists(
        st.tuples(st.sampled_from(["open", "settle", "check"]), st.integers(0, 9_000_000), st.integers(0, 40), st.integers(0, 5)),
        max_size=40,
    ),
)
def test_never_more_than_the_limit(algorithm: Algorithm, steps: list[tuple[str, int, int, int]]) -> None:
    """Used units that were settled in time within their reservation, and units of checks, never exceed the limit of an hour."""
    clock = Clock(1_700_000_000_000_000 // 3_600_000_000 * 3_600_000_000)
    store = MemoryCounters(clock=clock)
    counters = ((limits_of(algorithm, "100/hour"), "s"),)
    reserved: dict[str, tuple[HoldHandle, int, int]] = {}
    used = 0
    for what, advance, cost, which in steps:
        clock.now_us += advance
        held = sum(units for _, units, ends in reserved.values() if ends > clock.now_us)
        if what == "open":
            decision, hold = store.open_hold_now(counters, cost, 20_000_000)
            assert decision.allowed == (used + held + cost <= 100 or cost == 0)
            if hold is not None:
                reserved[hold.id] = (hold, cost, clock.now_us + 20_000_000)
        elif what == "settle" and reserved:
            hold, _, ends = reserved.pop(list(reserved)[which % len(reserved)])
            settled = store.settle_hold_now(hold, cost)
            assert settled.late == (ends <= clock.now_us)
            used += cost
        else:
            allowed = store.charge_all(counters, cost).allowed
            assert allowed == (used + held + cost <= 100 or cost == 0)
            used += cost if allowed else 0
        held = sum(units for _, units, ends in reserved.values() if ends > clock.now_us)
        assert store.charge_all(counters, 0).remaining == max(100 - used - held, 0)


async def test_the_http_door(app: DataPlane, clock: Clock) -> None:
    answer, opened = await post(app, "/v1/holds", {**KEY, "cost": 800, "ttl_s": 30})
    assert (answer.status, opened["allowed"], opened["remaining"]) == (200, True, 200)
    assert (opened["reserved"], opened["expires_after"], opened["rule"]) == (800, 30, "tokens")
    assert answer.headers["x-ratelimit-remaining"] == "200"
    answer, denied = await post(app, "/v1/holds", {**KEY, "cost": 300})
    assert (answer.status, denied["hold"], denied["reserved"], denied["retry_after"]) == (429, None, 0, 30)
    path = f"/v1/holds/{opened['hold']}"
    assert (await post(app, f"{path}/renew", {"ttl_s": 60}))[1] == {"hold": opened["hold"], "expires_after": 60}
    for _ in range(2):
        answer, settled = await post(app, f"{path}/settle", {"cost": 100})
        assert answer.status == 200
        assert (settled["cost"], settled["late"], settled["limit"], settled["remaining"]) == (100, False, 1000, 900)
    assert (await post(app, f"{path}/renew", {"ttl_s": 60}))[1]["error"]["code"] == "HOLD_ENDED"
    figures = app.gate.holds.figures  # type: ignore[attr-defined]
    assert (figures.opened, figures.denied, figures.settled, figures.late) == (1, 1, 1, 0)
    assert (figures.reserved_units, figures.used_units) == ({"tokens": 800}, {"tokens": 100})


async def test_limits_of_the_request(app: DataPlane) -> None:
    sent = {"namespace": "tokens", "subject": "u", "limits": ["100/minute"], "cost": 90}
    _, opened = await post(app, "/v1/holds", sent)
    assert (await post(app, "/v1/holds", sent))[0].status == 429
    _, settled = await post(app, f"/v1/holds/{opened['hold']}/settle", {"cost": 10})
    assert settled["remaining"] == 90


async def test_a_path_without_limits_can_be_held(app: DataPlane) -> None:
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy('[[tiers]]\nname = "t"\n[anonymous]\ntier = "t"\n'))), MemoryCounters())
    app = DataPlane(gate, {})
    _, opened = await post(app, "/v1/holds", {"path": "/x", "cost": 5})
    _, settled = await post(app, f"/v1/holds/{opened['hold']}/settle", {"cost": 7})
    assert (settled["cost"], settled["limit"], settled["remaining"]) == (7, None, None)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({**KEY, "ttl_s": 0}, "ttl_s 0 must be a whole number of seconds from 1 to 3600"),
        ({**KEY, "ttl_s": 3601}, "ttl_s 3601 must be"),
        ({**KEY, "ttl_s": 1.5}, "ttl_s 1.5 must be"),
        ({**KEY, "cost": 1001}, "cost 1001 is above 1000, the most that the limit 1000/minute ever admits at once"),
        ({**KEY, "cost": 10**9 + 1}, "cost 1000000001 must be a whole number"),
        ({"cost": 1}, "path is missing"),
        ({"path": "/x", "namespace": "n"}, "path and namespace came together"),
        ({"path": "/x", "subject": "s"}, "need a namespace"),
        ({**KEY, "units": 3}, "unknown field"),
    ],
)
async def test_bad_requests(app: DataPlane, body: Any, message: str) -> None:
    answer, said = await post(app, "/v1/holds", body)
    assert (answer.status, said["error"]["code"]) == (400, "BAD_REQUEST")
    assert message in said["error"]["message"]


async def test_clamp_reserves_the_most_there_is(app: DataPlane) -> None:
    answer, opened = await post(app, "/v1/holds", {**KEY, "cost": 5000, "clamp": True})
    assert (answer.status, opened["reserved"], opened["remaining"]) == (200, 1000, 0)


async def test_bad_ids_and_settlements(app: DataPlane, store: MemoryCounters) -> None:
    foreign = HoldHandle(new_id(), 10).text
    for hold, status, code in ((foreign, 404, "HOLD_NOT_FOUND"), ("x" * 9000, 400, "BAD_REQUEST"), ("abc", 400, "BAD_REQUEST")):
        for action, body in (("settle", {"cost": 1}), ("renew", {"ttl_s": 10})):
            answer, said = await post(app, f"/v1/holds/{hold}/{action}", body)
            assert (answer.status, said["error"]["code"]) == (status, code), hold[:20]
    opened = (await post(app, "/v1/holds", {**KEY, "cost": 10}))[1]["hold"]
    for cost in (10**9 + 1, -1, 1.5):
        answer, said = await post(app, f"/v1/holds/{opened}/settle", {"cost": cost})
        assert (answer.status, said["error"]["details"]) == (400, {"field": "cost"})
    assert (await post(app, f"/v1/holds/{opened}/cancel", {}))[0].status == 404
    assert (await post(app, f"/v1/holds/{opened}x/settle", {"cost": 1}))[0].status == 400
    assert store.open_holds == 1


NO_IDS = ("", "=", "AAAA", None, 7, "é", new_id(), HoldHandle("short", 1).text, HoldHandle("x" * 16, -1).text)


@pytest.mark.parametrize("text", NO_IDS, ids=range(len(NO_IDS)))
def test_what_is_no_id(text: Any) -> None:
    with pytest.raises(BadRequest, match="is not an id"):
        HoldHandle.of(text)


async def test_the_gate_charges_shadow_rules_beside_a_hold() -> None:
    policy = POLICY.replace(
        'limits = ["1000/minute"]',
        'limits = ["1000/minute"]\n  [[tiers.rules]]\n  endpoint = "/llm/*"\n  '
        'name = "watch"\n  mode = "shadow"\n  limits = ["50/minute"]',
    )
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(policy))), MemoryCounters())
    opened = await gate.holds.open(Check.of("/llm/x", "POST", "demo-free-key-0001", cost=40))
    assert opened.decision.remaining == 960
    assert (await gate.usage("demo-free-key-0001")).rules[-1].decision.remaining == 10


async def test_a_limiter_holds_while_a_block_runs() -> None:
    async with Limiter("100/minute") as limiter:
        async with limiter.hold("u", cost=80) as hold:
            assert (await limiter.check("u", 0)).remaining == 20
            with pytest.raises(RateLimitExceeded) as denied:
                async with limiter.hold("u", cost=30):
                    pass
            assert denied.value.decision.remaining == 20
            hold.settle(10)
            await hold.renew(120)
        assert hold.settlement is not None
        assert (hold.settlement.cost, hold.settlement.remaining) == (10, 90)
        with pytest.raises(ZeroDivisionError):
            async with limiter.hold("u", cost=80):
                raise ZeroDivisionError
        assert (await limiter.check("u", 0)).remaining == 90
        with pytest.raises(RateLimitExceeded):
            async with limiter.hold("u", cost=500, clamp=True):
                pass
        assert (await limiter.check("u", 0)).remaining == 90


async def test_a_cancelled_task_gives_back() -> None:
    limiter = Limiter("100/minute")
    entered = asyncio.Event()

    async def work() -> None:
        async with limiter.hold("u", cost=80):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.ensure_future(work())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await limiter.check("u", 0)).remaining == 100


def test_a_sync_limiter_holds_while_a_block_runs() -> None:
    with SyncLimiter("100/minute") as limiter:
        with limiter.hold("u", cost=80, ttl_s=5) as hold:
            assert limiter.check("u", 0).remaining == 20
            hold.renew(120)
        assert limiter.check("u", 0).remaining == 20
        with limiter.hold("u", cost=20) as hold:
            hold.cancel()
        assert limiter.check("u", 0).remaining == 20
        with pytest.raises(BadRequest, match="ever admits at once"):
            limiter.hold("u", cost=101)
        with pytest.raises(BadRequest, match="ttl_s 0"):
            limiter.hold("u", ttl_s=0)
        with pytest.raises(RateLimitExceeded), limiter.hold("u", cost=21):
            pass


CONCURRENT = """
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/llm/*"
  name = "tokens"
  limits = ["1000/minute", "2 concurrent"]
  [[tiers.rules]]
  endpoint = "/export"
  limits = ["1 concurrent"]

[[api_keys]]
key = "demo-free-key-0001"
tier = "free"
"""


@pytest.fixture
def slots(store: MemoryCounters) -> DataPlane:
    return DataPlane(Gate(CachedCatalog(PolicyCatalog(parse_policy(CONCURRENT))), store), {})


async def test_slots_are_taken_by_holds_and_freed_by_settlements(slots: DataPlane, clock: Clock) -> None:
    opened = [await post(slots, "/v1/holds", {**KEY, "cost": 10, "ttl_s": 5}) for _ in range(3)]
    assert [answer.status for answer, _ in opened] == [200, 200, 429]
    assert [body["remaining"] for _, body in opened] == [1, 0, 0]
    assert opened[0][0].headers["ratelimit-policy"] == '"1000/minute";q=1000;w=60, "2 concurrent";q=2;qu="concurrent-requests"'
    assert opened[2][0].headers["retry-after"] == "1"
    check = {**KEY, "cost": 1}
    assert (await post(slots, "/v1/check", check))[0].status == 429
    assert (await post(slots, "/v1/check", {**KEY, "cost": 0}))[0].status == 200
    settled = await post(slots, f"/v1/holds/{opened[0][1]['hold']}/settle", {"cost": 300})
    assert (settled[1]["limit"], settled[1]["remaining"]) == (2, 1)
    # Twice frees nobody else's; a check takes none.
    await post(slots, f"/v1/holds/{opened[0][1]['hold']}/settle", {"cost": 300})
    for _ in range(3):
        answer, decision = await post(slots, "/v1/check", check)
        assert (answer.status, decision["remaining"], decision["limit"]) == (200, 1, 2)
    usage = json.loads((await call(slots, "/v1/usage", headers=[("x-api-key", b"demo-free-key-0001")])).body)
    windows = {
        rule["rule"]: [(each["limit"], each["window"], each["used"]) for each in rule["windows"]] for rule in usage["rules"]
    }
    assert windows == {"/export": [(1, 0, 0)], "tokens": [(1000, 60, 313), (2, 0, 1)]}
    clock.advance(5)
    # The other one has expired: its slot is free, and its units are back.
    assert (await post(slots, "/v1/holds", {**KEY, "cost": 0}))[1]["remaining"] == 1
    late = await post(slots, f"/v1/holds/{opened[1][1]['hold']}/settle", {"cost": 20})
    assert late[1]["late"]


async def test_a_rule_with_slots_alone(slots: DataPlane) -> None:
    export = {"api_key": "demo-free-key-0001", "path": "/export"}
    answer, opened = await post(slots, "/v1/holds", {**export, "cost": 0})
    assert (answer.status, opened["limit"], opened["remaining"]) == (200, 1, 0)
    assert (await post(slots, "/v1/holds", {**export, "cost": 0}))[0].status == 429
    assert (await post(slots, f"/v1/holds/{opened['hold']}/settle", {"cost": 0}))[1]["remaining"] == 1
    answer, opened = await post(slots, "/v1/holds", export)
    assert answer.status == 200


async def test_a_reset_frees_slots(store: MemoryCounters) -> None:
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(CONCURRENT))), store)
    opened = await gate.holds.open(Check.of("/export", "GET", "demo-free-key-0001"))
    await gate.reset("demo-free-key-0001")
    assert (await gate.holds.open(Check.of("/export", "GET", "demo-free-key-0001"))).hold is not None
    # The first one frees nobody else's slot.
    await gate.holds.settle(opened.hold, 1)
    assert (await gate.holds.open(Check.of("/export", "GET", "demo-free-key-0001"))).hold is None


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (CONCURRENT.replace('"2 concurrent"', '"2 concurrent", "3 concurrent"'), "both count requests in progress"),
        (CONCURRENT.replace('"2 concurrent"', '"0 concurrent"'), "must be a whole number from 1"),
        (CONCURRENT.replace('name = "free"', 'name = "free"\nlimits = ["5 concurrent"]', 1), "only limits of rules can"),
        (CONCURRENT.replace('"/export"', '"/export"\n  mode = "soft"'), "cannot be soft"),
    ],
)
def test_bad_concurrency_limits(policy: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        parse_policy(policy)
    with pytest.raises(PolicyError, match="only limits of rules can"):
        Limiter("5 concurrent")


def middleware(store: MemoryCounters, app: Any) -> RateLimitMiddleware:
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(CONCURRENT))), store)
    return RateLimitMiddleware(app, gate=gate)


async def request(app: Any, path: str = "/export", key: str = "demo-free-key-0001") -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    headers = [(b"x-api-key", key.encode())]
    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
    await app({**scope, "client": ("127.0.0.1", 5)}, receive, send)
    return sent


async def test_the_middleware_holds_a_slot_until_the_last_byte(store: MemoryCounters) -> None:
    entered, go = asyncio.Event(), asyncio.Event()

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        entered.set()
        await go.wait()
        await send({"type": "http.response.body", "body": b"x"})

    app = middleware(store, inner)
    first = asyncio.ensure_future(request(app))
    await entered.wait()
    assert (await request(app))[0]["status"] == 429
    go.set()
    assert (b"x-ratelimit-remaining", b"0") in (await first)[0]["headers"]
    assert (await request(app))[0]["status"] == 200
    # One that is cancelled, as a server does where the client disconnects, frees it too.
    go.clear()
    entered.clear()
    cancelled = asyncio.ensure_future(request(app))
    await entered.wait()
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    go.set()
    assert (await request(app))[0]["status"] == 200
    # Rules without slots, paths without rules, and refused callers are as before.
    assert (await request(app, "/llm/x"))[0]["status"] == 200
    assert (await request(app, "/other"))[0]["status"] == 200
    assert (await request(app, key="nobody"))[0]["status"] == 401
    assert store.open_holds == 0


def test_open_holds_on_redis_are_counted_by_when_they_expire(clock: Clock) -> None:
    one, other = HoldEnds(clock), HoldEnds(clock)
    start = clock.now_us
    one.note(start + 60_000_000, 1)
    one.note(start + 5_500_000, 1)
    one.note(start + 5_500_000, 1)
    other.note(start + 5_500_000, -1)  # settled at another instance
    assert (one.open, other.open, one.expired, other.expired) == (3, -1, 0, 0)
    clock.advance(6)
    assert (one.open, other.open, one.expired, other.expired) == (1, 0, 2, -1)
    other.note(start + 60_000_000, -1)  # renewed
    other.note(start + 90_000_000, 1)
    clock.advance(60)
    assert (one.open + other.open, one.expired + other.expired) == (1, 1)
    one.note(start, 1)
    clock.advance(60)
    assert (one.open + other.open, one.expired + other.expired) == (0, 3)


async def test_usage_of_operators_has_the_open_holds(clock: Clock, store: MemoryCounters) -> None:
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), store)
    check = Check.of("/llm/chat", "POST", "demo-free-key-0001", cost=10)
    held = [(await gate.holds.open(check)).hold for _ in range(3)]

    async def holds() -> dict[str | None, int | None]:
        usage = await gate.usage("demo-free-key-0001", count_holds=True)
        return {each.rule: each.holds for each in usage.rules}

    assert await holds() == {None: 3, "tokens": 3}
    await gate.holds.settle(held[0], 5)
    assert await holds() == {None: 2, "tokens": 2}
    clock.advance(61)
    assert await holds() == {None: 0, "tokens": 0}
    assert {each.holds for each in (await gate.usage("demo-free-key-0001")).rules} == {None}
