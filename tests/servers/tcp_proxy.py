"""A proxy on loopback that delays, splits, cuts, stalls or spoils what a server answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Self

HOST = "127.0.0.1"
_CHUNK = 65_536


class _Link:
    """One client's connection and the one made for it to the server."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter | None = None) -> None:
        self.client = client
        self.server = server

    def close(self) -> None:
        """Send what was written, then close both sides."""
        for side in (self.client, self.server):
            if side is not None:
                side.close()

    def abort(self) -> None:
        """Close both sides at once."""
        for side in (self.client, self.server):
            if side is not None:
                side.transport.abort()


class TcpProxy:
    """Listens on a free port and forwards to a server, inside the loop it is entered in: `async with TcpProxy(port) as proxy`.

    The attributes can be set at any time; they hold for what arrives from then on, on all connections.

    Args:
        target_port: of the server on loopback.

    Attributes:
        target_port: where connections made from now on go.
        delay_s: how much later each chunk of a reply reaches the client, the order kept; 0 for at once.
        vary_delay: gives the same for each chunk anew, in place of `delay_s`; None for that.
        split: whether replies are written one byte at a time.
        cut_after: after how many more bytes of replies, of all connections together, the connection they came on is closed on
            both sides; then it is None again, which is for never.
        refuse: whether new connections are closed at once.
        rewrite: what makes other bytes of each chunk of a reply; None for none.
        connections: how many were accepted so far, refused ones included.
        bytes_to_server: forwarded so far.
        bytes_to_client: forwarded so far.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self.delay_s = 0.0
        self.vary_delay: Callable[[], float] | None = None
        self.split = False
        self.cut_after: int | None = None
        self.refuse = False
        self.rewrite: Callable[[bytes], bytes] | None = None
        self.connections = 0
        self.bytes_to_server = 0
        self.bytes_to_client = 0
        self._flows = asyncio.Event()
        self._flows.set()
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._accept, HOST, 0)
        self.port = int(self._listener.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._listener is not None:
            self._listener.close()
        self.drop_all()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            await self._listener.wait_closed()

    @property
    def url(self) -> str:
        """`redis://127.0.0.1:PORT`."""
        return f"redis://{HOST}:{self.port}"

    @property
    def bytes_forwarded(self) -> int:
        """Forwarded so far, both ways."""
        return self.bytes_to_server + self.bytes_to_client

    @property
    def open_connections(self) -> int:
        """How many are open now."""
        return len(self._links)

    @property
    def stall(self) -> bool:
        """Whether nothing is forwarded, either way; what arrives meanwhile is kept and goes on when this is False again."""
        return not self._flows.is_set()

    @stall.setter
    def stall(self, value: bool) -> None:
        if value:
            self._flows.clear()
        else:
            self._flows.set()

    def drop_all(self) -> None:
        """Close all connections at once, both sides; new ones are taken."""
        for link in list(self._links):
            link.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.refuse:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        link = _Link(writer)
        self._links.add(link)
        try:
            await self._serve(link, reader)
        except asyncio.CancelledError:
            # The proxy ends and waits for this task; asyncio's streams would report the cancellation as an error.
            link.abort()
        finally:
            link.close()
            self._links.discard(link)
            self._tasks.discard(task)

    async def _serve(self, link: _Link, from_client: asyncio.StreamReader) -> None:
        try:
            from_server, link.server = await asyncio.open_connection(HOST, self.target_port)
        except OSError:
            return  # the client sees its connection closed, as with a server that is gone
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=1024)
        flows = [
            asyncio.create_task(work)
            for work in (self._requests(link, from_client), self._take_replies(from_server, queue), self._replies(link, queue))
        ]
        try:
            # The end of one side ends the other; replies that were taken before the server closed still go out.
            await asyncio.wait((flows[0], flows[2]), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for flow in flows:
                flow.cancel()
            await asyncio.gather(*flows, return_exceptions=True)

    async def _requests(self, link: _Link, source: asyncio.StreamReader) -> None:
        assert link.server is not None
        with contextlib.suppress(OSError):  # either side closed: the link ends
            while chunk := await source.read(_CHUNK):
                await self._flows.wait()
                self.bytes_to_server += len(chunk)
                link.server.write(chunk)
                await link.server.drain()

    async def _take_replies(self, source: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]]) -> None:
        """Notes when each chunk is due, apart from the sending: a delay must not become a throughput."""
        now = asyncio.get_running_loop().time
        chunk = b"-"
        while chunk:
            try:
                chunk = await source.read(_CHUNK)
            except OSError:
                chunk = b""
            await queue.put((now() + (self.delay_s if self.vary_delay is None else self.vary_delay()), chunk))

    async def _replies(self, link: _Link, queue: asyncio.Queue[tuple[float, bytes]]) -> None:
        now = asyncio.get_running_loop().time
        with contextlib.suppress(OSError):  # the client is gone: the link ends
            while True:
                due, chunk = await queue.get()
                if due > now():
                    await asyncio.sleep(due - now())
                await self._flows.wait()
                if not chunk:
                    return
                if self.rewrite is not None:
                    chunk = self.rewrite(chunk)
                cut = self.cut_after is not None and self.cut_after <= len(chunk)
                if self.cut_after is not None:
                    left, self.cut_after = self.cut_after, None if cut else self.cut_after - len(chunk)
                    chunk = chunk[:left]
                await self._send(link.client, chunk)
                if cut:
                    return

    async def _send(self, client: asyncio.StreamWriter, chunk: bytes) -> None:
        pieces = [chunk[place : place + 1] for place in range(len(chunk))] if self.split else [chunk]
        for piece in pieces:
            client.write(piece)
            self.bytes_to_client += len(piece)
            await client.drain()
            if self.split:
                await asyncio.sleep(0)  # a reader in the same loop sees every byte by itself
