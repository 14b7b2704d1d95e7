"""The formulas: from traffic, measured constants and assumptions to a fleet and its cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from tidegate.tools.plan.assumptions import Assumptions
from tidegate.tools.plan.caches import Shares, shares
from tidegate.tools.plan.constants import Constant
from tidegate.tools.plan.quantities import rate, short, size

DAY_S: Final = 86_400
MONTH_DAYS: Final = 30
BALANCERS: Final = 2


class Line(msgspec.Struct, frozen=True):
    """One figure of a plan.

    Args:
        name: of the figure, for programs.
        value: in `unit`.
        unit: of the value; empty for a count.
        shown: the value for people.
        title: the name for people.
        formula: with the numbers put in.
        rests_on: names of measured constants in it.
        assumes: names of assumptions in it.
    """

    name: str
    value: float
    unit: str
    shown: str
    title: str
    formula: str
    rests_on: tuple[str, ...] = ()
    assumes: tuple[str, ...] = ()


class CapacityPlan(msgspec.Struct, frozen=True):
    """A fleet for so many users.

    Args:
        dau: daily users.
        lines: every figure, in the order they are worked out.
        notes: what somebody who follows the plan must know.
    """

    dau: float
    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    def value(self, name: str) -> float:
        """A figure by its name.

        Args:
            name: of the line.

        Returns:
            Its value.
        """
        return next(line.value for line in self.lines if line.name == name)

    def shown(self, name: str) -> str:
        """A figure by its name, for people.

        Args:
            name: of the line.

        Returns:
            Its text.
        """
        return next(line.shown for line in self.lines if line.name == name)


def instance_capacity(constants: Mapping[str, Constant], assumed: Assumptions) -> float:
    """Checks/s that an instance decides with all of its cores busy.

    Args:
        constants: measured.
        assumed: how many cores it has.

    Returns:
        Checks a second.
    """
    return 1e6 / constants["check_cpu_us"].value * assumed.use["cores_per_instance"]


def aimed_at(constants: Mapping[str, Constant], assumed: Assumptions) -> float:
    """Checks/s that the autoscaler lets an instance have: by CPU or by rate, whichever is less.

    Args:
        constants: measured.
        assumed: both targets.

    Returns:
        Checks a second.
    """
    return min(instance_capacity(constants, assumed) * assumed.use["cpu_target"], assumed.use["checks_per_instance"])


def shards_for(checks: float, held_bytes: float, constants: Mapping[str, Constant], assumed: Assumptions) -> tuple[int, int]:
    """Masters that a rate needs, and masters that an amount of memory needs.

    Args:
        checks: calls a second at Redis.
        held_bytes: of counters and cache.
        constants: measured.
        assumed: targets and sizes of a shard.

    Returns:
        Both.
    """
    use = assumed.use
    by_cpu = checks * constants["redis_cpu_us"].value / 1e6 / use["redis_cpu_target"]
    by_memory = held_bytes / (use["shard_gb"] * 1e9 * use["shard_fill"])
    return math.ceil(by_cpu), math.ceil(by_memory)


def cached(dau: float, checks: float, instances: int, assumed: Assumptions) -> Shares:
    """Who answers the question whose a key is.

    Args:
        dau: daily users, each with a key.
        checks: a second.
        instances: that share them.
        assumed: the caches' settings.

    Returns:
        The shares.
    """
    use = assumed.use
    return shares(dau, checks, instances, use["l1_ttl_s"], use["l2_ttl_s"], use["l1_keys"], use["zipf_exponent"])


class _Sheet:
    """Lines in the order they are worked out, and what goes into them."""

    def __init__(self, dau: float, constants: Mapping[str, Constant], assumed: Assumptions) -> None:
        self.dau = dau
        self.lines: list[Line] = []
        self.constants = constants
        self.assumed = assumed
        self.use = assumed.use
        self.prices = assumed.prices
        self.known = {name: constant.value for name, constant in constants.items()}

    def put(self, name: str, value: float, unit: str, title: str, formula: str, rests_on: str = "", assumes: str = "") -> float:
        """Add a line; names of constants and of assumptions are separated by spaces."""
        shown = _SHOWN[unit](value)
        self.lines.append(Line(name, value, unit, shown, title, formula, tuple(rests_on.split()), tuple(assumes.split())))
        return value


_SHOWN: Final[Mapping[str, Callable[[float], str]]] = {
    "": lambda value: f"{value:,.0f}" if value < 100_000 else short(value),
    "1/s": lambda value: f"{value:,.0f}/s",
    "share": lambda value: f"{value:.1%}",
    "B": size,
    "bit/s": rate,
    "$/month": lambda value: f"${value:,.0f}",
}
"""How a value is written, by its unit."""
_CACHES: Final = "zipf_exponent l1_ttl_s l2_ttl_s l1_keys"


def make_plan(
    dau: float,
    constants: Mapping[str, Constant],
    assumed: Assumptions,
    peak: float | None = None,
    counters: float | None = None,
) -> CapacityPlan:
    """Work out a fleet.

    Args:
        dau: daily users, 1 or more.
        constants: measured.
        assumed: the rest.
        peak: checks/s in the peak second, where it is known.
        counters: live counters, where they are known.

    Returns:
        The plan.
    """
    sheet = _Sheet(dau, constants, assumed)
    mean, peak = _traffic(sheet, peak)
    instances = _instances(sheet, peak)
    found = cached(dau, peak, instances, assumed)
    replicas, stored = _database(sheet, peak, found)
    calls, nodes = _redis(sheet, peak, found, counters)
    _bandwidth(sheet, peak, calls)
    _cost(sheet, mean, instances, nodes, replicas + 1, stored)
    return CapacityPlan(dau, tuple(sheet.lines), _notes(sheet, instances, peak, found))


def _traffic(sheet: _Sheet, peak: float | None) -> tuple[float, float]:
    """Requests a second, in the mean and at the peak."""
    per_user, factor = sheet.use["requests_per_user"], sheet.use["peak_factor"]
    if peak is None:
        formula = f"{short(sheet.dau)} users × {per_user:g} / {DAY_S:,} s"
        mean = sheet.put("mean_rps", sheet.dau * per_user / DAY_S, "1/s", "requests, mean", formula, "", "requests_per_user")
        peak = sheet.put("peak_rps", mean * factor, "1/s", "requests, peak", f"mean × {factor:g}", "", "peak_factor")
        return mean, peak
    mean = sheet.put("mean_rps", peak / factor, "1/s", "requests, mean", f"{peak:,.0f}/s / {factor:g}", "", "peak_factor")
    return mean, sheet.put("peak_rps", peak, "1/s", "requests, peak", "as given")


def _instances(sheet: _Sheet, peak: float) -> int:
    """How many instances."""
    use, known = sheet.use, sheet.known
    capacity = sheet.put(
        "instance_capacity",
        instance_capacity(sheet.constants, sheet.assumed),
        "1/s",
        "an instance, all it can",
        f"{use['cores_per_instance']:g} core(s) / {known['check_cpu_us']:g} µs",
        "check_cpu_us",
        "cores_per_instance",
    )
    aim = sheet.put(
        "instance_target",
        aimed_at(sheet.constants, sheet.assumed),
        "1/s",
        "an instance, aimed at",
        f"min({use['cpu_target']:.0%} of {capacity:,.0f}, {use['checks_per_instance']:,.0f})",
        "check_cpu_us",
        "cpu_target checks_per_instance",
    )
    instances = max(math.ceil(peak / aim) + int(use["spare_instances"]), int(use["min_instances"]))
    sheet.put(
        "instances",
        instances,
        "",
        "instances",
        f"max(⌈{peak:,.0f} / {aim:,.0f}⌉ + {use['spare_instances']:g}, {use['min_instances']:g})",
        "check_cpu_us",
        "spare_instances min_instances",
    )
    sheet.put(
        "instances_memory",
        instances * use["cores_per_instance"] * known["instance_mb"] * 1e6,
        "B",
        "their memory, without cached keys",
        f"{instances:,} × {use['cores_per_instance']:g} × {known['instance_mb']:g} MB",
        "instance_mb",
        "cores_per_instance",
    )
    return instances


def _database(sheet: _Sheet, peak: float, found: Shares) -> tuple[int, float]:
    """What the caches leave to the database: how many replicas, and bytes on each server."""
    use, known = sheet.use, sheet.known
    ttls = f"TTL {use['l1_ttl_s']:g} s and {use['l2_ttl_s']:g} s"
    model = f"a key per user, Zipf {use['zipf_exponent']:g}, {ttls}; measured on a workload "
    shares_of = (
        ("l1_share", found.l1, "look-ups answered by L1, memory", f"{model}of its own", "l1_percent"),
        ("l2_share", found.l2, "look-ups answered by L2, Redis", "the same", "l2_percent"),
        ("database_share", found.database, "look-ups at the database", "the rest", "database_percent"),
    )
    for name, value, title, formula, constant in shares_of:
        sheet.put(name, value, "share", title, f"{formula}: {known[constant]:.0f} %", constant, _CACHES)
    formula = f"{peak:,.0f}/s × {found.database:.1%}"
    reads = sheet.put("database_reads", peak * found.database, "1/s", "look-ups at the database, peak", formula, "", _CACHES)
    cpu_us = use["database_cores"] * use["database_cpu_target"] * 1e6
    replicas = max(math.ceil(reads * known["look_up_cpu_us"] / cpu_us), int(use["min_replicas"]))
    sheet.put(
        "replicas",
        replicas,
        "",
        "PostgreSQL read replicas",
        f"max(⌈{reads:,.0f} × {known['look_up_cpu_us']:g} µs / "
        f"({use['database_cores']:g} cores × {use['database_cpu_target']:.0%})⌉, {use['min_replicas']:g}), beside the primary",
        "look_up_cpu_us",
        "database_cores database_cpu_target min_replicas",
    )
    formula = f"{short(sheet.dau)} keys × {known['api_key_bytes']:g} B"
    stored = sheet.dau * known["api_key_bytes"]
    return replicas, sheet.put("database_bytes", stored, "B", "database, each server", formula, "api_key_bytes")


def _redis(sheet: _Sheet, peak: float, found: Shares, counters: float | None) -> tuple[float, int]:
    """What Redis does and holds: calls a second at the peak, and how many servers."""
    use, known = sheet.use, sheet.known
    if counters is None:
        counters = sheet.dau * use["counters_per_user"]
        formula = f"{short(sheet.dau)} users × {use['counters_per_user']:g}"
        sheet.put("counters", counters, "", "live counters", formula, "", "counters_per_user")
    else:
        sheet.put("counters", counters, "", "live counters", "as given")
    formula = f"{short(counters)} × {known['counter_bytes']:g} B"
    held = counters * known["counter_bytes"]
    sheet.put("counters_bytes", held, "B", "Redis memory of the counters", formula, "counter_bytes")
    entries = found.l2_entries * known["cache_entry_bytes"]
    formula = f"{short(found.l2_entries)} keys in it at once × {known['cache_entry_bytes']:g} B"
    sheet.put("cache_bytes", entries, "B", "Redis memory of the shared cache", formula, "cache_entry_bytes", _CACHES)
    looked_up = peak * (1 - found.l1)
    formula = f"{peak:,.0f} checks + {looked_up:,.0f} look-ups that L1 has not"
    calls = sheet.put("redis_calls", peak + looked_up, "1/s", "calls at Redis, peak", formula, "", _CACHES)
    by_cpu, by_memory = shards_for(calls, held + entries, sheet.constants, sheet.assumed)
    shards = max(by_cpu, by_memory, int(use["min_shards"]))
    sheet.put(
        "shards",
        shards,
        "",
        "Redis shards",
        f"max({by_cpu} by CPU: {calls:,.0f} × {known['redis_cpu_us']:g} µs / {use['redis_cpu_target']:.0%}; "
        f"{by_memory} by memory: {size(held + entries)} / ({use['shard_gb']:g} GB × {use['shard_fill']:.0%}); "
        f"{use['min_shards']:g})",
        "redis_cpu_us counter_bytes cache_entry_bytes",
        "redis_cpu_target shard_gb shard_fill min_shards",
    )
    nodes = shards * (1 + int(use["replicas_per_shard"]))
    formula = f"{shards} masters × (1 + {use['replicas_per_shard']:g})"
    sheet.put("redis_nodes", nodes, "", "Redis servers", formula, "", "replicas_per_shard")
    memory = nodes * use["shard_gb"] * 1e9
    sheet.put("redis_memory", memory, "B", "Redis memory to provide", f"{nodes} × {use['shard_gb']:g} GB", "", "shard_gb")
    return calls, nodes


def _bandwidth(sheet: _Sheet, peak: float, calls: float) -> None:
    """Bits a second at the peak."""
    use, known = sheet.use, sheet.known
    api = peak * use["api_bytes"] * 8
    formula = f"{peak:,.0f}/s × {use['api_bytes']:g} B × 8"
    sheet.put("bandwidth", api, "bit/s", "bandwidth of the API, peak", formula, "", "api_bytes")
    formula = f"{rate(api)} × (1 − {use['edge_hit_rate']:.0%})"
    behind = api * (1 - use["edge_hit_rate"])
    sheet.put("bandwidth_edge", behind, "bit/s", "the same behind an edge cache", formula, "", "api_bytes edge_hit_rate")
    for name, title, often, asked, told in (
        ("bandwidth_checks", "gateways to instances, peak", peak, "question_bytes", "answer_bytes"),
        ("bandwidth_redis", "instances to Redis, peak", calls, "to_redis_bytes", "from_redis_bytes"),
    ):
        formula = f"{often:,.0f}/s × ({known[asked]:g} + {known[told]:g}) B × 8"
        sheet.put(name, often * (known[asked] + known[told]) * 8, "bit/s", title, formula, f"{asked} {told}")


def _cost(sheet: _Sheet, mean: float, instances: int, nodes: int, servers: int, stored: float) -> None:
    """Dollars a month."""
    use, prices = sheet.use, sheet.prices
    of_database = prices["database_node"] + stored / 1e9 * prices["database_gb"]
    parts = (
        ("instances", "instances", instances, prices["instance"], f"${prices['instance']:g}", "prices.instance"),
        ("redis", "Redis", nodes, prices["redis_node"], f"${prices['redis_node']:g}", "prices.redis_node"),
        (
            "database",
            "PostgreSQL",
            servers,
            of_database,
            f"(${prices['database_node']:g} + {size(stored)} × ${prices['database_gb']:g}/GB)",
            "prices.database_node prices.database_gb",
        ),
        ("balancers", "load balancers", BALANCERS, prices["balancer"], f"${prices['balancer']:g}", "prices.balancer"),
    )
    total = 0.0
    for name, title, number, price, text, assumes in parts:
        total += number * price
        sheet.put(f"cost_{name}", number * price, "$/month", f"{title}, a month", f"{number:,} × {text}", "", assumes)
    sheet.put("cost", total, "$/month", "the limiter, a month", "the sum of these four")
    gb = mean * DAY_S * MONTH_DAYS * use["api_bytes"] / 1e9
    missed = gb * (1 - use["edge_hit_rate"])
    origin, edge = prices["origin_gb"], prices["edge_gb"]
    formula = f"{gb:,.0f} GB × ${origin:g}"
    sheet.put("cost_traffic", gb * origin, "$/month", "traffic of the API, a month", formula, "", "prices.origin_gb api_bytes")
    formula = f"{gb:,.0f} GB × ${edge:g} + {missed:,.0f} GB × ${origin:g}"
    assumes = "prices.edge_gb prices.origin_gb api_bytes edge_hit_rate"
    sheet.put("cost_traffic_edge", gb * edge + missed * origin, "$/month", "the same with an edge cache", formula, "", assumes)


def _notes(sheet: _Sheet, instances: int, peak: float, found: Shares) -> tuple[str, ...]:
    use = sheet.use
    told = []
    if instances > use["max_instances"]:
        times = math.ceil(instances / use["max_instances"])
        cores, checks = times * use["cores_per_instance"], times * use["checks_per_instance"]
        told.append(
            f"{instances:,} instances are above the autoscaler's most ({use['max_instances']:g}): raise maxReplicas, "
            f"or give each more cores (--set cores_per_instance={cores:g} --set checks_per_instance={checks:g})"
        )
    hot = peak * found.hottest
    busy = hot * sheet.known["redis_cpu_us"] / 1e6
    if busy > use["redis_cpu_target"] / 2:
        told.append(
            f"the busiest key brings {found.hottest:.1%} of all requests, {hot:,.0f}/s, {busy:.0%} of one shard's core; "
            "a key is on one shard however many there are. Give it a limit: beyond that it is denied from memory "
            "and asks Redis no more"
        )
    if found.database > 0.05:
        told.append(
            f"{found.database:.0%} of the look-ups reach the database, as many users come back only after {use['l2_ttl_s']:g} s. "
            "Changes are announced, so cache.l2_ttl_s can be longer: try --set l2_ttl_s=3600"
        )
    told.append("the fleet is sized for all requests, also those that an edge cache answers by itself")
    told.append("bytes on the wire are those of HTTP and of Redis, without TCP's and IP's own headers")
    return tuple(told)
