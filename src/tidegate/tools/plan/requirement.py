"""The table that Tidegate was asked to meet, beside ours, with the reason of each difference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from tidegate.tools.plan.assumptions import Assumptions
from tidegate.tools.plan.constants import Constant
from tidegate.tools.plan.fleet import CapacityPlan, instance_capacity, make_plan
from tidegate.tools.plan.quantities import short, size

SIZES: Final = (1_000_000, 10_000_000, 100_000_000)
NOT_SAID: Final = "not said"
ROWS: Final[Mapping[str, tuple[str, str, str, str]]] = {
    "peak_rps": ("requests/s", "3,500", "35,000", NOT_SAID),
    "instances": ("instances", "3", "10", "up to 50"),
    "shards": ("Redis shards", "3", "9", NOT_SAID),
    "redis_memory": ("Redis memory", "2 GB used, 6 GB in all", "20 GB used, 18 GB in all", NOT_SAID),
    "counters": ("live keys", "10M", "100M", NOT_SAID),
    "replicas": ("read replicas", "2", "5", NOT_SAID),
    "database_bytes": ("database", "350 MB", "3.5 GB", NOT_SAID),
    "bandwidth": ("bandwidth", "84 Mbit/s", "840 Mbit/s", NOT_SAID),
    "bandwidth_edge": ("bandwidth with edge caching", NOT_SAID, NOT_SAID, NOT_SAID),
    "database_share": ("look-ups at the database", "5%", "5%", "5%"),
    "cost_instances": ("cost of instances", "$90", "$300", NOT_SAID),
}
"""By the name of our line: title, and what the requirement says for each of `SIZES`."""


class Compared(msgspec.Struct, frozen=True):
    """One figure of the requirement, and ours.

    Args:
        name: of our line.
        title: for people.
        dau: daily users.
        required: as the requirement writes it.
        ours: as our plan has it.
        why: they differ.
    """

    name: str
    title: str
    dau: int
    required: str
    ours: str
    why: str


def compare(constants: Mapping[str, Constant], assumed: Assumptions, sizes: tuple[int, ...] = SIZES) -> list[Compared]:
    """Put our plans beside the requirement's table.

    Args:
        constants: measured.
        assumed: as for the plan.
        sizes: of `SIZES`.

    Returns:
        A row for each figure and size.
    """
    found = []
    plans = {size_: make_plan(size_, constants, assumed) for size_ in sizes}
    for name, (title, *required) in ROWS.items():
        for dau, text in zip(SIZES, required, strict=True):
            if dau in plans:
                ours = plans[dau].shown(name)
                if name == "redis_memory":
                    ours = f"{size(plans[dau].value('counters_bytes'))} of counters, {ours} in all"
                found.append(Compared(name, title, dau, text, ours, _why(name, dau, plans[dau], constants, assumed)))
    return found


def _why(name: str, dau: int, plan: CapacityPlan, constants: Mapping[str, Constant], assumed: Assumptions) -> str:
    use = assumed.use
    if name == "peak_rps":
        exact = f"{short(dau)} × {use['requests_per_user']:g} × {use['peak_factor']:g} / 86,400"
        return f"{exact}; the requirement rounds it" if dau != SIZES[2] else f"{exact}; the requirement's table ends at 10M"
    if name == "instances":
        aim, capacity = plan.value("instance_target"), instance_capacity(constants, assumed)
        needed, spare = (
            plan.value("peak_rps") / aim,
            f"and {use['spare_instances']:g} to spare, at least {use['min_instances']:g}",
        )
        text = f"{needed:.1f} at {aim:,.0f} checks/s each ({capacity:,.0f} measured at 100 % CPU) {spare}"
        each = {SIZES[0]: 3_500 / 3, SIZES[1]: 3_500}.get(dau)
        return text + (f"; the requirement's would each have {each:,.0f}/s, below its own trigger of 10,000" if each else "")
    if name == "shards":
        why = f"by memory and CPU of Redis, {use['shard_gb']:g} GB a shard where the requirement has 2 GB"
        return why + ("; a cluster needs 3 to elect" if plan.value("shards") == use["min_shards"] else "")
    if name == "redis_memory":
        text = f"{constants['counter_bytes'].value:g} B a counter measured, the requirement's 2 GB for 10M are 200 B"
        if dau == SIZES[1]:
            text += "; its 20 GB do not fit the 18 GB of its 9 shards"
        return text + "; ours in all counts replicas and room to grow"
    if name == "counters":
        return f"{use['counters_per_user']:g} a user, the ratio of the requirement's 'max keys' to its users"
    if name == "replicas":
        return (
            f"{plan.value('database_reads'):,.0f} look-ups/s after both caches, {constants['look_up_cpu_us'].value:g} µs each; "
            "the requirement has 5 for 3,500 requests/s, as if nothing were cached"
        )
    if name == "database_bytes":
        return f"{constants['api_key_bytes'].value:g} B a key with its indexes, where the requirement has 350 B a user"
    if name == "bandwidth":
        checks = plan.shown("bandwidth_checks")
        return (
            f"the API's own traffic at {use['api_bytes']:g} B a request; questions to the limiter and answers take {checks} more"
        )
    if name == "bandwidth_edge":
        return (
            f"{use['edge_hit_rate']:.0%} answered at the edge, an assumption; the requirement names edge caching without a figure"
        )
    if name == "database_share":
        measured = constants["database_percent"].value
        return (
            f"a user's key is asked for {plan.value('peak_rps') / plan.dau * use['l2_ttl_s']:.2g} times in L2's TTL at the peak: "
            f"few are still cached; {measured:.0f} % is what a workload of 20 look-ups a key gives, measured"
        )
    return "instances × price; the requirement leaves out Redis, PostgreSQL and balancers, which cost " + (
        f"${plan.value('cost') - plan.value('cost_instances'):,.0f} more"
    )
