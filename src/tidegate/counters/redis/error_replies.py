"""What Redis answers instead of a reply, and doing what it tells: MOVED, ASK, TRYAGAIN, CLUSTERDOWN, LOADING, READONLY, NOSCRIPT.

A check that gets its reply at once never comes here.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import hiredis

from tidegate.counters.redis.connection import Connection, encode_command
from tidegate.counters.redis.scripts import Script
from tidegate.counters.redis.topology import Topology
from tidegate.counters.redis.url import Endpoint
from tidegate.errors import StoreUnavailable

_RETRIED: Final = ("TRYAGAIN", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "BUSY")
"""What passes by itself: asked again, a moment later."""
_PAUSE_S: Final = 0.005


async def settled(topology: Topology, slot: int, command: bytes, reply: Any, work: Script | None, timeout_s: float) -> Any:
    """Do what an error reply tells, until a reply is none or the deadline passes.

    Args:
        topology: of the servers.
        slot: of the command's keys.
        command: as it was written.
        reply: what came; where it is no error, whoever asked has found no sense in it.
        work: the script that the command runs; None where it runs none.
        timeout_s: how long all of it may take, s.

    Returns:
        The reply.

    Raises:
        StoreUnavailable: if there is none; its `reason` says why in one word.
    """
    if not isinstance(reply, hiredis.ReplyError):
        topology.connection_of(slot).drop("it answered what was not asked")
        raise StoreUnavailable(f"Redis answered what no counter says: {str(reply)[:100]}", reason="garbage")
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                connection = topology.connection_of(slot)
                word = str(reply).partition(" ")[0]
                if word == "NOSCRIPT" and work is not None:
                    reply = await _load_and_ask(connection, command, work, timeout_s)
                elif word == "MOVED":
                    topology.moved(slot, _named_endpoint(reply, connection))
                    connection = topology.connection_of(slot)
                    await connection.wait_up(timeout_s)
                    reply = await connection.ask(command)
                elif word == "ASK":
                    other = topology.connection_to(_named_endpoint(reply, connection))
                    await other.wait_up(timeout_s)
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
                    await topology.connection_of(slot).wait_up(timeout_s)
                    await asyncio.sleep(_PAUSE_S)
                    reply = await topology.connection_of(slot).ask(command)
                else:
                    raise StoreUnavailable(f"Redis at {connection.endpoint} refuses: {reply}", reason=reason_of(reply))
                if not isinstance(reply, hiredis.ReplyError):
                    return reply
    except TimeoutError:
        raise StoreUnavailable(
            f"Redis did not settle within {timeout_s * 1000:g} ms; last it said: {reply}", reason=reason_of(reply)
        ) from None


def reason_of(reply: Any) -> str:
    """One word for what Redis said.

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
    }.get(word, "error")


async def _load_and_ask(connection: Connection, command: bytes, work: Script, timeout_s: float) -> Any:
    """Load a script and ask again; of a batch that misses it, the first loads it for all."""
    now = asyncio.get_running_loop().time()
    loaded = connection.loads.get(work.sha)
    if loaded is not None and now - loaded < timeout_s:
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


def _named_endpoint(reply: Any, source: Connection) -> Endpoint:
    """The address of `MOVED 3999 127.0.0.1:6381`; an empty host means the one that said so."""
    host, _, port = str(reply).rpartition(" ")[2].rpartition(":")
    if not port.isascii() or not port.isdecimal():
        raise StoreUnavailable(f"Redis at {source.endpoint} redirects to nowhere: {reply}", reason="garbage")
    return Endpoint(host or source.endpoint.host, int(port))
