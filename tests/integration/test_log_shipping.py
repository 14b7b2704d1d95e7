"""The shipped rsyslog configuration before a real OpenSearch: what is written arrives, once, whoever is killed."""

from __future__ import annotations

import asyncio
import base64
import http.server
import json
import os
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Serve
from tests.moments import wait_until
from tests.servers.elasticsearch import OpenSearch
from tests.servers.rsyslog import Shipper
from tests.servers.tcp_proxy import TcpProxy

DEPLOY = Path(__file__).parents[2] / "deploy/logging"
INDEX = "tidegate-logs-*"
DAY = "2026-11-25"
PATIENCE_S = 120.0
PAUSE_S = 0.4
"""Between two counts of what is stored: each refreshes the indices, which takes more CPU time than the documents."""

pytestmark = pytest.mark.timeout(600)


def install(server: OpenSearch) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TIDEGATE_LOGS_URL": server.url}
    command = [DEPLOY / "elasticsearch/install"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def running() -> Iterator[OpenSearch]:
    with OpenSearch() as server:
        yield server


@pytest.fixture
def server(running: OpenSearch) -> Iterator[OpenSearch]:
    """With the shipped template, and without logs."""
    running.call("DELETE", f"/{INDEX}?expand_wildcards=all")
    done = install(running)
    assert done.returncode == 0, done.stderr
    yield running
    if not running.alive:
        running.start()


@pytest.fixture
def shipper(server: OpenSearch) -> Iterator[Shipper]:
    with Shipper(server.url) as shipping:
        yield shipping


def line(number: int, **fields: Any) -> str:
    """As Tidegate writes one for a request."""
    return json.dumps(
        {
            "@timestamp": f"{DAY}T07:00:{number % 60:02}.{number % 1000:03}Z",
            "log.level": "info",
            "message": "denied – “free”",
            "ecs.version": "1.6.0",
            "log": {"logger": "tidegate.access"},
            "service": {"name": "tidegate", "version": "0.1.0"},
            "process": {"pid": 123},
            "http": {"request": {"id": f"r-{number}", "method": "GET"}, "response": {"status_code": 429}},
            "trace": {"id": f"{number:032x}"},
            "span": {"id": f"{number:016x}"},
            "url": {"path": "/v1/authorize"},
            "event": {"dataset": "tidegate.access", "duration": 123_000},
            "tidegate": {"tier": "free", "rule": "all", "allowed": False},
            **fields,
        },
        ensure_ascii=False,
    )


def append(path: Path, *lines: str) -> None:
    with path.open("a") as log:
        log.write("".join(f"{each}\n" for each in lines))


def arrived(server: OpenSearch) -> Counter[str]:
    """How often each request is stored."""
    return Counter(each["_source"]["http"]["request"]["id"] for each in server.documents(INDEX))


def wait_count(server: OpenSearch, expected: int, shipper: Shipper, query: str = "*") -> None:
    try:
        wait_until(lambda: server.count(INDEX, query) >= expected, PATIENCE_S, f"{expected} documents are stored", PAUSE_S)
    except TimeoutError as error:
        raise AssertionError(f"{error}: {server.count(INDEX, query)}; rsyslogd says:\n{shipper.said()}") from None
    assert server.count(INDEX, query) == expected


def test_rsyslogd_accepts_the_configuration() -> None:
    said = Shipper("http://127.0.0.1:9").check()
    assert "End of config validation run" in said
    assert "error" not in said
    assert "warning" not in said


def test_the_template_maps_what_is_searched_and_no_more(server: OpenSearch, shipper: Shipper) -> None:
    append(
        shipper.logs / "tidegate.log",
        line(1, client={"ip": "2001:db8::1"}, tidegate={"tier": "free", "allowed": False, "surprise": {"a": 1}}, surprise="x"),
    )
    wait_count(server, 1, shipper)
    (document,) = server.documents(
        INDEX, 'client.ip:"2001:db8::/32" AND tidegate.tier:free AND http.response.status_code:[400 TO 499]'
    )
    assert document["_index"] == f"tidegate-logs-{DAY}"
    assert document["_source"]["tidegate"]["surprise"] == {"a": 1}
    assert document["_source"]["host"]["hostname"]
    assert server.count(INDEX, "log.level:info AND @timestamp:[2026-11-25 TO 2026-11-25]") == 1
    mapping = server.call("GET", f"/{document['_index']}/_mapping")[document["_index"]]["mappings"]["properties"]
    assert "surprise" not in mapping
    assert "surprise" not in mapping["tidegate"]["properties"]
    assert mapping["event"]["properties"]["duration"]["type"] == "long"


def test_install_reports_that_there_is_no_retention_without_the_plugin(running: OpenSearch) -> None:
    done = install(running)
    assert done.returncode == 0
    assert "no retention: this OpenSearch has no index management plugin" in done.stderr


def test_old_days_are_deleted(running: OpenSearch) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "TIDEGATE_LOGS_URL": running.url}
        command = [DEPLOY / "elasticsearch/delete-old", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    running.call("DELETE", f"/{INDEX}")
    today = datetime.now(UTC)
    names = {days: f"tidegate-logs-{today - timedelta(days):%Y-%m-%d}" for days in (0, 4, 8, 400)}
    for name in (*names.values(), "tidegate-logs-kept", "others-2020-01-01"):
        running.call("PUT", f"/{name}")
    assert run().stdout == f"{names[400]}\n"
    assert run("6").stdout == f"{names[8]}\n"
    assert run("six").stderr == "delete-old: 'six' is no number of days\n"
    left = {each["index"] for each in running.call("GET", "/_cat/indices?format=json")}
    assert left == {names[0], names[4], "tidegate-logs-kept", "others-2020-01-01"}


def test_the_policies_keep_30_days() -> None:
    """Neither can be run here: index lifecycle is Elastic's own, and the plugin of OpenSearch is on no registry."""
    lifecycle = json.loads((DEPLOY / "elasticsearch/ilm-policy.json").read_text())["policy"]["phases"]
    assert lifecycle["delete"] == {"min_age": "30d", "actions": {"delete": {}}}
    policy = json.loads((DEPLOY / "elasticsearch/ism-policy.json").read_text())["policy"]
    states = {each["name"]: each for each in policy["states"]}
    assert states[policy["default_state"]]
    for state in states.values():
        assert all(each["state_name"] in states for each in state["transitions"])
    assert states["warm"]["transitions"] == [{"state_name": "delete", "conditions": {"min_index_age": "30d"}}]


def test_nothing_is_lost_and_nothing_doubled_while_both_sides_are_killed(server: OpenSearch, shipper: Shipper) -> None:
    log = shipper.logs / "tidegate.log"
    lines = 10_000

    def write(first: int, last: int) -> None:
        for start in range(first, last, 250):
            append(log, *(line(number) for number in range(start, min(start + 250, last))))
            time.sleep(0.02)

    writing = threading.Thread(target=write, args=(0, 4000))
    writing.start()
    wait_until(lambda: server.count(INDEX) > 0, PATIENCE_S, "the first are stored", PAUSE_S)
    server.kill()
    writing.join()
    write(4000, 7000)
    wait_until(lambda: shipper.queued() > 1_000_000, PATIENCE_S, "the queue is on disk")
    shipper.stop()
    write(7000, 8000)
    shipper.start()
    write(8000, 9000)
    server.start()
    wait_until(lambda: server.count(INDEX) > 0, PATIENCE_S, "some are stored", PAUSE_S)
    shipper.stop()
    shipper.start()
    write(9000, lines)
    wait_count(server, lines, shipper)
    assert arrived(server) == Counter(f"r-{number}" for number in range(lines))
    assert shipper.kept("failed.json") == shipper.kept("refused.json") == ""


def test_lines_that_are_not_json_are_messages(server: OpenSearch, shipper: Shipper) -> None:
    texts = [
        "Traceback (most recent call last):",
        '  File "x.py", line 1, in <module>',
        '{"@timestamp": "2026-11-25T07:00:00Z", "message": "cut off in the mid',
        "[1, 2]",
        "42",
        '"text"',
        '{"message": "a"} {"message": "b"}',
        "\ttabs \\ and ‘quotes’ \x1b[31m",
    ]
    append(shipper.logs / "tidegate.log", *texts)
    with (shipper.logs / "tidegate.log").open("ab") as log:
        log.write(b"\n\xff\xfe no utf-8\n")
    wait_count(server, len(texts) + 1, shipper, "event.dataset:tidegate.text")
    found = [each["_source"] for each in server.documents(INDEX)]
    assert {each["message"] for each in found} == {*texts, "   no utf-8"}
    for each in found:
        assert set(each) == {"@timestamp", "message", "event", "service", "ecs", "host"}
        assert each["service"] == {"name": "tidegate"}


def test_odd_json_is_stored_too(server: OpenSearch, shipper: Shipper) -> None:
    long = "x" * 500_000
    append(
        shipper.logs / "tidegate.log",
        json.dumps({"message": "no time"}),
        line(1, **{"@timestamp": "yesterday/../_all"}),
        line(2, **{"@timestamp": "2025-02-29T00:00:00Z"}),
        line(3, error={"type": "ValueError", "message": long, "stack_trace": long}),
        line(4, event={"dataset": "tidegate.access", "duration": "short"}, message="newline \n, tab \t"),
        line(5, big=2**63 - 1, small=1.0e-7, none=None, empty={}),
        line(6, url={"path": "/" + "y" * 40_000}),
    )
    wait_count(server, 7, shipper)
    found = {each["_source"]["http"]["request"]["id"]: each for each in server.documents(INDEX, "http.request.id:*")}
    received = found["r-1"]["_source"]["@timestamp"]
    assert abs(datetime.fromisoformat(received) - datetime.now(UTC)) < timedelta(hours=1)
    assert found["r-1"]["_index"] == f"tidegate-logs-{received[:10]}"
    assert found["r-2"]["_index"] == "tidegate-logs-2025-02-29"
    assert found["r-3"]["_source"]["error"]["stack_trace"] == long
    assert found["r-4"]["_source"]["message"] == "newline \n, tab \t"
    assert {key: found["r-5"]["_source"][key] for key in ("big", "small", "none", "empty")} == {
        "big": 2**63 - 1,
        "small": 1.0e-7,
        "none": None,
        "empty": {},
    }
    assert server.count(INDEX, "message:time") == 1
    assert shipper.kept("failed.json") == shipper.kept("refused.json") == ""


def test_what_the_server_rejects_is_kept_with_the_reason_and_sent_again(server: OpenSearch, shipper: Shipper) -> None:
    append(shipper.logs / "tidegate.log", line(1), line(2, http="not an object"), line(3))
    wait_count(server, 2, shipper)
    wait_until(lambda: shipper.kept("refused.json") != "", PATIENCE_S, "the refused one is kept")
    (refused,) = map(json.loads, shipper.kept("refused.json").splitlines())
    assert refused["reply"]["status"] == 400
    assert "http" in refused["reply"]["error"]["reason"]
    assert refused["document"]["http"] == "not an object"

    done = shipper.resend()
    assert done.returncode == 1
    assert "still not accepted: 1" in done.stderr
    assert json.loads(shipper.kept("refused.json")) == refused

    server.call("DELETE", "/_index_template/tidegate-logs")
    server.call("DELETE", f"/{INDEX}")
    done = shipper.resend()
    assert (done.returncode, done.stderr) == (0, "")
    assert [each["_source"]["http"] for each in server.documents(INDEX)] == ["not an object"]
    assert shipper.kept("refused.json") == ""


def test_a_server_that_is_too_busy_is_retried(server: OpenSearch, shipper: Shipper) -> None:
    log = shipper.logs / "tidegate.log"
    append(log, line(0))
    wait_count(server, 1, shipper)
    # What a full disk brings about: 429 for each document.
    server.call("PUT", f"/{INDEX}/_settings", {"index.blocks.read_only_allow_delete": True})
    append(log, *(line(number) for number in range(1, 500)))
    time.sleep(3)
    assert server.count(INDEX) == 1
    server.call("PUT", f"/{INDEX}/_settings", {"index.blocks.read_only_allow_delete": None})
    wait_count(server, 500, shipper)
    assert arrived(server) == Counter(f"r-{number}" for number in range(500))
    assert shipper.kept("failed.json") == shipper.kept("refused.json") == ""


class Refusing(http.server.ThreadingHTTPServer):
    """Answers every bulk request with the same; what it was asked as whom is kept."""

    def __init__(self, status: int, body: str) -> None:
        self.authorizations: list[str | None] = []
        refusing = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(200, "green")

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                refusing.authorizations.append(self.headers["Authorization"])
                self._answer(status, body)

            def _answer(self, code: int, text: str) -> None:
                self.send_response(code)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: object) -> None:
                """Says nothing."""

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.mark.parametrize(
    ("status", "body", "file"),
    [
        (401, '{"error": {"type": "security_exception", "reason": "who are you?"}, "status": 401}', "failed.json"),
        (503, '{"error": {"type": "cluster_block_exception", "reason": "no master"}, "status": 503}', "failed.json"),
        (502, "<html>Bad Gateway</html>", "unanswered.json"),
    ],
    ids=["401", "503", "502 of a proxy"],
)
def test_whole_requests_that_are_rejected_are_kept_and_sent_again(server: OpenSearch, status: int, body: str, file: str) -> None:
    requests = {f"r-{number}" for number in range(20)}
    with Refusing(status, body) as refusing:
        thread = threading.Thread(target=refusing.serve_forever, args=(0.05,))
        thread.start()
        shipper = Shipper(refusing.url, user="tidegate-shipper", password="p:ss-word")
        try:
            with shipper:
                append(shipper.logs / "tidegate.log", *(line(number) for number in range(20)))
                wait_until(lambda: all(each in shipper.kept(file) for each in requests), PATIENCE_S, "they are kept")
        finally:
            refusing.shutdown()
            thread.join()
    assert refusing.authorizations[0] == f"Basic {base64.b64encode(b'tidegate-shipper:p:ss-word').decode()}"
    shipper.send_to(server.url)
    done = shipper.resend()
    assert (done.returncode, done.stderr) == (0, "")
    assert arrived(server) == Counter(requests)
    assert shipper.kept(file) == ""


def test_a_password_that_rsyslogd_does_not_take_is_reported_at_once() -> None:
    shipper = Shipper("http://127.0.0.1:9", user="tidegate-shipper", password="with space")
    with pytest.raises(RuntimeError, match="'pwd' contains whitespace"):
        shipper.start()


def test_the_log_can_be_cut(server: OpenSearch, shipper: Shipper) -> None:
    log = shipper.logs / "tidegate.log"
    append(log, *(line(number) for number in range(300)))
    wait_count(server, 300, shipper)
    shutil.copy(log, shipper.logs / "tidegate.log.1")
    os.truncate(log, 0)
    append(log, *(line(number) for number in range(300, 500)))
    wait_count(server, 500, shipper)
    shipper.stop()
    shipper.start()
    append(log, line(500))
    wait_until(lambda: "r-500" in arrived(server), PATIENCE_S, "what comes last", PAUSE_S)
    # imfile misplaces the first line after a cut: read again, it has another id.
    counts = arrived(server)
    assert counts.pop("r-300") in (1, 2)
    assert counts == Counter(f"r-{number}" for number in range(501) if number != 300)


async def test_a_full_queue_waits(server: OpenSearch) -> None:
    def fill_and_drain(proxy: TcpProxy) -> None:
        with Shipper(f"http://127.0.0.1:{proxy.port}", changes={'"2000000"': '"3000"'}) as shipper:
            append(shipper.logs / "tidegate.log", *(line(number) for number in range(9000)))
            wait_until(lambda: shipper.queued() > 2_000_000, PATIENCE_S, "the queue fills")
            time.sleep(3)  # longer than rsyslog's usual patience with a full queue
            assert shipper.queued() < 5_000_000
            assert server.count(INDEX) == 0
            proxy.refuse = False
            wait_count(server, 9000, shipper)
            assert arrived(server) == Counter(f"r-{number}" for number in range(9000))

    # For rsyslogd a server that closes every connection is as a dead one, and OpenSearch takes long to start once more.
    async with TcpProxy(server.port) as proxy:
        proxy.refuse = True
        await asyncio.to_thread(fill_and_drain, proxy)


def test_tidegate_itself(server: OpenSearch, shipper: Shipper, serve: Callable[..., Serve]) -> None:
    """Its stderr goes to the file, as the systemd unit has it."""
    instance = serve("--demo", TIDEGATE_COUNTERS__URL="redis://127.0.0.1:1")  # something to complain of
    _, _, said = instance.stop()
    lines = [each for each in said.splitlines() if each]
    assert lines
    append(shipper.logs / "tidegate.log", *lines)
    wait_count(server, len(lines), shipper)
    found = [each["_source"]["message"] for each in server.documents(INDEX)]

    def message(text: str) -> str:
        try:
            return str(json.loads(text)["message"])
        except ValueError:
            return text

    assert sorted(found) == sorted(map(message, lines))
