"""What is read in one pass over the bytes is answered byte for byte as what is read in full; and the plain case is read so."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases.doors import EXPIRED, FREE, POLICY, REVOKED
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters import Charge
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Decision
from tidegate.doors import plain_requests as reader
from tidegate.doors.client_address import TrustedProxies
from tidegate.doors.http import DataPlane
from tidegate.doors.http_connection import Connection
from tidegate.doors.http_exchange import PlainRequest
from tidegate.doors.http_server import HttpServer
from tidegate.doors.responses import limit_headers, limit_lines
from tidegate.gate.gate import Gate
from tidegate.observation import Observation
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.policy.toml_reader import parse_policy

NOW_US = 1_700_000_000_000_000
ATTRIBUTES = """
[attributes]
user = "header:X-User-Id"
plan = "header:X-Plan"
[callers]
tier_from = "plan"
[[tiers]]
name = "by-user"
  [[tiers.rules]]
  endpoint = "/*"
  subject = "user"
  limits = ["3/minute"]
"""
PEERS = (("127.0.0.1", 50_000), ("203.0.113.50", 50_000), None)


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self, peer: tuple[str, int] | None) -> None:
        super().__init__({"peername": peer})
        self.written = b""

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False

    def can_write_eof(self) -> bool:
        return False

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def close(self) -> None: ...

    def abort(self) -> None: ...


class Awaited(MemoryCounters):
    """Counters that have to be awaited, as those on Redis have."""

    immediate = False

    async def charge(self, charges: Sequence[Charge]) -> list[Decision]:
        await asyncio.sleep(0)
        return await super().charge(charges)


class Side:
    """A data plane with a gate and counters of its own, and connections without a socket.

    Args:
        plain: whether plain requests may be answered from their bytes.
        store: what counts.
    """

    def __init__(self, plain: bool, store: type[MemoryCounters]) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.read_in_full = 0
        catalog = CachedCatalog(PolicyCatalog(parse_policy(ATTRIBUTES + POLICY)))
        self.gate = Gate(catalog, store(clock=lambda: NOW_US), self.observe, wall_clock_ns=lambda: NOW_US * 1000)
        self.plane = DataPlane(self.gate, {}, self.observe, TrustedProxies())
        self.server = HttpServer(self if not plain else self.plane)
        self.server._loop = asyncio.get_running_loop()
        self.server.now = asyncio.get_running_loop().time
        self.server._tick()
        if plain:
            reading = self.plane.__rsgi__

            async def counted(scope: Any, proto: Any) -> None:
                self.read_in_full += 1
                await reading(scope, proto)

            self.plane.__rsgi__ = counted  # type: ignore[method-assign]

    async def __rsgi__(self, scope: Any, proto: Any) -> None:
        await self.plane.__rsgi__(scope, proto)

    def observe(self, seen: Observation) -> None:
        self.seen.append(
            (repr(seen.decision), seen.error, seen.shadow_denied, seen.subject, seen.denied_by and seen.denied_by.name)
        )

    async def answer(self, peer: tuple[str, int] | None, sent: bytes, times: int) -> bytes:
        transport = Transport(peer)
        connection = Connection(self.server)
        connection.connection_made(transport)
        for _ in range(times):
            connection.data_received(sent)
            while connection._current is not None or connection._out:
                await asyncio.sleep(0)
        connection.connection_lost(None)
        return transport.written


def request(line: bytes, headers: list[tuple[bytes, bytes]], body: bytes | None = None) -> bytes:
    if body is not None:
        headers = [*headers, (b"Content-Length", b"%d" % len(body))]
    return line + b"\r\nHost: a\r\n" + b"".join(b"%s: %s\r\n" % header for header in headers) + b"\r\n" + (body or b"")


def values(*plain: bytes) -> st.SearchStrategy[bytes]:
    """Plain values, and others of every kind."""
    odd = st.sampled_from([b"", b"\xc3\xa9", b"\xff", b"a b", b"%2F", b"/a/../b"])
    return st.one_of(st.sampled_from(plain), st.sampled_from(plain), odd)


KEYS = values(FREE.encode(), FREE.encode(), REVOKED.encode(), EXPIRED.encode(), b"nobody-knows-this-key", b"tg_mistyped")
PATHS = values(
    b"/api/v1/a",
    b"/api/v1/a?b=c",
    b"/",
    b"/login",
    b"/watched",
    b"/a//b",
    b"/.a",
    b"/a%7E",
    b"/%41",
    b"/a;b",
    b"a",
    b"/\xc3\xa9",
    b"/a?\xff",
)
METHODS = values(b"GET", b"POST", b"get", b"HEAD", b"BREW", b"G T")
ADDRESSES = values(
    b"203.0.113.7", b"203.0.113.7:80", b"2001:db8::1", b"::ffff:203.0.113.7", b"[2001:db8::2]:1", b"256.1.1.1", b"nobody"
)
HEADERS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([b"X-API-Key", b"x-api-key"]), KEYS),
        st.tuples(st.sampled_from([b"X-Original-URI", b"X-Forwarded-Uri"]), PATHS),
        st.tuples(st.sampled_from([b"X-Original-Method", b"X-Forwarded-Method"]), METHODS),
        st.tuples(st.sampled_from([b"X-Real-IP", b"X-Forwarded-For"]), ADDRESSES),
        st.tuples(st.just(b"Forwarded"), st.sampled_from([b"for=203.0.113.9", b"for=unknown", b"x"])),
        st.tuples(st.just(b"Authorization"), st.sampled_from([b"Bearer " + FREE.encode(), b"Basic eA==", b"Bearer x"])),
        st.tuples(st.just(b"X-User-Id"), values(b"42", b"a:b", b"x" * 256, b"x" * 257)),
        st.tuples(st.just(b"X-Plan"), values(b"by-user", b"free", b"none")),
        st.tuples(st.just(b"X-Much"), st.sampled_from([b"x", b"x" * 8000, b"x" * 9000])),
        st.tuples(st.just(b"X-Tidegate-Denied-Status"), st.just(b"403")),
        st.tuples(st.just(b"X-Request-Id"), st.just(b"one")),
        st.tuples(st.just(b"Connection"), st.sampled_from([b"keep-alive", b"close"])),
        st.tuples(st.just(b"Expect"), st.just(b"100-continue")),
        st.tuples(st.just(b"Content-Encoding"), st.sampled_from([b"identity", b"gzip"])),
    ),
    max_size=6,
    unique_by=lambda header: header[0],
)
LINES = st.sampled_from(
    [b"GET /v1/authorize HTTP/1.1"] * 4
    + [
        b"HEAD /v1/authorize HTTP/1.1",
        b"POST /v1/authorize HTTP/1.1",
        b"GET /v1/authorize?a HTTP/1.1",
        b"GET /v1/authorize HTTP/1.0",
    ]
)
BODIES = st.one_of(
    st.fixed_dictionaries(
        {"path": st.sampled_from(["/api/v1/a", "/login", "/a//b", "/\u00e9", "", "a", "/a?b", "/" + "a" * 9000])},
        optional={
            "method": st.sampled_from(["GET", "get", "BREW", "G T", None]),
            "api_key": st.sampled_from([FREE, REVOKED, EXPIRED, "x", "", "\u00e9" * 20, None]),
            "ip": st.sampled_from(["203.0.113.7", "2001:db8::1", "nobody", "", None]),
            "cost": st.sampled_from([0, 1, 3, -1, 1.0, 1.5, 2**40, None]),
            "more": st.just(1),
            "attributes": st.none()
            | st.dictionaries(
                st.sampled_from(["user", "plan", "User", "ip"]), st.sampled_from(["42", "by-user", "", "é", "x" * 257, None, 1])
            ),
            "tier": st.sampled_from(["by-user", "none", "", None, 1]),
        },
    ),
    st.just([]),
)


@pytest.fixture(params=[MemoryCounters, Awaited])
async def sides(request: pytest.FixtureRequest) -> Any:
    pair = Side(True, request.param), Side(False, request.param)
    yield pair
    for side in pair:
        assert side.server._ticking is not None
        side.server._ticking.cancel()


# Where no request id came, one is made; it is in the header and in some messages.
_VARYING = re.compile(rb"date: .*|.*request.id.*").fullmatch


async def compare(sides: tuple[Side, Side], peer: tuple[str, int] | None, sent: bytes, times: int = 1) -> None:
    plain, full = sides
    answers = [[line for line in (await side.answer(peer, sent, times)).split(b"\r\n") if not _VARYING(line)] for side in sides]
    assert answers[0] == answers[1]
    assert plain.seen == full.seen
    assert plain.plane.answered == full.plane.answered
    assert (plain.plane.in_flight, full.plane.in_flight) == (0, 0)


def in_loop(
    loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side], peer: tuple[str, int] | None, sent: bytes, times: int
) -> None:
    asyncio.run_coroutine_threadsafe(compare(sides, peer, sent, times), loop).result(60)


TIMES = st.sampled_from([1, 1, 3])
"""How often the same bytes come on one connection: a request that repeats is not parsed again."""


async def test_authorize_is_answered_alike(sides: tuple[Side, Side]) -> None:
    loop = asyncio.get_running_loop()

    @settings(max_examples=400)
    @given(st.sampled_from(PEERS), LINES, HEADERS, TIMES)
    def alike(peer: tuple[str, int] | None, line: bytes, headers: list[tuple[bytes, bytes]], times: int) -> None:
        in_loop(loop, sides, peer, request(line, headers), times)

    await asyncio.to_thread(alike)


async def test_check_is_answered_alike(sides: tuple[Side, Side]) -> None:
    loop = asyncio.get_running_loop()

    @settings(max_examples=300)
    @given(HEADERS, BODIES, st.booleans(), TIMES)
    def alike(headers: list[tuple[bytes, bytes]], body: object, broken: bool, times: int) -> None:
        raw = json.dumps(body, ensure_ascii=False).encode() + (b"\xff" if broken else b"")
        in_loop(loop, sides, PEERS[0], request(b"POST /v1/check HTTP/1.1", headers, raw), times)

    await asyncio.to_thread(alike)


KEY = (b"X-API-Key", FREE.encode())
PLAIN = [KEY, (b"X-Original-URI", b"/api/v1/a?b=c"), (b"X-Original-Method", b"GET"), (b"X-Real-IP", b"203.0.113.7")]


def plain_requests() -> Iterator[bytes]:
    """What the shipped gateways and clients send."""
    yield request(b"GET /v1/authorize HTTP/1.1", PLAIN)
    yield request(b"HEAD /v1/authorize HTTP/1.1", [*PLAIN, (b"Connection", b"keep-alive")])
    forwarded = [
        KEY,
        (b"X-Forwarded-Uri", b"/api/v1/a"),
        (b"X-Forwarded-Method", b"GET"),
        (b"X-Forwarded-For", b"203.0.113.7, 127.0.0.1"),
    ]
    yield request(b"GET /v1/authorize HTTP/1.1", forwarded)
    yield request(b"POST /v1/check HTTP/1.1", [KEY], b'{"path":"/api/v1/a"}')
    yield request(b"GET /v1/authorize HTTP/1.1", [*PLAIN, (b"X-User-Id", b"42"), (b"X-Plan", b"by-user")])
    yield request(b"POST /v1/check HTTP/1.1", [], b'{"path":"/a","tier":"by-user","attributes":{"user":"42"}}')
    yield request(
        b"POST /v1/check HTTP/1.1", [], b'{"path":"/api/v1/a","api_key":"%s","ip":"203.0.113.7","cost":1}' % FREE.encode()
    )


@pytest.mark.parametrize("number", range(7))
async def test_plain_requests_are_not_read_in_full(sides: tuple[Side, Side], number: int) -> None:
    sent = list(plain_requests())[number]
    for side in sides:
        await side.gate.catalog.caller_policy()
    for times in (1, 3):
        await compare(sides, PEERS[0], sent, times)
    assert sides[0].read_in_full == 0
    await compare(sides, PEERS[0], request(b"GET /v1/authorize HTTP/1.1", [*PLAIN, (b"X-Real-IP", b"203.0.113.8")]))
    assert sides[0].read_in_full == 1, "a header that came twice is"


async def test_a_request_that_repeats_is_read_by_the_active_policy(sides: tuple[Side, Side]) -> None:
    connection = Connection(sides[0].server)
    connection.connection_made(Transport(PEERS[0]))
    received: list[PlainRequest] = []
    sides[0].server.decide = received.append  # type: ignore[assignment,method-assign]
    for _ in range(2):
        connection.data_received(request(b"GET /v1/authorize HTTP/1.1", [*PLAIN, (b"X-User-Id", b"42")]))
        connection._current = None
    first, again = received
    assert first is again
    assert again.repeats
    policy = await sides[0].gate.catalog.caller_policy()
    other = msgspec.structs.replace(policy, attributes=())
    for each, attributes in ((policy, {"user": "42"}), (other, {})):
        check = reader.plain_authorize(again, TrustedProxies(), 8192, each)
        assert check is not None
        assert dict(check.attributes) == attributes
        assert (again.check, again.policy) == (check, each)
    connection.connection_lost(None)
    assert connection._last is None, "it refers to the connection, and garbage collection does not look at it"


async def test_a_change_of_the_policy_reaches_requests_that_repeat(sides: tuple[Side, Side]) -> None:
    side = sides[0]
    policy = await side.gate.catalog.caller_policy()
    connection = Connection(side.server)
    connection.connection_made(Transport(PEERS[0]))
    for number in range(6):
        if number == 3:
            side.gate.catalog.active_policy = msgspec.structs.replace(policy, attributes=())
        connection.data_received(
            request(b"GET /v1/authorize HTTP/1.1", [*PLAIN[1:], (b"X-User-Id", b"42"), (b"X-Plan", b"by-user")])
        )
        while connection._current is not None:
            await asyncio.sleep(0)
    assert [subject for *_, subject, _ in side.seen] == ["a:user=42"] * 3 + [side.seen[-1][3]] * 3
    assert side.seen[-1][3] != "a:user=42"
    connection.connection_lost(None)


async def test_a_percent_sign_in_a_limit_is_one_in_the_answer() -> None:
    labelled = Limit(10, 60_000_000, label="100% d\u00e9j\u00e0")
    limits = LimitSet("a", Algorithm.FIXED_WINDOW, [labelled])
    for decision in (
        Decision(True, limits.limits[0], 9, 1, 0, NOW_US, limits),
        Decision(False, limits.limits[0], 0, 1_000_001, 2_500_000, NOW_US, limits),
        Decision(False, limits.limits[0], 0, 1_000_001, None, NOW_US, limits),
        Decision(True),
    ):
        assert limit_lines(decision) == "".join(f"{name}: {value}\r\n" for name, value in limit_headers(decision)).encode()


async def test_a_line_break_in_a_limit_reaches_no_header() -> None:
    limits = LimitSet("a", Algorithm.FIXED_WINDOW, [Limit(10, 60_000_000, label="a\r\nset-cookie: b")])
    with pytest.raises(ValueError, match="line break"):
        limit_lines(Decision(True, limits.limits[0], 9, 1, 0, NOW_US, limits))


def test_long_addresses_are_not_remembered() -> None:
    before = reader._known_address.cache_info().currsize
    assert reader._address("1" * 10_000) is None
    assert reader._address(b"2001:db8:" + b"0" * 10_000) is None
    assert reader._known_address.cache_info().currsize == before
    assert reader._address(b"2001:0db8::1") == "2001:db8::1"
