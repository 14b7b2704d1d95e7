"""Keeps the whole topology running in the background, for a developer to ask, break and look at.

    python -m drills.stack_command up [--redis cluster|sentinel|standalone] [--instances N] [--shards N] [--replicas N]
                                        [--postgres-replicas N]
    python -m drills.stack_command status
    python -m drills.stack_command down

What runs is listed in a state file, by default .stack.json here. A state file whose stack has died is reported and removed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
import pytest
from tests.servers.process_tree import has_ended

from drills.stack import TOPOLOGIES, Piece, Sizes, Stack

STATE: Final = Path(".stack.json")
POLICY_TEXT: Final = Path(__file__).parents[1] / "examples/simulate.policy.toml"
UP_WITHIN_S: Final = 180.0
DOWN_WITHIN_S: Final = 60.0
_PREFIX: Final = "tidegate-stack-"


class Recorded(msgspec.Struct, frozen=True):
    """One process.

    Args:
        address: `HOST:PORT`; empty for the one that keeps the others.
        began: when it was started, in clock ticks since the machine was: an id is given anew, a pair of both is not.
    """

    what: str
    address: str
    pid: int
    began: int

    @property
    def runs(self) -> bool:
        """Whether that very process is there and has not ended."""
        return began_at(self.pid) == self.began and not has_ended(self.pid)


class State(msgspec.Struct, frozen=True):
    """A stack that was started.

    Args:
        keeper: the process that keeps the others.
        directory: of all their files.
        ready: whether all of them are there.
        url: of the balancer; empty until it is there.
        pieces: the others.
    """

    keeper: Recorded
    directory: str
    ready: bool = False
    url: str = ""
    pieces: tuple[Recorded, ...] = ()


def began_at(pid: int) -> int | None:
    """When a process was started, in clock ticks since the machine was; None if there is none."""
    try:
        # The second field, its name, may hold anything; the start is the 22nd.
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19])
    except OSError:
        return None


def read_state(path: Path) -> State | None:
    """What the state file says.

    Returns:
        None where there is none.

    Raises:
        SystemExit: with the remedy, if it cannot be read.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        sys.exit(f"{path} cannot be read: {error}; look for processes of a stack with `ps`, then remove the file")


def write_state(path: Path, state: State) -> None:
    """Write it so that nobody reads half of it.

    Args:
        state: what to write.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_bytes(msgspec.json.format(msgspec.json.encode(state)))
    beside.replace(path)


def clean_up(path: Path, state: State) -> list[str]:
    """End what a dead keeper left, by process id, and remove its files.

    Args:
        path: of the state file.
        state: its content.

    Returns:
        What had to be ended.
    """
    ended = _end(state.pieces)
    # Processes that were started and not yet recorded, or that a killed one left, have the stack's directory as their place for
    # temporary files.
    ended += _end([Recorded("unrecorded", "", pid, began_at(pid) or 0) for pid in _pids_of(state.directory)])
    directory = Path(state.directory)
    # Nothing but what we made is removed, whatever the file says.
    if directory.name.startswith(_PREFIX):
        shutil.rmtree(directory, ignore_errors=True)
    path.unlink(missing_ok=True)
    return ended


def _end(processes: Sequence[Recorded]) -> list[str]:
    ended = []
    for each in processes:
        # PostgreSQL, and pg_autoctl that keeps one, end their children at SIGQUIT, and cannot at SIGKILL.
        if each.runs:
            ended.append(f"{each.what} {each.pid}")
            os.kill(each.pid, signal.SIGQUIT if each.what.startswith("postgres") else signal.SIGKILL)
    deadline = time.monotonic() + DOWN_WITHIN_S / 2
    while any(each.runs for each in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    return ended


def _pids_of(directory: str) -> list[int]:
    wanted = f"TMPDIR={directory}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:  # it has ended, or is another user's
                continue
            if wanted in environment.split(b"\0"):
                found.append(int(entry.name))
    return found


def up(path: Path, topology: str, sizes: Sizes) -> int:
    """Start a stack in the background, or say that one runs.

    Args:
        path: of the state file.

    Returns:
        The exit code.
    """
    state = read_state(path)
    if state is not None and state.keeper.runs:
        print(f"runs already, since process {state.keeper.pid} was started; `make stack-down` ends it")
        return status(path)
    if state is not None:
        ended = clean_up(path, state)
        print(f"{path} was of a stack that had died; {'ended ' + ', '.join(ended) if ended else 'nothing of it ran'}")
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
    # PostgreSQL runs as a user of its own.
    directory.chmod(0o755)
    log = directory / "stack.log"
    command = [sys.executable, "-m", "drills.stack_command", "keep", "--state", str(path.absolute()), "--redis", topology]
    command += ["--instances", str(sizes.instances), "--shards", str(sizes.shards), "--replicas", str(sizes.redis_replicas)]
    command += ["--postgres-replicas", str(sizes.postgres_replicas)]
    with log.open("wb") as said:
        keeper = subprocess.Popen(
            command,
            cwd=Path(__file__).parents[1],
            env={**os.environ, "TMPDIR": str(directory)},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            # Ctrl-C and the end of the terminal are not the stack's.
            start_new_session=True,
        )
    deadline = time.monotonic() + UP_WITHIN_S
    while time.monotonic() < deadline:
        state = read_state(path)
        if state is not None and state.ready:
            return status(path)
        if keeper.poll() is not None:
            print(f"the stack did not start:\n{log.read_text(errors='replace')[-4000:]}", file=sys.stderr)
            break
        time.sleep(0.1)
    else:
        print(f"the stack was not ready within {UP_WITHIN_S:g} s: see {log}", file=sys.stderr)
        keeper.terminate()
    keeper.wait()
    if (state := read_state(path)) is not None:
        clean_up(path, state)
    shutil.rmtree(directory, ignore_errors=True)
    return 1


def keep(path: Path, topology: str, sizes: Sizes) -> int:
    """Run a stack until SIGTERM.

    Args:
        path: of the state file.

    Returns:
        The exit code.
    """
    wanted = next(each for each in TOPOLOGIES if each == topology)
    directory = os.environ["TMPDIR"]
    state = State(Recorded("keeper", "", os.getpid(), began_at(os.getpid()) or 0), directory)
    write_state(path, state)
    signals = {signal.SIGTERM, signal.SIGINT}
    # Raised, not waited for: a start that takes long can be broken off too.
    for each in signals:
        signal.signal(each, _stop)
    instances = Path(directory) / "instances"
    instances.mkdir()

    def record(ready: bool = False, url: str = "") -> None:
        pieces = tuple(Recorded(each.what, each.address, each.pid, began_at(each.pid) or 0) for each in stack.pieces())
        write_state(path, msgspec.structs.replace(state, ready=ready, url=url, pieces=pieces))

    try:
        stack = Stack(instances, POLICY_TEXT.read_text(), wanted, sizes, progress=record)
        with stack:
            record(True, stack.url)
            while True:
                signal.pause()
    except KeyboardInterrupt:
        return 0
    except pytest.skip.Exception as reason:
        print(reason)
        return 1
    finally:
        path.unlink(missing_ok=True)


def _stop(number: int, _frame: object) -> None:
    # Only once: what ends the stack is not broken off.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def status(path: Path) -> int:
    """Print what runs, where and how it is.

    Args:
        path: of the state file.

    Returns:
        0 where all is healthy, else 1.
    """
    state = read_state(path)
    if state is None:
        print("no stack runs; `make stack` starts one")
        return 1
    if not state.keeper.runs:
        print(f"{path} is of a stack that has died; `make stack-down` cleans up after it")
        return 1
    print(f"{'what':<22} {'address':<22} {'pid':>8}  healthy")
    well = True
    for each in state.pieces:
        healthy = each.runs and Piece(each.what, each.address, each.pid).healthy
        well = well and healthy
        print(f"{each.what:<22} {each.address:<22} {each.pid:>8}  {'yes' if healthy else 'NO'}")
    if state.ready:
        print(f'\ncurl -s {state.url}/v1/check -d \'{{"path":"/","ip":"203.0.113.7"}}\'')
        print(f"logs and policy: {state.directory}/instances")
    else:
        print("\nnot all has been started yet")
    return 0 if well and state.ready else 1


def down(path: Path) -> int:
    """End the stack.

    Args:
        path: of the state file.

    Returns:
        The exit code.
    """
    state = read_state(path)
    if state is None:
        print("no stack runs")
        return 0
    if state.keeper.runs:
        os.kill(state.keeper.pid, signal.SIGTERM)
        deadline = time.monotonic() + DOWN_WITHIN_S
        while state.keeper.runs and time.monotonic() < deadline:
            time.sleep(0.05)
        if state.keeper.runs:
            print(f"process {state.keeper.pid} did not end within {DOWN_WITHIN_S:g} s: killed", file=sys.stderr)
            os.kill(state.keeper.pid, signal.SIGKILL)
    ended = clean_up(path, state)
    print(f"ended{': left over were ' + ', '.join(ended) if ended else ''}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says.

    Args:
        arguments: of the command; those of the process where not given.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m drills.stack_command", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("up", "status", "down", "keep"), help="keep: for `up` itself")
    parser.add_argument("--state", type=Path, default=STATE, metavar="FILE", help=f"the state file (default: {STATE})")
    parser.add_argument("--redis", choices=TOPOLOGIES, default="cluster", help="its topology (default: cluster)")
    parser.add_argument("--instances", type=_number(1, 16), default=3, help="of Tidegate (default: 3)")
    parser.add_argument("--shards", type=_number(3, 16), default=3, help="of a cluster (default: 3)")
    parser.add_argument("--replicas", type=_number(1, 5), default=None, help="of each master (default: 1; of sentinels' 2)")
    parser.add_argument("--postgres-replicas", type=_number(0, 5), default=2, help="of PostgreSQL (default: 2)")
    asked = parser.parse_args(arguments)
    if asked.command in ("status", "down"):
        return {"status": status, "down": down}[asked.command](asked.state)
    replicas = asked.replicas or (2 if asked.redis == "sentinel" else 1)
    sizes = Sizes(asked.instances, asked.shards, replicas, asked.postgres_replicas)
    return {"up": up, "keep": keep}[asked.command](asked.state, asked.redis, sizes)


def _number(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            found = int(text)
        except ValueError:
            found = least - 1
        if not least <= found <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to {most}")
        return found

    return number


if __name__ == "__main__":
    sys.exit(main())
