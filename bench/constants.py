"""Which figures of which benches `tidegate plan` computes with, and how they get into the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

from bench.measure import RESULTS

MEASURED: Final = Path(__file__).parents[1] / "src" / "tidegate" / "tools" / "plan" / "measured.json"


class Source(NamedTuple):
    """Where a constant comes from.

    Args:
        bench: module of this package; its results are `bench/results/BENCH.json`.
        label: of the figure there.
        what: for a reader of the plan.
    """

    bench: str
    label: str
    unit: str
    what: str


SOURCES: Final = {
    "check_cpu_us": Source(
        "scaling", "one instance at its peak, µs CPU a check", "µs", "CPU of an instance for one check over HTTP, on a cluster"
    ),
    "redis_cpu_us": Source(
        "scaling", "one instance at its peak, Redis, µs CPU a check", "µs", "CPU of the Redis servers for one check"
    ),
    "authorize_cpu_us": Source(
        "redis_http", "GET /v1/authorize, µs CPU", "µs", "CPU of an instance for GET /v1/authorize on one Redis server"
    ),
    "counter_bytes": Source(
        "redis_memory", "sliding_window, 3 window(s), bytes a key", "B", "Redis memory of a live counter with three windows"
    ),
    "question_bytes": Source("capacity", "GET /v1/authorize, bytes of the question", "B", "a gateway's question over HTTP"),
    "answer_bytes": Source("capacity", "GET /v1/authorize, bytes of the answer", "B", "the answer with its limit headers"),
    "to_redis_bytes": Source("capacity", "one check at Redis, bytes to it", "B", "what a check sends to Redis"),
    "from_redis_bytes": Source("capacity", "one check at Redis, bytes from it", "B", "what Redis answers"),
    "api_key_bytes": Source(
        "capacity", "an API key in PostgreSQL with its indexes, bytes", "B", "an API key in PostgreSQL with its indexes"
    ),
    "look_up_cpu_us": Source(
        "capacity", "look-up of a key, µs CPU of PostgreSQL", "µs", "CPU of PostgreSQL for the look-up of one key"
    ),
    "cache_entry_bytes": Source(
        "capacity", "a key in the shared cache, bytes of Redis", "B", "Redis memory of a key in the shared cache"
    ),
    "start_s": Source("capacity", "start to /readyz 200, shortest, s", "s", "from exec of tidegate serve to /readyz 200"),
    "drain_s": Source(
        "capacity", "SIGTERM to the end with nothing in flight, s", "s", "from SIGTERM to the end with nothing in flight"
    ),
    "instance_mb": Source("capacity", "resident memory of an instance, MB", "MB", "resident memory of an instance"),
    "l1_percent": Source("catalog", "far: answered by L1, %", "%", "look-ups answered from memory, Zipf, memory for a fifth"),
    "l2_percent": Source("catalog", "far: answered by L2, %", "%", "look-ups answered by the shared cache there"),
    "database_percent": Source("catalog", "far: answered by the database, %", "%", "look-ups that reached the database there"),
}
"""By the name that the plan's formulas use."""


def collect(results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Read the figures.

    Args:
        results: folder with what the benches wrote.

    Returns:
        The constants, as `measured.json` holds them.

    Raises:
        ValueError: saying which bench is to be run, if a result is missing, of a smoke run, or has no such figure.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, source in SOURCES.items():
        path = results / f"{source.bench}.json"
        command = f"python -m bench.{source.bench}"
        if not path.exists():
            raise ValueError(f"{path} is not there: run {command}")
        result = json.loads(path.read_text())
        if result["smoke"]:
            raise ValueError(f"{path} is of a smoke run, whose figures mean nothing: run {command} without --smoke")
        values = [figure["value"] for figure in result["figures"] if figure["label"] == source.label]
        if len(values) != 1 or "measured_on" not in result:
            raise ValueError(f"{path} has no figure {source.label!r} with its date: run {command} again")
        found[name] = {
            "value": float(f"{values[0]:.4g}"),
            "unit": source.unit,
            "what": source.what,
            "command": result["command"],
            "label": source.label,
            "measured_on": result["measured_on"],
            "machine": f"{result['machine']}, Python {result['python']}",
        }
    return found


def write() -> Path:
    """Write the constants into the package; they are committed with it.

    Returns:
        The file.
    """
    try:
        constants = collect()
    except ValueError as error:
        sys.exit(f"no constants were written: {error}")
    MEASURED.write_text(json.dumps(constants, indent=2, ensure_ascii=False) + "\n")
    return MEASURED
