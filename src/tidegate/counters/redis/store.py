"""Counters on Redis: one atomic script call for each check, on the one shard of its subject.

A counter is one key, `tg:{subject}name`: the subject is the hash tag, so that all counters of a subject lie on one shard; the
name is a digest of the limit set's name and algorithm. All windows of the set are packed in its value. Every key expires.

Where a rule counts by another subject than its tier's own limits, a cluster may hold the two on different shards. Then they are
charged one after the other, and the first is given back where the second refuses: in between another check may be refused
that would have passed; more than a limit is never admitted.

What Redis answers beside replies is followed within the check's deadline (`error_replies`). What cannot be settled until then
raises `StoreUnavailable`; its `reason` says why in one word.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final

import hiredis

from tidegate.algorithms import DECIDE, State
from tidegate.counters import Charge, Outcome
from tidegate.counters.redis.connection import Connection, ConnectionOptions, encode_command
from tidegate.counters.redis.error_replies import reason_of, settled
from tidegate.counters.redis.keyspace import hash_tag, key_of, slot_of_tag
from tidegate.counters.redis.plans import ChargePlan, absorb_command, batch_command, charge_command
from tidegate.counters.redis.scripts import Script, script
from tidegate.counters.redis.topology import Topology, open_topology
from tidegate.counters.redis.url import RedisUrl, parse_redis_url
from tidegate.decision import Decision
from tidegate.errors import SettingsError, StoreUnavailable
from tidegate.limits import LimitSet

logger = logging.getLogger(__name__)

_PLANS_KEPT: Final = 65_536
_AT_ONCE: Final = 50
"""Most checks in one script: Redis does nothing else meanwhile, half a millisecond here."""


class RedisCounters:
    """Counters shared by all instances that use the same Redis.

    Args:
        url: see `tidegate.counters.redis.url`.
        timeout_s: deadline of a check, s; what is retried is retried within it.
        max_in_flight: most unanswered calls a shard.
        name: what Redis shows in CLIENT LIST.

    Raises:
        SettingsError: if the URL is not understood or its PEM files cannot be used.
    """

    def __init__(self, url: str | RedisUrl, timeout_s: float = 0.05, max_in_flight: int = 10_000, name: str = "tidegate") -> None:
        self.url = parse_redis_url(url) if isinstance(url, str) else url
        self.timeout_s = timeout_s
        self._options = ConnectionOptions(
            timeout_s, max_in_flight, self.url.credentials, self.url.db, self.url.tls_context(), name
        )
        self._plans: dict[Any, ChargePlan] = {}
        self._topology: Topology | None = None
        self._starting: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def started(self) -> bool:
        """Whether it has begun to connect, in the running event loop."""
        return self._topology is not None and self._loop is asyncio.get_running_loop()

    async def start(self) -> None:
        """Connect, in the running event loop; anew where it is another one than before. Returns when the servers are there, or
        without them after a second.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._leave_loop()
            self._loop = loop
        if self._topology is None:
            self._topology = open_topology(self.url, self._options)
            self._starting = asyncio.ensure_future(self._topology.start(max(1.0, self.timeout_s)))
        if self._starting is not None:
            await asyncio.shield(self._starting)

    def reload_certificates(self) -> None:
        """Read the PEM files of the URL again, for connections made from now on; logs those that cannot be used."""
        if self._options.tls is not None:
            try:
                self.url.load_certificates(self._options.tls)
            except SettingsError as error:
                logger.error("certificates not reloaded, the previous ones stay active: %s", error)

    async def charge(self, charges: Sequence[Charge]) -> list[Outcome]:
        """See `CounterStore.charge`: one write for each shard touched, and where there is but one, one call for every 50.

        A shard that fails fails only its own charges.
        """
        if self._topology is None or self._loop is not asyncio.get_running_loop():
            await self.start()
        if len(charges) > 1 and not self._must_topology().sharded:
            pieces = [charges[start : start + _AT_ONCE] for start in range(0, len(charges), _AT_ONCE)]
            return [outcome for each in [self._ask_many(piece) for piece in pieces] for outcome in await each]
        asked: list[asyncio.Future[Any] | asyncio.Task[Decision] | StoreUnavailable] = []
        for charge in charges:
            try:
                if self._is_split(charge):
                    asked.append(asyncio.ensure_future(self._charge_split(charge)))
                else:
                    asked.append(self._ask(charge)[0])
            except StoreUnavailable as error:
                asked.append(error)
        answers: list[Outcome] = []
        for charge, waiting in zip(charges, asked, strict=True):
            if isinstance(waiting, StoreUnavailable):
                answers.append(waiting)
                continue
            try:
                reply = await waiting
                if isinstance(reply, Decision):
                    answers.append(reply)
                elif type(reply) is list:
                    answers.append(self._plan(charge.counters).decision(reply))
                else:
                    answers.append(await self._settle(charge, reply))
            except StoreUnavailable as error:
                if error.details.get("reason") == "garbage":
                    self._distrust(charge)
                answers.append(error)
        return answers

    async def charge_one(self, charge: Charge) -> Decision:
        """Decide one charge: the hot path.

        Args:
            charge: what is asked.

        Returns:
            The decision.

        Raises:
            StoreUnavailable: if its shard does not answer.
        """
        if len(charge.counters) > 1 and self._is_split(charge):
            return await self._charge_split(charge)
        future, plan = self._ask(charge)
        reply = await future
        if type(reply) is list:
            try:
                return plan.decision(reply)
            except StoreUnavailable:
                self._distrust(charge)
                raise
        return await self._settle(charge, reply)

    def shard_of(self, subject: str) -> str:
        """Which server counts a subject now.

        Args:
            subject: as in a `Charge`.

        Returns:
            Its address; changes when another server takes its place.
        """
        try:
            return str(self._connection(hash_tag(subject)).endpoint)
        except StoreUnavailable:
            return "nobody"

    async def windows(self, counters: Sequence[tuple[LimitSet, str]]) -> list[tuple[Decision, ...] | None]:
        """See `CounterStore.windows`: all windows of a set are in one value, which a set of one of them reads as well."""
        looks = [Charge(((one, subject),), 0) for limits, subject in counters for one in limits.single_sets()]
        outcomes = iter(await self.charge(looks))
        found: list[tuple[Decision, ...] | None] = []
        for limits, _ in counters:
            own = [next(outcomes) for _ in limits.limits]
            decisions = tuple(each for each in own if isinstance(each, Decision))
            found.append(decisions if len(decisions) == len(own) else None)
        return found

    async def reset(self, counters: Sequence[tuple[LimitSet, str]]) -> None:
        """See `CounterStore.reset`."""
        await self.start()
        await self._each(
            [(hash_tag(subject), encode_command("UNLINK", key_of(limits, subject)), None) for limits, subject in counters]
        )

    async def absorb(self, states: Iterable[tuple[LimitSet, str, Sequence[State]]]) -> None:
        """Add what was admitted elsewhere, without asking any limit. All is written before anything is waited for, so that
        a charge asked later by anybody finds it added.

        Args:
            states: for each counter its limits, its subject, and a state for each limit (None for nothing).

        Raises:
            StoreUnavailable: if a shard does not answer; some may have been added then.
        """
        asked = []
        for limits, subject, each in states:
            work = script("absorb", frozenset((limits.algorithm,)))
            asked.append((hash_tag(subject), absorb_command(work, limits, subject, each), work))
        await self._each(asked)

    def listening(
        self, channel: str, on_push: Callable[[list[Any]], None], on_change: Callable[[Connection], None]
    ) -> Connection:
        """A new connection that listens on a channel; whoever asked closes it.

        Args:
            channel: its name.
            on_push: is given what the server says unasked.
            on_change: is told when the connection came up or went down.

        Returns:
            The connection, which keeps itself connected.

        Raises:
            StoreUnavailable: before `start`.
        """
        return self._must_topology().listening(channel, on_push, on_change)

    async def call(self, tag: bytes, *parts: str | bytes) -> Any:
        """Run a command on the shard of a hash tag, redirections followed.

        Args:
            tag: of the command's keys.
            parts: the command.

        Returns:
            The reply.

        Raises:
            StoreUnavailable: if there is none.
        """
        return (await self._each([(tag, encode_command(*parts), None)]))[0]

    async def run(self, tag: bytes, work: Script, keys: Sequence[bytes], arguments: Sequence[str]) -> Any:
        """Run a script on the shard of a hash tag, redirections followed.

        Args:
            tag: of all its keys.
            work: the script.
            keys: its keys.
            arguments: its arguments.

        Returns:
            The reply.

        Raises:
            StoreUnavailable: if there is none.
        """
        command = encode_command("EVALSHA", work.sha, str(len(keys)), *keys, *arguments)
        return (await self._each([(tag, command, work)]))[0]

    async def ping(self) -> None:
        """See `CounterStore.ping`: every shard must answer."""
        await self.start()
        connections = self._must_topology().connections()
        if not connections:
            raise StoreUnavailable("no node of the Redis cluster answers", reason="disconnected")
        replies = await asyncio.gather(*(_asked(connection, encode_command("PING")) for connection in connections))
        for connection, reply in zip(connections, replies, strict=True):
            if isinstance(reply, hiredis.ReplyError):
                raise StoreUnavailable(f"Redis at {connection.endpoint} answers PING with {reply}", reason=reason_of(reply))

    async def close(self) -> None:
        """See `CounterStore.close`."""
        if self._loop is not asyncio.get_running_loop():
            self._leave_loop()
            return
        if self._starting is not None:
            self._starting.cancel()
            self._starting = None
        if self._topology is not None:
            await self._topology.close()
            self._topology = None

    def _leave_loop(self) -> None:
        """Let go of what belongs to another event loop: it cannot be awaited here; that loop closes it if it runs again."""
        loop, topology, self._topology, self._starting = self._loop, self._topology, None, None
        if loop is not None and topology is not None and not loop.is_closed():
            loop.call_soon_threadsafe(lambda: loop.create_task(topology.close()))

    def connections(self) -> Sequence[Connection]:
        """The connections to the servers that count, in no order; none before `start`."""
        return () if self._topology is None else self._topology.connections()

    # One check.

    def _plan(self, counters: tuple[tuple[LimitSet, str], ...]) -> ChargePlan:
        key: Any = counters[0][0] if len(counters) == 1 else tuple(limits for limits, _ in counters)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _PLANS_KEPT:
                self._plans.clear()
            plan = self._plans[key] = ChargePlan(tuple(limits for limits, _ in counters))
        return plan

    def _ask(self, charge: Charge) -> tuple[asyncio.Future[Any], ChargePlan]:
        counters = charge.counters
        plan = self._plan(counters)
        tag = hash_tag(counters[0][1])
        return self._connection(tag).ask(charge_command(plan, charge, tag)), plan

    def _ask_many(self, charges: Sequence[Charge]) -> Awaitable[list[Outcome]]:
        """Write charges that one server counts as one call: a third less work for it than a call for each."""
        keys: list[bytes] = []
        which: dict[LimitSet, int] = {}
        plan: list[int] = []
        for charge in charges:
            plan += (len(charge.counters), charge.cost)
            for limits, subject in charge.counters:
                keys.append(b"tg:{%b}%b" % (hash_tag(subject), self._plan(((limits, subject),)).name))
                plan.append(which.setdefault(limits, len(which) + 2))
        work = script("charge_many", frozenset(limits.algorithm for limits in which))
        command = batch_command(work, plan, keys, which)
        try:
            future = self._must_topology().connection_of(0).ask(command)
        except StoreUnavailable as error:
            return _failed(len(charges), error)
        return self._answer_many(charges, future, command, work)

    async def _answer_many(
        self, charges: Sequence[Charge], future: asyncio.Future[Any], command: bytes, work: Script
    ) -> list[Outcome]:
        try:
            reply = await future
            if type(reply) is not list:
                reply = await self._settled(b"", command, reply, work)
            if type(reply) is not list or len(reply) != 5 * len(charges):
                raise StoreUnavailable(f"Redis answered what no counters say: {str(reply)[:100]}", reason="garbage")
            return [
                self._plan(charge.counters).decision(reply[5 * place : 5 * place + 5]) for place, charge in enumerate(charges)
            ]
        except StoreUnavailable as error:
            if error.details.get("reason") == "garbage":
                self._distrust(charges[0])
            return [error] * len(charges)

    def _distrust(self, charge: Charge) -> None:
        """What a shard answered fits no question of ours: what follows would be given to the wrong ones."""
        self._connection(hash_tag(charge.counters[0][1])).drop("it answered what was not asked")

    async def _settle(self, charge: Charge, reply: Any) -> Decision:
        """Follow what Redis said instead of a decision."""
        plan = self._plan(charge.counters)
        tag = hash_tag(charge.counters[0][1])
        return plan.decision(await self._settled(tag, charge_command(plan, charge, tag), reply, plan.script))

    def _is_split(self, charge: Charge) -> bool:
        counters = charge.counters
        return (
            len(counters) > 1
            and self._must_topology().sharded
            and any(subject != counters[0][1] for _, subject in counters[1:])
            and len({slot_of_tag(hash_tag(subject)) for _, subject in counters}) > 1
        )

    async def _charge_split(self, charge: Charge) -> Decision:
        """Charge counters of several shards: each in turn, and given back where a later one refuses."""
        done: list[tuple[LimitSet, str, Decision]] = []
        least: Decision | None = None
        try:
            for limits, subject in charge.counters:
                decision = await self.charge_one(Charge(((limits, subject),), charge.cost))
                if not decision.allowed:
                    await self._give_back(done, charge.cost)
                    return _as_of(decision, charge.counters[0][0])
                done.append((limits, subject, decision))
                if least is None or (decision.remaining or 0) < (least.remaining or 0):
                    least = decision
        except (StoreUnavailable, asyncio.CancelledError):
            await self._give_back(done, charge.cost)
            raise
        assert least is not None
        return _as_of(least, charge.counters[0][0])

    async def _give_back(self, done: Sequence[tuple[LimitSet, str, Decision]], cost: int) -> None:
        if not cost:
            return
        for limits, subject, decision in done:
            states = [_negative(DECIDE[limits.algorithm](limit, None, decision.at_us, cost)[0]) for limit in limits.limits]
            try:
                await self.absorb([(limits, subject, states)])
            except StoreUnavailable:
                # The shard is gone with the charge: less is admitted than might be, never more.
                continue

    async def _each(self, asked: Iterable[tuple[bytes, bytes, Script | None]]) -> list[Any]:
        """Run commands, each on the shard of its tag. All are written before anything is waited for."""
        futures = [(tag, command, work, self._connection(tag).ask(command)) for tag, command, work in asked]
        replies = []
        for tag, command, work, future in futures:
            reply = await future
            replies.append(await self._settled(tag, command, reply, work) if isinstance(reply, hiredis.ReplyError) else reply)
        return replies

    async def _settled(self, tag: bytes, command: bytes, reply: Any, work: Script | None = None) -> Any:
        return await settled(self._must_topology(), slot_of_tag(tag), command, reply, work, self.timeout_s)

    def _connection(self, tag: bytes) -> Connection:
        """The connection to the server that counts a hash tag."""
        topology = self._topology
        if topology is None:
            raise _not_started()
        return topology.connection_of(slot_of_tag(tag) if topology.sharded else 0)

    def _must_topology(self) -> Topology:
        if self._topology is None:
            raise _not_started()
        return self._topology


def _not_started() -> StoreUnavailable:
    return StoreUnavailable("Redis was not connected to yet, or no more", reason="disconnected")


async def _failed(count: int, error: StoreUnavailable) -> list[Outcome]:
    return [error] * count


async def _asked(connection: Connection, command: bytes) -> Any:
    return await connection.ask(command)


def _negative(state: State) -> State:
    """What gives a lone charge back: its state with the units below 0."""
    assert state is not None
    if isinstance(state[1], tuple):
        return (-state[0], state[1], tuple(-cost for cost in state[2]))
    if len(state) == 4:
        return (-state[0], *state[1:])
    return (state[0], *(-units for units in state[1:]))


def _as_of(decision: Decision, limits: LimitSet) -> Decision:
    """A decision of one counter of a check, as the whole check's."""
    return Decision(
        decision.allowed,
        decision.binding,
        decision.remaining,
        decision.reset_after_us,
        decision.retry_after_us,
        decision.at_us,
        limits,
    )
