"""`tidegate keys … --url` where the control plane refuses what is asked, or is not there, or is something else."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.cli_ways import FILE_KEY, HEX_KEY, POLICY, TOKEN, Runner, over_api, with_catalog
from tests.moments import PATIENCE_S, wait_until
from tests.servers.certificates import Authority
from tests.servers.foreign_servers import ForeignServer, TlsProxy
from tests.servers.ports import free_port
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.cli import control_plane


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(tmp_path, monkeypatch, capsys)


@pytest.fixture
def server(serve: Callable[..., Any], tmp_path: Path) -> Any:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    return serve(TIDEGATE_ADMIN__TOKEN=TOKEN)


@pytest.fixture
def api(server: Any, run: Runner, tmp_path: Path) -> Runner:
    """The way over the admin API, from a directory where no database is."""
    return over_api(run, server, tmp_path / "elsewhere")


def test_the_token(server: Any, api: Runner, tmp_path: Path) -> None:
    file = tmp_path / "token"
    bare = api.way(*api.options)
    from_file = api.way(*api.options, "--token-file", str(file))
    assert "TIDEGATE_ADMIN__TOKEN" in bare.refused("list")
    assert "--token-file" in bare.refused("list")
    for written, said in (
        (None, "cannot be read: No such file"),
        (b"", "does not contain a token"),
        (b" \n", "does not contain a token"),
        (b"a" * 20_000, "does not contain a token"),
        (b"\xff\xfe", "it is not UTF-8 text"),
        (b"two words", "has invalid characters"),
        ("tokén".encode(), "has invalid characters"),
        (b"one\r\nX-Header: other", "has invalid characters"),
    ):
        if written is not None:
            file.write_bytes(written)
        message = from_file.refused("list")
        assert said in message
        assert str(file) in message
    file.write_text(f"{TOKEN}\n")
    assert len(from_file.told("list")) == 2
    # It goes before the settings' one, and those are not even read.
    broken = api.way(*from_file.options, TIDEGATE_ADMIN__TOKEN="short")
    assert len(broken.told("list")) == 2
    file.write_text("a-token-that-nobody-knows")
    message = from_file.refused("list")
    assert message.startswith("INVALID_TOKEN: the token is unknown, expired or revoked: ask an operator")
    assert message.endswith(f"(the token of {file})")
    assert "nobody-knows" not in message
    wrong = api.way(*api.options, TIDEGATE_ADMIN__TOKEN="another-token-of-nobody")
    assert "the token of TIDEGATE_ADMIN__TOKEN" in wrong.refused("create", "--tier", "free")
    assert "--token-file is only used with --url" in api.way("--token-file", str(file)).refused("list")
    told = api.keys("list", "--token", TOKEN)
    assert (told.code, "No such option" in told.err) == (2, True), "a token on the command line would be seen by everyone"


def test_a_viewer_may_read(server: Any, api: Runner, tmp_path: Path) -> None:
    made = httpx.post(
        f"http://127.0.0.1:{server.admin_port}/admin/v1/tokens",
        headers={"Authorization": f"Bearer {TOKEN}"},
        json={"name": "looks", "role": "viewer"},
    ).json()
    (tmp_path / "viewer").write_text(made["token"])
    viewer = api.way(*api.options, "--token-file", str(tmp_path / "viewer"))
    (key,) = viewer.told("list", "--tier", "free")
    for arguments in (("create", "--tier", "free"), ("revoke", key["id"], "--reason", "x"), ("rotate", key["id"])):
        assert (
            viewer.refused(*arguments)
            == "FORBIDDEN: the token 'looks' has the role viewer, which may not do this: use a token of an operator"
        )


def test_too_many_requests(server: Any, api: Runner) -> None:
    url = f"http://127.0.0.1:{server.admin_port}/admin/v1/api-keys"
    statuses = [httpx.get(url, headers={"Authorization": "Bearer wrong"}).status_code for _ in range(21)]
    assert statuses == [401] * 20 + [429]
    wrong = api.way(*api.options, **{**api.environment, "TIDEGATE_ADMIN__TOKEN": "wrong-token-of-somebody"})
    message = wrong.refused("list")
    assert len(api.told("list")) == 2, "the right token passes"
    assert re.fullmatch(
        r"RATE_LIMIT_EXCEEDED: more than 20/minute requests with a wrong token .*: try again in [1-6]?\d s", message
    )


def test_a_catalog_that_is_unavailable(server: Any, api: Runner, run: Runner, tmp_path: Path) -> None:
    async def take_away(catalog: SqlCatalog) -> None:
        async with catalog.database.transaction() as connection:
            await connection.exec_driver_sql("ALTER TABLE api_keys RENAME TO away")

    with_catalog(f"sqlite:///{tmp_path}/tidegate.db", take_away)
    for arguments in (("list",), ("create", "--tier", "free")):
        message = api.refused(*arguments)
        assert message.startswith("CATALOG_UNAVAILABLE: ")
        assert "try again in 1 s; if this continues, run 'tidegate doctor'" in message
        assert run.way().refused(*arguments).startswith("CATALOG_UNAVAILABLE: ")


def test_the_wrong_port(server: Any, api: Runner) -> None:
    wrong = api.way("--url", server.url, **api.environment)
    for arguments in (("list",), ("create", "--tier", "free"), ("show", FILE_KEY)):
        message = wrong.refused(*arguments)
        assert f"{server.url} is the data plane" in message
        assert "[server] admin" in message


def test_the_address_of_the_control_plane(server: Any, api: Runner) -> None:
    url = f"http://127.0.0.1:{server.admin_port}"
    for spelled in (f"{url}/", f"{url}/admin/v1", f"{url}/admin/v1/", url.replace("127.0.0.1", "localhost")):
        assert len(api.way("--url", spelled, **api.environment).told("list")) == 2
    for wrong, said in (
        ("", "is not a valid URL"),
        ("127.0.0.1:8082", "is not a valid URL"),
        ("ftp://127.0.0.1", "is not a valid URL"),
        ("http://", "is not a valid URL"),
        ("http://127.0.0.1:99999", "is not a valid URL"),
        ("http://[::1", "is not a valid URL"),
        ("http://127.0.0.1:8082?x=1", "is not a valid URL"),
        ("http://127.0.0.1/\r\nX-Header: 1", "is not a valid URL"),
        ("http://me:secret@127.0.0.1:8082", "must not contain a user or a password"),
        ("http://nowhere.invalid:8082", "the name 'nowhere.invalid' cannot be resolved"),
        (f"http://127.0.0.1:{free_port()}", "connection refused: start it with 'tidegate serve'"),
        (f"http://[::1]:{free_port()}", "start it with 'tidegate serve'"),
        (f"http://{'a' * 70}.example:8082", "is not a valid URL"),
        (f"https://127.0.0.1:{server.admin_port}", "use http:// if it does not use TLS"),
    ):
        message = api.way("--url", wrong, **api.environment).refused("list")
        assert said in message, (wrong, message)
        assert "secret" not in message
    for wrong in ("http://127.0.0.1:99999", "http://[::1"):
        said = api.way("--url", wrong)("check", "-", "GET", "/")
        assert (said.code, "is not a valid URL of a server" in said.err) == (2, True)


@pytest.fixture
def foreign_server() -> Iterator[Callable[[bytes | None], ForeignServer]]:
    started: list[ForeignServer] = []

    def start(reply: bytes | None) -> ForeignServer:
        started.append(ForeignServer(reply))
        return started[-1]

    yield start
    for each in started:
        each.close()


def _http(status: str, body: bytes, *headers: str) -> bytes:
    head = "\r\n".join((f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers))
    return f"{head}\r\n\r\n".encode() + body


def _error(code: str, message: str) -> bytes:
    return json.dumps({"error": {"code": code, "message": message, "details": {}}}).encode()


RECORD = (
    b'{"id": "000000000000000000000000", "tier": "t", "name": "", "status": "active", "expires_at": null, "limits": null, '
    b'"overrides": [], "created_at": "2030-01-01T00:00:00Z", "revoked_at": null, "revoked_reason": null, '
    b'"managed_by_file": false, "revision": 1}'
)
UNKNOWN = "the change may have been made"
NOT_OURS = "is not a control plane of Tidegate"


@pytest.mark.parametrize(
    ("reply", "said", "unknown"),
    [
        (_http("200 OK", b"<html>hello</html>"), NOT_OURS, True),
        (_http("200 OK", b"{}"), NOT_OURS, True),
        (_http("200 OK", b"[" * 100_000), NOT_OURS, True),
        (_http("200 OK", b"\xff"), NOT_OURS, True),
        (_http("200 OK", b'{"items": [{"id": "x"}], "next": null}'), NOT_OURS, True),
        (_http("404 Not Found", b"not here"), f"{NOT_OURS}, it answers 404", False),
        (_http("401 Unauthorized", b"{}", "WWW-Authenticate: Basic"), f"{NOT_OURS}, it answers 401", False),
        (_http("400 Bad Request", b"The plain HTTP request was sent to HTTPS port"), f"{NOT_OURS}, it answers 400", False),
        (_http("429 Too Many", b"slow", "Retry-After: 7"), "answers 429, too many requests: try again in 7 s", False),
        (_http("429 Too Many", b"slow", "Retry-After: Thu, 01 Jan"), "try again later", False),
        (_http("429 Too Many", _error("BUSY", "no"), "Retry-After: 9"), "BUSY: no: try again in 9 s", False),
        (_http("502 Bad Gateway", b"<html>"), "answers 502: check that 'tidegate serve' runs behind it", True),
        (_http("504 Gateway Timeout", b"", "Retry-After: 3"), "try again in 3 s", True),
        (_http("400 Bad", _error("BAD\x1b[2J", "a\x1b]0;title\x07\nb\u202ec")), "BAD [2J: a ]0;title  b c", False),
        (_http("400 Bad", _error("BAD", "x" * 100_000)), "x" * 1000, False),
        (_http("500 Fault", _error("INTERNAL", "the control plane failed")), "INTERNAL: the control plane failed", False),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "does not speak HTTP", True),
        (b"\x15\x03\x03\x00\x02\x02\x32", "does not speak HTTP: give another URL, with https:// if the server uses TLS", True),
        (b"", "closed the connection without a response", True),
        (_http("200 OK", b"{}").replace(b"Length: 2", b"Length: 200"), "its response is incomplete", True),
        (None, "did not respond within 0.3 s: start it with 'tidegate serve'", True),
    ],
)  # fmt: skip
def test_servers_that_are_not_a_control_plane(
    reply: bytes | None,
    said: str,
    unknown: bool,
    foreign_server: Callable[..., ForeignServer],
    run: Runner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(control_plane, "TIMEOUT_S", 0.3)
    other = foreign_server(reply)
    way = run.way("--url", other.url, TIDEGATE_ADMIN__TOKEN=TOKEN)
    looked, made = way.refused("list"), way.refused("create", "--tier", "free")
    for message in (looked, made):
        assert said in message, message
        assert len(message) < 1200
        assert message.isprintable()
    assert UNKNOWN not in looked
    assert (UNKNOWN in made) == unknown, made


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"])
def test_a_redirect_is_not_followed_with_the_token(
    status: str, foreign_server: Callable[..., ForeignServer], run: Runner
) -> None:
    target = foreign_server(_http("200 OK", b'{"items": [], "next": null}'))
    location = f"Location: {target.url}/admin/v1/api-keys?token=\x1b[2J"
    way = run.way("--url", foreign_server(_http(status, b"", location)).url, TIDEGATE_ADMIN__TOKEN=TOKEN)
    for arguments in (("list",), ("create", "--tier", "free")):
        message = way.refused(*arguments)
        assert "redirects to http://127.0.0.1, and the token is not sent to other addresses" in message
        assert "set the control plane's own address with --url" in message
    assert target.requests == []
    for location in ("/elsewhere", "http://[", "javascript:x"):
        way = run.way("--url", foreign_server(_http(status, b"", f"Location: {location}")).url, TIDEGATE_ADMIN__TOKEN=TOKEN)
        assert "redirects, and the token is not sent to other addresses" in way.refused("list")


def test_a_list_that_would_never_end_ends(foreign_server: Callable[..., ForeignServer], run: Runner) -> None:
    endless = foreign_server(_http("200 OK", b'{"items": [], "next": "000000000000000000000000"}'))
    assert run.way("--url", endless.url, TIDEGATE_ADMIN__TOKEN=TOKEN).keys("list").code == 0
    assert len(endless.requests) == 1


def test_a_record_cannot_move_the_cursor(foreign_server: Callable[..., ForeignServer], run: Runner) -> None:
    record = RECORD.replace(b'"name": ""', b'"name": "a\\u001b[2J\\nb"').replace(b'"tier": "t"', b'"tier": "\\u001bt"')
    way = run.way(
        "--url", foreign_server(_http("200 OK", b'{"items": [' + record + b'], "next": null}')).url, TIDEGATE_ADMIN__TOKEN=TOKEN
    )
    for command in ("list", "show 000000"):
        ran = way.keys(*command.split())
        assert (ran.code, "\x1b" in ran.out) == (0, False)
        assert "a [2J b" in ran.out
    assert way.told("list")[0]["name"] == "a\x1b[2J\nb", "JSON is exact"


def test_ctrl_c_does_not_wait_for_an_answer(foreign_server: Callable[..., ForeignServer], tmp_path: Path) -> None:
    silent = foreign_server(None)
    # As `tidegate keys list`, with an hour of patience: whoever waits for the answer does not end within this test.
    program = "from tidegate.cli import control_plane, main; control_plane.TIMEOUT_S = 3600; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "keys", "list", "--url", silent.url],
        cwd=tmp_path,
        env={**os.environ, "TIDEGATE_ADMIN__TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: silent.requests, what="it has asked")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode not in (0, 2)
    assert "Traceback" not in err


@pytest.fixture
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def test_tls_and_what_goes_over_it(server: Any, api: Runner, authority: Authority) -> None:
    front = TlsProxy(authority, server.admin_port)
    try:
        url = f"https://localhost:{front.port}"
        trusting = api.way("--url", url, **api.environment, SSL_CERT_FILE=str(authority.ca))
        assert len(trusting.told("list")) == 2
        made = trusting.told("create", "--tier", "free")
        front.heard = b""
        assert trusting.told("show", made["api_key"])["id"] == made["id"]
        assert trusting.told("show", HEX_KEY)["name"] == "all hex digits"
        assert trusting.told("revoke", made["api_key"], "--reason", "leaked")["status"] == "revoked"
        assert trusting.told("delete", made["api_key"])["id"] == made["id"]
        trusting.refused("show", FILE_KEY[:-1] + "9")
        assert made["id"].encode() in front.heard
        for api_key in (made["api_key"], HEX_KEY, FILE_KEY[:-1]):
            assert api_key.encode() not in front.heard, "only the id of a key goes over the wire"

        strange = api.way("--url", url, **api.environment)
        message = strange.refused("create", "--tier", "free")
        assert "its certificate is not trusted" in message
        assert "SSL_CERT_FILE" in message
        assert UNKNOWN not in message, "nothing was sent"
        other_name = api.way("--url", f"https://127.0.0.2:{front.port}", **trusting.environment)
        assert other_name.keys("list").code == 2
        plain = api.way("--url", f"http://localhost:{front.port}", **api.environment)
        assert "with https:// if the server uses TLS" in plain.refused("list")
    finally:
        front.close()
