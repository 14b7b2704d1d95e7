"""What a plan assumes and nobody can measure for you: your users, your targets, your prices. All of it can be replaced."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from tidegate.errors import SettingsError
from tidegate.settings import CacheSettings

PRICES_OF: Final = "2026-11-25"
"""The day the prices below were assumed on: round numbers of the size that clouds ask, nobody's list."""


class Known(NamedTuple):
    """One assumption.

    Args:
        default: where nothing else is given.
        least: of its range.
        most: of its range.
        what: with its unit, and where the default comes from.
    """

    default: float
    least: float
    most: float
    what: str


_CACHE: Final = CacheSettings()

USE: Final[Mapping[str, Known]] = {
    "requests_per_user": Known(100, 0.001, 1e6, "requests of a user in a day"),
    "peak_factor": Known(3, 1, 1000, "requests in the peak second, as a multiple of the day's mean"),
    "counters_per_user": Known(10, 0.01, 10_000, "live counters of a user"),
    "cpu_target": Known(0.70, 0.05, 1, "CPU of an instance at the peak, share; the autoscaler's target"),
    "checks_per_instance": Known(10_000, 1, 1e6, "checks/s of an instance that the autoscaler aims at"),
    "cores_per_instance": Known(1, 1, 256, "cores, each with a worker"),
    "min_instances": Known(3, 1, 1000, "fewest instances; the autoscaler's"),
    "max_instances": Known(50, 1, 10_000, "most instances; the autoscaler's"),
    "spare_instances": Known(1, 0, 100, "instances that may be away at the peak"),
    "redis_cpu_target": Known(0.60, 0.05, 1, "CPU of a shard's one core at the peak, share"),
    "shard_gb": Known(4, 0.1, 1000, "maxmemory of a shard, GB"),
    "shard_fill": Known(0.75, 0.05, 1, "share of maxmemory in use; the rest is for growth, fork and fragments"),
    "min_shards": Known(3, 1, 1000, "fewest masters: a cluster elects with three"),
    "replicas_per_shard": Known(1, 0, 5, "copies of each shard"),
    "database_cores": Known(2, 1, 256, "cores of a database server"),
    "database_cpu_target": Known(0.50, 0.05, 1, "CPU of a replica at the peak, share"),
    "min_replicas": Known(2, 0, 100, "fewest read replicas: one may be away"),
    "zipf_exponent": Known(1.0, 0, 3, "how unevenly requests spread over users: 0 evenly, 1 as words in a text"),
    "l1_ttl_s": Known(_CACHE.l1_ttl_s, 0.1, 86_400, "cache.l1_ttl_s, s"),
    "l2_ttl_s": Known(_CACHE.l2_ttl_s, 0.1, 86_400, "cache.l2_ttl_s, s"),
    "l1_keys": Known(_CACHE.max_keys, 1, 1e8, "cache.max_keys of an instance"),
    "api_bytes": Known(3_000, 1, 1e9, "bytes of an API request and its response"),
    "edge_hit_rate": Known(0.60, 0, 1, "share of the API's answers that an edge cache gives by itself, without a check"),
}
PRICES: Final[Mapping[str, Known]] = {
    "instance": Known(30, 0, 1e6, "$ a month for an instance"),
    "redis_node": Known(50, 0, 1e6, "$ a month for a Redis server with shard_gb"),
    "database_node": Known(120, 0, 1e6, "$ a month for a database server with database_cores"),
    "database_gb": Known(0.12, 0, 1000, "$ a month for a GB of database storage, each server"),
    "balancer": Known(20, 0, 1e6, "$ a month for a load balancer; there are two"),
    "origin_gb": Known(0.05, 0, 1000, "$ for a GB from the API to the world or to the edge"),
    "edge_gb": Known(0.02, 0, 1000, "$ for a GB from the edge to the world"),
}
_WHOLE: Final = frozenset(
    {"cores_per_instance", "min_instances", "max_instances", "spare_instances", "min_shards", "replicas_per_shard"}
    | {"database_cores", "min_replicas", "l1_keys"}
)


class Assumptions(msgspec.Struct, frozen=True):
    """All of them, by name.

    Args:
        use: users, targets and sizes.
        prices: US dollars.
        replaced: names of those that were given.
        prices_of: the day that the prices are of.
    """

    use: Mapping[str, float]
    prices: Mapping[str, float]
    replaced: tuple[str, ...] = ()
    prices_of: str = PRICES_OF


def assume(file: Path | None = None, given: Iterable[str] = (), options: Mapping[str, float] | None = None) -> Assumptions:
    """Put together the defaults, a file, and what the command line gives; later ones go over earlier ones.

    Args:
        file: TOML with the tables `[use]` and `[prices]`, and optionally `prices_of = "2027-01-31"`.
        given: texts `NAME=VALUE`; prices are named `prices.NAME`.
        options: values of `use` that have options of their own.

    Returns:
        The assumptions.

    Raises:
        SettingsError: if the file cannot be read, a name is unknown or a value is out of range.
    """
    use = {name: known.default for name, known in USE.items()}
    prices = {name: known.default for name, known in PRICES.items()}
    replaced: list[str] = []
    prices_of = PRICES_OF

    def put(section: str, name: str, value: object, where: str) -> None:
        known = {"use": USE, "prices": PRICES}.get(section, {}).get(name)
        if known is None:
            names = ", ".join((*USE, *(f"prices.{each}" for each in PRICES)))
            raise SettingsError(f"{where}: there is no assumption {name!r}; there are {names}")
        (use if section == "use" else prices)[name] = _checked(name, known, value, where)
        full = name if section == "use" else f"prices.{name}"
        if full not in replaced:
            replaced.append(full)

    if file is not None:
        content = _read(file)
        prices_of = str(content.pop("prices_of", PRICES_OF))
        for section, values in content.items():
            if section not in ("use", "prices") or not isinstance(values, dict):
                raise SettingsError(f"{file}: {section!r} is not understood: write the tables [use] and [prices]")
            for name, value in values.items():
                put(section, name, value, str(file))
    for text in given:
        name, sign, value = text.partition("=")
        if not sign:
            raise SettingsError(f"--set {text!r} is not understood: write NAME=VALUE, as in --set cpu_target=0.6")
        section, _, tail = name.strip().rpartition(".")
        put(section or "use", tail, value.strip(), f"--set {text}")
    for name, number in (options or {}).items():
        put("use", name, number, "--" + name.replace("_", "-"))
    if use["min_instances"] > use["max_instances"]:
        raise SettingsError(
            f"min_instances {use['min_instances']:g} is above max_instances {use['max_instances']:g}: lower it, or raise that"
        )
    return Assumptions(use, prices, tuple(replaced), prices_of)


def _checked(name: str, known: Known, value: object, where: str) -> float:
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None:
        raise SettingsError(f"{where}: {name} must be a number, not {value!r}")
    if not known.least <= number <= known.most:
        raise SettingsError(
            f"{where}: {name} = {number:g} is out of range: give {known.least:g} to {known.most:g} ({known.what})"
        )
    if name in _WHOLE and number != int(number):
        raise SettingsError(f"{where}: {name} = {number:g} must be whole: give {int(number)} or {int(number) + 1}")
    return number


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} is no TOML: {error}") from None
