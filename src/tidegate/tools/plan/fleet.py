"""Formulas: a fleet and its cost from traffic, measured constants and assumptions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from tidegate.tools.plan.assumptions import Assumptions
from tidegate.tools.plan.caches import CacheShares, cache_shares
from tidegate.tools.plan.constants import Constant
from tidegate.tools.plan.leases import lease_calls
from tidegate.tools.plan.quantities import rate, short, size

DAY_S: Final = 86_400
MONTH_DAYS: Final = 30
BALANCERS: Final = 2


class Line(msgspec.Struct, frozen=True):
    """One figure of a plan.

    Args:
        name: identifier, as in `--json`.
        value: in `unit`.
        unit: empty for a count.
        shown: the value as text, with its unit.
        title: the figure's name in tables.
        formula: the formula with its numbers.
        rests_on: names of the measured constants in the formula.
        assumes: names of the assumptions in the formula.
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
    """A fleet for `dau` daily users: its figures in the order of calculation, and notes on limits and omissions."""

    dau: float
    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    def value(self, name: str) -> float:
        """The value of the figure with this name."""
        return next(line.value for line in self.lines if line.name == name)

    def shown(self, name: str) -> str:
        """The figure with this name, as text with its unit."""
        return next(line.shown for line in self.lines if line.name == name)


def instance_capacity(constants: Mapping[str, Constant], assumed: Assumptions) -> float:
    """Checks/s of an instance with all of its cores busy."""
    return 1e6 / constants["check_cpu_us"].value * assumed.use["cores_per_instance"]


def target_load(constants: Mapping[str, Constant], assumed: Assumptions) -> float:
    """Checks/s of an instance at which the autoscaler adds another: by CPU or by rate, whichever is lower."""
    return min(instance_capacity(constants, assumed) * assumed.use["cpu_target"], assumed.use["checks_per_instance"])


def shards_for(calls: float, stored_bytes: float, constants: Mapping[str, Constant], assumed: Assumptions) -> tuple[int, int]:
    """Masters needed for `calls`/s, and masters needed for `stored_bytes` of counters and cached keys."""
    use = assumed.use
    by_cpu = calls * constants["redis_cpu_us"].value / 1e6 / use["redis_cpu_target"]
    by_memory = stored_bytes / (use["shard_gb"] * 1e9 * use["shard_fill"])
    return math.ceil(by_cpu), math.ceil(by_memory)


def key_look_ups(dau: float, checks: float, instances: int, assumed: Assumptions) -> CacheShares:
    """CacheShares of API key look-ups by the level that answers them, for `dau` keys and `checks`/s."""
    use = assumed.use
    return cache_shares(dau, checks, instances, use["l1_ttl_s"], use["l2_ttl_s"], use["l1_keys"], use["zipf_exponent"])


class _Sheet:
    """The lines of a plan in order of calculation, with their inputs."""

    def __init__(self, dau: float, constants: Mapping[str, Constant], assumed: Assumptions) -> None:
        self.dau = dau
        self.lines: list[Line] = []
        self.constants = constants
        self.assumed = assumed
        self.use = assumed.use
        self.prices = assumed.prices
        self.measured = {name: constant.value for name, constant in constants.items()}

    def add(self, name: str, value: float, unit: str, title: str, formula: str, rests_on: str = "", assumes: str = "") -> float:
        """Add a line and return its value. Names of constants and of assumptions are separated by spaces."""
        shown = _FORMATS[unit](value)
        self.lines.append(Line(name, value, unit, shown, title, formula, tuple(rests_on.split()), tuple(assumes.split())))
        return value


_FORMATS: Final[Mapping[str, Callable[[float], str]]] = {
    "": lambda value: f"{value:,.0f}" if value < 100_000 else short(value),
    "calls": lambda value: f"{value:.2f}",
    "1/s": lambda value: f"{value:,.0f}/s",
    "share": lambda value: f"{value:.1%}",
    "B": size,
    "bit/s": rate,
    "$/month": lambda value: f"${value:,.0f}",
}
"""Format of a value, by its unit."""
_CACHES: Final = "zipf_exponent l1_ttl_s l2_ttl_s l1_keys"


def make_plan(
    dau: float,
    constants: Mapping[str, Constant],
    assumed: Assumptions,
    peak: float | None = None,
    counters: float | None = None,
) -> CapacityPlan:
    """Calculate a fleet.

    Args:
        dau: daily users, 1 or more.
        constants: measured.
        assumed: values of the assumptions.
        peak: checks/s in the peak second, if known.
        counters: live counters, if known.
    """
    sheet = _Sheet(dau, constants, assumed)
    mean, peak = _traffic(sheet, peak)
    instances = _instances(sheet, peak)
    look_ups = key_look_ups(dau, peak, instances, assumed)
    replicas, stored = _database(sheet, peak, look_ups)
    calls, nodes = _redis(sheet, peak, instances, look_ups, counters)
    _bandwidth(sheet, peak, calls)
    _cost(sheet, mean, instances, nodes, replicas + 1, stored)
    return CapacityPlan(dau, tuple(sheet.lines), _notes(sheet, instances, peak, look_ups))


def _traffic(sheet: _Sheet, peak: float | None) -> tuple[float, float]:
    """Requests/s: mean and peak."""
    per_user, factor = sheet.use["requests_per_user"], sheet.use["peak_factor"]
    if peak is None:
        formula = f"{short(sheet.dau)} users × {per_user:g} / {DAY_S:,} s"
        mean = sheet.add("mean_rps", sheet.dau * per_user / DAY_S, "1/s", "requests, mean", formula, "", "requests_per_user")
        peak = sheet.add("peak_rps", mean * factor, "1/s", "requests, peak", f"mean × {factor:g}", "", "peak_factor")
        return mean, peak
    mean = sheet.add("mean_rps", peak / factor, "1/s", "requests, mean", f"{peak:,.0f}/s / {factor:g}", "", "peak_factor")
    return mean, sheet.add("peak_rps", peak, "1/s", "requests, peak", "as given")


def _instances(sheet: _Sheet, peak: float) -> int:
    """Number of instances."""
    use, measured = sheet.use, sheet.measured
    capacity = sheet.add(
        "instance_capacity",
        instance_capacity(sheet.constants, sheet.assumed),
        "1/s",
        "capacity of an instance",
        f"{use['cores_per_instance']:g} core(s) / {measured['check_cpu_us']:g} µs",
        "check_cpu_us",
        "cores_per_instance",
    )
    target = sheet.add(
        "instance_target",
        target_load(sheet.constants, sheet.assumed),
        "1/s",
        "target load of an instance",
        f"min({use['cpu_target']:.0%} of {capacity:,.0f}, {use['checks_per_instance']:,.0f})",
        "check_cpu_us",
        "cpu_target checks_per_instance",
    )
    instances = max(math.ceil(peak / target) + int(use["spare_instances"]), int(use["min_instances"]))
    sheet.add(
        "instances",
        instances,
        "",
        "instances",
        f"max(⌈{peak:,.0f} / {target:,.0f}⌉ + {use['spare_instances']:g}, {use['min_instances']:g})",
        "check_cpu_us",
        "spare_instances min_instances",
    )
    sheet.add(
        "instances_memory",
        instances * use["cores_per_instance"] * measured["instance_mb"] * 1e6,
        "B",
        "memory of the instances, without cached keys",
        f"{instances:,} × {use['cores_per_instance']:g} × {measured['instance_mb']:g} MB",
        "instance_mb",
        "cores_per_instance",
    )
    return instances


def _database(sheet: _Sheet, peak: float, look_ups: CacheShares) -> tuple[int, float]:
    """Replicas for the look-ups that the caches do not answer, and bytes on each database server."""
    use, measured = sheet.use, sheet.measured
    ttls = f"TTL {use['l1_ttl_s']:g} s and {use['l2_ttl_s']:g} s"
    model = f"a key per user, Zipf {use['zipf_exponent']:g}, {ttls}; measured"
    shares_of = (
        ("l1_share", look_ups.l1, "look-ups answered by L1 (memory)", f"{model} in a benchmark", "l1_percent"),
        ("l2_share", look_ups.l2, "look-ups answered by L2 (Redis)", "same model; benchmark", "l2_percent"),
        ("database_share", look_ups.database, "look-ups that reach the database", "the rest; benchmark", "database_percent"),
    )
    for name, value, title, formula, constant in shares_of:
        sheet.add(name, value, "share", title, f"{formula}: {measured[constant]:.0f} %", constant, _CACHES)
    formula = f"{peak:,.0f}/s × {look_ups.database:.1%}"
    reads = sheet.add(
        "database_reads", peak * look_ups.database, "1/s", "look-ups that reach the database, peak", formula, "", _CACHES
    )
    cpu_us = use["database_cores"] * use["database_cpu_target"] * 1e6
    replicas = max(math.ceil(reads * measured["look_up_cpu_us"] / cpu_us), int(use["min_replicas"]))
    sheet.add(
        "replicas",
        replicas,
        "",
        "PostgreSQL read replicas",
        f"max(⌈{reads:,.0f} × {measured['look_up_cpu_us']:g} µs / "
        f"({use['database_cores']:g} cores × {use['database_cpu_target']:.0%})⌉, "
        f"{use['min_replicas']:g}), in addition to the primary",
        "look_up_cpu_us",
        "database_cores database_cpu_target min_replicas",
    )
    formula = f"{short(sheet.dau)} keys × {measured['api_key_bytes']:g} B"
    stored = sheet.dau * measured["api_key_bytes"]
    return replicas, sheet.add("database_bytes", stored, "B", "database size of each server", formula, "api_key_bytes")


def _leased(sheet: _Sheet, peak: float, instances: int) -> float:
    """Calls to Redis for a check, with leases where there are any."""
    use = sheet.use
    each = use["calls_per_check"]
    if not use["leases"]:
        return each
    spread = 1 if use["affinity"] else instances
    share = lease_calls(sheet.dau, peak, spread, use["lease_ttl_s"], use["zipf_exponent"])
    where = "each at one instance" if use["affinity"] else f"spread over {instances:,} instances"
    return sheet.add(
        "leased_calls_per_check",
        each * share,
        "calls",
        "calls to Redis for a check, with leases",
        f"{each:g} × {share:.2f}: users by Zipf {use['zipf_exponent']:g}, {where}, leases of {use['lease_ttl_s']:g} s and more",
        "",
        "calls_per_check leases affinity lease_ttl_s zipf_exponent",
    )


def _redis(sheet: _Sheet, peak: float, instances: int, look_ups: CacheShares, counters: float | None) -> tuple[float, int]:
    """Calls/s to Redis at the peak, and the number of Redis servers."""
    use, measured = sheet.use, sheet.measured
    if counters is None:
        counters = sheet.dau * use["counters_per_user"]
        formula = f"{short(sheet.dau)} users × {use['counters_per_user']:g}"
        sheet.add("counters", counters, "", "live counters", formula, "", "counters_per_user")
    else:
        sheet.add("counters", counters, "", "live counters", "as given")
    formula = f"{short(counters)} × {measured['counter_bytes']:g} B"
    counters_bytes = counters * measured["counter_bytes"]
    sheet.add("counters_bytes", counters_bytes, "B", "Redis memory of the counters", formula, "counter_bytes")
    entries = look_ups.l2_entries * measured["cache_entry_bytes"]
    formula = f"{short(look_ups.l2_entries)} cached keys × {measured['cache_entry_bytes']:g} B"
    sheet.add("cache_bytes", entries, "B", "Redis memory of the shared cache", formula, "cache_entry_bytes", _CACHES)
    looked_up = peak * (1 - look_ups.l1)
    each = _leased(sheet, peak, instances)
    formula = f"{peak:,.0f} checks × {each:.3g} + {looked_up:,.0f} look-ups that L1 does not answer"
    used = f"calls_per_check leases affinity lease_ttl_s {_CACHES}"
    calls = sheet.add("redis_calls", peak * each + looked_up, "1/s", "calls to Redis, peak", formula, "", used)
    by_cpu, by_memory = shards_for(calls, counters_bytes + entries, sheet.constants, sheet.assumed)
    shards = max(by_cpu, by_memory, int(use["min_shards"]))
    if use["leases"]:
        every = peak * use["calls_per_check"] + looked_up
        before, _ = shards_for(every, 0, sheet.constants, sheet.assumed)
        for name, count, title, text in (
            ("shards_by_cpu_without_leases", before, "Redis shards that CPU needs, without leases", every),
            ("shards_by_cpu", by_cpu, "the same with leases", calls),
        ):
            formula = f"⌈{text:,.0f}/s × {measured['redis_cpu_us']:g} µs / {use['redis_cpu_target']:.0%}⌉"
            sheet.add(name, count, "", title, formula, "redis_cpu_us", "redis_cpu_target")
    sheet.add(
        "shards",
        shards,
        "",
        "Redis shards",
        f"max({by_cpu} by CPU: {calls:,.0f} × {measured['redis_cpu_us']:g} µs / {use['redis_cpu_target']:.0%}; "
        f"{by_memory} by memory: {size(counters_bytes + entries)} / ({use['shard_gb']:g} GB × {use['shard_fill']:.0%}); "
        f"{use['min_shards']:g})",
        "redis_cpu_us counter_bytes cache_entry_bytes",
        "redis_cpu_target shard_gb shard_fill min_shards",
    )
    nodes = shards * (1 + int(use["replicas_per_shard"]))
    formula = f"{shards} masters × (1 + {use['replicas_per_shard']:g})"
    sheet.add("redis_nodes", nodes, "", "Redis servers", formula, "", "replicas_per_shard")
    memory = nodes * use["shard_gb"] * 1e9
    sheet.add("redis_memory", memory, "B", "Redis memory to provide", f"{nodes} × {use['shard_gb']:g} GB", "", "shard_gb")
    return calls, nodes


def _bandwidth(sheet: _Sheet, peak: float, calls: float) -> None:
    """Bandwidth at the peak."""
    use, measured = sheet.use, sheet.measured
    api = peak * use["api_bytes"] * 8
    formula = f"{peak:,.0f}/s × {use['api_bytes']:g} B × 8"
    sheet.add("bandwidth", api, "bit/s", "bandwidth of the API, peak", formula, "", "api_bytes")
    formula = f"{rate(api)} × (1 − {use['edge_hit_rate']:.0%})"
    behind = api * (1 - use["edge_hit_rate"])
    sheet.add(
        "bandwidth_edge",
        behind,
        "bit/s",
        "bandwidth of the API behind an edge cache, peak",
        formula,
        "",
        "api_bytes edge_hit_rate",
    )
    for name, title, calls_per_s, request, response in (
        ("bandwidth_checks", "gateways to instances, peak", peak, "question_bytes", "answer_bytes"),
        ("bandwidth_redis", "instances to Redis, peak", calls, "to_redis_bytes", "from_redis_bytes"),
    ):
        formula = f"{calls_per_s:,.0f}/s × ({measured[request]:g} + {measured[response]:g}) B × 8"
        sheet.add(
            name, calls_per_s * (measured[request] + measured[response]) * 8, "bit/s", title, formula, f"{request} {response}"
        )


def _cost(sheet: _Sheet, mean: float, instances: int, nodes: int, servers: int, stored: float) -> None:
    """Cost in US dollars a month."""
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
        sheet.add(f"cost_{name}", number * price, "$/month", f"{title}, a month", f"{number:,} × {text}", "", assumes)
    sheet.add("cost", total, "$/month", "the limiter, a month", "sum of the four above")
    gb = mean * DAY_S * MONTH_DAYS * use["api_bytes"] / 1e9
    missed = gb * (1 - use["edge_hit_rate"])
    origin, edge = prices["origin_gb"], prices["edge_gb"]
    formula = f"{gb:,.0f} GB × ${origin:g}"
    sheet.add("cost_traffic", gb * origin, "$/month", "traffic of the API, a month", formula, "", "prices.origin_gb api_bytes")
    formula = f"{gb:,.0f} GB × ${edge:g} + {missed:,.0f} GB × ${origin:g}"
    assumes = "prices.edge_gb prices.origin_gb api_bytes edge_hit_rate"
    sheet.add(
        "cost_traffic_edge",
        gb * edge + missed * origin,
        "$/month",
        "traffic of the API with an edge cache, a month",
        formula,
        "",
        assumes,
    )


def _notes(sheet: _Sheet, instances: int, peak: float, look_ups: CacheShares) -> tuple[str, ...]:
    use = sheet.use
    notes = []
    if instances > use["max_instances"]:
        times = math.ceil(instances / use["max_instances"])
        cores, checks = times * use["cores_per_instance"], times * use["checks_per_instance"]
        notes.append(
            f"{instances:,} instances exceed the autoscaler's maximum ({use['max_instances']:g}): increase maxReplicas, "
            f"or give each instance more cores (--set cores_per_instance={cores:g} --set checks_per_instance={checks:g})"
        )
    hot = peak * look_ups.hottest
    busy = hot * sheet.measured["redis_cpu_us"] / 1e6
    if busy > use["redis_cpu_target"] / 2:
        notes.append(
            f"the most requested key accounts for {look_ups.hottest:.1%} of all requests, {hot:,.0f}/s, "
            f"{busy:.0%} of the core of one shard; "
            "a key stays on one shard, however many there are. Give it a limit: requests above it are denied from memory, "
            "without a call to Redis"
        )
    if look_ups.database > 0.05:
        notes.append(
            f"{look_ups.database:.0%} of the look-ups reach the database, "
            f"because many users return only after more than {use['l2_ttl_s']:g} s. "
            "Changes invalidate cached keys, so cache.l2_ttl_s can be longer: try --set l2_ttl_s=3600"
        )
    notes.append("the fleet is sized for all requests, including those that an edge cache would answer")
    notes.append("bandwidth includes HTTP and Redis protocol bytes, but not TCP and IP headers")
    return tuple(notes)
