"""Runs programs side by side, each with ports of its own, and prints what each printed in one piece."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue


def run_all(commands: Mapping[str, Sequence[str]], at_once: int) -> list[str]:
    """Run them all, whichever fails.

    Args:
        commands: name → command line.
        at_once: how many run at the same time, 1 or more.

    Returns:
        The names of those that failed, in the order of `commands`.
    """
    places: SimpleQueue[int] = SimpleQueue()
    for place in range(at_once):
        places.put(place)

    def run(name: str) -> bool:
        place = places.get()
        try:
            # tests/servers/ports.py gives each of so many processes ports that no other one has.
            ports = {"PYTEST_XDIST_WORKER_COUNT": str(at_once), "PYTEST_XDIST_WORKER": f"gw{place}"}
            ended = subprocess.run(
                commands[name],
                env={**os.environ, **ports},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
        finally:
            places.put(place)
        print(ended.stdout, end="", flush=True)
        return ended.returncode == 0

    with ThreadPoolExecutor(at_once) as threads:
        well = list(threads.map(run, commands))
    return [name for name, good in zip(commands, well, strict=True) if not good]
