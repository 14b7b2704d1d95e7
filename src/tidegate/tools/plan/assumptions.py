"""Assumptions of a plan: users, targets, sizes and prices. All can be replaced."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from tidegate.errors import SettingsError
from tidegate.settings import CacheSettings, LeaseSettings

PRICES_OF: Final = "2026-11-25"
"""Date of the prices below: round numbers in the range of cloud providers' prices, not from a price list."""


class Assumption(NamedTuple):
    """One assumption: its default, its range, and its description with the unit and the source of the default."""

    default: float
    minimum: float
    maximum: float
    description: str


_CACHE: Final = CacheSettings()
_LEASES: Final = LeaseSettings()

USE: Final[Mapping[str, Assumption]] = {
    "requests_per_user": Assumption(100, 0.001, 1e6, "requests of a user in a day"),
    "peak_factor": Assumption(3, 1, 1000, "requests in the peak second, as a multiple of the day's mean"),
    "counters_per_user": Assumption(10, 0.01, 10_000, "live counters of a user"),
    "cpu_target": Assumption(0.70, 0.05, 1, "CPU utilization of an instance at the peak, 0 to 1; the autoscaler's target"),
    "checks_per_instance": Assumption(10_000, 1, 1e6, "checks/s of an instance; the autoscaler's target"),
    "cores_per_instance": Assumption(1, 1, 256, "cores of an instance, one worker on each"),
    "min_instances": Assumption(3, 1, 1000, "minimum number of instances; minReplicas of the autoscaler"),
    "max_instances": Assumption(50, 1, 10_000, "maximum number of instances; maxReplicas of the autoscaler"),
    "spare_instances": Assumption(1, 0, 100, "instances that may be unavailable at the peak"),
    "calls_per_check": Assumption(1, 0.001, 2, "calls to Redis for a check, without leases"),
    "leases": Assumption(1, 0, 1, "leases.enabled: 1, or 0 for none"),
    "affinity": Assumption(0, 0, 1, "whether the balancer sends a key to one instance: 1, or 0"),
    "lease_ttl_s": Assumption(_LEASES.ttl_s, 0.2, 60, "leases.ttl_s, s"),
    "redis_cpu_target": Assumption(0.60, 0.05, 1, "CPU utilization of a shard's core at the peak, 0 to 1"),
    "shard_gb": Assumption(4, 0.1, 1000, "maxmemory of a shard, GB"),
    "shard_fill": Assumption(0.75, 0.05, 1, "maximum share of maxmemory in use; the rest is for growth, fork and fragmentation"),
    "min_shards": Assumption(3, 1, 1000, "minimum number of masters: a failover election needs three"),
    "replicas_per_shard": Assumption(1, 0, 5, "replicas of each shard"),
    "database_cores": Assumption(2, 1, 256, "cores of a database server"),
    "database_cpu_target": Assumption(0.50, 0.05, 1, "CPU utilization of a replica at the peak, 0 to 1"),
    "min_replicas": Assumption(2, 0, 100, "minimum number of read replicas: one may be unavailable"),
    "zipf_exponent": Assumption(1.0, 0, 3, "skew of requests over users: 0 uniform, 1 as words in a text"),
    "l1_ttl_s": Assumption(_CACHE.l1_ttl_s, 0.1, 86_400, "cache.l1_ttl_s, s"),
    "l2_ttl_s": Assumption(_CACHE.l2_ttl_s, 0.1, 86_400, "cache.l2_ttl_s, s"),
    "l1_keys": Assumption(_CACHE.max_keys, 1, 1e8, "cache.max_keys of an instance"),
    "api_bytes": Assumption(3_000, 1, 1e9, "bytes of an API request and its response"),
    "edge_hit_rate": Assumption(0.60, 0, 1, "share of API responses that an edge cache serves without a check"),
}
PRICES: Final[Mapping[str, Assumption]] = {
    "instance": Assumption(30, 0, 1e6, "$ a month for an instance"),
    "redis_node": Assumption(50, 0, 1e6, "$ a month for a Redis server with shard_gb"),
    "database_node": Assumption(120, 0, 1e6, "$ a month for a database server with database_cores"),
    "database_gb": Assumption(0.12, 0, 1000, "$ a month for a GB of database storage, each server"),
    "balancer": Assumption(20, 0, 1e6, "$ a month for a load balancer; there are two"),
    "origin_gb": Assumption(0.05, 0, 1000, "$ for a GB from the API to clients or to the edge"),
    "edge_gb": Assumption(0.02, 0, 1000, "$ for a GB from the edge to clients"),
}
_INTEGERS: Final = frozenset(
    {"cores_per_instance", "min_instances", "max_instances", "spare_instances", "min_shards", "replicas_per_shard"}
    | {"leases", "affinity"}
    | {"database_cores", "min_replicas", "l1_keys"}
)


class Assumptions(msgspec.Struct, frozen=True):
    """Values of all assumptions, by name.

    `use` holds users, targets and sizes; `prices` are in US dollars, of the date `prices_of`; `replaced` names those that differ
    from the defaults because they were given.
    """

    use: Mapping[str, float]
    prices: Mapping[str, float]
    replaced: tuple[str, ...] = ()
    prices_of: str = PRICES_OF


def assume(file: Path | None = None, overrides: Iterable[str] = (), options: Mapping[str, float] | None = None) -> Assumptions:
    """Combine the defaults, a file and the command line; later ones override earlier ones.

    Args:
        file: TOML with the tables `[use]` and `[prices]`, and optionally `prices_of = "2027-01-31"`.
        overrides: texts `NAME=VALUE`; prices are named `prices.NAME`.
        options: values of `use` that have command line options.

    Raises:
        SettingsError: if the file cannot be read, a name is unknown or a value is out of range.
    """
    use = {name: assumption.default for name, assumption in USE.items()}
    prices = {name: assumption.default for name, assumption in PRICES.items()}
    replaced: list[str] = []
    prices_of = PRICES_OF

    def replace(section: str, name: str, value: object, where: str) -> None:
        assumption = {"use": USE, "prices": PRICES}.get(section, {}).get(name)
        if assumption is None:
            names = ", ".join((*USE, *(f"prices.{each}" for each in PRICES)))
            raise SettingsError(f"{where}: unknown assumption {name!r}; expected one of {names}")
        (use if section == "use" else prices)[name] = _checked(name, assumption, value, where)
        full = name if section == "use" else f"prices.{name}"
        if full not in replaced:
            replaced.append(full)

    if file is not None:
        content = _read(file)
        prices_of = str(content.pop("prices_of", PRICES_OF))
        for section, values in content.items():
            if section not in ("use", "prices") or not isinstance(values, dict):
                raise SettingsError(f"{file}: unexpected {section!r}; expected the tables [use] and [prices]")
            for name, value in values.items():
                replace(section, name, value, str(file))
    for text in overrides:
        name, sign, value = text.partition("=")
        if not sign:
            raise SettingsError(f"--set {text!r} is not valid; expected NAME=VALUE, e.g. --set cpu_target=0.6")
        section, _, tail = name.strip().rpartition(".")
        replace(section or "use", tail, value.strip(), f"--set {text}")
    for name, number in (options or {}).items():
        replace("use", name, number, "--" + name.replace("_", "-"))
    if use["min_instances"] > use["max_instances"]:
        raise SettingsError(
            f"min_instances {use['min_instances']:g} is above max_instances {use['max_instances']:g}: "
            "decrease min_instances or increase max_instances"
        )
    return Assumptions(use, prices, tuple(replaced), prices_of)


def _checked(name: str, assumption: Assumption, value: object, where: str) -> float:
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None:
        raise SettingsError(f"{where}: {name} must be a number, not {value!r}")
    if not assumption.minimum <= number <= assumption.maximum:
        raise SettingsError(
            f"{where}: {name} = {number:g} is out of range; "
            f"expected {assumption.minimum:g} to {assumption.maximum:g} ({assumption.description})"
        )
    if name in _INTEGERS and number != int(number):
        raise SettingsError(f"{where}: {name} = {number:g} must be an integer, e.g. {int(number)} or {int(number) + 1}")
    return number


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} is not valid TOML: {error}") from None
