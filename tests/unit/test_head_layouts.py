"""A head that a layout has read is the request that llhttp reads, and nothing else is read by it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.doors.client_address import TrustedProxies
from tidegate.doors.head_layouts import MAX_LAYOUTS, RENEW_S, HeadLayouts, values_of
from tidegate.doors.http_exchange import Exchange, PlainRequest
from tidegate.doors.http_parser import RequestParser
from tidegate.doors.plain_requests import authorize_layouts, facts_check, plain_authorize
from tidegate.errors import TidegateError
from tidegate.policy.attributes import CallerPolicy

HEAD = (
    b"GET /v1/authorize HTTP/1.1\r\nHost: localhost\r\nX-API-Key: key-1\r\nX-Original-URI: /api/v1/items?page=2\r\n"
    b"X-Original-Method: POST\r\nX-Real-IP: 203.0.113.7\r\nCookie: a=b; c=d\r\n\r\n"
)
ODD = st.sampled_from(
    (
        b"\r\n",
        b"\n",
        b"\r",
        b"\0",
        b" ",
        b"\t",
        b":",
        b"\x80",
        b"\r\n\r\n",
        b"\r\n ",
        b"\x7f",
        b"//",
        b"%",
        b"",
        b"GET ",
        b"?",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\n",
        b"Connection: close\r\n",
        b"Host: other\r\n",
    )
)


class Parser(RequestParser):
    """Keeps what was read: method, target, headers; an error where the request was refused."""

    def __init__(self, layouts: HeadLayouts | None) -> None:
        super().__init__(layouts)
        self.read: list[object] = []
        self.facts: list[tuple[bytes, ...] | None] = []

    def enqueue(self, request: Exchange | PlainRequest) -> None:
        target = request.target if isinstance(request.target, bytes) else request.target.encode("latin-1")
        raw = request.headers.raw()
        self.read.append((request.method, target, raw, isinstance(request, Exchange)))
        self.facts.append(None)

    def enqueue_plain(self, request: PlainRequest) -> None:
        self.read.append((request.method, request.target, request.headers.raw(), False))
        self.facts.append(request.facts)

    def repeat(self, request: PlainRequest) -> None:
        self.enqueue_plain(request)

    def refuse(self, error: TidegateError) -> None:
        self._stopped = True
        self.read.append(error.code)
        self.facts.append(None)


def trained() -> Parser:
    parser = Parser(authorize_layouts())
    for number in (1, 2, 3):
        parser.parse(HEAD.replace(b"key-1", b"key-%d" % (number + 1)))
    return parser


def test_the_third_head_of_a_layout_is_read_by_it() -> None:
    parser = trained()
    assert parser.facts == [None, None, (b"key-4", b"/api/v1/items", b"POST", b"203.0.113.7")]
    assert parser.read[2] == (
        "GET",
        b"/v1/authorize",
        [
            (b"host", b"localhost"),
            (b"x-api-key", b"key-4"),
            (b"x-original-uri", b"/api/v1/items?page=2"),
            (b"x-original-method", b"POST"),
            (b"x-real-ip", b"203.0.113.7"),
            (b"cookie", b"a=b; c=d"),
        ],
        False,
    )


def test_headers_that_do_not_come_are_empty_facts() -> None:
    layout = authorize_layouts().learn(b"GET /v1/authorize HTTP/1.1\r\nHost: x\r\nX-Original-URI: /a\r\n\r\n")
    assert layout is not None
    assert layout.read(b"GET /v1/authorize HTTP/1.1\r\nHost: y\r\nX-Original-URI: /b?c\r\n\r\n") == (b"", b"/b", b"", b"")
    assert layout.read(b"GET /v1/authorize HTTP/1.1\r\nHost: y\r\nX-Original-URI: /b?c\r\n\r\nGET") is None


@given(st.lists(st.tuples(st.integers(0, len(HEAD)), st.integers(0, 3), ODD), max_size=3), st.integers(0, len(HEAD)))
def test_what_a_layout_reads_is_what_llhttp_reads(edits: list[tuple[int, int, bytes]], cut: int) -> None:
    data = HEAD
    for at, length, put in edits:
        data = data[:at] + put + data[at + length :]
    for pieces in ((data,), (data[:cut], data[cut:])):
        parser, reference = trained(), Parser(None)
        assert parser.facts[-1] is not None
        del parser.read[:]
        # What comes behind it is read by llhttp in both, so its state is the same.
        for piece in (*pieces, b"GET /livez HTTP/1.1\r\nHost: x\r\nA: b\r\n\r\n"):
            for each in (parser, reference):
                if piece and not each._stopped:
                    each.parse(piece)
        assert parser.read == reference.read


@pytest.mark.parametrize(
    "changed",
    [
        b"Content-Length: 0",
        b"Transfer-Encoding: chunked",
        b"Expect: 100-continue",
        b"Upgrade: h2c",
        b"Proxy-Connection: close",
        b"X-Real-IP: ::1",
    ],
)
def test_heads_with_headers_that_say_more_are_not_learned(changed: bytes) -> None:
    data = HEAD.replace(b"Cookie: a=b; c=d", changed)
    assert authorize_layouts().learn(data) is None


def test_a_connection_that_ends_is_left_to_llhttp() -> None:
    data = HEAD.replace(b"Cookie: a=b; c=d", b"Connection: keep-alive")
    layout = authorize_layouts().learn(data)
    assert layout is not None
    assert layout.read(data) == (b"key-1", b"/api/v1/items", b"POST", b"203.0.113.7")
    for value in (b"close", b"keep-alive, close", b"upgrade", b"keep-alive "):
        assert layout.read(data.replace(b"keep-alive", value)) is None


def test_a_layout_is_found_again_after_a_head_in_pieces() -> None:
    parser = trained()
    parser.parse(HEAD[:50])
    parser.parse(HEAD[50:])
    for number in (5, 6, 7):
        parser.parse(HEAD.replace(b"key-1", b"key-%d" % number))
    assert [facts is not None for facts in parser.facts] == [False, False, True, False, False, True, True]


def test_the_table_is_bounded_and_renewed() -> None:
    now = 0.0
    layouts = HeadLayouts(b"/v1/authorize", {}, lambda _: True, lambda: now)

    def learn(number: int) -> object:
        return layouts.learn(b"GET /v1/authorize HTTP/1.1\r\nHost: x\r\nX-%d: 1\r\n\r\n" % number)

    assert all(learn(number) is not None for number in range(MAX_LAYOUTS))
    assert learn(MAX_LAYOUTS) is None
    assert learn(0) is not None
    now = RENEW_S
    assert learn(MAX_LAYOUTS) is not None


def test_values_of_a_head_have_names_in_lower_case() -> None:
    assert values_of(b"GET / HTTP/1.1\r\nHost: a\r\nX-Y: b: c\r\n\r\n") == {b"host": b"a", b"x-y": b"b: c"}


@given(
    st.sampled_from((b"key-2", b"k", b"a:b")),
    st.sampled_from((b"/", b"/a/b?c=/../", b"/a//b", b"/a/../b", b"/.well", b"/a%20b", b"/a;b", b"/" + b"a" * 3000)),
    st.sampled_from((b"GET", b"DELETE", b"get", b"PURGE", b"PROPFIND")),
    st.sampled_from((b"203.0.113.9", b"2001:db8::1", b"::ffff:192.0.2.1", b"1.2.3", b"a:b", b"1.2.3.4:80")),
    st.sampled_from(("127.0.0.1", "198.51.100.7", "")),
)
def test_the_check_of_a_head_is_that_of_its_headers(key: bytes, uri: bytes, method: bytes, ip: bytes, peer: str) -> None:
    data = (
        b"GET /v1/authorize HTTP/1.1\r\nHost: x\r\nX-API-Key: %b\r\nX-Original-URI: %b\r\nX-Original-Method: %b\r\n"
        b"X-Real-IP: %b\r\nX-Forwarded-For: 192.0.2.8\r\n\r\n"
    ) % (key, uri, method, ip)
    layout = authorize_layouts().learn(data)
    assert layout is not None
    facts = layout.read(data)
    connection: Any = SimpleNamespace(peer=peer)
    request = PlainRequest(connection, "GET", b"/v1/authorize", None, None, len(data), data=data, facts=facts)
    trusted, policy = TrustedProxies(), CallerPolicy()
    expected = plain_authorize(request, trusted, 8192, policy)
    if facts is not None:
        assert facts_check(request, facts, trusted, policy) == expected
    else:
        assert expected is None
