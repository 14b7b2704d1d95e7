"""Counters on Redis: one atomic script call for each check, on the one shard of its subject.

A counter is one key, `tg:{subject}name`: the subject is the hash tag, so that all counters of a subject lie on one shard; the
name is a digest of the limit set's name and algorithm. All windows of the set are packed in its value. Every key expires.

Where a rule counts by another subject than its tier's own limits, a cluster may hold the two on different shards. Then they are
charged one after the other, and the first is given back where the second refuses: in between another check may be refused
that would have passed; more than a limit is never admitted.

What Redis answers beside replies (MOVED, ASK, TRYAGAIN, CLUSTERDOWN, LOADING, READONLY, NOSCRIPT) is followed within the check's
deadline. What cannot be settled until then raises `StoreUnavailable`; its `reason` says why in one word.
"""

from __future__ import annotations

import asyncio
import binascii
import hashlib
import re
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any, Final

import hiredis
import msgspec

from tidegate.algorithms import DECIDE, State
from tidegate.counters import Charge, Outcome
from tidegate.counters.redis.connection import Connection, ConnectionOptions, encode_command
from tidegate.counters.redis.scripts import Script, layout, parameters, script, wire_states
from tidegate.counters.redis.topology import Topology, open_topology
from tidegate.counters.redis.url import Endpoint, RedisUrl, parse_redis_url
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.limits import Limit, LimitSet

_PLANS_KEPT: Final = 65_536
_AT_ONCE: Final = 50
"""Most checks in one script: Redis does nothing else meanwhile, half a millisecond here."""
_PAUSE_S: Final = 0.005
_PLAIN: Final = re.compile(r"[ -z|~]{1,40}", re.ASCII).fullmatch
"""Subjects that stand in keys as they are: short, printable, without braces."""
_COSTS: Final = tuple(b"$%d\r\n%d\r\n" % (len(str(cost)), cost) for cost in range(1000))
_RETRIED: Final = ("TRYAGAIN", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "BUSY")


class _Plan:
    """What was prepared for the counters of a charge: all that does not depend on subject and cost."""

    __slots__ = ("head", "limits", "name", "places", "script", "suffix", "tail")

    def __init__(self, sets: tuple[LimitSet, ...]) -> None:
        self.script = script("charge", frozenset(limits.algorithm for limits in sets))
        self.limits = sets[0]
        self.places: tuple[Limit, ...] = tuple(limit for limits in sets for limit in limits.limits)
        self.head = _head(self.script, len(sets), 2 * len(sets) + 1)
        self.name = _name(sets[0])
        self.suffix = tuple(b"}" + _name(limits) + b"\r\n" for limits in sets)
        self.tail = b"".join(_bulk(parameters(limits)) for limits in sets)

    def decision(self, reply: Any) -> Decision:
        """The decision that a script's reply says."""
        try:
            binding, least, reset, retry, now = reply
            limit = self.places[(binding if binding > 0 else -binding) - 1]
            return Decision(binding > 0, limit, least, reset, None if retry < 0 else retry, now, self.limits)
        except (TypeError, ValueError, IndexError):
            raise StoreUnavailable(f"Redis answered what no counter says: {str(reply)[:100]}", reason="garbage") from None


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
        self._plans: dict[Any, _Plan] = {}
        self._topology: Topology | None = None
        self._starting: asyncio.Task[None] | None = None

    @property
    def started(self) -> bool:
        """Whether it has begun to connect."""
        return self._topology is not None

    async def start(self) -> None:
        """Connect, in the running event loop. Returns when the servers are there, or without them after a second."""
        if self._topology is None:
            self._topology = open_topology(self.url, self._options)
            self._starting = asyncio.ensure_future(self._topology.start(max(1.0, self.timeout_s)))
        if self._starting is not None:
            await asyncio.shield(self._starting)

    async def charge(self, charges: Sequence[Charge]) -> list[Outcome]:
        """See `CounterStore.charge`: one write for each shard touched, and where there is but one, one call for every 50.

        A shard that fails fails only its own charges.
        """
        if self._topology is None:
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
        topology = self._topology
        if topology is None:
            return ""
        try:
            return str(topology.connection_of(_slot(_tag(subject)) if topology.sharded else 0).endpoint)
        except StoreUnavailable:
            return "nobody"

    async def reset(self, counters: Sequence[tuple[LimitSet, str]]) -> None:
        """See `CounterStore.reset`."""
        await self.start()
        await self._each([(_tag(subject), encode_command("UNLINK", _key(limits, subject)), None) for limits, subject in counters])

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
            command = b"".join(
                (
                    _head(work, 1, 3),
                    _bulk(_key(limits, subject)),
                    _bulk(parameters(limits)),
                    _bulk(wire_states(limits, each)),
                )
            )
            asked.append((_tag(subject), command, work))
        await self._each(asked)

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
                raise StoreUnavailable(f"Redis at {connection.endpoint} answers PING with {reply}", reason=_reason(reply))

    async def close(self) -> None:
        """See `CounterStore.close`."""
        if self._starting is not None:
            self._starting.cancel()
        if self._topology is not None:
            await self._topology.close()
            self._topology = None

    def connections(self) -> Sequence[Connection]:
        """The connections to the servers that count, in no order; none before `start`."""
        return () if self._topology is None else self._topology.connections()

    # One check.

    def _plan(self, counters: tuple[tuple[LimitSet, str], ...]) -> _Plan:
        key: Any = counters[0][0] if len(counters) == 1 else tuple(limits for limits, _ in counters)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _PLANS_KEPT:
                self._plans.clear()
            plan = self._plans[key] = _Plan(tuple(limits for limits, _ in counters))
        return plan

    def _ask(self, charge: Charge) -> tuple[asyncio.Future[Any], _Plan]:
        counters = charge.counters
        plan = self._plan(counters)
        topology = self._must_topology()
        tag = _tag(counters[0][1])
        connection = topology.connection_of(_slot(tag) if topology.sharded else 0)
        return connection.ask(_command(plan, charge, tag)), plan

    def _ask_many(self, charges: Sequence[Charge]) -> Awaitable[list[Outcome]]:
        """Write charges that one server counts as one call: a third less work for it than a call for each."""
        keys: list[bytes] = []
        which: dict[LimitSet, int] = {}
        plan: list[int] = []
        for charge in charges:
            plan += (len(charge.counters), charge.cost)
            for limits, subject in charge.counters:
                keys.append(b"tg:{%b}%b" % (_tag(subject), self._plan(((limits, subject),)).name))
                plan.append(which.setdefault(limits, len(which) + 2))
        work = script("charge_many", frozenset(limits.algorithm for limits in which))
        command = encode_command(
            "EVALSHA",
            work.sha,
            str(len(keys)),
            *keys,
            msgspec.msgpack.encode(plan),
            *(parameters(limits) for limits in which),
        )
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
                reply = await self._follow(b"", command, reply, work)
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
        connection = self._must_topology().connection_of(slot_of(charge.counters[0][1]))
        connection.drop("it answered what was not asked")

    async def _settle(self, charge: Charge, reply: Any) -> Decision:
        """Follow what Redis said instead of a decision."""
        plan = self._plan(charge.counters)
        tag = _tag(charge.counters[0][1])
        return plan.decision(await self._follow(tag, _command(plan, charge, tag), reply, plan.script))

    def _is_split(self, charge: Charge) -> bool:
        counters = charge.counters
        return (
            len(counters) > 1
            and self._must_topology().sharded
            and any(subject != counters[0][1] for _, subject in counters[1:])
            and len({_slot(_tag(subject)) for _, subject in counters}) > 1
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
        topology = self._must_topology()
        futures = [
            (tag, command, work, topology.connection_of(_slot(tag) if topology.sharded else 0).ask(command))
            for tag, command, work in asked
        ]
        replies = []
        for tag, command, work, future in futures:
            reply = await future
            replies.append(await self._follow(tag, command, reply, work) if isinstance(reply, hiredis.ReplyError) else reply)
        return replies

    async def _follow(self, tag: bytes, command: bytes, reply: Any, work: Script | None = None) -> Any:
        """Do what an error reply tells, until a reply is none or the deadline passes."""
        if not isinstance(reply, hiredis.ReplyError):
            self._must_topology().connection_of(_slot(tag)).drop("it answered what was not asked")
            raise StoreUnavailable(f"Redis answered what no counter says: {str(reply)[:100]}", reason="garbage")
        topology = self._must_topology()
        slot = _slot(tag)
        try:
            async with asyncio.timeout(self.timeout_s):
                while True:
                    connection = topology.connection_of(slot)
                    word = str(reply).partition(" ")[0]
                    if word == "NOSCRIPT" and work is not None:
                        reply = await self._load_and_ask(connection, command, work)
                    elif word == "MOVED":
                        topology.moved(slot, _named(reply, connection))
                        connection = topology.connection_of(slot)
                        await connection.wait_up(self.timeout_s)
                        reply = await connection.ask(command)
                    elif word == "ASK":
                        other = topology.connection_to(_named(reply, connection))
                        await other.wait_up(self.timeout_s)
                        # Both in one write: another command between them would use up the ASKING.
                        asking = other.ask(encode_command("ASKING"))
                        reply = await other.ask(command)
                        await asking
                        if str(reply).startswith("NOSCRIPT") and isinstance(reply, hiredis.ReplyError) and work is not None:
                            load = other.ask(encode_command("SCRIPT", "LOAD", work.source))
                            asking = other.ask(encode_command("ASKING"))
                            reply = await other.ask(command)
                            await asyncio.gather(load, asking)
                    elif word in _RETRIED:
                        if word == "CLUSTERDOWN":
                            topology.doubt(connection, str(reply))
                        await asyncio.sleep(_PAUSE_S)
                        reply = await topology.connection_of(slot).ask(command)
                    elif word == "READONLY":
                        topology.doubt(connection, "it is a replica now")
                        await topology.connection_of(slot).wait_up(self.timeout_s)
                        await asyncio.sleep(_PAUSE_S)
                        reply = await topology.connection_of(slot).ask(command)
                    else:
                        raise StoreUnavailable(f"Redis at {connection.endpoint} refuses: {reply}", reason=_reason(reply))
                    if not isinstance(reply, hiredis.ReplyError):
                        return reply
        except TimeoutError:
            raise StoreUnavailable(
                f"Redis did not settle within {self.timeout_s * 1000:g} ms; last it said: {reply}", reason=_reason(reply)
            ) from None

    async def _load_and_ask(self, connection: Connection, command: bytes, work: Script) -> Any:
        """Load a script and ask again; of a batch that misses it, the first loads it for all."""
        now = asyncio.get_running_loop().time()
        loaded = connection.loads.get(work.sha)
        if loaded is not None and now - loaded < self.timeout_s:
            reply = await connection.ask(command)
            if not (isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOSCRIPT")):
                return reply
        connection.loads[work.sha] = now
        load = connection.ask(encode_command("SCRIPT", "LOAD", work.source))
        again = connection.ask(command)
        loaded_reply = await load
        if isinstance(loaded_reply, hiredis.ReplyError):
            raise StoreUnavailable(f"Redis at {connection.endpoint} refuses the script: {loaded_reply}", reason="refused")
        return await again

    def _must_topology(self) -> Topology:
        if self._topology is None:
            raise StoreUnavailable("Redis was not connected to yet, or no more", reason="disconnected")
        return self._topology


async def _failed(count: int, error: StoreUnavailable) -> list[Outcome]:
    return [error] * count


async def _asked(connection: Connection, command: bytes) -> Any:
    return await connection.ask(command)


def _command(plan: _Plan, charge: Charge, tag: bytes) -> bytes:
    """The bytes that ask Redis for a charge. `tag` is that of the first counter's subject."""
    cost = charge.cost
    cost_part = _COSTS[cost] if cost < 1000 else _bulk(b"%d" % cost)
    suffixes = plan.suffix
    # A key is "tg:{" + tag + suffix without its line's end: 4 and -2 bytes.
    if len(suffixes) == 1:
        suffix = suffixes[0]
        return b"%b$%d\r\ntg:{%b%b%b%b" % (plan.head, len(tag) + len(suffix) + 2, tag, suffix, plan.tail, cost_part)
    keys = []
    for (_, subject), suffix in zip(charge.counters, suffixes, strict=True):
        own = tag if subject == charge.counters[0][1] else _tag(subject)
        keys.append(b"$%d\r\ntg:{%b%b" % (len(own) + len(suffix) + 2, own, suffix))
    return b"%b%b%b%b" % (plan.head, b"".join(keys), plan.tail, cost_part)


def _head(work: Script, keys: int, arguments: int) -> bytes:
    count = b"%d" % keys
    return b"*%d\r\n$7\r\nEVALSHA\r\n$40\r\n%b\r\n$%d\r\n%b\r\n" % (arguments + 3, work.sha.encode(), len(count), count)


def _bulk(raw: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(raw), raw)


def _key(limits: LimitSet, subject: str) -> bytes:
    return b"tg:{%b}%b" % (_tag(subject), _name(limits))


def _name(limits: LimitSet) -> bytes:
    """Eight characters for a limit set's name and shape. 48 bits: only the sets of one subject must differ."""
    digest = hashlib.blake2b(f"{layout(limits)}\0{limits.name}".encode(errors="surrogatepass"), digest_size=6).digest()
    return binascii.b2a_base64(digest, newline=False)


def _tag(subject: str) -> bytes:
    """The hash tag of a subject: itself where it is short and plain, a key's id in base64, else a digest.

    No two subjects share one: `k` + 16 characters are ids alone (a plain subject has `=` before it), `#` + 22 are digests.
    """
    if len(subject) == 26 and subject.startswith("k:"):
        try:
            key_id = binascii.unhexlify(subject[2:])
            if key_id.hex() == subject[2:]:
                return b"k" + binascii.b2a_base64(key_id, newline=False)
        except ValueError:
            pass  # no key's id, but a subject that looks like one: it is plain
    if _PLAIN(subject):
        return b"=" + subject.encode()
    digest = hashlib.blake2b(subject.encode(errors="surrogatepass"), digest_size=16).digest()
    return b"#" + binascii.b2a_base64(digest, newline=False)


def tag_of(subject: str) -> str:
    """The hash tag under which Redis keeps a subject's counters, for people who look: keys are `tg:{tag}name`.

    Args:
        subject: as in a `Charge`.

    Returns:
        The tag.
    """
    return _tag(subject).decode()


def slot_of(subject: str) -> int:
    """The slot of a cluster in which a subject's counters lie.

    Args:
        subject: as in a `Charge`.

    Returns:
        0 to 16383.
    """
    return _slot(_tag(subject))


def _slot(tag: bytes) -> int:
    return binascii.crc_hqx(tag, 0) & 16_383


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


def _named(reply: Any, source: Connection) -> Endpoint:
    """The address of `MOVED 3999 127.0.0.1:6381`; an empty host means the one that said so."""
    host, _, port = str(reply).rpartition(" ")[2].rpartition(":")
    if not port.isascii() or not port.isdecimal():
        raise StoreUnavailable(f"Redis at {source.endpoint} redirects to nowhere: {reply}", reason="garbage")
    return Endpoint(host or source.endpoint.host, int(port))


def _reason(reply: Any) -> str:
    """One word for what Redis said."""
    word = str(reply).partition(" ")[0]
    return {
        "OOM": "out_of_memory",
        "LOADING": "loading",
        "CLUSTERDOWN": "cluster_down",
        "MASTERDOWN": "cluster_down",
        "READONLY": "not_master",
        "TRYAGAIN": "migrating",
        "MOVED": "migrating",
        "ASK": "migrating",
        "NOAUTH": "refused",
        "NOPERM": "refused",
        "NOREPLICAS": "no_replicas",
        "MISCONF": "misconfigured",
        "BUSY": "busy",
    }.get(word, "error")
