"""`mypy --strict` of a user's script against the built wheel: it ships its types, and they say what the pages say."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """\
import asyncio
from typing import assert_type

from tidegate import Decision, Limiter, RateLimitExceeded, Reservation, SyncLimiter, exempt, limit


@limit("2/minute; 50/day", key="email", cost=lambda email: len(email))
def send_mail(email: str) -> int:
    return len(email)


@exempt
@limit("2/minute")
async def later(number: int) -> str:
    return str(number)


async def main() -> None:
    async with Limiter("10/second", name="partner", leases=False) as limiter:
        assert_type(await limiter.check({"org": "acme"}), Decision)
        assert_type(await limiter.wait("all", at_most_s=1), Decision)
        assert_type(await limiter.reserve("all", at_most_s=1), Reservation)
    assert_type(await later(1), str)


assert_type(send_mail("a@example.com"), int)
try:
    send_mail("a@example.com")
except RateLimitExceeded as error:
    assert_type(error.retry_after, float | None)
    assert_type(error.decision, Decision)
    assert_type(error.limit_headers, dict[str, str])
with SyncLimiter("1/minute") as blocking:
    assert_type(blocking.reserve("all", at_most_s=1).at.timestamp(), float)
asyncio.run(main())
send_mail(5)  # a mistake
"""


def test_a_strictly_typed_script(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("tidegate-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    (tmp_path / "script.py").write_text(SCRIPT)
    # Errors inside of the wheel are those of `make check`: here only the script's count.
    options = ("--strict", "--config-file=", "--cache-dir", str(tmp_path / "cache"), "--follow-imports", "silent")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--python-version", "3.11", "script.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=False,
    )
    mistakes = [line for line in checked.stdout.splitlines() if ": error: " in line]
    assert len(mistakes) == 1, checked.stdout + checked.stderr
    assert mistakes[0].startswith(f"script.py:{SCRIPT.count(chr(10))}: error: Argument 1 to")
