"""The network beneath httpcore's pools: what they take for a timeout is here the moment at which the time is over."""

# ruff: noqa: ARG002, ASYNC109 - the signatures are httpcore's

from __future__ import annotations

import asyncio
import errno
import select
import socket
import ssl
import sys
from collections.abc import Iterable
from time import monotonic
from typing import Any, NoReturn, cast

import httpcore


def _why(error: OSError | UnicodeError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted, {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"it does not speak TLS as it should, {error.reason or 'it ended'}"
    if isinstance(error, socket.gaierror | UnicodeError):
        return "its name is not found"
    return (error.strerror or str(error) or type(error).__name__).lower()


def _left(by: float | None) -> float:
    """Seconds until a moment, which was handed through as a timeout."""
    left = 0.0 if by is None else by - monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _readable(sock: Any) -> bool:
    """Whether something came that nobody asked for: mostly the server's end of the connection."""
    if sock is None or sock.fileno() < 0:
        return True
    if sys.platform == "win32":
        return bool(select.select([sock], [], [], 0)[0])
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    return bool(poll.poll(0))


class DeadlineBackend(httpcore.NetworkBackend):
    """Blocking sockets."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Try the addresses of a name in turn, each for its share of the time. The look-up itself is the system's to bound."""
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(_why(error)) from None
        failed: OSError = OSError(errno.EADDRNOTAVAIL, "it has no address")
        for place, (family, kind, protocol, _, address) in enumerate(addresses):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(_left(timeout) / (len(addresses) - place))
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                sock.close()
                failed = error
            else:
                return _Stream(sock)
        if isinstance(failed, TimeoutError):
            raise httpcore.ConnectTimeout
        raise httpcore.ConnectError(_why(failed))


class _Stream(httpcore.NetworkStream):
    """Keeps what is written until something is read, so that head and body of a question go out at once."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._unsent = b""

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._unsent:
            self._send(timeout)
        try:
            self._socket.settimeout(_left(timeout))
            return self._socket.recv(max_bytes)
        except TimeoutError:
            raise httpcore.ReadTimeout from None
        except OSError as error:
            raise httpcore.ReadError(_why(error)) from None

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._unsent += buffer

    def _send(self, timeout: float | None) -> None:
        rest, self._unsent = memoryview(self._unsent), b""
        try:
            while rest:
                self._socket.settimeout(_left(timeout))
                rest = rest[self._socket.send(rest) :]
        except TimeoutError:
            raise httpcore.WriteTimeout from None
        except OSError as error:
            raise httpcore.WriteError(_why(error)) from None

    def close(self) -> None:
        self._socket.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        try:
            self._socket.settimeout(_left(timeout))
            return _Stream(ssl_context.wrap_socket(self._socket, server_hostname=server_hostname))
        except OSError as error:
            self.close()
            _no_tls(error)

    def get_extra_info(self, info: str) -> Any:
        return _readable(self._socket) if info == "is_readable" else None


def _no_tls(error: OSError) -> NoReturn:
    if isinstance(error, TimeoutError):
        raise httpcore.ConnectTimeout from None
    raise httpcore.ConnectError(_why(error)) from None


class AsyncDeadlineBackend(httpcore.AsyncNetworkBackend):
    """Transports of the running event loop."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect, by the moment that `timeout` is."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_left(timeout)):
                _, wire = await loop.create_connection(_Wire, host, port)
        except TimeoutError:
            raise httpcore.ConnectTimeout from None
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(_why(error)) from None
        return _AsyncStream(wire)


class _Wire(asyncio.Protocol):
    """The bytes of one connection. What is asked is small and waits for its answer, so nothing here needs to be slowed down."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.came = bytearray()
        self.ended = False
        self.broken: OSError | None = None
        self._reader: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self.came += data
        self._wake()

    def eof_received(self) -> bool:
        self.ended = True
        self._wake()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        self.broken = exc if isinstance(exc, OSError) else None
        self._wake()

    async def read(self, most: int) -> bytes:
        while not self.came and not self.ended:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if self.broken is not None and not self.came:
            raise self.broken
        chunk = bytes(self.came[:most])
        del self.came[:most]
        return chunk

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class _AsyncStream(httpcore.AsyncNetworkStream):
    """As `_Stream`; the caller's one timer bounds everything but connecting."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire
        self._unsent = b""

    @property
    def _transport(self) -> asyncio.Transport:
        assert self._wire.transport is not None
        return self._wire.transport

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._unsent:
            unsent, self._unsent = self._unsent, b""
            if self._transport.is_closing():
                raise httpcore.WriteError("it ended")
            self._transport.write(unsent)
        try:
            return await self._wire.read(max_bytes)
        except OSError as error:
            raise httpcore.ReadError(_why(error)) from None

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._unsent += buffer

    async def aclose(self) -> None:
        # Not close(): that waits for bytes a hung server never takes.
        self._transport.abort()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_left(timeout)):
                transport = await loop.start_tls(self._transport, self._wire, ssl_context, server_hostname=server_hostname)
        except OSError as error:
            await self.aclose()
            _no_tls(error)
        if transport is None:
            raise httpcore.ConnectError("it ended while TLS began")
        self._wire.transport = transport
        return self

    def get_extra_info(self, info: str) -> Any:
        if info != "is_readable":
            return None
        # What the loop has not read yet counts too: the server's end may have come within this turn.
        wire = self._wire
        return (
            bool(wire.came) or wire.ended or self._transport.is_closing() or _readable(self._transport.get_extra_info("socket"))
        )
