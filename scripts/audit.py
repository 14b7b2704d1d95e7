"""`make audit`: looks the locked packages up in the databases of known vulnerabilities, with pip-audit.

Each lock is looked up at PyPI, and at OSV where PyPI does not know its packages (a mirror without that data).

Exit code 0: nothing was found, or the data cannot be reached and that is printed. 1: a locked version has a known vulnerability.
2: with `--required`, the data cannot be reached.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
LOCKS: Final = ("image", "build", "dev")
SERVICES: Final = ("pypi", "osv")


def findings(report: dict[str, Any]) -> tuple[int, list[str]]:
    """What a report of pip-audit says.

    Args:
        report: as `pip-audit --format json` prints it.

    Returns:
        How many packages were looked up (pip-audit itself reports "no known vulnerabilities" for those that it skipped), and one
        sentence for each vulnerability.
    """
    looked_up = [each for each in report["dependencies"] if "skip_reason" not in each]
    return len(looked_up), [
        f"{each['name']} {each['version']}: {found['id']}"
        + (f" ({', '.join(found['aliases'])})" if found.get("aliases") else "")
        + (f", fixed in {', '.join(found['fix_versions'])}" if found.get("fix_versions") else ", no fixed version")
        for each in looked_up
        for found in each["vulns"]
    ]


def reports(lock: Path) -> Iterator[dict[str, Any]]:
    """The report of each service that answers at all.

    Args:
        lock: the file with the packages.

    Yields:
        Reports in pip-audit's JSON.
    """
    for service in SERVICES:
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(lock), "--require-hashes", "--disable-pip"]
        command += ["--format", "json", "--progress-spinner", "off", "--vulnerability-service", service]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.stdout.startswith("{"):
            yield json.loads(done.stdout)
        else:
            reason = done.stderr.strip().splitlines() or ["no reason given"]
            print(f"audit: {service} did not answer for {lock.name}: {reason[-1][:200]}", file=sys.stderr)


def main(required: bool) -> int:
    """Audit all locks.

    Args:
        required: fail where the data cannot be reached.

    Returns:
        The exit code.
    """
    vulnerable: list[str] = []
    missing = []
    for name in LOCKS:
        lock = ROOT / "locks" / f"{name}.txt"
        for report in reports(lock):
            looked_up, found = findings(report)
            total = len(report["dependencies"])
            if looked_up:
                print(f"audit: {lock.name}: {looked_up} of {total} packages looked up, {len(found)} vulnerabilities")
                vulnerable += found
                break
        else:
            missing.append(lock.name)
    for each in vulnerable:
        print(f"audit: {each}")
    if missing:
        print(
            f"audit: NOT AUDITED: {', '.join(missing)}: no database of vulnerabilities can be reached from here", file=sys.stderr
        )
    if vulnerable:
        return 1
    return 2 if missing and required else 0


if __name__ == "__main__":
    sys.exit(main("--required" in sys.argv[1:]))
