"""Accepting connections with TLS: handshakes are bounded in number and time, and counted as connections.

A TLS server of asyncio reports a connection only after its handshake, so connections that never complete one could not be
counted. Here each connection is accepted first, and its handshake is a task.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Final

from tidegate.doors.accept_queue import accept_queued
from tidegate.doors.tls import ServerTls
from tidegate.telemetry.logs import UNAUTHENTICATED

logger = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_S: Final = 0.5
"""How long a connection that the server closes waits for the client to confirm that."""
_BATCH_SIZE: Final = 64
"""Connections accepted in one turn of the event loop."""
_PAUSE_S: Final = 0.5
_EXHAUSTED: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
_GONE: Final = frozenset((errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.EINTR))
"""Of `accept`: the connection ended before it was accepted, or a firewall forbids it."""


class TlsAcceptor:
    """Accepts connections on a socket and does their TLS handshakes.

    Args:
        listening: bound; closed by `close`.
        tls: the context of new handshakes.
        new_protocol: makes the protocol of a connection, which calls `completed` when it is made, after the handshake.
        timeout_s: how long a handshake may take, s.
        is_full: whether handshakes take places that others need; called after each connection.

    Attributes:
        failures: handshakes without a connection, by reason: `failed`, or `dropped` to make room for later ones.
    """

    def __init__(
        self,
        listening: socket.socket,
        tls: ServerTls,
        new_protocol: Callable[[], asyncio.Protocol],
        timeout_s: float,
        is_full: Callable[[], bool],
    ) -> None:
        self.failures: Counter[str] = Counter()
        self._listening = listening
        self._tls = tls
        self._new_protocol = new_protocol
        self._timeout_s = timeout_s
        self._is_full = is_full
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[asyncio.Protocol, asyncio.Task[None]] = {}  # the oldest first
        self._pausing: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """How many handshakes are in progress."""
        return len(self._tasks)

    def start(self, backlog: int) -> None:
        """Accept connections.

        Args:
            backlog: how many may wait in the kernel.
        """
        self._listening.listen(backlog)
        self._loop.add_reader(self._listening, self._accept)

    def completed(self, protocol: asyncio.Protocol) -> None:
        """The handshake of a connection succeeded: it does not count as one any more."""
        self._tasks.pop(protocol, None)

    def stop_accepting(self) -> None:
        """Close the listening socket, after accepting what is queued; handshakes continue."""
        if self._pausing is not None:
            self._pausing.cancel()
        if self._listening.fileno() >= 0:
            self._loop.remove_reader(self._listening)
            for accepted in accept_queued(self._listening):
                self._begin(accepted)
            self._listening.close()

    async def close(self, timeout_s: float) -> None:
        """Accept no more, and wait for the handshakes in progress.

        Args:
            timeout_s: how long to wait before they are ended.
        """
        self.stop_accepting()
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=timeout_s)
        for task in list(self._tasks.values()):
            task.cancel()

    def _accept(self) -> None:
        for _ in range(_BATCH_SIZE):
            try:
                accepted, _ = self._listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _GONE:
                    continue
                self._pause(error)
                return
            accepted.setblocking(False)
            self._begin(accepted)

    def _begin(self, accepted: socket.socket) -> None:
        protocol = self._new_protocol()
        task = self._loop.create_task(self._handshake(accepted, protocol))
        self._tasks[protocol] = task
        task.add_done_callback(partial(self._ended, accepted, protocol))
        if self._is_full():
            self.failures["dropped"] += 1
            self._tasks.pop(next(iter(self._tasks))).cancel()

    def _pause(self, error: OSError) -> None:
        """Accept nothing for a moment: the socket stays readable, and accepting would fail again and again."""
        if error.errno not in _EXHAUSTED:
            logger.error("cannot accept connections: %s", error.strerror or error)
        else:
            logger.error("cannot accept connections: %s; raise the limit of open files (ulimit -n, LimitNOFILE=)", error.strerror)
        self._loop.remove_reader(self._listening)
        self._pausing = self._loop.call_later(_PAUSE_S, self._loop.add_reader, self._listening, self._accept)

    async def _handshake(self, accepted: socket.socket, protocol: asyncio.Protocol) -> None:
        await self._loop.connect_accepted_socket(
            lambda: protocol,
            accepted,
            ssl=self._tls.context(),
            ssl_handshake_timeout=self._timeout_s,
            ssl_shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        )

    def _ended(self, accepted: socket.socket, protocol: asyncio.Protocol, task: asyncio.Task[None]) -> None:
        self._tasks.pop(protocol, None)
        if not task.cancelled() and (error := task.exception()) is None:
            return
        # Also where the handshake had not begun, or goes on without the task.
        with contextlib.suppress(OSError):
            accepted.shutdown(socket.SHUT_RDWR)
        accepted.close()
        if task.cancelled():
            return
        self.failures["failed"] += 1
        if isinstance(error, ssl.SSLError):
            logger.info("TLS handshake failed: %s", _reason_of(error), extra={UNAUTHENTICATED: True})
        elif not isinstance(error, OSError):
            logger.error("TLS handshake failed", exc_info=error)


def _reason_of(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the client's certificate is not accepted, {error.verify_message}"
    return (error.reason or str(error) or type(error).__name__).lower().replace("_", " ")
