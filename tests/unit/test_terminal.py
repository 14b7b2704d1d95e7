"""What commands print: no text controls the terminal, no reader that has gone and no narrow encoding makes them fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.moments import PATIENCE_S
from tests.servers import forked
from tidegate.errors import PolicyError, SettingsError
from tidegate.policy.toml_reader import parse_policy
from tidegate.settings_loader import load_settings
from tidegate.tools.terminal import json_text

HOSTILE = "a\x1b[2J\x1b]0;owned\x07\x9b31m\u202eb\nok: forged\r\x00"
ALLOWED = {"allowed": True, "limit": 9, "remaining": 8, "reset_after": 1.0, "retry_after": None, "degraded": False}
POLICY = """
[[tiers]]
name = "public"
  [[tiers.rules]]
  endpoint = "/donn%C3%A9es/{id}/a/very/long/path/that/no/terminal/of/eighty/columns/shows/in/one/line/of/its/own"
  limits = ["3/minute"]
[anonymous]
tier = "public"
"""


def run(*arguments: str, directory: Path, command: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command as a shell starts it; `command` goes behind it, such as a pipe. Without one, and without variables that the
    interpreter reads, no shell is needed, and the process is forked."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TIDEGATE_", "PYTHON", "COLUMNS"))}
    if not command and not any(name.startswith("PYTHON") for name in environment):
        return forked.run_for_bytes(arguments, PATIENCE_S, directory, clean | environment)
    line = ["bash", "-o", "pipefail", "-c", f'"$@" {command}', "-", sys.executable, "-m", "tidegate", *arguments]
    return subprocess.run(line, cwd=directory, env=clean | environment, capture_output=True, timeout=60, check=False)


class _Hostile(BaseHTTPRequestHandler):
    """A server that answers whatever it is asked with text that would control a terminal."""

    answer: Any = None
    status = 200

    def do_GET(self) -> None:
        body = json.dumps(self.answer).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hostile() -> Iterator[tuple[type[_Hostile], str]]:
    handler = type("Handler", (_Hostile,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield handler, f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def is_harmless(output: bytes) -> bool:
    text = output.decode()
    return all(character.isprintable() or character == "\n" for character in text) and "\nok: forged" not in text


@pytest.mark.parametrize(
    ("status", "answer", "code"),
    [
        (200, ALLOWED | {"rule": HOSTILE, "tier": HOSTILE}, 0),
        (200, ALLOWED | {"rule": None, "limit": None, "tier": HOSTILE}, 0),
        (429, ALLOWED | {"rule": HOSTILE, "tier": "t", "allowed": False}, 1),
        (401, {"error": {"code": HOSTILE, "message": HOSTILE}}, 2),
        (500, {"error": HOSTILE}, 2),
        (200, {"allowed": HOSTILE}, 2),
        (200, {"hello": "world"}, 2),
    ],
)
def test_a_server_s_texts_do_not_control_the_terminal(
    hostile: tuple[type[_Hostile], str], tmp_path: Path, status: int, answer: Any, code: int
) -> None:
    handler, address = hostile
    handler.answer, handler.status = answer, status
    options = ("--json",) if status == 401 else ()
    ran = run("check", "-", "GET", "/", "--url", f"http://{address}", *options, directory=tmp_path)
    assert ran.returncode == code, ran.stderr
    assert is_harmless(ran.stdout + ran.stderr), ran
    assert b"Traceback" not in ran.stderr


def test_texts_in_the_output_of_doctor_do_not_control_the_terminal(hostile: tuple[type[_Hostile], str], tmp_path: Path) -> None:
    handler, address = hostile
    handler.answer = {"components": {HOSTILE: {"status": "unhealthy", "reason": HOSTILE}}}
    environment = {"TIDEGATE_SERVER__HTTP": address, "TIDEGATE_SERVER__ADMIN": "", "TIDEGATE_SERVER__GRPC": ""}
    ran = run("doctor", directory=tmp_path, **environment)
    assert ran.returncode == 1
    assert is_harmless(ran.stdout + ran.stderr), ran
    assert b"forged" in ran.stdout


@settings(max_examples=50)
@given(st.text())
def test_json_stays_the_same_json(text: str) -> None:
    for encoding in ("utf-8", "ascii", "latin-1", None):
        shown = json_text(json.dumps({"a": [text]}, ensure_ascii=False, indent=2), encoding)
        assert json.loads(shown) == {"a": [text]}
        assert all(character.isprintable() or character == "\n" for character in shown)
        if encoding:
            shown.encode(encoding)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY, encoding="utf-8")
    (tmp_path / "tidegate.toml").write_text('[catalog]\nurl = "sqlite:///t.db"\n')
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "--dau", "10M"),
        ("policy", "example"),
        ("--help",),
        ("simulate", "access.log", "-p", "tidegate.policy.toml"),
    ],
)
def test_a_reader_that_goes_is_no_failure(policy: Path, arguments: tuple[str, ...]) -> None:
    (policy / "access.log").write_text('10.0.0.1 - - [14/Nov/2023:22:13:20 +0000] "GET /a HTTP/1.1" 200 12\n')
    ran = run(*arguments, directory=policy, command="| true", PYTHONUNBUFFERED="1" if arguments[0] == "plan" else "")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"", b"")


def test_a_reader_that_goes_leaves_the_exit_code(policy: Path) -> None:
    assert run("policy", "check", "missing.toml", directory=policy, command="2>&1 | true").returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
@pytest.mark.parametrize(
    ("arguments", "unbuffered"), [(("plan", "--dau", "10M"), ""), (("policy", "example"), "1"), (("--version",), "")]
)
def test_a_full_disk_is_one_sentence(policy: Path, arguments: tuple[str, ...], unbuffered: str) -> None:
    ran = run(*arguments, directory=policy, command="> /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert (ran.returncode, ran.stderr) == (2, b"tidegate: the output cannot be written: No space left on device\n")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_character_that_the_terminal_lacks_is_shown_as_an_escape(policy: Path, encoding: str) -> None:
    log = '{"time":1700000000,"ip":"10.0.0.1","path":"/donn\u00e9es/\u2603"}\n{"time":1}\u2603\n'
    (policy / "access.log").write_text(log, encoding="utf-8")
    (policy / "bad.toml").write_text('[[tiers]]\nname = "\u2603"\n', encoding="utf-8")
    for arguments, code in (
        (("simulate", "access.log", "-p", "tidegate.policy.toml"), 0),
        (("simulate", "access.log", "-p", "tidegate.policy.toml", "--json"), 0),
        (("policy", "check", "bad.toml", "--json"), 2),
    ):
        ran = run(*arguments, directory=policy, PYTHONIOENCODING=encoding)
        assert ran.returncode == code, ran.stderr
        assert b"Traceback" not in ran.stderr
        text = ran.stdout.decode(encoding)
        if "--json" in arguments:
            json.loads(text)


def test_a_piped_table_has_each_row_in_one_line(policy: Path) -> None:
    (policy / "access.log").write_text('{"time":1700000000,"ip":"10.0.0.1","path":"/donn\u00e9es/7"}\n')
    plan = run("plan", "--dau", "10M", directory=policy, COLUMNS="40").stdout.decode()
    longest = max(plan.splitlines(), key=len)
    assert len(longest) > 100
    assert all(line == line.rstrip() or len(line) < 1000 for line in plan.splitlines())
    told = run("simulate", "access.log", "-p", "tidegate.policy.toml", directory=policy).stdout.decode()
    (row,) = [line for line in told.splitlines() if line.startswith("/donn%C3%A9es/{id}")]
    assert "its/own" in row
    assert "public" in row


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    file = tmp_path / "tidegate.toml"
    file.write_text('\ufeff[server]\nhttp = "127.0.0.1:9"\n', encoding="utf-8")
    assert load_settings(file, {}).server.http == "127.0.0.1:9"
    file.write_text("\ufeff[server]\nhttp = \n", encoding="utf-8")
    with pytest.raises(SettingsError, match="line 2"):
        load_settings(file, {})


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[[tiers]]\nname = "a b"\n', 2),
        ('[[tiers]]\nname = "a"\n[[tiers.rules]]\nendpoint = "x"\nlimits = ["1/minute"]\n', 4),
        ('tiers = 3\n[anonymous]\ntier = "x"\n', 1),
        ("[[tiers]]\nnme = 1\n", 2),
    ],
)
def test_lines_are_right_after_a_byte_order_mark(text: str, line: int) -> None:
    for mark in ("", "\ufeff"):
        with pytest.raises(PolicyError) as refused:
            parse_policy(mark + text)
        assert refused.value.line == line
