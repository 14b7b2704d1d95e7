"""Signals for a process and all below it.

PostgreSQL gives each of its processes a group of its own, so that no one signal reaches all.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from tests.moments import wait_until

_WAIT_S = 5.0


def tree_of(pid: int) -> list[int]:
    """Ask Linux for a process and all below it, with those that have ended and are not collected yet.

    Returns:
        Their process ids, parents first; empty if the process is gone.
    """
    everybody = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    parents = {one: _state_and_parent(one)[1] for one in everybody}
    tree = [pid] if parents.get(pid) else []
    for above in tree:
        tree += [below for below, parent in parents.items() if parent == above]
    return tree


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or has ended and only waits to be collected; in a container, nobody may ever do that.

    Returns:
        True if nothing of it runs any more.
    """
    return _state_and_parent(pid)[0] in "ZX"


def freeze(pid: int) -> None:
    """Stop a process and all below it by SIGSTOP, and wait until all are stopped: from then on, no new ones come.

    Raises:
        TimeoutError: if they are not stopped within 5 s.
    """

    def frozen() -> bool:
        stopped = {one for one in tree_of(pid) if _state_and_parent(one)[0] in "TtZX"}
        # Listed anew: one that was not seen stopped before may have made another meanwhile.
        running = [one for one in tree_of(pid) if one not in stopped]
        for one in running:
            os.kill(one, signal.SIGSTOP)  # if it has ended meanwhile, that is an OSError: asked again
        return not running

    wait_until(frozen, _WAIT_S, f"process {pid} and all below it are stopped")


def thaw(pid: int) -> None:
    """Let a process and all below it go on."""
    # The process last: while it is stopped, it collects none of those below, and their ids stay theirs.
    for one in reversed(tree_of(pid)):
        os.kill(one, signal.SIGCONT)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all below it by SIGKILL, and wait until all have ended; nothing happens if it has ended.

    Args:
        process: a child of ours.

    Raises:
        TimeoutError: if they have not ended within 5 s.
    """
    if process.poll() is not None:
        return
    freeze(process.pid)  # else one that is just made would be missed
    tree = tree_of(process.pid)
    for pid in tree:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: all(map(has_ended, tree)), _WAIT_S, f"all of {tree} have ended")


def _state_and_parent(pid: int) -> tuple[str, int]:
    """Ask Linux for the state of a process, such as `T` for stopped or `Z` for ended, and its parent; `X` and 0 if it is gone."""
    try:
        # The name stands before them, and may hold anything.
        state, parent = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
    except OSError:
        return "X", 0
    return state, int(parent)
