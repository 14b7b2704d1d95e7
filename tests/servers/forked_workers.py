"""Workers of a supervisor that are forked from it, where the supervisor itself was forked: see `fork_server`.

To start one takes a second of CPU time, nearly all of it to load the code that the supervisor has loaded. A forked worker is a
child of its supervisor as any other: own process id, process group and environment, and of the descriptors those that it is
given.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

from tidegate.server import supervisor

_STANDARD_FDS = 3
_FLUSH_FAILED = 120
"""The exit code of the interpreter where what was printed could not be written."""


class ForkedWorker(subprocess.Popen[bytes]):
    """`python -m tidegate ARGUMENTS`, without loading its code; takes what the supervisor gives to `subprocess.Popen`."""

    main: Callable[[], None]
    """Runs the command of `sys.argv`."""

    def _execute_child(self, *arguments: Any) -> None:
        command, pass_fds, environment, p2cread = arguments[0], arguments[4], arguments[6], arguments[10]
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            if task is not None:
                asyncio.tasks._leave_task(loop, task)
            asyncio._set_running_loop(None)
            _become(command, environment, p2cread, pass_fds)
        self._child_created = True
        self._closed_child_pipe_fds = True
        os.close(p2cread)


def _become(command: list[str], environment: Mapping[str, str], stdin: int, pass_fds: Collection[int]) -> NoReturn:
    """Run a worker in this copy of its supervisor, and end with its exit code. Nothing of the supervisor runs any more."""

    def worker() -> None:
        os.setpgid(0, 0)
        os.dup2(stdin, 0)
        _close_all_but(pass_fds)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # What the supervisor does at its end, such as removing its directory, is not for a worker to do.
        atexit._clear()
        weakref.finalize._registry.clear()  # type: ignore[attr-defined]
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[1:] = command[command.index("tidegate") + 1 :]
        ForkedWorker.main()

    run_and_end(worker)


def run_and_end(main: Callable[[], None]) -> NoReturn:
    """Run a command, then end this process with its exit code as the interpreter does, but without freeing every object.

    To free them writes to all memory that a forked process shares with its parent, which then is copied: 0.06 s of CPU time.

    Args:
        main: raises `SystemExit` or returns.
    """
    code: object = None
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:  # noqa: BLE001 - reported as at the end of any process
        sys.excepthook(*sys.exc_info())
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    status = code if isinstance(code, int) else int(code is not None)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        status = _FLUSH_FAILED
    os._exit(status)


def _close_all_but(kept: Collection[int]) -> None:
    first = _STANDARD_FDS
    for each in sorted(kept):
        os.closerange(first, each)
        first = each + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))


def fork_workers(main: Callable[[], None]) -> None:
    """Let the supervisor of this process fork its workers.

    Args:
        main: runs the command of `sys.argv`.
    """
    ForkedWorker.main = staticmethod(main)
    forking = types.SimpleNamespace(**{**vars(subprocess), "Popen": ForkedWorker})
    setattr(supervisor, "subprocess", forking)  # noqa: B010 - the module does not export it
