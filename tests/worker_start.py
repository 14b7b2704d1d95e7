"""`python worker_start.py NAME`: what pytest-xdist starts as a worker; NAME is the address of `tests.worker_server`.

It imports little, so that it starts at once, and gives its standard streams to a fork of the server. It ends as the fork does;
where it is killed, the server kills the fork.
"""

import json
import os
import socket
import struct
import sys
from pathlib import Path


def main() -> int:
    server = socket.socket(socket.AF_UNIX)
    server.connect(f"\0{sys.argv[1]}")
    server.recv(1)  # once it has loaded the tests
    pipe, other = os.pipe()
    request = json.dumps({"arguments": [], "cwd": str(Path.cwd()), "environment": dict(os.environ)}).encode()
    socket.send_fds(server, [struct.pack("!I", len(request))], [0, 1, 2, other])
    server.sendall(request)
    # The other end sees that the worker has closed its streams only if nobody else has them.
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nothing, stream)
    os.close(other)
    said = b""
    while len(said) < 8:  # process id, exit status
        more = os.read(pipe, 8 - len(said))
        if not more:
            return 1
        said += more
    status: int = struct.unpack("!ii", said)[1]
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    os._exit(main())
