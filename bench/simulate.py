"""Lines a second of `tidegate simulate`, from start to end of the process, and its peak memory for a log and a quarter of it.

    python -m bench.simulate [--smoke] [--log FILE]

The log is repeated with later times until it is long enough: a real one in combined format where `--log` gives it or it lies
beside the repository, else one that is made up. CPU seconds and peak memory are what the kernel accounts to the process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from bench.measure import Goal, report
from tidegate.tools.simulate.log_formats import Request, parser_of

ROOT = Path(__file__).parents[1]
REAL_LOG = ROOT.parent / "shared" / "data" / "apache_access.log"
POLICY = ROOT / "examples" / "simulate.policy.toml"
ONE_LIMIT = '[[tiers]]\nname = "t"\n[[tiers.rules]]\nendpoint = "/*"\nlimits = ["60/minute"]\nsubject = "ip"\n'


class Cost(NamedTuple):
    """What one process took."""

    cpu_s: float
    peak_mib: float


def made_up_log() -> Iterator[str]:
    """10,000 lines of four days: 1,750 clients, some of them busy, each line up to a minute out of order."""
    chance = random.Random(1)
    start = datetime.datetime(2026, 5, 17, tzinfo=datetime.UTC)
    for number in range(10_000):
        at = start + datetime.timedelta(seconds=number * 34 + chance.uniform(-30, 30))
        client = int(1_750 * chance.random() ** 3)
        section = chance.choice(("presentations/deck/images", "blog/geekery", "files/logstash", "images", "style"))
        yield (
            f"198.51.{client // 256}.{client % 256} - - [{at:%d/%b/%Y:%H:%M:%S} +0000] "
            f'"GET /{section}/{chance.randrange(900)}.html HTTP/1.1" 200 {chance.randrange(90_000)} "http://example.com/blog/" '
            '"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/132.0.0.0 Safari/537.36"'
        )


def repeated(lines: list[str], requests: list[Request], times: int) -> Iterator[str]:
    """The log so many times over, each time after the last."""
    span_days = (max(each.at_us for each in requests) - min(each.at_us for each in requests)) // 86_400_000_000 + 1
    for again in range(times):
        moved: dict[str, str] = {}
        for line in lines:
            begin = line.index("[") + 1
            day = line[begin : begin + 11]
            if day not in moved:
                later = datetime.datetime.strptime(day, "%d/%b/%Y") + datetime.timedelta(days=again * span_days)
                moved[day] = f"{later:%d/%b/%Y}"
            yield line[:begin] + moved[day] + line[begin + 11 :]


def as_json_lines(lines: Iterable[str]) -> Iterator[str]:
    """The same requests as nginx would write them in JSON."""
    parse = parser_of("combined", "ip", None)
    for at_us, ip, method, path, *_ in map(parse, lines):
        yield json.dumps({"msec": at_us / 1e6, "remote_addr": ip, "request_method": method, "request_uri": path, "status": 200})


def as_csv(lines: Iterable[str]) -> Iterator[str]:
    """The same requests as CSV."""
    parse = parser_of("combined", "ip", None)
    yield "time,ip,method,path,status"
    for at_us, ip, method, path, *_ in map(parse, lines):
        yield f'{at_us / 1e6},{ip},{method},"{path}",200'


def run(log: Path, policy: Path) -> Cost:
    """Simulate a log in a process of its own."""
    command = [sys.executable, "-m", "tidegate", "simulate", str(log), "-p", str(policy), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return Cost(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def readable(line: str) -> bool:
    """Whether a line of the source holds a request."""
    try:
        parser_of("combined", "ip", None)(line)
    except Exception:  # noqa: BLE001 - whatever is wrong with it, the bench leaves it out
        return False
    return True


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--smoke", action="store_true", help="a small log, one round: that it works, not how fast")
    arguments.add_argument("--log", type=Path, help="a log in combined format to repeat")
    given = arguments.parse_args()
    source: Path | None = given.log or (REAL_LOG if REAL_LOG.exists() else None)
    lines = source.read_text(encoding="utf-8", errors="replace").splitlines() if source else list(made_up_log())
    lines = [line for line in lines if readable(line)]
    requests = [parser_of("combined", "ip", None)(line) for line in lines]
    rounds, times = (1, 1) if given.smoke else (5, max(500_000 // len(lines) // 4, 1))
    length = times * len(lines)
    with tempfile.TemporaryDirectory() as directory:

        def write(name: str, content: Iterable[str]) -> Path:
            path = Path(directory) / name
            with path.open("w", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in content)
            return path

        long = write("long.log", repeated(lines, requests, 4 * times))
        short = write("short.log", repeated(lines, requests, times))
        one_limit = write("one.policy.toml", [ONE_LIMIT])
        as_json = write("json.log", as_json_lines(repeated(lines, requests, times)))
        as_table = write("table.csv", as_csv(repeated(lines, requests, times)))
        measured = {
            "combined, example policy": (4 * length, long, POLICY),
            "combined, one limit": (4 * length, long, one_limit),
            "JSON lines, example policy": (length, as_json, POLICY),
            "CSV, example policy": (length, as_table, POLICY),
            "a quarter of the log": (length, short, POLICY),
        }
        costs: dict[str, list[Cost]] = {name: [] for name in measured}
        for _ in range(rounds):
            for name, (_, log, policy) in measured.items():
                costs[name].append(run(log, policy))
    speed = {name: count / statistics.median(cost.cpu_s for cost in costs[name]) for name, (count, *_) in measured.items()}
    peak = {name: statistics.median(cost.peak_mib for cost in costs[name]) for name in measured}
    first = "combined, example policy"
    report(
        "simulate",
        f"simulate: {4 * length:,} lines {'of a real log' if source else 'made up'}, end to end, one core, median of {rounds}",
        [
            *(
                (f"{name}, lines a CPU second", speed[name], Goal(at_least=100_000) if name == first else None)
                for name in list(measured)[:4]
            ),
            ("peak memory, a quarter of the log, MiB", peak["a quarter of the log"], None),
            ("peak memory, the log, MiB", peak[first], None),
            ("peak memory, four times the length to once", peak[first] / peak["a quarter of the log"], Goal(at_most=1.1)),
        ],
        smoke=given.smoke,
    )


if __name__ == "__main__":
    main()
