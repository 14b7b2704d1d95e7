"""What Redis answers instead of a reply."""

from __future__ import annotations

from typing import Any, Final

from tidegate.counters.redis.connection import Connection
from tidegate.counters.redis.url import Endpoint
from tidegate.errors import StoreUnavailable

RETRIED: Final = ("TRYAGAIN", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "BUSY")
"""What passes by itself: asked again, a moment later."""


def named_endpoint(reply: Any, source: Connection) -> Endpoint:
    """The address of `MOVED 3999 127.0.0.1:6381`; an empty host means the one that said so."""
    host, _, port = str(reply).rpartition(" ")[2].rpartition(":")
    if not port.isascii() or not port.isdecimal():
        raise StoreUnavailable(f"Redis at {source.endpoint} redirects to nowhere: {reply}", reason="garbage")
    return Endpoint(host or source.endpoint.host, int(port))


def reason_of(reply: Any) -> str:
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
