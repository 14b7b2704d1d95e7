"""What the benches share: goals, and a table of figures that is also written as JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"


class Goal(NamedTuple):
    """What a figure should be."""

    at_most: float | None = None
    at_least: float | None = None

    def met(self, value: float) -> bool:
        """Whether a value meets the goal."""
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)

    def __str__(self) -> str:
        bounds = [f"≤ {self.at_most:g}"] if self.at_most is not None else []
        return ", ".join(bounds + ([f"≥ {self.at_least:g}"] if self.at_least is not None else []))


def asked_for_smoke(description: str | None) -> bool:
    """Read the command line of a bench that has no other option than --smoke.

    Args:
        description: what --help prints above it.

    Returns:
        Whether the smallest size is wanted.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the smallest size: that it works, not how fast or how much")
    return bool(parser.parse_args().smoke)


def report(name: str, title: str, figures: Sequence[tuple[str, float, Goal | None]], *, smoke: bool) -> None:
    """Print figures with their goals, and write them to `bench/results/NAME.json`.

    Args:
        name: of the file.
        title: of the table.
        figures: label, value and goal of each.
        smoke: whether the run was too short for its figures to mean anything: then goals are not judged.
    """
    print(f"\n{title}{' (smoke run: no figure to quote)' if smoke else ''}")
    width = max(len(label) for label, _, _ in figures)
    for label, value, goal in figures:
        judged = "" if goal is None else f"goal {goal}" + ("" if smoke else ": met" if goal.met(value) else ": MISSED")
        print(f"  {label:<{width}}  {value:>12,.2f}  {judged}")
    rows: list[dict[str, Any]] = [{"label": label, "value": value, "goal": goal and str(goal)} for label, value, goal in figures]
    RESULTS.mkdir(exist_ok=True)
    written = {
        "title": title,
        "smoke": smoke,
        "command": f"python -m bench.{name}",
        "measured_on": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "machine": machine(),
        "figures": rows,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(written, indent=2, ensure_ascii=False))


def machine() -> str:
    """What the figures were measured on: the processor's name, its cores, the system."""
    names = [line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {platform.system()}"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
