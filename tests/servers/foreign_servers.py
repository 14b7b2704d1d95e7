"""Listeners on loopback in place of a Tidegate server: a server with fixed responses, and a TLS proxy."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import threading

from tests.servers.certificates import Authority


class ForeignServer:
    """Answers every request with the same bytes; with None not at all."""

    def __init__(self, reply: bytes | None) -> None:
        self.requests: list[bytes] = []
        self._reply = reply
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._accepted: list[socket.socket] = []
        self.port = int(self._socket.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            accepted, _ = self._socket.accept()
            self._accepted.append(accepted)
            request = accepted.recv(65_536)
            if not request:  # `close` knocks
                return
            while not _is_whole(request) and (more := accepted.recv(65_536)):
                request += more
            self.requests.append(request)
            if self._reply is not None:
                accepted.sendall(self._reply)
                accepted.close()

    def close(self) -> None:
        socket.create_connection(("127.0.0.1", self.port)).close()
        self._thread.join(10)
        for each in (self._socket, *self._accepted):
            each.close()


def _is_whole(request: bytes) -> bool:
    head, end, body = request.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    return bool(end) and len(body) >= (int(length[1]) if length else 0)


class TlsProxy:
    """TLS before a listener on loopback, as a proxy of the operator's would put it there; keeps what was said in the clear.

    Args:
        authority: whose certificate for 127.0.0.1 and localhost it shows.
        target_port: of the listener.
    """

    def __init__(self, authority: Authority, target_port: int) -> None:
        self.heard = b""
        self._target_port = target_port
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(authority.server_cert, authority.server_key)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(10)

    def _run(self) -> None:
        async def serve() -> None:
            self._stop = asyncio.Event()
            listener = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._context)
            self.port = int(listener.sockets[0].getsockname()[1])
            self._ready.set()
            async with listener:
                await self._stop.wait()

        self._loop.run_until_complete(serve())
        self._loop.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_target, to_target = await asyncio.open_connection("127.0.0.1", self._target_port)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, heard: bool) -> None:
            with contextlib.suppress(OSError):
                while chunk := await source.read(65_536):
                    self.heard += chunk if heard else b""
                    sink.write(chunk)
                    await sink.drain()
            sink.close()

        await asyncio.gather(pump(reader, to_target, True), pump(from_target, writer, False))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
