"""The connections that wait in the queue of a listening socket."""

from __future__ import annotations

import socket
from typing import Final

MAX_ACCEPTED: Final = 65_536
"""Far more than a queue has: the bound of the work where connections arrive as fast as they are accepted."""


def accept_queued(listening: socket.socket) -> list[socket.socket]:
    """Accept what is queued: the kernel resets these connections when the socket closes, with the requests that they carry.

    Args:
        listening: a non-blocking listening socket.

    Returns:
        The connections; fewer than there were if the process may not open so many files.
    """
    accepted: list[socket.socket] = []
    while len(accepted) < MAX_ACCEPTED:
        try:
            connection, _ = listening.accept()
        except ConnectionAbortedError:
            continue  # its client has left
        except OSError:  # none is left, or the process has too many files open
            break
        connection.setblocking(False)
        accepted.append(connection)
    return accepted
