"""`python -m tests.servers.fork_server FD`: a process that has Tidegate's code loaded and forks a copy for each command.

Loading the code takes most of the CPU time of a short command, and the tests run hundreds. FD is a socket that listens: all
processes that run tests share one server, which ends when the last of them has closed its connection. A connection gets one byte
when it is accepted. Then `tests.servers.forked` sends requests over it: JSON with its length before it, and file descriptors for
standard input, output and error and for a pipe that gets the process id at once and the exit status at the end, 4 bytes each.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

FILES = 4
_MAX_FD = 1024


def _load() -> list[str]:
    """Import what commands need, so that copies share it.

    Returns:
        The statements that make a new SQLite database.
    """
    import aiosqlite  # noqa: F401
    import pygrpc_native  # noqa: F401

    import tidegate.catalog.sql.postgres_channel
    import tidegate.catalog.sql.postgres_connection
    import tidegate.cli
    import tidegate.doors.grpc.listener
    import tidegate.doors.grpc.service
    import tidegate.server.control_plane
    import tidegate.server.grpc_door
    import tidegate.server.run
    import tidegate.server.supervisor
    import tidegate.server.worker
    from tests.servers.forked_schema import record_schema
    from tidegate.catalog.sql.schema import head_revision
    from tidegate.doors.admin.app import AdminDeps, admin_app

    for command in tidegate.cli.COMMANDS.values():
        importlib.import_module(command.partition(":")[0])
    # Some modules are loaded by the first call: the migrations, and parts of FastAPI.
    head_revision()
    nothing = Mock()
    admin_app(AdminDeps(nothing, nothing))
    schema = record_schema()
    if len([*Path("/proc/self/task").iterdir()]) > 1:
        raise RuntimeError("loading started threads, which a fork would lose")
    gc.collect()
    gc.freeze()
    return schema


def serve(listener: socket.socket, kill_with_connection: bool = False) -> list[str] | None:
    """Fork a process for each request until all connections are closed.

    Args:
        listener: accepts the connections.
        kill_with_connection: kills the processes of a connection that is closed.

    Returns:
        In the copy, the arguments of its command; None in the server itself at the end.
    """
    pipes: dict[int, tuple[int, int]] = {}  # pidfd → process id, pipe
    connections: dict[int, socket.socket] = {}
    requested: dict[int, int] = {}  # pidfd → its connection
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready == listener.fileno():
                connection, _ = listener.accept()
                connection.sendall(b"+")
                connections[connection.fileno()] = connection
                poll.register(connection, select.POLLIN)
            elif ready in pipes:
                pid, pipe = pipes.pop(ready)
                requested.pop(ready)
                poll.unregister(ready)
                os.close(ready)
                _, status = os.waitpid(pid, 0)
                _say(pipe, os.waitstatus_to_exitcode(status))
                os.close(pipe)
            else:
                head, files = _next(connections[ready])
                if not head:
                    poll.unregister(ready)
                    connections.pop(ready).close()
                    for running in [running for running, by in requested.items() if kill_with_connection and by == ready]:
                        signal.pidfd_send_signal(running, signal.SIGKILL)
                    if not connections:
                        return None
                    continue
                request = json.loads(_exactly(connections[ready], struct.unpack("!I", head)[0]))
                pid = os.fork()
                if not pid:
                    for each in (listener, *connections.values()):
                        each.detach()
                    return _become(request, files)
                for file in files[:3]:
                    os.close(file)
                _say(files[3], pid)
                waiting = os.pidfd_open(pid)
                pipes[waiting] = pid, files[3]
                requested[waiting] = ready
                poll.register(waiting, select.POLLIN)


def _next(connection: socket.socket) -> tuple[bytes, list[int]]:
    """The beginning of a request, with its files; nothing where the other side has ended."""
    try:
        head, files, _, _ = socket.recv_fds(connection, 4, FILES)
    except ConnectionError:  # it was killed
        return b"", []
    return head, files


def _become(request: dict[str, Any], files: list[int]) -> list[str]:
    """Make this copy look like a process that was just started."""
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    os.closerange(3, _MAX_FD)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8")  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8")  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace")  # type: ignore[misc]
    return list(request["arguments"])


def _say(pipe: int, number: int) -> None:
    try:
        os.write(pipe, struct.pack("!i", number))
    except BrokenPipeError:
        print(f"nobody waits for the process any more: {number}", file=sys.stderr)


def _exactly(control: socket.socket, size: int) -> bytes:
    read = b""
    while len(read) < size:
        more = control.recv(size - len(read))
        if not more:
            raise EOFError("the request ended early")
        read += more
    return read


def main() -> None:
    # Ctrl-C is for the tests, which end their servers themselves.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    schema = _load()
    arguments = serve(socket.socket(fileno=int(sys.argv[1])))
    if arguments is None:
        return
    sys.argv[:] = ["tidegate", *arguments]
    sys.orig_argv[:] = [sys.executable, "-m", "tidegate", *arguments]
    from tests.servers.forked_schema import copy_schema
    from tests.servers.forked_workers import fork_workers, run_and_end
    from tidegate.__main__ import main as tidegate

    fork_workers(tidegate)
    if arguments[:1] != ["db"]:
        copy_schema(schema)
    run_and_end(tidegate)


if __name__ == "__main__":
    main()
