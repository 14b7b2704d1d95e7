"""Processes of Tidegate that are forked from one that has its code loaded: see `fork_server`.

They behave as if `python -m tidegate` had been started: own process id, standard streams, directory and environment. Only their
parent is another one. Outside of tests, and where variables for the interpreter or the loader are given, a process is really
started.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_AT_THE_START = ("PYTHON", "LD_")
"""How variables begin that the interpreter or the loader reads when a process starts."""
REALLY_STARTED = {"PYTHONNODEBUGRANGES": "1"}
"""An environment that makes no difference except that the process, and what it starts, is not forked."""
_lock = threading.Lock()
_connections: dict[int, socket.socket] = {}
_ADDRESS = f"\0tidegate-fork-server-{os.environ.get('PYTEST_XDIST_TESTRUNUID') or os.getpid()}"
"""Of the server that all processes of a run share; it is in no directory, and free again when the server has ended."""
_PAUSE_S = 0.01


def _control() -> socket.socket:
    """The connection of this process to the fork server, which the first that needs it starts for all that run these tests."""
    found = _connections.get(os.getpid())
    while found is None:
        found = _connected(_ADDRESS)
        if found is None:
            _start_server(_ADDRESS)
    _connections[os.getpid()] = found
    return found


def _connected(address: str) -> socket.socket | None:
    """A connection that the server has accepted; None if there is no server, or it has just ended."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
        if connection.recv(1):
            atexit.register(_close, os.getpid(), connection)
            return connection
    except ConnectionError:
        pass
    connection.close()
    return None


def _start_server(address: str) -> None:
    """Start the server, unless another process has just done it."""
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            time.sleep(_PAUSE_S)  # it is about to listen
            return
        listener.listen()
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.servers.fork_server", str(listener.fileno())],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")},
            stdin=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
        )
    # Registered before the connection is made: it is called after that is closed.
    atexit.register(_wait, os.getpid(), process)


def _close(pid: int, connection: socket.socket) -> None:
    if os.getpid() == pid:
        connection.close()


def _wait(pid: int, process: subprocess.Popen[bytes]) -> None:
    if os.getpid() == pid:
        process.wait()


class ForkedProcess(subprocess.Popen[str]):
    """`python -m tidegate ARGUMENTS`, without loading its code."""

    def __init__(self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str], **pipes: Any) -> None:
        self._forked = {"arguments": list(arguments), "cwd": str(cwd), "environment": dict(env)}
        self._pipe = -1
        super().__init__(["tidegate", *arguments], text=True, encoding="utf-8", **pipes)

    def _execute_child(self, *arguments: Any) -> None:
        # The descriptors that Popen made, of the child and of this process; -1 where the child inherits one.
        (p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite) = arguments[10:16]
        self._pipe, other = os.pipe()
        files = [p2cread if p2cread >= 0 else 0, c2pwrite if c2pwrite >= 0 else 1, errwrite if errwrite >= 0 else 2, other]
        request = json.dumps(self._forked).encode()
        with _lock:
            control = _control()
            socket.send_fds(control, [struct.pack("!I", len(request))], files)
            control.sendall(request)
        os.close(other)
        for mine, others in ((p2cread, p2cwrite), (c2pwrite, c2pread), (errwrite, errread)):
            if mine >= 0 and others >= 0:
                os.close(mine)
        if (nothing := getattr(self, "_devnull", None)) is not None:
            os.close(nothing)
        self._closed_child_pipe_fds = True
        (pid,) = struct.unpack("!i", self._read())
        self.pid = pid
        self._child_created = True

    def _read(self) -> bytes:
        read = os.read(self._pipe, 4)
        if len(read) < 4:
            raise RuntimeError("the fork server ended: its output says why")
        return read

    def _collect(self, timeout: float | None) -> int | None:
        if self.returncode is None and self._pipe >= 0 and select.select([self._pipe], [], [], timeout)[0]:
            (self.returncode,) = struct.unpack("!i", self._read())
            os.close(self._pipe)
            self._pipe = -1
        return self.returncode

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        return self._collect(0)

    def _wait(self, timeout: float | None) -> int:
        returned = self._collect(timeout)
        if returned is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return returned


def start(arguments: Sequence[str], cwd: Path, env: Mapping[str, str], **pipes: Any) -> subprocess.Popen[str]:
    """`python -m tidegate ARGUMENTS`, forked if that makes no difference.

    Args:
        arguments: of the command.
        cwd: its directory.
        env: its environment.
        pipes: standard streams, as for `subprocess.Popen`.

    Returns:
        The process.
    """
    # Drills and benches measure processes as they are started.
    of_a_test = "PYTEST_CURRENT_TEST" in os.environ
    if not of_a_test or any(name.startswith(_AT_THE_START) and os.environ.get(name) != value for name, value in env.items()):
        return subprocess.Popen([sys.executable, "-m", "tidegate", *arguments], cwd=cwd, env=env, text=True, **pipes)
    return ForkedProcess(arguments, cwd, env, **pipes)


def run_for_bytes(
    arguments: Sequence[str], timeout: float, cwd: Path, env: Mapping[str, str]
) -> subprocess.CompletedProcess[bytes]:
    """As `run`, for what is printed as it is, with every byte."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with start(arguments, cwd, env, stdin=subprocess.DEVNULL, stdout=out, stderr=err) as process:
            try:
                process.wait(timeout)
            except BaseException:
                process.kill()
                raise
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(process.args, process.returncode, out.read(), err.read())


def run(
    arguments: Sequence[str], timeout: float, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with captured output, for `python -m tidegate ARGUMENTS`."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start(arguments, cwd or Path.cwd(), os.environ if env is None else env, **streams) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)
