"""Brings up a whole stack, does one bad or big thing to it under load, and prints what clients saw of it.

    python -m drills [NAME ...] [--smoke] [--without-leases] [--pictures DIRECTORY] [--list]

All drills where none is named. The exit code is 1 where a goal was missed; with --smoke the lengths are the smallest, goals that
depend on how fast the machine is are printed and not judged, and where none is named, the other programs of drills/ run as well.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import pytest

from drills import balancer, handover, instance
from drills.findings import Findings
from drills.flood import DRILLS as FLOODS
from drills.holds import DRILLS as HOLDS
from drills.outcome import ChargeOutcome
from drills.picture import draw
from drills.postgres_failures import DRILLS as POSTGRES_FAILURES
from drills.redis_changes import DRILLS as REDIS_CHANGES
from drills.redis_outages import DRILLS as REDIS_FAILURES
from drills.redis_outages import Size
from drills.side_by_side import run_all
from drills.soak import DRILLS as SOAKS

Drill = Callable[[Size], Awaitable[ChargeOutcome | Findings]]
PROGRAMS: Final = {"instance": instance, "handover": handover, "balancer": balancer}
"""Drills without a database, which have no table of this form: programs of their own."""
DRILLS: Final[dict[str, Drill]] = {
    drill.__name__.replace("_", "-"): drill
    for drill in (*REDIS_FAILURES, *REDIS_CHANGES, *POSTGRES_FAILURES, *FLOODS, *HOLDS, *SOAKS)
}
NAMES: Final = (*DRILLS, *PROGRAMS)
BESIDES: Final = ("redis_failures", "autoscale", "fleet")
"""Programs with drills of their own, which `--smoke` runs as well where no drill is named."""


def _description(name: str) -> str:
    said = (PROGRAMS[name] if name in PROGRAMS else DRILLS[name]).__doc__ or ""
    return f"{name:<24} {said.strip().splitlines()[0]}"


async def _awaited(drill: Drill, size: Size) -> ChargeOutcome | Findings:
    return await drill(size)


def run(name: str, size: Size, pictures: Path) -> bool:
    """Run one drill and print its table.

    Args:
        name: of the drill.
        size: how long it takes its time.
        pictures: directory of the picture.

    Returns:
        Whether all goals were met.
    """
    began = time.monotonic()
    if name in PROGRAMS:
        print(f"\n{_description(name)}", flush=True)
        command = [sys.executable, "-m", f"drills.{name}", *(["--smoke"] if size.smoke else [])]
        return subprocess.run(command, check=False).returncode == 0
    print(f"\n{name}: {(DRILLS[name].__doc__ or '').strip().splitlines()[0]}", flush=True)
    before = os.getloadavg()[0]
    outcome = asyncio.run(_awaited(DRILLS[name], size))
    print(outcome.table(timed=not size.smoke))
    drawn = ""
    if outcome.seen:
        picture = pictures / f"{name}.png"
        draw(name, outcome.seen, outcome.marks, picture)
        drawn = f"; {picture}"
    # Figures of a machine that does other things too are to be read with that in mind.
    print(f"  {os.cpu_count()} cores, load {before:.1f} before; {time.monotonic() - began:.0f} s in all{drawn}", flush=True)
    return outcome.met(timed=not size.smoke)


def main() -> None:
    """Run the drills that were asked for."""
    logging.disable(logging.CRITICAL)  # what servers say of the failure is known here
    parser = argparse.ArgumentParser(
        prog="python -m drills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which drills: {', '.join(NAMES)}")
    parser.add_argument("--smoke", action="store_true", help="the smallest size of each")
    parser.add_argument("--pictures", type=Path, default=Path(__file__).parent / "results", help="where pictures go")
    parser.add_argument("--without-leases", action="store_true", help="instances charge each check by itself, for comparison")
    parser.add_argument("--skip-missing", action="store_true", help="skip a drill whose servers are not installed, also if named")
    parser.add_argument("--list", action="store_true", help="name the drills and end")
    asked = parser.parse_args()
    if asked.list:
        for name in NAMES:
            print(_description(name))
        return
    unknown = sorted(set(asked.names) - set(NAMES))
    if unknown:
        parser.error(f"there is no drill {unknown[0]!r}: {', '.join(NAMES)}")
    if asked.smoke and not asked.names:
        # Goals that depend on the machine's speed are not judged: two at a time, since each waits most of the time.
        program = [sys.executable, "-m", "drills", "--smoke", "--pictures", str(asked.pictures), "--skip-missing"]
        program += ["--without-leases"] if asked.without_leases else []
        others = {name: [sys.executable, "-m", f"drills.{name}", "--smoke"] for name in BESIDES}
        missed = run_all({**{name: [*program, name] for name in NAMES}, **others}, at_once=2)
    else:
        missed = _one_by_one(asked)
    if missed:
        sys.exit(f"\ngoals missed: {', '.join(missed)}")


def _one_by_one(asked: argparse.Namespace) -> list[str]:
    """Run the drills that were asked for; returns the names of those that missed a goal."""
    missed = []
    for name in asked.names or NAMES:
        try:
            if not run(name, Size(asked.smoke, not asked.without_leases), asked.pictures):
                missed.append(name)
        except pytest.skip.Exception as reason:
            # Where it was asked for by name, that is a failure; of all drills, the others go on.
            if asked.names and not asked.skip_missing:
                sys.exit(f"{name}: {reason}")
            print(f"  skipped: {reason}", flush=True)
    return missed


if __name__ == "__main__":
    main()
