"""What each change touched: the log in a real database, what is read of it, and a cache that follows it at its own pace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from sqlalchemy import delete, insert, select, update

from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.changes import (
    ALL,
    ANONYMOUS,
    KEY,
    MAX_READ,
    NONE,
    TIER,
    Changes,
    Item,
)
from tidegate.catalog.freshness import FreshnessTracker
from tidegate.catalog.shared import SharedCatalog
from tidegate.catalog.sql import database as database_module
from tidegate.catalog.sql.change_log import KEPT_MS, MAX_TOUCHED, read_changes
from tidegate.catalog.sql.database import Database
from tidegate.catalog.sql.engine import open_engine
from tidegate.catalog.sql.tables import catalog_changes, metadata, policy_state
from tidegate.policy.attributes import CallerPolicy
from tidegate.policy.limits import Limit
from tidegate.policy.model import ApiKey, Tier

A, B, C = (KEY, "a"), (KEY, "b"), (TIER, "c")


async def open_log() -> Database:
    """A database with the two tables of the log; the others would only cost time."""
    engine = open_engine("sqlite://")
    async with engine.begin() as connection:
        await connection.run_sync(lambda made: metadata.create_all(made, [policy_state, catalog_changes]))
        await connection.execute(insert(policy_state).values(id=1, version=0, changed_at_us=0))
    return Database("sqlite://", engine, engine)


async def read_whole(database: Database, since: int, most: int = MAX_READ) -> Changes:
    async with database.reading() as connection:
        return await read_changes(connection, since, most)


async def read(database: Database, since: int, most: int = MAX_READ) -> Changes:
    """Without the versions, which are looked at here."""
    changes = await read_whole(database, since, most)
    assert list(changes.versions) == sorted(set(changes.versions))
    assert (changes.versions[0], changes.versions[-1]) == (changes.floor, changes.version)
    assert {at for at, _ in changes.items} <= set(changes.versions[1:])
    return msgspec.structs.replace(changes, versions=())


async def change(database: Database, *items: Item) -> int:
    async with database.changing() as writing:
        for item in items:
            writing.touch(*item)
    return writing.version


async def change_as_older_tidegate(database: Database) -> int:
    """A change by a version of Tidegate that knew of no log."""
    async with database.transaction() as connection:
        await connection.execute(update(policy_state).values(version=policy_state.c.version + 1))
    return await database.version()


async def prune(database: Database, upto: int) -> None:
    async with database.transaction() as connection:
        await connection.execute(delete(catalog_changes).where(catalog_changes.c.version <= upto))


@pytest.fixture
async def log() -> AsyncIterator[Database]:
    database = await open_log()
    yield database
    await database.close()


class WallClock:
    """The clock that versions are taken from, ms since the epoch."""

    def __init__(self, now_ms: int = 1_700_000_000_000) -> None:
        self.now_ms = now_ms

    def now_us(self) -> int:
        return self.now_ms * 1000

    def monotonic(self) -> float:
        return self.now_ms / 1000


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    clock = WallClock()
    monkeypatch.setattr(database_module, "time", clock)
    monkeypatch.setattr(database_module, "now_us", clock.now_us)
    return clock


# The log.


async def test_the_chain_is_followed_down_to_the_last_version_read(log: Database) -> None:
    assert await read(log, 0) == Changes(0, 0)
    first = await change(log, A, C)
    second = await change(log, B, A)
    third = await change(log, (ANONYMOUS, ""))
    assert await read(log, third) == Changes(third, third)
    assert await read(log, second) == Changes(third, second, ((third, (ANONYMOUS, "")),))
    since_first = await read(log, first)
    assert (since_first.version, since_first.floor) == (third, first)
    assert set(since_first.items) == {(second, A), (second, B), (third, (ANONYMOUS, ""))}
    whole = await read(log, 0)
    assert (whole.version, whole.floor) == (third, 0)
    assert set(whole.items) == {(first, C), (second, A), (second, B), (third, (ANONYMOUS, ""))}, "each with its last change"
    assert [at for at, _ in whole.items] == sorted(at for at, _ in whole.items)


async def test_versions_ascend_whatever_the_clock_does(log: Database, wall: WallClock) -> None:
    first = await change(log, A)
    assert first == wall.now_ms
    assert await change(log, A) == first + 1
    wall.now_ms -= 3_600_000
    assert await change(log, B) == first + 2
    wall.now_ms += 7_200_000
    assert await change(log, B) == wall.now_ms
    assert (await read(log, first)).floor == first


async def test_a_change_without_items_keeps_the_chain_complete(log: Database) -> None:
    first = await change(log, A)
    second = await change(log, (NONE, ""))
    assert await read(log, first) == Changes(second, first)
    third = await change(log, B)
    assert await read(log, first) == Changes(third, first, ((third, B),))


async def test_unrecorded_or_too_many_changes_count_as_everything(log: Database) -> None:
    first = await change(log, A)
    everything = await change(log)
    assert await read(log, first) == Changes(everything, everything)
    last = await change(log, B)
    assert await read(log, first) == Changes(last, everything, ((last, B),)), "what came after it is known"
    assert await read(log, everything) == Changes(last, everything, ((last, B),))
    fits = await change(log, *((KEY, f"{number}") for number in range(MAX_TOUCHED)))
    assert (await read(log, last)).floor == last
    too_much = await change(log, *((KEY, f"{number}") for number in range(MAX_TOUCHED + 1)))
    assert await read(log, fits) == Changes(too_much, too_much)


async def test_a_change_without_rows_counts_as_everything(log: Database) -> None:
    first = await change(log, A)
    foreign = await change_as_older_tidegate(log)
    assert foreign == first + 1
    assert await read(log, first) == Changes(foreign, foreign)
    assert await read(log, 0) == Changes(foreign, foreign)
    last = await change(log, B)
    assert await read(log, first) == Changes(last, foreign, ((last, B),))
    assert await read(log, foreign) == Changes(last, foreign, ((last, B),))


async def test_a_change_that_fails_leaves_no_trace(log: Database) -> None:
    first = await change(log, A)

    async def fail() -> None:
        async with log.changing() as writing:
            writing.touch(KEY, "b")
            raise RuntimeError("refused")

    with pytest.raises(RuntimeError, match="refused"):
        await fail()
    assert await read(log, 0) == Changes(first, 0, ((first, A),))


async def test_rows_of_a_day_ago_are_pruned_with_the_next_change(log: Database, wall: WallClock) -> None:
    first = await change(log, A)
    wall.now_ms += KEPT_MS - 1
    second = await change(log, B)
    assert (await read(log, 0)).floor == 0
    wall.now_ms += 1
    third = await change(log, B)
    assert await read(log, first) == Changes(third, first, ((third, B),)), "who saw what was pruned needs it not"
    assert await read(log, 0) == Changes(third, first, ((third, B),)), "who did not sees from where on it is whole"
    async with log.reading() as connection:
        assert set((await connection.execute(select(catalog_changes.c.version))).scalars()) == {second, third}


async def test_the_versions_that_there_were(log: Database) -> None:
    assert (await read_whole(log, 0)).versions == (0,)
    first = await change(log, A)
    second = await change(log, (NONE, ""))
    third = await change(log, A, B)
    assert (await read_whole(log, 0)).versions == (0, first, second, third)
    assert (await read_whole(log, second)).versions == (second, third)
    assert (await read_whole(log, second + 5)).versions == (third,)
    foreign = await change_as_older_tidegate(log)
    last = await change(log, A)
    assert (await read_whole(log, 0)).versions == (foreign, last)


async def test_of_more_rows_than_are_read_at_once_the_latest_count(log: Database) -> None:
    first = await change(log, A, B)
    second = await change(log, A, C)
    third = await change(log, (KEY, "d"), (KEY, "e"))
    rows = [(third, (KEY, "d")), (third, (KEY, "e")), (second, A), (second, C), (first, A), (first, B)]
    # Rows of the lowest version that is read may be cut off.
    for most, floor in ((1, third), (2, third), (3, second), (4, second), (5, first), (6, first), (7, 0)):
        told = await read(log, 0, most)
        assert (told.version, told.floor) == (third, floor)
        assert set(told.items) == {row for row in rows if row[0] > floor} - ({(first, A)} if floor < first else set())
    for most, floor in ((1, third), (2, third), (3, second), (7, second)):
        told = await read(log, second, most)
        assert (told.floor, set(told.items)) == (floor, {row for row in rows if row[0] > floor})


async def test_what_was_never_a_version_here_is_noticed(log: Database) -> None:
    """A primary that was lost gave versions that the one in its place does not have."""
    first = await change(log, A)
    second = await change(log, B)
    lost = second + 5
    assert await read(log, lost) == Changes(second, second), "the version went back"
    async with log.transaction() as connection:
        # As the first change after the loss: it names the version before, which is not the lost one.
        await connection.execute(insert(catalog_changes).values(version=lost + 5, previous=second, kind=KEY, name="a"))
        await connection.execute(update(policy_state).values(version=lost + 5, previous=second))
    last = lost + 5
    assert await read(log, lost) == Changes(last, last)
    assert await read(log, second) == Changes(last, second, ((last, A),)), "who never saw the lost one misses nothing"
    assert await read(log, first) == Changes(last, first, ((second, B), (last, A)))


async def test_the_statement_is_one_snapshot(tmp_path: Path) -> None:
    """Readers beside writers see each version with its rows: else it would look like a change of everything."""
    database = await Database.open(f"sqlite:///{tmp_path}/tidegate.db")
    first = await change(database, A)
    floors: set[int] = set()
    items: set[Item] = set()

    async def follow(writers: asyncio.Task[Any]) -> None:
        seen = first
        while not writers.done():
            changes = await read(database, seen)
            floors.add(changes.floor - seen)
            items.update(item for _, item in changes.items)
            seen = changes.version

    writers = asyncio.ensure_future(asyncio.gather(*(change(database, (KEY, f"{number}")) for number in range(40))))
    await asyncio.gather(*(follow(writers) for _ in range(3)))
    versions = await writers
    assert len(set(versions)) == 40, "writers take turns"
    final = await read(database, first)
    assert floors == {0}
    assert {item for _, item in final.items} == {(KEY, f"{number}") for number in range(40)}
    await database.close()


# What an instance remembers.


def test_an_answer_must_not_be_older_than_the_last_change_of_its_item() -> None:
    last = FreshnessTracker()
    assert last.min_version(KEY, "a") == 0
    last.note(Changes(10, 5, ((7, A), (9, C))))
    assert (last.version, last.floor) == (10, 5)
    assert [last.min_version(*item) for item in (A, C, B, (ANONYMOUS, ""))] == [7, 9, 5, 5]
    last.note(Changes(12, 10, ((12, A),)))
    assert [last.min_version(*item) for item in (A, C, B)] == [12, 9, 5]


def test_older_answers_are_invalid_if_the_log_is_incomplete() -> None:
    last = FreshnessTracker()
    last.note(Changes(10, 5, ((7, A), (9, C))))
    last.note(Changes(20, 15, ((18, B),)))
    assert [last.min_version(*item) for item in (A, C, B)] == [15, 15, 18]


def test_a_version_that_went_back_takes_what_was_known_with_it() -> None:
    last = FreshnessTracker()
    last.note(Changes(10, 0, ((7, A), (9, C))))
    last.note(Changes(8, 8))
    assert last.version == 8
    assert [last.min_version(*item) for item in (A, B, C)] == [8, 8, 8], "9 is not to be had any more"


def test_a_change_made_here_counts_before_it_is_read_of() -> None:
    last = FreshnessTracker()
    last.note(Changes(10, 5))
    last.remember([(20, A)])
    assert (last.version, last.min_version(*A), last.min_version(*B)) == (10, 20, 5)
    last.note(Changes(15, 10, ((12, A), (15, B))))
    assert (last.min_version(*A), last.min_version(*B)) == (20, 15), "an earlier change that is read of later takes nothing back"
    last.remember([(30, (ALL, ""))])
    assert [last.min_version(*item) for item in (A, B, C)] == [30, 30, 30]
    last.remember([(31, B)])
    assert [last.min_version(*item) for item in (A, B, C)] == [30, 31, 30]


def test_dropped_items_raise_the_floor() -> None:
    last = FreshnessTracker(max_items=3)
    for at in range(1, 6):
        last.remember([(at, (KEY, f"{at}"))])
    assert last.floor == 2
    assert last.min_version(KEY, "1") == last.min_version(KEY, "nobody") == 2
    assert last.min_version(KEY, "4") == 4
    last.remember([(6, (KEY, "3"))])
    last.remember([(7, (KEY, "7"))])
    assert (last.min_version(KEY, "3"), last.min_version(KEY, "4")) == (6, 4), (
        "what changed lately is remembered, not what was first heard of"
    )


# A cache that follows.

KEYS = tuple(f"{number:064x}" for number in range(2))
TIERS = ("t0",)
THINGS: tuple[Item, ...] = (*((KEY, name) for name in KEYS), *((TIER, name) for name in TIERS), (ANONYMOUS, ""))
SOME = st.sets(st.sampled_from(THINGS), min_size=1, max_size=3)
WHO = st.integers(0, 1)


class State(NamedTuple):
    """What a database holds at one version: thing → a number that no other change has given to anything."""

    version: int
    held: dict[Item, int]


class Truth:
    """A catalog on the log of a real database. What things are stands beside it, at every version: a replica gives an old one."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.states = [State(0, dict.fromkeys(THINGS, 0))]
        self.replica = 0
        """Which state the replica shows."""
        self.most = MAX_READ

    @property
    def now(self) -> State:
        return self.states[-1]

    def _seen(self, min_version: int) -> State:
        replica = self.states[self.replica]
        return replica if replica.version >= min_version else self.now

    async def api_key(self, sha256: str, min_version: int = 0) -> tuple[int, ApiKey | None]:
        state = self._seen(min_version)
        return state.version, ApiKey(sha256, "t0", name=str(state.held[KEY, sha256]))

    async def tier(self, name: str, min_version: int = 0) -> tuple[int, Tier | None]:
        state = self._seen(min_version)
        return state.version, Tier(name, limits=(Limit.parse(f"{state.held.get((TIER, name), 0) + 1}/day"),))

    async def caller_policy(self, min_version: int = 0) -> tuple[int, CallerPolicy]:
        state = self._seen(min_version)
        return state.version, CallerPolicy(f"a{state.held[ANONYMOUS, '']}")

    async def changes(self, since: int) -> Changes:
        return await read_whole(self.database, since, self.most)


class Kept:
    """A Redis that forgets nothing."""

    def __init__(self) -> None:
        self.held: dict[str | bytes, str | bytes] = {}

    async def call(self, tag: bytes, *parts: str | bytes) -> Any:
        if parts[0] == "GET":
            return self.held.get(parts[1])
        self.held[parts[1]] = parts[2]
        return b"OK"


def value_of(thing: ApiKey | Tier | CallerPolicy | str) -> int:
    """The number that tells as of which change a thing is."""
    if isinstance(thing, ApiKey):
        return int(thing.name)
    if isinstance(thing, CallerPolicy):
        thing = thing.anonymous_tier or ""
    return int(thing[1:]) if isinstance(thing, str) else thing.limits[0].amount - 1


class Instance:
    """A cache, with or without a shared one behind it.

    Attributes:
        loaded: the value of each thing that its cache was given last.
        may: the values that it may serve: what was true when it looked last, or became true later.
        ahead: values that it was given of a primary that was lost before it noticed their version: they leave with their time.
    """

    def __init__(self, truth: Truth, kept: Kept | None, remembered: int) -> None:
        self.source: Any = truth if kept is None else SharedCatalog(cast("Any", truth), kept, b"secret of a test")
        self.cached = CachedCatalog(cast("Any", self), clock=lambda: 0.0)
        self.cached._last = FreshnessTracker(remembered)
        self.loaded: dict[Item, int] = {}
        self.may: dict[Item, set[int]] = {thing: {0} for thing in THINGS}
        self.ahead: dict[Item, int] = {}

    async def api_key(self, sha256: str, min_version: int = 0) -> tuple[int, ApiKey | None]:
        return self._note((KEY, sha256), await self.source.api_key(sha256, min_version))

    async def tier(self, name: str, min_version: int = 0) -> tuple[int, Tier | None]:
        return self._note((TIER, name), await self.source.tier(name, min_version))

    async def caller_policy(self, min_version: int = 0) -> tuple[int, CallerPolicy]:
        return self._note((ANONYMOUS, ""), await self.source.caller_policy(min_version))

    async def serve(self, thing: Item) -> int:
        kind, name = thing
        found: Any
        if kind == TIER:
            compiled = await self.cached.tier(name)
            found = compiled and compiled.tier
        else:
            caller = await (self.cached.caller(name) if kind == KEY else self.cached.anonymous())
            found = caller and (caller.api_key or caller.tier.tier.name)
        if isinstance(self.source, SharedCatalog):
            await self.source.settle()
        return value_of(found)

    def looked(self, changes: Changes, before: int, now: State) -> None:
        """Take in what may be served from now on."""
        if changes.version < before or changes.floor > before:
            self.ahead.clear()
        for _, item in changes.items:
            self.ahead.pop(item, None)
        self.may = {thing: {now.held[thing]} for thing in THINGS}

    def _note(self, thing: Item, found: tuple[int, Any]) -> tuple[int, Any]:
        self.loaded[thing] = value_of(found[1])
        return found


class Following(RuleBasedStateMachine):
    """Two instances look at random moments at a catalog that is changed, pruned, and loses its last changes at random."""

    @initialize(share=st.booleans(), remembered=st.sampled_from([2, 5, MAX_READ]))
    def begin(self, share: bool, remembered: int) -> None:
        self.loop = asyncio.Runner()
        self.wall = WallClock()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(database_module, "time", self.wall)
        self.patch.setattr(database_module, "now_us", self.wall.now_us)
        self.truth = Truth(self.loop.run(open_log()))
        kept = Kept() if share else None
        self.instances = [Instance(self.truth, kept, remembered) for _ in range(2)]
        self.value = self.highest = 0
        self.lost: set[int] = set()

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.loop.run(self.truth.database.close())
            self.loop.close()
            self.patch.undo()

    def _changed(self, version: int, things: Iterable[Item]) -> None:
        held = dict(self.truth.now.held)
        for thing in things:
            self.value += 1
            held[thing] = self.value
            for instance in self.instances:
                instance.may[thing].add(self.value)
        self.truth.states.append(State(version, held))
        self.highest = max(self.highest, version)

    @rule(things=SOME, told=st.sampled_from([True, True, False]), later_ms=st.integers(0, 3), seen_by=st.sets(WHO))
    def change(self, things: set[Item], told: bool, later_ms: int, seen_by: set[int]) -> None:
        """By somebody else; it says what it touches, or does not."""
        self.wall.now_ms += later_ms
        self._changed(self.loop.run(change(self.truth.database, *(things if told else ()))), things)
        for who in seen_by:
            self.look(who, MAX_READ)

    @rule(who=WHO, things=SOME, told=st.booleans())
    def change_here(self, who: int, things: set[Item], told: bool) -> None:
        """By an instance, which knows of it before it looks."""
        version = self.loop.run(change(self.truth.database, *(things if told else ())))
        self._changed(version, things)
        instance = self.instances[who]
        instance.cached.touched(version, things if told else [(ALL, "")])
        for thing in things:
            instance.may[thing] = {self.truth.now.held[thing]}
            instance.ahead.pop(thing, None)

    @rule()
    def change_nothing(self) -> None:
        self._changed(self.loop.run(change(self.truth.database, (NONE, ""))), ())

    @rule(things=SOME)
    def change_as_of_old(self, things: set[Item]) -> None:
        # An older Tidegate counted versions, and could give one again that was lost.
        assume(self.truth.now.version + 1 not in self.lost)
        self._changed(self.loop.run(change_as_older_tidegate(self.truth.database)), things)

    @rule(drawn=st.data())
    def prune(self, drawn: st.DataObject) -> None:
        self.loop.run(prune(self.truth.database, drawn.draw(st.sampled_from(self.truth.states)).version))

    @rule(drawn=st.data())
    def lag(self, drawn: st.DataObject) -> None:
        self.truth.replica = drawn.draw(st.integers(0, len(self.truth.states) - 1))

    @rule(most=st.integers(1, 3), seen_by=st.sets(WHO))
    def lose_the_primary(self, most: int, seen_by: set[int]) -> None:
        """A standby takes its place, which lacks some of the last changes."""
        kept = max(0, len(self.truth.states) - 1 - most)
        now, lost = self.truth.states[kept], self.truth.states[kept + 1 :]
        self.lost |= {state.version for state in lost}
        # It takes longer than a millisecond.
        self.wall.now_ms = max(self.wall.now_ms, self.highest) + 1
        self.loop.run(lose(self.truth, now))
        for instance in self.instances:
            for thing in THINGS:
                instance.may[thing].add(now.held[thing])
                loaded = instance.loaded.get(thing)
                if any(loaded == state.held[thing] != now.held[thing] for state in lost):
                    instance.ahead[thing] = cast("int", loaded)
        for who in seen_by:
            self.look(who, MAX_READ)

    @rule(who=WHO, most=st.sampled_from([1, 2, 4, MAX_READ]))
    def look(self, who: int, most: int) -> None:
        instance = self.instances[who]
        self.truth.most = most
        before = instance.cached.version
        changes = self.loop.run(instance.source.changes(before))
        if changes.version != before:
            instance.cached.changed(changes)
            instance.looked(changes, before, self.truth.now)
        self.serve(who)

    @rule(who=WHO)
    def serve(self, who: int) -> None:
        instance = self.instances[who]
        for thing in THINGS:
            served = self.loop.run(instance.serve(thing))
            assert served in instance.may[thing] or served == instance.ahead.get(thing), (
                f"{thing} is served as of change {served}, may be of {instance.may[thing]}"
            )


async def lose(truth: Truth, kept: State) -> None:
    """Go back to what a standby had."""
    del truth.states[truth.states.index(kept) + 1 :]
    truth.replica = min(truth.replica, len(truth.states) - 1)
    async with truth.database.transaction() as connection:
        await connection.execute(delete(catalog_changes).where(catalog_changes.c.version > kept.version))
        await connection.execute(update(policy_state).values(version=kept.version))


async def test_entries_of_a_lost_primary_are_ignored(log: Database, wall: WallClock) -> None:
    """They lie in the shared cache with a version that is newer than what is asked for."""
    truth, redis = Truth(log), Kept()
    saw_it, slept, joined = (Instance(truth, redis, MAX_READ) for _ in range(3))
    key, other = THINGS[:2]

    async def put(thing: Item, value: int) -> None:
        wall.now_ms += 1
        truth.states.append(State(await change(log, thing), {**truth.now.held, thing: value}))
        truth.replica = len(truth.states) - 1

    async def look(instance: Instance) -> None:
        instance.cached.changed(await instance.source.changes(instance.cached.version))

    await put(key, 1)
    kept = truth.now
    await look(saw_it)
    await look(slept)
    await put(key, 2)
    await look(saw_it)
    assert await saw_it.serve(key) == 2
    entries = dict(redis.held)
    await lose(truth, kept)
    await look(saw_it)
    assert saw_it.cached.version == slept.cached.version == kept.version
    await look(joined)
    for instance in (saw_it, slept, joined):
        redis.held = dict(entries)
        assert await instance.serve(key) == 1
    # Also when the versions have gone past the lost one.
    await put(other, 3)
    for instance in (saw_it, slept, joined, Instance(truth, redis, MAX_READ)):
        await look(instance)
        instance.cached.invalidate()
        redis.held = dict(entries)
        assert await instance.serve(key) == 1
        assert await instance.serve(other) == 3


async def test_an_entry_newer_than_the_known_versions_is_ignored(log: Database) -> None:
    truth, redis = Truth(log), Kept()
    first, second = (Instance(truth, redis, MAX_READ) for _ in range(2))
    key = THINGS[0]
    for instance in (first, second):
        instance.cached.changed(await instance.source.changes(0))
    truth.states.append(State(await change(log, (NONE, "")), truth.now.held))
    truth.replica = 1
    first.cached.changed(await first.source.changes(0))
    await first.serve(key)
    await second.serve(key)
    assert second.source.hits == 0, "it may be of a primary that was lost since"
    second.cached.changed(await second.source.changes(0))
    second.cached.invalidate()
    await second.serve(key)
    assert second.source.hits > 0


class TestFollowing(Following.TestCase):  # type: ignore[misc,name-defined]
    settings = settings(max_examples=70, stateful_step_count=25)
