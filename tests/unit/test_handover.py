"""Sockets that share an address, as the system reports them."""

from __future__ import annotations

import contextlib
import socket
import sys

import pytest

from tidegate.errors import SettingsError
from tidegate.server.handover import listening_sockets, shared_address

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_all_sockets_that_listen_on_an_address_are_counted(host: str) -> None:
    with contextlib.ExitStack() as stack:
        port = 0
        for number in range(1, 4):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listening = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            try:
                listening.bind((host, port))
            except OSError:
                pytest.skip(f"no {host} here")
            listening.listen()
            port = listening.getsockname()[1]
            assert listening_sockets(host, port) == number
        # A connection is not a listening socket, and another address not this one.
        stack.enter_context(socket.create_connection((host, port)))
        assert listening_sockets(host, port) == 3
        assert listening_sockets("127.0.0.2", port) == 0
    assert listening_sockets(host, port) == 0


def test_an_address_that_is_in_use_can_be_shared() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert shared_address(f"127.0.0.1:{port}", "server.http") == ("127.0.0.1", port)
    assert shared_address("127.0.0.1:0", "server.http")[1] > 0
    with pytest.raises(SettingsError, match=r"server\.http"):
        shared_address("127.0.0.1", "server.http")
