"""Whether a shard decides checks: the script of a check is run on counters used for nothing else.

A PING is not enough: a server may answer it and refuse the script, for lack of a permission or of memory.
"""

from __future__ import annotations

from typing import Final

from tidegate.counters.redis.keyspace import slot_of_tag
from tidegate.counters.redis.topology import Topology
from tidegate.policy.limits import Algorithm, Limit, LimitSet

PROBE: Final = tuple(
    LimitSet(f"tidegate:probe:{algorithm}", algorithm, [Limit.parse("1000/second")])
    for algorithm in (Algorithm.FIXED_WINDOW, Algorithm.SLIDING_WINDOW, Algorithm.SLIDING_LOG, Algorithm.TOKEN_BUCKET)
)
"""One counter of each kind that there is in Redis. Their keys live for two seconds at most."""
_MAX_TRIES: Final = 200_000


def probe_tags(topology: Topology) -> dict[str, bytes]:
    """A hash tag for each server, of a slot that it counts. No subject has such a tag.

    Returns:
        By address; without those that count nothing.
    """
    if not topology.sharded:
        return {str(connection.endpoint): b"probe" for connection in topology.connections()}
    wanted = {id(connection): str(connection.endpoint) for connection in topology.connections()}
    found: dict[str, bytes] = {}
    for number in range(_MAX_TRIES):
        if not wanted:
            break
        tag = b"p%d" % number
        owner = topology.owner_of(slot_of_tag(tag))
        shard = wanted.pop(id(owner), None)
        if shard is not None:
            found[shard] = tag
    return found
