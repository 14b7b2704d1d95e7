"""Several processes on one Redis admit together exactly the limit."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tidegate.policy.limits import Algorithm

PROCESSES, EACH = 3, 100


@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize("topology", ["redis_server", "valkey_server", "redis_cluster", "redis_sentinel"])
def test_processes_admit_exactly_the_limit(request: pytest.FixtureRequest, topology: str, algorithm: Algorithm) -> None:
    server: Any = request.getfixturevalue(topology)
    limit = "120/hour burst 120" if algorithm.is_bucket else "120/hour"
    if algorithm is Algorithm.LEAKY_BUCKET:
        limit = "120/day burst 120"
    command = [
        sys.executable,
        "-m",
        "tests.limiter_process",
        server.url,
        algorithm.value,
        limit,
        f"processes:{algorithm}",
        str(EACH),
    ]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [process.communicate(timeout=60)[0].split() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    assert sum(int(degraded) for _, degraded in said) == 0
    assert sum(int(allowed) for allowed, _ in said) == 120
