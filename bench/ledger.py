"""What recording usage costs a check, and what an export of the ledger takes.

    python -m bench.ledger [--smoke]

Recording: CPU time of this process for one call of the observer, and for a check in memory with and without it, of one key and of
10,000 in turn; rounds are interleaved, medians and the medians of ratios and differences round by round are printed. Beside it,
what a journal would cost that loses nothing if the process is killed: one write() to a file for each check.

Export: `tidegate usage export` from SQLite, and over the admin API of a server, with a tenth of the rows and with all of them:
rows per second of the command, and the peak memory of the command and of the server. Peak memory must not depend on the number of
rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.servers.ports import accepts, free_port

from bench.measure import Goal, asked_for_smoke, report
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.catalog.sql.database import Database
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check, Decision
from tidegate.gate.gate import Gate, Observer
from tidegate.ledger.aggregate import UsageCounts
from tidegate.ledger.buffer import DAY_US
from tidegate.observation import Observation, UsageMemo
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.policy.toml_reader import parse_policy
from tidegate.telemetry.metrics import Metrics
from tidegate.violations.recorder import Violations

AT_US = 1_700_000_000_000_000
POLICY = """
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/api/*"
  limits = ["1000000/second"]
"""
TOKEN = "token-of-the-bench-0001"


def observations(keys: int, count: int, *, moving: bool = False) -> list[Observation]:
    """What the gate reports of checks of so many keys in turn, under 8 rules; one in ten was blocked.

    As in the gate, the texts and the memo of a key are those of its cached caller: the same objects in all its checks.

    Args:
        moving: whether each check of a key is answered by another rule than the one before.
    """
    sets = [
        LimitSet(f"t:/{number}", Algorithm.FIXED_WINDOW, [Limit.parse("100/minute")], rule=f"/api/{number}", tier="free")
        for number in range(8)
    ]
    callers = [(f"k:{number:024x}", f"{number:024x}", UsageMemo(f"{number:024x}")) for number in range(keys)]
    made = []
    for number in range(count):
        limits = sets[(number % keys + number // keys * moving) % 8]
        subject, key, memo = callers[number % keys]
        decision = Decision(number % 10 > 0, limits.limits[0], 50, limits=limits, at_us=AT_US + number)
        made.append(Observation(decision, None, 400_000, (), subject, None, 1, key, memo=memo))
    return made


def per_call_ns(observe: Observer, checks: Sequence[Observation]) -> float:
    """CPU ns of one call."""
    started = time.process_time_ns()
    for check in checks:
        observe(check)
    return (time.process_time_ns() - started) / len(checks)


def flush(counts: UsageCounts) -> None:
    """Take what was counted, and read it, as every write to the database does."""
    for minute in counts.take():
        for _ in minute.rows():
            pass


def journal(descriptor: int) -> Observer:
    """A write() for each check: what was written survives the process, though not the machine."""

    def observe(observation: Observation) -> None:
        decision = observation.decision
        assert decision is not None
        line = f"{decision.at_us} {observation.key_id} {decision.rule} {observation.cost}\n"
        os.write(descriptor, line.encode())

    return observe


def composed(*observers: Observer) -> Observer:
    """As an instance composes them."""
    if len(observers) == 2:
        one, two = observers

        def observe_two(observation: Observation) -> None:
            one(observation)
            two(observation)

        return observe_two
    one, two, three = observers

    def observe_three(observation: Observation) -> None:
        one(observation)
        two(observation)
        three(observation)

    return observe_three


async def checking_ns(keys: int, rounds: int, count: int) -> list[tuple[float, float]]:
    """CPU ns of a check in memory of so many keys in turn, with and without recording, by round."""
    names = [f"demo-bench-key-{number:05}" for number in range(keys)]
    policy = parse_policy(POLICY + "".join(f'[[api_keys]]\nkey = "{name}"\ntier = "free"\n' for name in names))
    checks = [Check.of("/api/items", api_key=name) for name in names]
    usage = UsageCounts()

    def per_check_ns(gate: Gate, total: int) -> float:
        started = time.process_time_ns()
        for _ in range(total // keys):
            for check in checks:
                gate.check_now(check)
        return (time.process_time_ns() - started) / (total // keys * keys)

    # Of the same callers and counters: where objects lie in memory costs as much as what is measured, if there are many.
    catalog, counters = CachedCatalog(PolicyCatalog(policy), l1_ttl_s=3600), MemoryCounters()
    gates = []
    for more in ((usage.observe,), ()):
        observe = composed(Metrics("bench").observe, Violations().observe, *more)
        gates.append(Gate(catalog, counters, observe))
        for check in checks:
            assert (await gates[-1].check(check)).allowed
    measured = []
    for turn in range(rounds + 1):
        first = turn % 2
        taken = {each: per_check_ns(gates[each], count) for each in (first, 1 - first)}
        measured.append((taken[0], taken[1]))
        flush(usage)
    return measured[1:]


def recording(smoke: bool) -> list[tuple[str, float, Goal | None]]:
    """The figures of recording."""
    rounds, count = (2, 20_000) if smoke else (9, 200_000)
    kinds = {f"{keys:,} keys in turn": observations(keys, count) for keys in (1, 1_000, 10_000)}
    kinds["1,000 keys in turn, other rules each time"] = observations(1_000, count, moving=True)
    kinds["every check of another key"] = observations(count, count)
    figures: list[tuple[str, float, Goal | None]] = []
    for label, checks in kinds.items():
        counts, runs = UsageCounts(), []
        for _ in range(rounds + 1):
            runs.append(per_call_ns(counts.observe, checks))
            flush(counts)
        runs.pop(0)
        # Of the others most checks add an entry, or read one that is not in the processor's caches.
        goal = Goal(at_most=300) if label.endswith("keys in turn") else None
        figures.append((f"recording, {label}, ns CPU", statistics.median(runs), goal))
    with tempfile.TemporaryFile() as file:
        runs = [per_call_ns(journal(file.fileno()), checks[: count // 4]) for _ in range(rounds)]
    figures.append(("a journal with one write() for each check, ns CPU", statistics.median(runs), None))
    for keys in (1, 1_000 if smoke else 10_000):
        pairs = asyncio.run(checking_ns(keys, rounds, count))
        label = f"check in memory, {keys:,} keys in turn" if keys > 1 else "check in memory, one key"
        figures.append((f"{label}, with recording, ns CPU", statistics.median(one for one, _ in pairs), None))
        figures.append((f"{label}, without, ns CPU", statistics.median(two for _, two in pairs), None))
        figures.append((f"{label}, ratio with / without", statistics.median(one / two for one, two in pairs), None))
        difference = statistics.median(one - two for one, two in pairs)
        figures.append((f"{label}, difference, ns CPU", difference, Goal(at_most=300)))
    return figures


def fill(file: Path, rows: int) -> None:
    """A ledger with so many rows in 30 days."""
    asyncio.run(_migrate(file))
    with sqlite3.connect(file) as database:
        database.execute("DELETE FROM usage_ledger")
        database.execute(
            """INSERT INTO usage_ledger WITH RECURSIVE number(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM number WHERE n + 1 < ?)
            SELECT ? + n % 30 * ?, 'customer-' || (n / 300), printf('%024x', n / 30), 'pro', '/api/v1/*', n % 997, n % 7, 0 FROM
            number""",
            (rows, AT_US - AT_US % DAY_US, DAY_US),
        )
    database.close()


async def _migrate(file: Path) -> None:
    await (await Database.open(f"sqlite:///{file}")).close()


def export(directory: Path, rows: int, *options: str) -> tuple[float, float]:
    """Run the command; returns rows per second and the peak memory of its process, MB."""
    output = directory / "usage.csv"
    command = [sys.executable, "-m", "tidegate", "usage", "export", "--from", "2023-11-14", "--to", "2023-12-31"]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--output", str(output), *options], stderr=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        # Not `ru_maxrss`: that of a new process includes what this one had when it was forked.
        peak = max(peak, peak_mb(process.pid))
        time.sleep(0.02)
    assert process.returncode == 0
    taken_s = time.perf_counter() - started
    with output.open("rb") as written:
        assert sum(1 for _ in written) == rows + 1
    return rows / taken_s, peak


def exporting(smoke: bool) -> list[tuple[str, float, Goal | None]]:
    """The figures of the export."""
    figures: list[tuple[str, float, Goal | None]] = []
    sizes = (2_000, 20_000) if smoke else (100_000, 1_000_000)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        file = directory / "tidegate.db"
        (directory / "token").write_text(TOKEN)
        (directory / "local.toml").write_text(f'[catalog]\nurl = "sqlite:///{file}"\n')
        peaks: dict[str, list[float]] = {"command on the database": [], "command over the API": [], "server": []}
        for rows in sizes:
            fill(file, rows)
            rate, peak = export(directory, rows, "--config", str(directory / "local.toml"))
            figures.append((f"{rows:,} rows from the database, rows/s", rate, None))
            peaks["command on the database"].append(peak)
            with serving(directory) as (url, pid):
                rate, peak = export(directory, rows, "--url", url, "--token-file", str(directory / "token"))
                peaks["server"].append(peak_mb(pid))
            figures.append((f"{rows:,} rows over the API, rows/s", rate, None))
            peaks["command over the API"].append(peak)
        for label, (small, large) in peaks.items():
            figures.append((f"peak memory of the {label}, {sizes[0]:,} rows, MB", small, None))
            figures.append((f"peak memory of the {label}, {sizes[1]:,} rows, MB", large, Goal(at_most=small * 1.1 + 5)))
    return figures


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[tuple[str, int]]:
    """A server on the database; gives the URL of its control plane and its process id."""
    url = f"127.0.0.1:{free_port()}"
    environment = {
        **os.environ,
        "TIDEGATE_SERVER__HTTP": f"127.0.0.1:{free_port()}",
        "TIDEGATE_SERVER__GRPC": "",
        "TIDEGATE_SERVER__ADMIN": url,
        "TIDEGATE_ADMIN__TOKEN": TOKEN,
        "TIDEGATE_LEDGER__KEEP_DAYS": "3650",
    }
    command = [sys.executable, "-m", "tidegate", "serve", "--config", str(directory / "local.toml")]
    with (directory / "server.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=directory, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while not accepts(int(url.rpartition(":")[2])):
                if time.monotonic() > deadline or server.poll() is not None:
                    raise SystemExit(f"the server did not start: {(directory / 'server.log').read_text()}")
                time.sleep(0.1)
            yield f"http://{url}", server.pid
        finally:
            server.terminate()
            server.wait(60)


def peak_mb(pid: int) -> float:
    """Peak memory of a process, MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0  # it has ended


def main() -> None:
    """Measure and report."""
    smoke = asked_for_smoke(__doc__)
    report("ledger", "Recording and exporting usage", recording(smoke) + exporting(smoke), smoke=smoke)


if __name__ == "__main__":
    main()
