"""Reference sizes of fleets for 1M, 10M and 100M daily users, in the units of the plan's figures.

A plan with the measured constants and the default assumptions is held to them: see `tests/unit/test_plan.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple


class Target(NamedTuple):
    """What a figure of the plan is compared with.

    `equals`: within 1 %, as the reference is rounded. `at_most`: the plan may need less.
    """

    dau: int
    relation: Literal["equals", "at_most"]
    value: float


TARGETS: Final[Mapping[str, tuple[Target, ...]]] = {
    "peak_rps": (Target(1_000_000, "equals", 3_500), Target(10_000_000, "equals", 35_000)),
    "instances": (
        Target(1_000_000, "at_most", 3),
        Target(10_000_000, "at_most", 10),
        Target(100_000_000, "at_most", 50),
    ),
    "counters": (Target(1_000_000, "equals", 10e6), Target(10_000_000, "equals", 100e6)),
    # 200 bytes a counter.
    "counters_bytes": (Target(1_000_000, "at_most", 2e9), Target(10_000_000, "at_most", 20e9)),
    "shards": (Target(1_000_000, "at_most", 3), Target(10_000_000, "at_most", 9)),
    "replicas": (Target(1_000_000, "at_most", 2), Target(10_000_000, "at_most", 5)),
    "bandwidth": (Target(1_000_000, "equals", 84e6), Target(10_000_000, "equals", 840e6)),
    "cost_instances": (Target(1_000_000, "at_most", 90), Target(10_000_000, "at_most", 300)),
}

DATABASE_PERCENT: Final = 5.0
"""Share of look-ups that reaches the database on the measured workload: 20 look-ups a key."""
API_KEY_BYTES: Final = 500
"""Bytes of an API key in PostgreSQL with its indexes: more than the 350 bytes a user of the reference, which names no indexes."""
