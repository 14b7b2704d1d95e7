"""`python -m tests.worker_server FD PATH...`: a process that has all test modules loaded and forks the workers of pytest-xdist.

To load the tests and what they import takes 5 s of CPU time, with coverage 15 s: here once, rather than in each of the processes
that run tests. pytest-xdist starts a worker as a program; that program is `worker_start.py`, which passes its standard streams to
this server, waits for the fork that becomes the worker, and ends with its exit code. The requests are those of
`tests.servers.fork_server`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def start_workers_from_here(config: pytest.Config, specs: Iterable[Any]) -> None:
    """Start the server, and let pytest-xdist start its workers by it. The server ends when this process does.

    Args:
        config: of the run; its files and folders are what the server loads.
        specs: of execnet, one for each worker; those of other machines and interpreters stay as they are.
    """
    own = [spec for spec in specs if spec.popen and not spec.python]
    if not own:
        return
    name = f"tidegate-worker-server-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.worker_server", str(listener.fileno()), *config.args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])},
        )
    # It serves until nobody is connected any more.
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"\0{name}")

    def end() -> None:
        connection.close()
        server.wait()

    config.add_cleanup(end)
    command = shlex.join([sys.executable, "-I", "-S", str(Path(__file__).with_name("worker_start.py")), name])
    for spec in own:
        spec.python = command


def _load(paths: list[str]) -> None:
    """Import the modules of the tests as pytest does. What cannot be imported fails again in each worker, which reports it."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", "-p", "no:xdist", *paths])
    if len([*Path("/proc/self/task").iterdir()]) > 1:
        raise RuntimeError("loading the tests started threads, which a fork would lose: start them in fixtures")
    # The workers collect again, and turn the collection of garbage on when they run their first test.
    gc.disable()
    gc.freeze()


def _work() -> None:
    """Run a worker: what execnet has any Python that it starts run."""
    bootstrap = sys.stdin.readline()
    exec(eval(bootstrap), {"__name__": "__main__"})  # this is execnet's own protocol


def main() -> None:
    # Ctrl-C is for the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _load(sys.argv[2:])
    # Tidegate is imported by it, which coverage has to see.
    from tests.servers import fork_server
    from tests.servers.forked_workers import run_and_end

    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    request = fork_server.serve(socket.socket(fileno=int(sys.argv[1])), kill_with_connection=True)
    if request is None:
        return
    sys.argv[:] = ["-c"]
    run_and_end(_work)


if __name__ == "__main__":
    main()
