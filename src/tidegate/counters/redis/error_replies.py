"""Error replies of Redis and how each is followed: MOVED, ASK, TRYAGAIN, CLUSTERDOWN, LOADING, READONLY, NOSCRIPT.

A check that gets a decision at once does not use this module.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Final

import hiredis

from tidegate.counters import LateAnswer
from tidegate.counters.redis.connection import Connection
from tidegate.counters.redis.resp import encode_command, with_source
from tidegate.counters.redis.scripts import Script
from tidegate.counters.redis.topology import Topology
from tidegate.counters.redis.url import Endpoint
from tidegate.errors import StoreUnavailable

logger = logging.getLogger(__name__)

_FOLLOWED: Final = frozenset(("NOSCRIPT", "MOVED", "ASK", "READONLY", "TRYAGAIN", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "BUSY"))
"""Errors that name another server or are temporary: the command is sent again after `_PAUSE_S`."""
_PAUSE_S: Final = 0.005
LOADED_S: Final = 0.05
"""A script that was loaded less than this ago, s, is not loaded again."""


class ScriptFailed(StoreUnavailable):
    """A script failed while it ran: because of a value it read, or a missing permission."""


async def follow_redirection(
    topology: Topology, slot: int, command: bytes, reply: Any, work: Script | None, deadline: float
) -> Any:
    """Follow an error reply, and those after it, until there is a reply or the deadline passes.

    Args:
        slot: of the command's keys.
        command: as it was written.
        reply: an error reply, or one that the caller cannot decode.
        work: the script that the command runs; None where it runs none.
        deadline: of all of it, monotonic s.

    Returns:
        The reply.

    Raises:
        LateAnswer: if the deadline passes while the command is unanswered.
        ScriptFailed: if the script fails, which may be for what its keys hold.
        StoreUnavailable: if there is no reply for another reason, named by its `reason`.
    """
    if not isinstance(reply, hiredis.ReplyError):
        topology.connection_of(slot).drop("its replies do not match the commands sent")
        raise StoreUnavailable(f"unexpected reply from Redis to a charge: {shown(reply)}", reason="garbage")
    while True:
        connection = topology.connection_of(slot)
        word = str(reply).partition(" ")[0]
        if is_script_failure(reply):
            raise ScriptFailed(
                f"script error on Redis at {connection.endpoint}: {shown(reply)}",
                reason="script",
                shard=str(connection.endpoint),
            )
        if word not in _FOLLOWED or (word == "NOSCRIPT" and work is None):
            raise _refused(connection, reply)
        if time.monotonic() >= deadline:
            raise StoreUnavailable(
                f"Redis at {connection.endpoint} still answered with an error at the deadline; last reply: {shown(reply)}",
                reason=reason_of(reply),
                shard=str(connection.endpoint),
            )
        if word == "NOSCRIPT" and work is not None:
            reply = await _load_and_send(connection, command, work, deadline)
        elif word == "MOVED":
            topology.moved(slot, _named_endpoint(reply, connection))
            reply = await _send_to_owner(topology, slot, command, deadline)
        elif word == "ASK":
            reply = await _send_to_importer(topology.connection_to(_named_endpoint(reply, connection)), command, work, deadline)
        else:
            if word == "CLUSTERDOWN":
                topology.mark_stale(connection, str(reply))
            elif word == "READONLY":
                topology.mark_stale(connection, "it is now a replica")
            await topology.pause(_PAUSE_S)
            reply = await _send_to_owner(topology, slot, command, deadline)
        if not isinstance(reply, hiredis.ReplyError):
            return reply


async def reply_by(sent: asyncio.Future[Any], deadline: float, shard: str) -> Any:
    """The reply to a command, until a deadline.

    Args:
        sent: the future reply.
        deadline: monotonic s.
        shard: address of the server, for the error.

    Returns:
        The reply.

    Raises:
        LateAnswer: when the deadline passes; the command stays in flight.
        StoreUnavailable: if the connection is lost.
    """
    if not sent.done():
        await asyncio.wait((sent,), timeout=max(deadline - time.monotonic(), 0))
    if sent.done():
        return sent.result()
    raise LateAnswer(f"Redis at {shard} did not answer before the deadline", sent, shard=shard)


async def _send_to_owner(topology: Topology, slot: int, command: bytes, deadline: float) -> Any:
    connection = topology.connection_of(slot)
    await connection.wait_up(max(deadline - time.monotonic(), 0))
    return await reply_by(connection.send(command), deadline, str(connection.endpoint))


async def _send_to_importer(other: Connection, command: bytes, work: Script | None, deadline: float) -> Any:
    """Send a command to the node that a slot moves to."""
    await other.wait_up(max(deadline - time.monotonic(), 0))
    # Both in one write: another command between them would use up the ASKING.
    _ignore_reply(other.send(encode_command("ASKING")))
    reply = await reply_by(other.send(command), deadline, str(other.endpoint))
    if work is None or not _misses_script(reply):
        return reply
    load = other.send(encode_command("SCRIPT", "LOAD", work.source))
    _ignore_reply(other.send(encode_command("ASKING")))
    again = other.send(command)
    if not isinstance(await reply_by(load, deadline, str(other.endpoint)), hiredis.ReplyError):
        return await reply_by(again, deadline, str(other.endpoint))
    _ignore_reply(again)
    _ignore_reply(other.send(encode_command("ASKING")))
    return await reply_by(other.send(with_source(command, work.sha, work.source)), deadline, str(other.endpoint))


async def _load_and_send(connection: Connection, command: bytes, work: Script, deadline: float) -> Any:
    """Load a script, once for a batch that misses it, and send the command again. Where loading is refused, use EVAL."""
    shard = str(connection.endpoint)
    now = time.monotonic()
    loaded = connection.loads.get(work.sha)
    if loaded is not None and now - loaded < LOADED_S:
        reply = await reply_by(connection.send(command), deadline, shard)
        if not _misses_script(reply):
            return reply
    if not connection.refuses_load:
        connection.loads[work.sha] = now
        load = connection.send(encode_command("SCRIPT", "LOAD", work.source))
        again = connection.send(command)
        refusal = await reply_by(load, deadline, shard)
        if not isinstance(refusal, hiredis.ReplyError):
            return await reply_by(again, deadline, shard)
        _ignore_reply(again)
        if str(refusal).startswith("LOADING"):
            return refusal
        logger.warning(
            "Redis at %s refused SCRIPT LOAD: %s; sending scripts with EVAL instead. Grant +script|load to avoid the overhead",
            shard,
            shown(refusal),
        )
        connection.refuses_load = True
    return await reply_by(connection.send(with_source(command, work.sha, work.source)), deadline, shard)


def _misses_script(reply: Any) -> bool:
    return isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOSCRIPT")


def _ignore_reply(sent: asyncio.Future[Any]) -> None:
    """Ignore its reply and its failure."""
    sent.add_done_callback(lambda done: None if done.cancelled() else done.exception())


def _refused(connection: Connection, reply: Any) -> StoreUnavailable:
    shard = str(connection.endpoint)
    return StoreUnavailable(f"Redis at {shard} refused the command: {shown(reply)}", reason=reason_of(reply), shard=shard)


def shown(reply: Any) -> str:
    """A reply as text for a message: short and on one line.

    Args:
        reply: anything.
    """
    return str(reply)[:200].encode("unicode_escape").decode()


def is_script_failure(reply: Any) -> bool:
    """Whether an error reply says that a script failed while it ran, because of a value it read or a missing permission.

    Args:
        reply: of the server.
    """
    text = str(reply)
    return isinstance(reply, hiredis.ReplyError) and "user_script:" in text and text.startswith(("WRONGTYPE", "ERR "))


def reason_of(reply: Any) -> str:
    """The reason of an error reply, in one word.

    Args:
        reply: an error reply.

    Returns:
        The word, as in `StoreUnavailable.reason`.
    """
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
        "NOSCRIPT": "noscript",
    }.get(word, "error")


def _named_endpoint(reply: Any, source: Connection) -> Endpoint:
    """The address of `MOVED 3999 127.0.0.1:6381`; an empty host means the server that sent it."""
    host, _, port = str(reply).rpartition(" ")[2].rpartition(":")
    if not port.isascii() or not port.isdecimal():
        raise StoreUnavailable(
            f"Redis at {source.endpoint} sent a redirection without a valid address: {shown(reply)}", reason="garbage"
        )
    return Endpoint(host or source.endpoint.host, int(port))
