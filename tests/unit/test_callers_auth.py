"""Who may call the data plane: tokens, certificates, what is refused and how."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from tests.raw_http import RawAnswer
from tests.rsgi import call
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.caller_tokens import CallerToken, CallerTokens, hash_caller_token, make_caller_token
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.doors.callers_auth import (
    FAILURES_PER_MINUTE,
    FAILURES_PER_MINUTE_OVERALL,
    CallersAuth,
    CertificateAuth,
    TokenAuth,
    scope_of,
)
from tidegate.doors.http import DataPlane
from tidegate.doors.openapi import data_plane_openapi
from tidegate.errors import TidegateError
from tidegate.gate.gate import Gate
from tidegate.observation import Observation
from tidegate.policy.toml_reader import parse_policy
from tidegate.timestamps import now_us

POLICY = """
[anonymous]
tier = "free"
[[tiers]]
name = "free"
[[tiers.rules]]
endpoint = "/*"
subject = "ip"
limits = ["1000/minute"]
"""
CHECK, LIMIT, EXPIRED, REVOKED = (make_caller_token() for _ in range(4))
HEADER = "X-Tidegate-Token"
PATHS = (
    ("GET", "/v1/authorize", b""),
    ("GET", "/v1/authorize/envoy", b""),
    ("GET", "/v1/authorize/envoy/api", b""),
    ("POST", "/v1/check", b'{"path":"/api","ip":"192.0.2.1"}'),
    ("POST", "/v1/check/batch", b'{"checks":[{"path":"/api","ip":"192.0.2.1"}]}'),
    ("GET", "/v1/usage", b""),
)


class Source:
    async def caller_tokens(self) -> list[CallerToken]:
        return [
            CallerToken(hash_caller_token(CHECK.encode()), "edge", frozenset({"check"}), now_us() + 3_600_000_000),
            CallerToken(hash_caller_token(LIMIT.encode()), "mailer", frozenset({"limit"})),
            CallerToken(hash_caller_token(EXPIRED.encode()), "old", frozenset({"check"}), now_us() - 1),
        ]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def token_auth(header: str = HEADER, clock: Clock | None = None) -> TokenAuth:
    tokens = CallerTokens(Source())
    await tokens.load()
    return TokenAuth(header, tokens, clock or Clock())


def data_plane(callers: CallersAuth | None, seen: list[str] | None = None) -> DataPlane:
    async def page() -> Any:
        return SimpleNamespace(status=200, content_type="text/plain", body=b"fine")

    def observe(observation: Observation) -> None:
        if seen is not None and observation.error is not None:
            seen.append(observation.error)

    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), MemoryCounters())
    pages = dict.fromkeys(("/health", "/readyz", "/livez", "/metrics", "/openapi.json"), page)
    return DataPlane(gate, pages, observe, callers=callers)


async def ask(app: DataPlane, *tokens: bytes, header: str = HEADER, **fields: Any) -> RawAnswer:
    headers = [("x-original-uri", b"/api"), *((header, token) for token in tokens)]
    return await call(app, fields.pop("path", "/v1/authorize"), headers, **fields)


def code(answer: RawAnswer) -> tuple[int, str | None]:
    return answer.status, answer.headers.get("x-tidegate-error")


@pytest.mark.parametrize(("method", "path", "body"), PATHS)
async def test_every_request_that_decides_needs_a_token(method: str, path: str, body: bytes) -> None:
    app = data_plane(await token_auth())
    fields = {"method": method, "path": path, "body": body}
    assert code(await ask(app, **fields)) == (401, "CALLER_UNAUTHENTICATED")
    assert code(await ask(app, LIMIT.encode(), **fields)) == (403, "CALLER_FORBIDDEN")
    for _ in range(2):
        assert (await ask(app, CHECK.encode(), **fields)).status in (200, 204)


@pytest.mark.parametrize(
    ("mode", "name", "scheme"),
    [
        ("token", "CallerToken", {"type": "apiKey", "in": "header", "name": "X-Gateway"}),
        ("mtls", "CallerCertificate", {"type": "mutualTLS"}),
    ],
)
def test_the_description_names_what_callers_need(mode: str, name: str, scheme: dict[str, str]) -> None:
    described, plain = data_plane_openapi(mode, "X-Gateway"), data_plane_openapi()
    found = described["components"]["securitySchemes"][name]
    assert scheme.items() <= found.items()
    assert name not in plain["components"]["securitySchemes"]
    assert described["paths"].keys() == plain["paths"].keys()
    for path, operations in described["paths"].items():
        for operation in operations.values():
            needs = operation.get("security", [{}])
            assert all((name in each) == path.startswith("/v1/") for each in needs), path
            assert not path.startswith("/v1/") or {"401", "403"} <= operation["responses"].keys()
    assert described["paths"]["/v1/check"]["post"]["security"] == [{"ApiKey": [], name: []}, {name: []}]
    wrong = described["paths"]["/v1/limit"]["post"]["responses"]["401"]
    assert wrong["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}


async def test_probes_metrics_and_the_description_need_none() -> None:
    app = data_plane(await token_auth())
    for path in ("/health", "/readyz", "/livez", "/metrics", "/openapi.json"):
        assert (await call(app, path)).status == 200
    assert (await call(app, "/nothing")).status == 404


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ([], (401, "CALLER_UNAUTHENTICATED")),
        ([b""], (401, "CALLER_UNAUTHENTICATED")),
        ([EXPIRED.encode()], (401, "CALLER_UNAUTHENTICATED")),
        ([REVOKED.encode()], (401, "CALLER_UNAUTHENTICATED")),
        ([CHECK.encode() + b"x"], (401, "CALLER_UNAUTHENTICATED")),
        ([CHECK.encode()[:-1] + b"\xc3"], (401, "CALLER_UNAUTHENTICATED")),
        ([b"tgc_" + b"a" * 10_000], (401, "CALLER_UNAUTHENTICATED")),
        ([CHECK.encode(), CHECK.encode()], (400, "BAD_REQUEST")),
        ([CHECK.encode(), b""], (400, "BAD_REQUEST")),
        ([b"Bearer " + CHECK.encode()], (204, None)),
    ],
)
async def test_what_a_caller_may_send(sent: list[bytes], expected: tuple[int, str | None]) -> None:
    seen: list[str] = []
    app = data_plane(await token_auth(), seen)
    for _ in range(2):
        answer = await ask(app, *sent)
        assert code(answer) == expected
    assert seen == ([] if expected[1] is None else [expected[1]] * 2)


async def test_no_answer_and_no_log_line_repeats_a_token(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for token in (REVOKED.encode(), LIMIT.encode(), CHECK.encode() + b"\xff"):
        app = data_plane(await token_auth())
        answer = await ask(app, token, path="/v1/usage")
        assert token[4:20] not in answer.body
        assert token[4:20].decode() not in caplog.text
        assert "refused" in caplog.text
        caplog.clear()


async def test_the_header_is_configurable_and_authorization_is_then_not_read_as_an_api_key() -> None:
    app = data_plane(await token_auth("Authorization"))
    assert code(await ask(app, CHECK.encode())) == (401, "CALLER_UNAUTHENTICATED")
    assert code(await ask(app, b"Bearer " + CHECK.encode(), header="authorization")) == (204, None)
    assert code(await ask(app, b"Basic " + CHECK.encode(), header="authorization")) == (401, "CALLER_UNAUTHENTICATED")


async def test_guesses_are_limited_for_each_peer_and_a_token_that_works_is_accepted_all_the_same() -> None:
    clock = Clock()
    app = data_plane(await token_auth(clock=clock))
    answers = [await ask(app, make_caller_token().encode()) for _ in range(FAILURES_PER_MINUTE + 5)]
    assert [answer.status for answer in answers] == [401] * FAILURES_PER_MINUTE + [429] * 5
    assert code(answers[-1]) == (429, "CALLER_ATTEMPTS_EXCEEDED")
    assert answers[-1].headers["retry-after"] == "60"
    assert (await ask(app, CHECK.encode())).status == 204
    assert (await ask(app, REVOKED.encode(), client="192.0.2.9:1")).status == 401
    clock.now += 61
    assert (await ask(app, REVOKED.encode())).status == 401


async def test_guesses_are_limited_overall_in_bounded_memory() -> None:
    app = data_plane(await token_auth())
    statuses = [
        (await ask(app, REVOKED.encode(), client=f"10.0.{number >> 8}.{number & 255}:1")).status
        for number in range(FAILURES_PER_MINUTE_OVERALL + 5)
    ]
    assert statuses == [401] * FAILURES_PER_MINUTE_OVERALL + [429] * 5
    assert (await ask(app, CHECK.encode(), client="10.0.0.1:1")).status == 204


async def test_refusals_are_logged_for_operators_but_not_each(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    app = data_plane(await token_auth(clock=clock))
    for _ in range(100):
        await ask(app)
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 1
    assert logged[0].startswith("caller at 127.0.0.1 refused: the caller sent no token: send the X-Tidegate-Token header")
    clock.now += 11
    await ask(app, LIMIT.encode())
    assert "the token 'mailer' has no scope 'check'" in caplog.text


@pytest.mark.parametrize(
    ("path", "needed"),
    [
        ("/v1/check", "check"),
        ("/v1/check/batch", "check"),
        ("/v1/authorize/envoy/v1/limit", "check"),
        ("/v1/usage", "check"),
        ("/v1/limit", "limit"),
        ("/v1/limit/batch", "limit"),
        ("/v1/holds", "hold"),
        ("/v1/holds/abc/settle", "hold"),
        ("/v1/reserve", "check"),
        ("/v1/reserve/abc/cancel", "check"),
        ("/v1/leases/abc/return", "lease"),
        ("/v1/limitless", "check"),
    ],
)
def test_the_scope_that_a_path_needs(path: str, needed: str) -> None:
    assert scope_of(path) == needed


def known(auth: CallersAuth, token: str | None = None, *names: str) -> bool:
    return auth.is_known({} if token is None else {b"x-tidegate-token": token.encode()}, names)


def metadata(token: str) -> list[tuple[str, str | bytes]]:
    return [("x-tidegate-token", token)]


async def test_a_caller_that_called_is_known_by_its_bytes_until_its_token_changes() -> None:
    tokens = CallerTokens(Source())
    await tokens.load()
    auth = TokenAuth(HEADER, tokens)
    assert not known(auth, CHECK)
    await auth.require_metadata(metadata(CHECK), "", (), "check")
    assert known(auth, CHECK)
    assert not known(auth)
    assert not known(auth, CHECK[:-1])
    await auth.require_metadata(metadata(LIMIT), "", (), "limit")
    assert not known(auth, LIMIT), "its scope does not permit checks"
    tokens.changed([("caller_token", hash_caller_token(CHECK.encode()))])
    assert not known(auth, CHECK)


async def test_a_token_that_expires_while_its_bytes_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = CallerTokens(Source())
    await tokens.load()
    auth = TokenAuth(HEADER, tokens)
    await auth.require_metadata(metadata(CHECK), "", (), "check")
    later = now_us() + 3_600_000_001
    monkeypatch.setattr("tidegate.catalog.caller_tokens.now_us", lambda: later)
    monkeypatch.setattr("tidegate.doors.callers_auth.time_ns", lambda: later * 1000)
    assert not known(auth, CHECK)
    with pytest.raises(TidegateError, match="expired"):
        await auth.require_metadata(metadata(CHECK), "", (), "check")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("gw.example.com",), None),
        (("other.example.com", "gw.example.com"), None),
        (("a.edge.example.com",), None),
        (("spiffe://example.com/ns/edge/sa/gateway",), None),
        (("2001:db8::1",), None),
        ((), (401, "CALLER_UNAUTHENTICATED")),
        (("edge.example.com",), (403, "CALLER_FORBIDDEN")),
        (("a.b.edge.example.com",), (403, "CALLER_FORBIDDEN")),
        (("*.edge.example.com",), (403, "CALLER_FORBIDDEN")),
        (("gw.example.com.evil.test",), (403, "CALLER_FORBIDDEN")),
        (("spiffe://example.com/ns/edge/sa/gateway/x",), (403, "CALLER_FORBIDDEN")),
    ],
)
async def test_names_of_certificates(names: tuple[str, ...], expected: tuple[int, str] | None) -> None:
    allowed = ["GW.example.com", "*.edge.example.com", "spiffe://example.com/ns/edge/sa/gateway", "2001:DB8::1"]
    auth = CertificateAuth(allowed)
    app = data_plane(auth)
    # A token proves nothing in this mode.
    answer = await ask(app, CHECK.encode(), peer_names=names)
    assert code(answer) == (expected or (204, None))
    assert known(auth, CHECK, *names) == (expected is None)
    assert await refused(auth.require_metadata([], "127.0.0.1:1", names, "check")) == (expected and expected[1])


async def test_every_certificate_of_the_authority_can_be_allowed_but_not_a_connection_without_one() -> None:
    auth = CertificateAuth(["*"])
    assert known(auth, None, "anything.test")
    assert not known(auth)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ([("x-tidegate-token", CHECK)], None),
        ([("x-request-id", "1"), ("x-tidegate-token", CHECK.encode())], None),
        ([("x-tidegate-token", f"Bearer {CHECK}")], None),
        ([], "CALLER_UNAUTHENTICATED"),
        ([("x-tidegate-token", REVOKED)], "CALLER_UNAUTHENTICATED"),
        ([("x-tidegate-token", "é" * 40)], "CALLER_UNAUTHENTICATED"),
        ([("x-tidegate-token", LIMIT)], "CALLER_FORBIDDEN"),
        ([("x-tidegate-token", CHECK), ("x-tidegate-token", CHECK)], "BAD_REQUEST"),
    ],
)
async def test_tokens_in_grpc_metadata(sent: list[tuple[str, str | bytes]], expected: str | None) -> None:
    auth = await token_auth()
    for _ in range(2):
        assert await refused(auth.require_metadata(sent, "127.0.0.1:1", (), "check")) == expected


async def refused(requiring: Any) -> str | None:
    """The code of the error that was raised."""
    try:
        await requiring
    except TidegateError as error:
        return error.code
    return None
