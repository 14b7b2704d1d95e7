"""Network backends of httpcore's pools: the `timeout` that httpcore passes is a deadline on the monotonic clock.

A host that begins with `/`, which no name or address does, is the path of a unix socket.
"""

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


def _reason_of(error: OSError | UnicodeError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted, {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS handshake failed, {error.reason or 'the connection was closed'}"
    if isinstance(error, socket.gaierror | UnicodeError):
        return "its name cannot be resolved"
    return (error.strerror or str(error) or type(error).__name__).lower()


def _remaining_s(deadline: float | None) -> float:
    """Seconds until a deadline, which httpcore passed as a timeout."""
    remaining_s = 0.0 if deadline is None else deadline - monotonic()
    if remaining_s <= 0:
        raise TimeoutError
    return remaining_s


def _readable(sock: Any) -> bool:
    """Whether an idle socket is readable: usually because the server closed the connection."""
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
        """Try the addresses of a name in turn, each for its share of the time. The operating system limits DNS resolution."""
        if host.startswith("/"):
            return _unix_stream(host, timeout)
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(_reason_of(error)) from None
        failed: OSError = OSError(errno.EADDRNOTAVAIL, "no address was found")
        for index, (family, kind, protocol, _, address) in enumerate(addresses):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(_remaining_s(timeout) / (len(addresses) - index))
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                sock.close()
                failed = error
            else:
                return _Stream(sock)
        if isinstance(failed, TimeoutError):
            raise httpcore.ConnectTimeout
        raise httpcore.ConnectError(_reason_of(failed))


def _unix_stream(path: str, timeout: float | None) -> httpcore.NetworkStream:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(_remaining_s(timeout))
        sock.connect(path)
    except OSError as error:
        sock.close()
        if isinstance(error, TimeoutError):
            raise httpcore.ConnectTimeout from None
        raise httpcore.ConnectError(_reason_of(error)) from None
    return _Stream(sock)


class _Stream(httpcore.NetworkStream):
    """Buffers writes until the first read, so that head and body of a request are sent together."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._unsent = b""
        self._awaits_response = False

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._unsent:
            self._send(timeout)
        try:
            self._socket.settimeout(_remaining_s(timeout))
            received = self._socket.recv(max_bytes)
        except TimeoutError:
            raise httpcore.ReadTimeout from None
        except OSError as error:
            raise httpcore.ReadError(_reason_of(error)) from None
        self._awaits_response = False
        return received

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        # First: from here on another thread must not take a response for the end of an idle connection.
        self._awaits_response = True
        self._unsent += buffer

    def _send(self, timeout: float | None) -> None:
        rest, self._unsent = memoryview(self._unsent), b""
        try:
            while rest:
                self._socket.settimeout(_remaining_s(timeout))
                rest = rest[self._socket.send(rest) :]
        except TimeoutError:
            raise httpcore.WriteTimeout from None
        except OSError as error:
            raise httpcore.WriteError(_reason_of(error)) from None

    def close(self) -> None:
        self._socket.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        try:
            self._socket.settimeout(_remaining_s(timeout))
            return _Stream(ssl_context.wrap_socket(self._socket, server_hostname=server_hostname))
        except OSError as error:
            self.close()
            _raise_tls_error(error)

    def get_extra_info(self, info: str) -> Any:
        """For `is_readable`, whether the connection is to be dropped: something arrived that is not a response.

        httpcore's pool asks in any thread: it reads that a connection is idle, then asks this. In between another thread may
        have sent a request and got its response, and the pool would close the connection before that thread reads it.
        """
        if info != "is_readable":
            return None
        return _readable(self._socket) and not self._awaits_response


def _raise_tls_error(error: OSError) -> NoReturn:
    if isinstance(error, TimeoutError):
        raise httpcore.ConnectTimeout from None
    raise httpcore.ConnectError(_reason_of(error)) from None


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
        """Connect before the deadline `timeout`."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_remaining_s(timeout)):
                if host.startswith("/"):
                    _, protocol = await loop.create_unix_connection(_Protocol, host)
                else:
                    _, protocol = await loop.create_connection(_Protocol, host, port)
        except TimeoutError:
            raise httpcore.ConnectTimeout from None
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(_reason_of(error)) from None
        return _AsyncStream(protocol)


class _Protocol(asyncio.Protocol):
    """Buffer of one connection. Requests are small and wait for their response, so no flow control is needed."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.received = bytearray()
        self.ended = False
        self.error: OSError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's class is not a subclass

    def data_received(self, data: bytes) -> None:
        self.received += data
        self._wake_reader()

    def eof_received(self) -> bool:
        self.ended = True
        self._wake_reader()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        self.error = exc if isinstance(exc, OSError) else None
        self._wake_reader()

    async def read(self, max_bytes: int) -> bytes:
        while not self.received and not self.ended:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self.error is not None and not self.received:
            raise self.error
        chunk = bytes(self.received[:max_bytes])
        del self.received[:max_bytes]
        return chunk

    def _wake_reader(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _AsyncStream(httpcore.AsyncNetworkStream):
    """As `_Stream`; everything but connecting is limited by the caller's timer."""

    def __init__(self, protocol: _Protocol) -> None:
        self._protocol = protocol
        self._unsent = b""

    @property
    def _transport(self) -> asyncio.Transport:
        assert self._protocol.transport is not None
        return self._protocol.transport

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._unsent:
            unsent, self._unsent = self._unsent, b""
            if self._transport.is_closing():
                raise httpcore.WriteError("the connection was closed")
            self._transport.write(unsent)
        try:
            return await self._protocol.read(max_bytes)
        except OSError as error:
            raise httpcore.ReadError(_reason_of(error)) from None

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._unsent += buffer

    async def aclose(self) -> None:
        # Not close(): it waits until all bytes are sent, which a hung server never accepts.
        self._transport.abort()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_remaining_s(timeout)):
                transport = await loop.start_tls(self._transport, self._protocol, ssl_context, server_hostname=server_hostname)
        except OSError as error:
            await self.aclose()
            _raise_tls_error(error)
        if transport is None:
            raise httpcore.ConnectError("the connection was closed during the TLS handshake")
        self._protocol.transport = transport
        return self

    def get_extra_info(self, info: str) -> Any:
        if info != "is_readable":
            return None
        # The socket too: the server may have closed it without the event loop having read that yet.
        protocol = self._protocol
        return (
            bool(protocol.received)
            or protocol.ended
            or self._transport.is_closing()
            or _readable(self._transport.get_extra_info("socket"))
        )
