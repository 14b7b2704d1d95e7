"""Counters on Redis: one atomic script call for each check, on the one shard of its subject.

A counter is one key, `tg:{subject}name`: the subject is the hash tag, so that all counters of a subject lie on one shard; the
name is a digest of the limit set's name and algorithm. All windows of the set are packed in its value. Every key expires.

Where a rule counts by another subject than its tier's own limits, a cluster may hold the two on different shards: see
`split_charge`.

Redirections and other errors of Redis are followed within the check's deadline (`error_replies`), which does not move however
many redirections there are. A charge without a decision by then fails with `StoreUnavailable`; its `reason` says why in one
word. Where Redis has received the charge and not answered, that is a `LateAnswer`: the caller can still learn whether it was
charged. A counter whose value no script can read is reset; other subjects are not affected (`corrupt_counters`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Iterable, Sequence
from functools import partial
from typing import Any, Final

from tidegate.algorithms import State
from tidegate.counters import Charge, ChargeOutcome, Counters, LateAnswer, LeaseReturn
from tidegate.counters.crossings import CrossingWatch
from tidegate.counters.holds import HoldHandle, HoldSettlement
from tidegate.counters.redis.command_templates import (
    CommandTemplate,
    absorb_command,
    batch_command,
    charge_command,
    give_back_command,
)
from tidegate.counters.redis.commands import LATE_TIMEOUT_S, Command, not_started, raise_first
from tidegate.counters.redis.connection import Connection
from tidegate.counters.redis.corrupt_counters import CorruptCounters
from tidegate.counters.redis.error_replies import ScriptFailed, follow_redirection, reply_by, shown
from tidegate.counters.redis.holds import RedisHolds
from tidegate.counters.redis.keyspace import hash_tag, key_of, reset_key_of, slot_of_tag
from tidegate.counters.redis.probe import PROBE, probe_tags
from tidegate.counters.redis.reservations import RedisReservations
from tidegate.counters.redis.resp import encode_command
from tidegate.counters.redis.scripts import Script, script
from tidegate.counters.redis.split_charge import charge_split
from tidegate.counters.redis.url import RedisUrl
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import IN_PROGRESS, LimitSet

logger = logging.getLogger(__name__)

_MAX_TEMPLATES: Final = 65_536
_BATCH_SIZE: Final = 50
"""Most checks in one script. Redis serves nothing else while it runs: about 0.5 ms."""

_RESET_KNOWN_MS: Final = "120000"
"""For how long it is known that a counter was reset, ms: no lease lives longer."""


class RedisCounters(RedisReservations):
    """Counters shared by all instances that use the same Redis.

    Args:
        url: see `tidegate.counters.redis.url`.
        timeout_s: deadline of a check, s; what is retried is retried within it.
        max_in_flight: most unanswered calls a shard.
        name: what Redis shows in CLIENT LIST.

    Raises:
        SettingsError: if the URL is not understood or its PEM files cannot be used.
    """

    immediate = False

    def __init__(self, url: str | RedisUrl, timeout_s: float = 0.05, max_in_flight: int = 10_000, name: str = "tidegate") -> None:
        super().__init__(url, timeout_s, max_in_flight, name)
        self._templates: dict[Any, CommandTemplate] = {}
        self._splits: set[asyncio.Task[Decision]] = set()
        self._loading: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.refunds = 0
        """Split charges of which a part was refunded: a subject that was denied meanwhile may pass now."""
        self.return_calls = 0
        """Calls that gave leases back."""
        self.corrupt = CorruptCounters(self._run_until)
        self.holds = RedisHolds(self._run_soon, self._run_late, self._template)
        self._watch: CrossingWatch | None = None

    @property
    def watch(self) -> CrossingWatch | None:
        """Finds thresholds that charges cross; None for none. While it is None, charges cost nothing more."""
        return self._watch

    @watch.setter
    def watch(self, watch: CrossingWatch | None) -> None:
        self._watch = self.holds.watch = watch
        self._templates.clear()

    async def charge(self, charges: Sequence[Charge], started_ns: int = 0) -> list[ChargeOutcome]:
        """See `CounterStore.charge`: one write for each shard touched, and where there is but one, one call for every 50.

        A shard that fails fails only its own charges.

        Args:
            started_ns: monotonic ns from which the deadline counts; from now where 0.
        """
        if not self._ready():
            await self.start()
        deadline = self._deadline(started_ns)
        if len(charges) > 1 and not self._require_topology().sharded:
            pieces = [charges[start : start + _BATCH_SIZE] for start in range(0, len(charges), _BATCH_SIZE)]
            return [outcome for each in [self._send_batch(piece, deadline) for piece in pieces] for outcome in await each]
        sent: list[asyncio.Future[Any] | StoreUnavailable] = []
        for charge in charges:
            try:
                sent.append(self._split(charge) if self._is_split(charge.counters) else self._send(charge)[0])
            except StoreUnavailable as error:
                sent.append(error)
        return [await self._outcome(charge, waiting, deadline) for charge, waiting in zip(charges, sent, strict=True)]

    async def charge_one(self, charge: Charge, started_ns: int = 0) -> Decision:
        """Decide one charge: the hot path.

        Args:
            started_ns: monotonic ns from which the deadline counts; from now where 0.

        Returns:
            The decision.

        Raises:
            LateAnswer: if its shard has not answered when the deadline passes.
            StoreUnavailable: if its shard does not answer.
        """
        if len(charge.counters) > 1 and self._is_split(charge.counters):
            return await reply_by(self._split(charge), self._deadline(started_ns), "several shards")  # type: ignore[no-any-return]
        future, template = self._send(charge)
        try:
            reply = await future
        except LateAnswer as late:
            late.decode = partial(self._decision, charge, template)
            raise
        if type(reply) is list:
            try:
                return self._decision(charge, template, reply) if template.watched else template.decision(reply)
            except StoreUnavailable:
                self._disconnect(charge)
                raise
        return await self._follow_reply(charge, reply, self._deadline(started_ns))

    async def windows(self, counters: Sequence[tuple[LimitSet, str]]) -> list[tuple[Decision, ...] | None]:
        """See `CounterStore.windows`: all windows of a set are in one value, which a set of one of them reads as well."""
        peeks = [Charge(((one, subject),), 0) for limits, subject in counters for one in limits.single_sets()]
        outcomes = iter(await self.charge(peeks))
        found: list[tuple[Decision, ...] | None] = []
        for limits, _ in counters:
            own = [next(outcomes) for _ in limits.limits]
            decisions = tuple(each for each in own if isinstance(each, Decision))
            found.append(decisions if len(decisions) == len(own) else None)
        return found

    async def reset(self, counters: Sequence[tuple[LimitSet, str]]) -> None:
        """See `CounterStore.reset`."""
        await self.start()
        work = script("reset", frozenset())
        sent: list[Command] = []
        for limits, subject in counters:
            counter = key_of(limits, subject)
            # The slots that are taken are the holds of a counter.
            names = [counter] if limits.algorithm not in IN_PROGRESS else [counter + b".holds"]
            if limits.failures is not None:
                names.append(counter)
            for name in names:
                keys = (name, reset_key_of(limits, subject))
                sent.append((hash_tag(subject), encode_command("EVALSHA", work.sha, "2", *keys, _RESET_KNOWN_MS), work))
        raise_first(await self._each(sent, wait_late=True))

    def grants(self, counters: tuple[tuple[LimitSet, str], ...]) -> bool:
        """See `LeaseGrantor.grants`: where one server counts all of them and has loaded the script.

        It is loaded beside the checks: those of many subjects that found it missing at a slow server would all fail.
        """
        if self._topology is None or self._is_split(counters):
            return False
        try:
            connection = self._connection(hash_tag(counters[0][1]))
        except StoreUnavailable:
            return False
        work = self._template(counters).lease_script
        if work.sha in connection.loaded:
            return True
        if work.sha not in self._loading:
            self._loading.add(work.sha)
            task = asyncio.ensure_future(self._load(connection, work))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return False

    async def _load(self, connection: Connection, work: Script) -> None:
        session = connection.session
        try:
            # Where it is refused, a check that finds the script missing sends it whole: see `error_replies`.
            await connection.send(encode_command("SCRIPT", "LOAD", work.source))
            if session == connection.session:
                connection.loaded.add(work.sha)
        except StoreUnavailable as error:
            logger.debug("script for leases not loaded, the next check tries again: %s", error)
        finally:
            self._loading.discard(work.sha)

    def session(self, counters: tuple[tuple[LimitSet, str], ...]) -> object:
        """See `LeaseGrantor.session`: a connection to one server. Another server, or the same one restarted, may lack writes."""
        try:
            connection = self._connection(hash_tag(counters[0][1]))
        except StoreUnavailable:
            return None
        return connection, connection.session

    async def give_back(self, returns: Sequence[LeaseReturn]) -> list[bool]:
        """See `LeaseGrantor.give_back`: all are written before anything is waited for; one call for every 50 on one server."""
        valid = [
            place
            for place, each in enumerate(returns)
            if each.session is not None and each.session == self.session(each.counters)
        ]
        size = 1 if self._require_topology().sharded else _BATCH_SIZE
        batches = [valid[start : start + size] for start in range(0, len(valid), size)]
        sent: list[Command] = []
        for batch in batches:
            leases = [returns[place] for place in batch]
            work = script("give_back", frozenset(limits.algorithm for each in leases for limits, _ in each.counters))
            sent.append((hash_tag(leases[0].counters[0][1]), give_back_command(work, leases), work))
        self.return_calls += len(sent)
        taken = [False] * len(returns)
        for batch, reply in zip(batches, await self._each(sent, wait_late=True), strict=True):
            if isinstance(reply, list) and len(reply) == len(batch):
                for place, counters in zip(batch, reply, strict=True):
                    taken[place] = counters == len(returns[place].counters)
        return taken

    async def open_hold(
        self, counters: Counters, cost: int, ttl_us: int, rule: str | None = None
    ) -> tuple[Decision, HoldHandle | None]:
        """See `HoldingCounterStore.open_hold`."""
        if not self._has_started():
            await self.start()
        return await self.holds.open(counters, cost, ttl_us, rule, self.sharded)

    async def settle_hold(self, handle: HoldHandle, cost: int, success: bool = False) -> HoldSettlement:
        """See `HoldingCounterStore.settle_hold`."""
        if not self._has_started():
            await self.start()
        return await self.settle_started(handle, cost, success)

    async def settle_started(self, handle: HoldHandle, cost: int, success: bool = False) -> HoldSettlement:
        """As `settle_hold`, where the store has started in the running event loop: to find that out costs 1 µs."""
        settled = await self.holds.settle(handle, cost, success)
        if cost < handle.cost:
            # What was denied because these units were used may pass now, on every instance. Where it had been settled before, the
            # answer to that may have reached nobody.
            self.refunds += 1
        return settled

    async def adjust(self, counters: Counters, units: int) -> Decision:
        """See `AdjustingCounterStore.adjust`."""
        await self.start()
        decision = await self.holds.adjust(counters, units, self._require_topology().sharded)
        if units < 0:
            self.refunds += 1
        return decision

    async def count_holds(self, counters: Counters) -> Sequence[int]:
        """See `HoldCountingStore.count_holds`."""
        if not self._has_started():
            await self.start()
        return await self.holds.count(counters)

    async def renew_hold(self, handle: HoldHandle, ttl_us: int) -> None:
        """See `HoldingCounterStore.renew_hold`."""
        await self.start()
        await self.holds.renew(handle, ttl_us)

    async def absorb(self, states: Iterable[tuple[LimitSet, str, Sequence[State]]]) -> list[StoreUnavailable | None]:
        """Add what was admitted elsewhere, without asking any limit. All is written before anything is waited for, so that
        a charge that anybody sends later finds it added. Waits also for answers that are late.

        Args:
            states: for each counter its limits, its subject, and a state for each limit (None for nothing).

        Returns:
            For each counter None, or why it is not known to have been added.
        """
        taken = list(states)
        sent = []
        watch = self._watch
        for limits, subject, each in taken:
            work = script("absorb", frozenset((limits.algorithm,)), crossings=watch is not None and bool(watch.marks(limits)))
            sent.append((hash_tag(subject), absorb_command(work, limits, subject, each), work))
        outcomes = await self._each(sent, wait_late=True)
        failed = [place for place, outcome in enumerate(outcomes) if isinstance(outcome, ScriptFailed)]
        if failed:
            deadline = time.monotonic() + LATE_TIMEOUT_S
            for place in failed:
                limits, subject, _ = taken[place]
                await self._reset_corrupt(((limits, subject),), 0, deadline)
            again = await self._each([sent[place] for place in failed], wait_late=True)
            for place, outcome in zip(failed, again, strict=True):
                outcomes[place] = outcome
        if watch is not None:
            for (limits, subject, _), outcome in zip(taken, outcomes, strict=True):
                if type(outcome) is list and len(outcome) == 4:
                    watch.note_change(((limits, subject),), *outcome[1:])
        return [outcome if isinstance(outcome, StoreUnavailable) else None for outcome in outcomes]

    async def ping(self) -> None:
        """See `CounterStore.ping`: every shard must run the script that decides checks, with a peek, which writes nothing."""
        await self.start()
        if not self.connections():
            raise StoreUnavailable("no node of the Redis cluster can be reached", reason="disconnected")
        outcomes = await asyncio.gather(*(self.probe(shard, 0) for shard in sorted(self.shards())), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def probe(self, shard: str, cost: int) -> None:
        """Find out whether a shard decides checks: with all algorithms, on counters of its own that expire in seconds.

        Args:
            shard: one of `shards`.
            cost: 0 to look only, 1 to find out whether it can write too.

        Raises:
            StoreUnavailable: if it does not, or counts nothing any more.
        """
        topology = self._require_topology()
        tag = probe_tags(topology).get(shard)
        if tag is None:
            raise StoreUnavailable(f"Redis at {shard} owns no slots at present", reason="cluster_down", shard=shard)
        charge = Charge(tuple((limits, "probe") for limits in PROBE), cost)
        template = self._template(charge.counters)
        command = charge_command(template, charge, tag)
        deadline = self._deadline(0)
        connection = topology.connection_of(slot_of_tag(tag))
        reply = await connection.send(command)
        if type(reply) is not list:
            reply = await follow_redirection(topology, slot_of_tag(tag), command, reply, template.script, deadline)
        template.decision(reply)

    async def close(self) -> None:
        """See `CounterStore.close`."""
        if self._loop is asyncio.get_running_loop():
            pending = [*self._splits, *self._tasks]
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        await super().close()

    @property
    def sharded(self) -> bool:
        """Whether subjects lie on several servers."""
        return self._require_topology().sharded

    # One check.

    def _ready(self) -> bool:
        """Whether commands can be sent from here: connected, in the running event loop."""
        return self._topology is not None and self._loop is asyncio.get_running_loop()

    def _has_started(self) -> bool:
        """As `_ready`, and the first attempt to connect has ended."""
        return self._ready() and self._starting is not None and self._starting.done()

    def _template(self, counters: tuple[tuple[LimitSet, str], ...]) -> CommandTemplate:
        key: Any = counters[0][0] if len(counters) == 1 else tuple(limits for limits, _ in counters)
        template = self._templates.get(key)
        if template is None or (template.until_s is not None and template.until_s <= time.time()):
            if len(self._templates) >= _MAX_TEMPLATES:
                self._templates.clear()
            template = self._templates[key] = CommandTemplate(
                tuple(limits for limits, _ in counters), self._watch is not None and self._watch.watches(counters)
            )
        return template

    def _send(self, charge: Charge) -> tuple[asyncio.Future[Any], CommandTemplate]:
        # The hot path: what `_template` and `_connection` do is written out, for calls cost more here than what they do.
        counters = charge.counters
        limits, subject = counters[0]
        template = self._templates.get(limits) if len(counters) == 1 and limits.plain else None
        if template is None:
            template = self._template(counters)
        topology = self._topology
        if topology is None:
            raise not_started()
        tag = hash_tag(subject)
        connection = topology.connection_of(slot_of_tag(tag) if topology.sharded else 0)
        return connection.send(charge_command(template, charge, tag)), template

    async def _outcome(self, charge: Charge, sent: asyncio.Future[Any] | StoreUnavailable, deadline: float) -> ChargeOutcome:
        """What became of one of several charges that were written together."""
        if isinstance(sent, StoreUnavailable):
            return sent
        try:
            reply = await reply_by(sent, deadline, "several shards") if isinstance(sent, asyncio.Task) else await sent
            if isinstance(reply, Decision):
                return reply
            if type(reply) is list:
                return self._decision(charge, self._template(charge.counters), reply)
            return await self._follow_reply(charge, reply, deadline)
        except StoreUnavailable as error:
            if isinstance(error, LateAnswer) and error.decode is None:
                error.decode = partial(self._decision, charge, self._template(charge.counters))
            if error.details.get("reason") == "garbage":
                self._disconnect(charge)
            return error

    def _send_batch(self, charges: Sequence[Charge], deadline: float) -> Awaitable[list[ChargeOutcome]]:
        """Write charges that one server counts as one call: a third less work for it than a call for each."""
        keys: list[bytes] = []
        which: dict[LimitSet, int] = {}
        layout: list[int] = []
        for charge in charges:
            layout += (len(charge.counters), charge.cost)
            for limits, subject in charge.counters:
                keys.append(b"tg:{%b}%b" % (hash_tag(subject), self._template(((limits, subject),)).name))
                layout.append(which.setdefault(limits, len(which) + 2))
        watched = self._watch is not None and any(self._watch.marks(limits) for limits in which)
        work = script("charge_many", frozenset(limits.algorithm for limits in which), watched=watched)
        command = batch_command(work, layout, keys, which)
        try:
            future = self._require_topology().connection_of(0).send(command)
        except StoreUnavailable as error:
            return _failed(len(charges), error)
        return self._batch_outcomes(charges, future, command, work, deadline)

    async def _batch_outcomes(
        self, charges: Sequence[Charge], future: asyncio.Future[Any], command: bytes, work: Script, deadline: float
    ) -> list[ChargeOutcome]:
        try:
            reply = await future
            if type(reply) is not list:
                reply = await follow_redirection(self._require_topology(), 0, command, reply, work, deadline)
            failed = [place for place in range(len(charges)) if type(reply) is list and reply[5 * place : 5 * place + 1] == [0]]
            # Each that failed is sent again by itself: its own error says why, and a corrupt counter is reset then.
            sent = {place: self._send(charges[place])[0] for place in failed}
            return [
                await self._outcome(charge, sent[place], deadline) if place in sent else self._decision_at(charges, place, reply)
                for place, charge in enumerate(charges)
            ]
        except LateAnswer as late:
            outcomes: list[ChargeOutcome] = []
            for place in range(len(charges)):
                each = LateAnswer(late.message, late.answer, shard=late.details.get("shard"))
                each.decode = partial(self._decision_at, charges, place)
                outcomes.append(each)
            return outcomes
        except StoreUnavailable as error:
            if error.details.get("reason") == "garbage":
                self._disconnect(charges[0])
            return [error] * len(charges)

    def _decision_at(self, charges: Sequence[Charge], place: int, reply: Any) -> Decision:
        """The decision of one charge of a batch."""
        if type(reply) is not list or len(reply) not in (5 * len(charges), 6 * len(charges)):
            raise StoreUnavailable(f"unexpected reply from Redis to a batch of charges: {shown(reply)}", reason="garbage")
        own = reply[5 * place : 5 * place + 5]
        if len(reply) != 5 * len(charges):
            own.append(reply[5 * len(charges) + place])
        return self._decision(charges[place], self._template(charges[place].counters), own)

    def _decision(self, charge: Charge, template: CommandTemplate, reply: Any) -> Decision:
        """The decision in a reply to a charge; thresholds that it crossed are reported."""
        decision = template.decision(reply)
        if self._watch is not None and decision.allowed:
            found = template.left(reply)
            if found is not None and charge.cost + found[0]:
                self._watch.note_all(charge.counters, found[1], charge.cost + found[0], decision.at_us)
        return decision

    def _disconnect(self, charge: Charge) -> None:
        """A shard's reply has the wrong form: the replies that follow might be matched to the wrong commands."""
        self._connection(hash_tag(charge.counters[0][1])).drop("its replies do not match the commands sent")

    async def _follow_reply(self, charge: Charge, reply: Any, deadline: float) -> Decision:
        """Handle a reply that is not a decision."""
        template = self._template(charge.counters)
        tag = hash_tag(charge.counters[0][1])
        work = template.script_of(charge)
        command, slot = charge_command(template, charge, tag), slot_of_tag(tag)
        topology = self._require_topology()
        try:
            try:
                followed = await follow_redirection(topology, slot, command, reply, work, deadline)
                return self._decision(charge, template, followed)
            except ScriptFailed:
                # Tried again in any case: another check may have reset it first.
                await self._reset_corrupt(charge.counters, charge.cost, deadline)
            connection = topology.connection_of(slot)
            again = await reply_by(connection.send(command), deadline, str(connection.endpoint))
            if type(again) is not list:
                again = await follow_redirection(topology, slot, command, again, work, deadline)
            return self._decision(charge, template, again)
        except LateAnswer as late:
            late.decode = partial(self._decision, charge, template)
            raise

    async def _reset_corrupt(self, counters: Sequence[tuple[LimitSet, str]], cost: int, deadline: float) -> bool:
        return await self.corrupt.reset(counters, cost, deadline)

    def _is_split(self, counters: tuple[tuple[LimitSet, str], ...]) -> bool:
        return (
            len(counters) > 1
            and self._require_topology().sharded
            and any(subject != counters[0][1] for _, subject in counters[1:])
            and len({slot_of_tag(hash_tag(subject)) for _, subject in counters}) > 1
        )

    def _split(self, charge: Charge) -> asyncio.Task[Decision]:
        """Charge counters of several shards; continues past the deadline of the check."""

        async def give_back(states: Sequence[tuple[LimitSet, str, Sequence[State]]]) -> None:
            self.refunds += 1
            await self.absorb(states)

        task = asyncio.ensure_future(charge_split(charge, self.charge_one, give_back))
        self._splits.add(task)
        task.add_done_callback(self._splits.discard)
        return task


async def _failed(count: int, error: StoreUnavailable) -> list[ChargeOutcome]:
    return [error] * count
