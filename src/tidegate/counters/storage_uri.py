"""URLs of stores as users of other Python limiters write them, read as ours.

The packages `limits`, slowapi, flask-limiter and others name a store by `redis://`, `redis+cluster://`, `async+redis://`,
`valkey://` and so on. Those that mean a Redis or the memory are understood; for others the error names what to use.
"""

from __future__ import annotations

from typing import Final

from tidegate.errors import SettingsError
from tidegate.url_parts import scheme_of

_OTHER_STORES: Final = ("memcached", "mongodb", "mongodb+srv", "etcd", "postgres", "postgresql", "sqlite", "mysql")


def counters_url(uri: str) -> str:
    """The URL of a counter store.

    Args:
        uri: ours, or of the package `limits`: `async+` before it is dropped, `valkey` is read as `redis`.

    Returns:
        The URL as `open_counters` reads it.

    Raises:
        SettingsError: if it is not a URL, or names a store that Tidegate does not count in.
    """
    if "://" not in uri:
        raise SettingsError(
            "counters must be a URL such as 'memory://', 'redis://127.0.0.1:6379' or "
            "'redis+cluster://127.0.0.1:7000', or a counter store"
        )
    scheme = scheme_of(uri)
    rest = uri.partition("://")[2]
    plain = scheme.removeprefix("async+")
    if plain in _OTHER_STORES:
        raise SettingsError(
            f"counters with the scheme {scheme!r}: Tidegate counts in Redis or in memory; use redis://, redis+sentinel:// or "
            "redis+cluster:// for several processes, memory:// for one"
        )
    if plain == "memory":
        return "memory://"
    if plain.startswith("valkeys"):
        plain = "rediss" + plain.removeprefix("valkeys")
    elif plain.startswith("valkey"):
        plain = "redis" + plain.removeprefix("valkey")
    return f"{plain}://{rest}"
