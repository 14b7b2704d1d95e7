"""What an import of 10,000 API keys takes: `tidegate keys import`, from CSV, into SQLite and PostgreSQL.

    python -m bench.key_import [--smoke]

Each import runs the command in a process of its own, on a catalog with one tier: the time until it ends, with the start of
Python, and its CPU time; then again on the same file, as after an interruption: no key is new. Medians over rounds,
each with keys of its own. PostgreSQL is measured where its programs are installed.
"""

from __future__ import annotations

import asyncio
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.servers.postgres import PostgresServer, programs

from bench.measure import Goal, asked_for_smoke, report
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.policy.toml_reader import parse_policy

GOAL_S = 5.0
Figures = list[tuple[str, float, Goal | None]]


def write_keys(file: Path, first: int, count: int) -> None:
    """A CSV file of keys."""
    rows = (f"bench-key-of-a-customer-{number:010},key {number},pro\n" for number in range(first, first + count))
    file.write_text("key,name,tier\n" + "".join(rows))


def import_keys(directory: Path, file: Path, expected: str) -> tuple[float, float]:
    """Run the command; returns the time that it took and its CPU time, s."""
    command = [sys.executable, "-m", "tidegate", "keys", "import", str(file), "--config", str(directory / "local.toml")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)
    taken_s = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode or expected not in done.stdout:
        raise RuntimeError(f"the import ended with {done.returncode}: {done.stdout}{done.stderr}")
    return taken_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


async def _make_tier(url: str) -> None:
    catalog = await SqlCatalog.open(url)
    await catalog.apply_policy(parse_policy('[[tiers]]\nname = "pro"\nquotas = ["100000/month"]\n'), "1")
    await catalog.close()


def importing(label: str, url: str, directory: Path, rounds: int, count: int) -> Figures:
    """The figures of one database."""
    (directory / "local.toml").write_text(f'[catalog]\nurl = "{url}"\n')
    asyncio.run(_make_tier(url))
    new: list[tuple[float, float]] = []
    again: list[tuple[float, float]] = []
    for number in range(rounds):
        file = directory / "keys.csv"
        write_keys(file, number * count, count)
        new.append(import_keys(directory, file, f"{count:,} imported, 0 unchanged, 0 with problems"))
        again.append(import_keys(directory, file, f"0 imported, {count:,} unchanged, 0 with problems"))
    return [
        (f"{label}, {count:,} new keys, s", statistics.median(taken for taken, _ in new), Goal(at_most=GOAL_S)),
        (f"{label}, {count:,} new keys, s CPU of the command", statistics.median(cpu for _, cpu in new), None),
        (f"{label}, the same file again, s", statistics.median(taken for taken, _ in again), Goal(at_most=GOAL_S)),
    ]


def main() -> None:
    """Measure and report."""
    smoke = asked_for_smoke(__doc__)
    rounds, count = (1, 200) if smoke else (5, 10_000)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        figures = importing("SQLite", f"sqlite:///{directory}/tidegate.db", directory, rounds, count)
        if programs() is None:
            print("PostgreSQL is not installed and not measured: install the Debian package postgresql")
        else:
            with PostgresServer() as server:
                figures += importing("PostgreSQL", server.url(), directory, rounds, count)
    report("key_import", f"importing {count:,} API keys", figures, smoke=smoke)


if __name__ == "__main__":
    main()
