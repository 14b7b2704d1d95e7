"""The client's own network backend: when its pool may drop a connection."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from time import monotonic

import pytest

from tests.moments import PATIENCE_S, wait_until
from tidegate.client import network


@pytest.fixture
def pair() -> Iterator[tuple[network._Stream, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield network._Stream(ours), theirs


def test_a_response_that_waits_to_be_read_is_not_the_end_of_an_idle_connection(
    pair: tuple[network._Stream, socket.socket],
) -> None:
    """Another thread asks between the request and its response: the pool would close the connection under the reader."""
    stream, server = pair
    deadline = monotonic() + PATIENCE_S
    assert not stream.get_extra_info("is_readable")
    stream.write(b"request", deadline)
    server.sendall(b"response")
    wait_until(lambda: network._readable(stream._socket), what="the response arrives")
    assert not stream.get_extra_info("is_readable")
    assert stream.read(100, deadline) == b"response"
    assert server.recv(100) == b"request"
    assert not stream.get_extra_info("is_readable")


@pytest.mark.parametrize("unexpected", [b"", b"HTTP/1.1 408 Request Timeout\r\n\r\n"])
def test_an_idle_connection_that_the_server_ends_is_dropped(
    unexpected: bytes, pair: tuple[network._Stream, socket.socket]
) -> None:
    stream, server = pair
    deadline = monotonic() + PATIENCE_S
    stream.write(b"request", deadline)
    server.sendall(b"response")
    assert stream.read(100, deadline) == b"response"
    server.sendall(unexpected)
    server.close()
    wait_until(lambda: stream.get_extra_info("is_readable"), what="the end is seen")
