"""The gRPC door against clients that mean ill: bytes on the wire that no gRPC library would send, each flood bounded.

After each, the server must answer others as before, must not have grown, and must not have said a word of a fault.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import hpack
import pytest

from tests.conftest import Serve
from tests.integration.ratelimit_client import SHOULD_RATE_LIMIT, ask, request
from tidegate.doors.grpc.messages import OK

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RESET, SETTINGS, PING, GOAWAY, WINDOW, CONTINUATION = 0, 1, 2, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS = 1, 4
MOST_GROWTH_MB = 40
CALL = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", SHOULD_RATE_LIMIT),
    (":authority", "x"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]
POLICY = """
[[tiers]]
name = "open"
limits = ["1000000/day"]
[anonymous]
tier = "open"
"""
ASKED = request([("path", "/a"), ("remote_address", "203.0.113.7")])


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def message(payload: bytes | None = None) -> bytes:
    payload = ASKED.SerializeToString() if payload is None else payload
    return b"\0" + len(payload).to_bytes(4, "big") + payload


class Wire:
    """A connection on which a test says what it likes."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 10)
        self.encoder = hpack.Encoder()
        self.send(PREFACE + frame(SETTINGS, 0, 0))

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def call(self, stream: int, flags: int = END_HEADERS, headers: list[tuple[str, str]] = CALL) -> bytes:
        return frame(HEADERS, flags, stream, self.encoder.encode(headers))

    def rest(self, timeout_s: float = 1.0) -> list[tuple[int, int, bytes]]:
        """All frames that come until the server closes or is silent: kind, stream, payload."""
        self.socket.settimeout(timeout_s)
        data = b""
        with contextlib.suppress(OSError):
            while chunk := self.socket.recv(1 << 16):
                data += chunk
        frames, at = [], 0
        while at + 9 <= len(data):
            length = int.from_bytes(data[at : at + 3], "big")
            frames.append((data[at + 3], int.from_bytes(data[at + 5 : at + 9], "big"), data[at + 9 : at + 9 + length]))
            at += 9 + length
        return frames

    def close(self) -> None:
        self.socket.close()


def rapid_resets(wire: Wire) -> None:
    for number in range(20_000):
        stream = 2 * number + 1
        wire.send(wire.call(stream) + frame(DATA, END_STREAM, stream, message()) + frame(RESET, 0, stream, struct.pack(">I", 8)))


def ten_thousand_streams(wire: Wire) -> None:
    for number in range(10_000):
        wire.send(wire.call(2 * number + 1))


def ten_thousand_answers_unread(wire: Wire) -> None:
    wire.send(frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0)))
    for number in range(10_000):
        wire.send(wire.call(2 * number + 1) + frame(DATA, END_STREAM, 2 * number + 1, message()))


def pings(wire: Wire) -> None:
    for _ in range(1000):
        wire.send(frame(PING, 0, 0, b"12345678") * 100)


def settings(wire: Wire) -> None:
    for _ in range(1000):
        wire.send(frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65535)) * 100)


def continuations(wire: Wire) -> None:
    wire.send(wire.call(1, 0))
    for _ in range(20_000):
        wire.send(frame(CONTINUATION, 0, 1, b"\x10\x04abcd\x04efgh" * 60))


def empty_continuations(wire: Wire) -> None:
    wire.send(wire.call(1, 0))
    for _ in range(2000):
        wire.send(frame(CONTINUATION, 0, 1) * 100)


def empty_data(wire: Wire) -> None:
    wire.send(wire.call(1))
    for _ in range(2000):
        wire.send(frame(DATA, 0, 1) * 100)


def header_bomb(wire: Wire) -> None:
    wire.send(wire.call(1, headers=[*CALL, ("x-a", "b" * 3900)]) + frame(DATA, END_STREAM, 1, message()))
    for number in range(1, 200):
        wire.send(frame(HEADERS, END_HEADERS, 2 * number + 1, wire.encoder.encode(CALL) + b"\xbe" * 4000))


def priorities(wire: Wire) -> None:
    for number in range(1000):
        wire.send(frame(PRIORITY, 0, 2 * number + 1, struct.pack(">IB", 0, 1)) * 50)


def window_updates(wire: Wire) -> None:
    for _ in range(1000):
        wire.send(frame(WINDOW, 0, 0, struct.pack(">I", 1)) * 100)


def window_overflow(wire: Wire) -> None:
    wire.send(frame(WINDOW, 0, 0, struct.pack(">I", 2**31 - 1)) * 2)


def unknown_frames(wire: Wire) -> None:
    for _ in range(1000):
        wire.send(frame(0x50, 0, 0, b"x" * 100) * 50)


def garbage(wire: Wire) -> None:
    wire.send(os.urandom(100_000))


def a_frame_too_long(wire: Wire) -> None:
    wire.send(frame(DATA, 0, 1, b"x" * 100_000))


def half_a_message(wire: Wire) -> None:
    wire.send(wire.call(1) + frame(DATA, END_STREAM, 1, b"\0\0\0\xff\xffabc"))


def a_message_that_claims_4_gb(wire: Wire) -> None:
    wire.send(wire.call(1) + frame(DATA, 0, 1, b"\0\xff\xff\xff\xff" + b"x" * 10_000))


def streams_without_end(wire: Wire) -> None:
    for number in range(200):
        wire.send(wire.call(2 * number + 1) + frame(DATA, 0, 2 * number + 1, b"\0\0\x3f\xff\xff" + b"x" * 200))


FLOODS: dict[str, tuple[Callable[[Wire], None], bool]] = {
    # Each with whether the server must end the connection.
    "rapid resets": (rapid_resets, True),
    "10,000 streams": (ten_thousand_streams, True),
    "10,000 answers unread": (ten_thousand_answers_unread, True),
    "pings": (pings, False),
    "settings": (settings, False),
    "continuations": (continuations, True),
    "empty continuations": (empty_continuations, True),
    "empty data": (empty_data, True),
    "header bomb": (header_bomb, True),
    "priorities": (priorities, False),
    "window updates": (window_updates, False),
    "window overflow": (window_overflow, True),
    "unknown frames": (unknown_frames, False),
    "garbage": (garbage, True),
    "a frame too long": (a_frame_too_long, True),
    "half a message": (half_a_message, False),
    "a message that claims 4 GB": (a_message_that_claims_4_gb, False),
    "streams without end": (streams_without_end, False),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    directory = tmp_path_factory.mktemp("floods")
    (directory / "tidegate.policy.toml").write_text(POLICY)
    running = Serve(directory, grpc=True)
    running.wait_ready()
    yield running
    code, _, err = running.stop()
    assert (code, "Traceback" in err, "panic" in err) == (0, False, False)


def _memory_mb(process_id: int) -> float:
    return int(Path(f"/proc/{process_id}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_harms_nobody_else(name: str, server: Serve) -> None:
    flood, ends = FLOODS[name]
    before_mb = _memory_mb(server.process.pid)
    wire = Wire(server.grpc_port)
    cut = False
    try:
        flood(wire)
    except OSError:
        cut = True  # the server has closed the connection while the flood went on
    kinds = {kind for kind, _, _ in wire.rest()}
    # While the flooder is still connected, another client is answered.
    assert ask(f"127.0.0.1:{server.grpc_port}", ASKED).overall_code == OK
    wire.close()
    if ends:
        assert cut or GOAWAY in kinds
    assert _memory_mb(server.process.pid) - before_mb < MOST_GROWTH_MB


def test_idle_and_silent_connections_cost_little(server: Serve) -> None:
    before_mb = _memory_mb(server.process.pid)
    idle = [Wire(server.grpc_port) for _ in range(200)]
    silent = [socket.create_connection(("127.0.0.1", server.grpc_port)) for _ in range(200)]
    assert ask(f"127.0.0.1:{server.grpc_port}", ASKED).overall_code == OK
    assert _memory_mb(server.process.pid) - before_mb < MOST_GROWTH_MB
    for each in idle:
        each.close()
    for one in silent:
        one.close()


GZIP = [*CALL, ("grpc-encoding", "gzip")]


def _packed(payload: bytes) -> bytes:
    return b"\1" + message(payload)[1:]


@pytest.mark.parametrize(
    ("headers", "payload", "status"),
    [
        (CALL, _packed(ASKED.SerializeToString()), "13"),
        (GZIP, _packed(b"no gzip"), "13"),
        (GZIP, _packed(gzip.compress(ASKED.SerializeToString())), "0"),
        # The server unpacks whatever it is: docs/envoy.md says who must not reach this port. What comes of it is denied.
        (GZIP, _packed(gzip.compress(bytes(10_000_000))), "0"),
        ([*CALL[:2], (":path", "/nobody/Nothing"), *CALL[3:]], message(), "12"),
        ([*CALL, *((f"x-{number}", "y" * 1000) for number in range(17))], message(), "431"),
    ],
    ids=["compressed without saying how", "no gzip", "gzip", "gzip that swells to 10 MB", "unknown method", "17 KB of headers"],
)
def test_what_is_not_done_is_reported(server: Serve, headers: list[tuple[str, str]], payload: bytes, status: str) -> None:
    before_mb = _memory_mb(server.process.pid)
    wire = Wire(server.grpc_port)
    pieces = [payload[at : at + 16_000] for at in range(0, len(payload), 16_000)]
    with contextlib.suppress(OSError):  # it is refused before all of it was sent
        wire.send(
            wire.call(1, headers=headers) + b"".join(frame(DATA, 0, 1, each) for each in pieces) + frame(DATA, END_STREAM, 1)
        )
    decoder = hpack.Decoder()
    told: dict[str, str] = {}
    for kind, _, block in wire.rest():
        if kind == HEADERS:
            told |= {str(name): str(value) for name, value in decoder.decode(block)}
    wire.close()
    assert told.get("grpc-status", told.get(":status")) == status, told
    assert _memory_mb(server.process.pid) - before_mb < MOST_GROWTH_MB
