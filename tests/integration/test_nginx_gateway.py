"""deploy/nginx/gateway.conf in a real nginx, in front of Tidegate and of an API that says what reached it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cases.doors import CASES, FREE, POLICY, Answer
from tests.conftest import Serve
from tests.moments import PATIENCE_S, wait_until
from tests.raw_http import RawAnswer, ask
from tests.servers.api import Api
from tests.servers.deployed import configured, gateway
from tests.servers.nginx import Nginx
from tests.servers.ports import free_port
from tidegate.doors.http import DataPlane
from tidegate.errors import ApiKeyExpired, ApiKeyRevoked, BadRequest, InvalidApiKey, MissingApiKey, TooManyUnknownKeys
from tidegate.gate.gate import Gate

UNHURRIED = "[[tiers]]\nname = 'free'\n  [[tiers.rules]]\n  endpoint = '/*'\n  limits = ['100000/minute']\n" + (
    f"[[api_keys]]\nkey = '{FREE}'\ntier = 'free'\n"
)
ITEM = "/api/v1/a"
KEY = {"X-API-Key": FREE}
LIMIT_HEADERS = ("ratelimit-policy", "ratelimit", "x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset")


@pytest.fixture
def api() -> Iterator[Api]:
    with Api() as api:
        yield api


@pytest.fixture
def start(api: Api) -> Iterator[Callable[..., Nginx]]:
    """Starts a gateway with these arguments; it ends with the test, before the API."""
    started: list[Nginx] = []

    def start(*arguments: Any, **options: Any) -> Nginx:
        made = gateway(*arguments, api=api.port, **options)
        started.append(made)
        made.start()
        return made

    yield start
    for each in started:
        each.stop()


@pytest.fixture
def tidegates(tmp_path: Path) -> Iterator[Callable[..., Serve]]:
    """Starts instances, each in a directory of its own."""
    started: list[Serve] = []

    def start(policy: str = POLICY, **environment: str) -> Serve:
        directory = tmp_path / str(len(started))
        directory.mkdir()
        (directory / "tidegate.policy.toml").write_text(policy)
        server = Serve(directory, **environment)
        started.append(server)
        server.wait_ready()
        return server

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGCONT)
        server.stop()


@pytest.mark.parametrize("name", CASES)
async def test_the_gateway_gives_the_answers_of_every_door(
    name: str, gate: Gate, listen: Callable[..., Any], start: Callable[..., Nginx], api: Api
) -> None:
    if any(asked.cost != 1 for asked, _ in CASES[name]):
        pytest.skip("every request counts as one")
    url = await listen(DataPlane(gate, {}))
    nginx = await asyncio.to_thread(start, [int(url.rpartition(":")[2])])
    nginx.add("set_real_ip_from 127.0.0.1; real_ip_header X-Forwarded-For;")
    nginx.stop()
    await asyncio.to_thread(nginx.start)
    for number, (asked, expected) in enumerate(CASES[name]):
        headers = {"X-Forwarded-For": asked.ip} | ({} if asked.api_key is None else {"X-API-Key": asked.api_key})
        reached = len(api.received)
        # nginx itself answers 400 to a method in lower case.
        answer = await asyncio.to_thread(ask, nginx.port, asked.path, asked.method.upper(), headers)
        assert _answer(answer, expected) == expected, f"step {number}: {asked}"
        assert len(api.received) - reached == (1 if expected.status == 200 else 0)
        if expected.status == 200:
            seen = api.received[-1]
            assert (seen["path"], seen["method"]) == (asked.path, asked.method.upper())
        else:
            body = answer.json()["error"]
            assert body["code"] == answer.headers["x-tidegate-error"]
            assert body["message"]
            assert answer.headers["cache-control"] == "no-store"


def _answer(answer: RawAnswer, expected: Answer) -> Answer:
    """What the client was told; rule and tier are not, and are taken as expected."""
    code = answer.headers.get("x-tidegate-error")
    if code not in (None, "RATE_LIMIT_EXCEEDED"):
        return Answer(answer.status, code=code)
    limit, remaining = (answer.headers.get(f"x-ratelimit-{name}") for name in ("limit", "remaining"))
    return Answer(answer.status, limit and int(limit), remaining and int(remaining), expected.rule, expected.tier)


def test_every_answer_has_the_limits_and_a_denial_its_retry(tidegates: Callable[..., Serve], start: Callable[..., Nginx]) -> None:
    nginx = start([tidegates().port])
    answers = [httpx.get(nginx.url + ITEM, headers=KEY) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    for answer in answers:
        assert all(answer.headers.get(name) for name in LIMIT_HEADERS)
        assert answer.headers.get_list("x-ratelimit-limit") == ["3"]  # not the API's own 7
    assert "retry-after" not in answers[0].headers
    denied = answers[-1]
    assert 1 <= int(denied.headers["retry-after"]) <= 60
    assert denied.json() == {
        "error": {
            "code": "RATE_LIMIT_EXCEEDED",
            "message": "rate limit exceeded: wait until Retry-After",
            "details": {"limit": 3, "remaining": 0, "reset": int(denied.headers["x-ratelimit-reset"])},
        }
    }
    body = httpx.post(nginx.url + "/login", headers=KEY, content=b"x" * 100_000)
    assert body.json()["body"] == "x" * 100_000


def test_too_many_unknown_keys_get_a_text_of_their_own(tidegates: Callable[..., Serve], start: Callable[..., Nginx]) -> None:
    """Ten guesses, so that a minute which ends in between does not matter."""
    nginx = start([tidegates(TIDEGATE_CATALOG__UNKNOWN_KEYS_PER_MINUTE="1").port])
    guesses = [
        httpx.get(nginx.url + ITEM, headers={"X-API-Key": f"demo-guess-key-{number:04}"}, timeout=30) for number in range(10)
    ]
    assert {guess.status_code for guess in guesses} == {401, 429}
    refused = next(guess for guess in guesses if guess.status_code == 429)
    assert refused.headers["x-tidegate-error"] == "API_KEY_LOOKUPS_EXCEEDED"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"] == {
        "code": "API_KEY_LOOKUPS_EXCEEDED",
        "message": "too many unknown API keys were sent from your address: wait until Retry-After",
        "details": {},
    }


def test_every_rejection_of_a_caller_has_a_text() -> None:
    """A code without one would get the text of a failure: try again later."""
    texts = configured("nginx/tidegate-answers.conf", {}).partition("$tidegate_message {")[2].partition("}")[0]
    refusals = (MissingApiKey, InvalidApiKey, TooManyUnknownKeys, ApiKeyRevoked, ApiKeyExpired, BadRequest)
    for code in ("RATE_LIMIT_EXCEEDED", "HEADERS_TOO_LARGE", *(refusal.code for refusal in refusals)):
        assert re.search(rf'^ +{code} +".+";$', texts, re.MULTILINE), code


def test_nginx_reads_the_configuration_without_a_warning(start: Callable[..., Nginx]) -> None:
    for edge in (False, True):
        said = start([free_port(), free_port()], edge=edge).check()
        assert "warn" not in said


def test_what_operators_ask_is_not_to_be_had(tidegates: Callable[..., Serve], start: Callable[..., Nginx], api: Api) -> None:
    server = tidegates()
    nginx = start([server.port])
    for path in ("/_tidegate", "/admin", "/admin/v1/tiers", "/ADMIN/", "/metrics", "/health", "/livez", "/readyz", "//metrics",
                 "/x/../metrics", "/%6detrics", "/metrics?x", "/admin%2fv1"):  # fmt: skip
        assert ask(nginx.port, path, headers=KEY).status == 404, path
    assert api.received == []
    # Tidegate's own paths lead to the API like any other.
    assert httpx.get(nginx.url + "/v1/check", headers=KEY).json()["path"] == "/v1/check"
    said = httpx.get(f"{server.url}/metrics").text
    assert "rate_limiter_requests_total{" in said


def test_clients_read_their_own_usage_and_nothing_else(
    tidegates: Callable[..., Serve], start: Callable[..., Nginx], api: Api
) -> None:
    policy = UNHURRIED + "[[tiers]]\nname = 'secret'\nquotas = ['7/month']\n"
    server = tidegates(policy.replace("  [[tiers.rules]]", "quotas = ['1000/month']\n  [[tiers.rules]]", 1))
    nginx = start([server.port])
    # Off as shipped: the path is the API's.
    assert httpx.get(nginx.url + "/usage", headers=KEY).json()["path"] == "/usage"
    nginx.change({"# include snippets/tidegate-usage.conf;": "include snippets/tidegate-usage.conf;"})
    nginx.stop()
    nginx.start()
    api.received.clear()

    def used(query: str = "", **headers: str) -> tuple[str, int, int, str]:
        answer = httpx.get(f"{nginx.url}/usage{query}", headers={**KEY, **headers})
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        assert answer.headers["cache-control"] == "no-store"
        (window,) = answer.json()["rules"][0]["windows"]
        return answer.json()["tier"], window["limit"], window["used"], window["period"]

    mine = ("free", 1000, 1, "month")
    assert used() == mine, "the one request to the API"
    # A trusted gateway may name a tier and attributes in the query: a client must not.
    assert used("?tier=secret&attribute=user=42") == mine, "reading it is not charged"
    assert used(**{"X-Forwarded-For": "198.51.100.7", "X-User-Id": "42", "Authorization": "Bearer x"}) == mine
    unknown = httpx.get(nginx.url + "/usage", headers={"X-API-Key": "demo-unknown-key-1"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (401, "INVALID_API_KEY")
    assert httpx.head(nginx.url + "/usage", headers=KEY).status_code == 200
    posted = httpx.post(nginx.url + "/usage", headers=KEY, json={"tier": "secret"})
    assert (posted.status_code, posted.json()["error"]["code"]) == (405, "METHOD_NOT_ALLOWED")
    assert api.received == []
    others = ["/usage/", "/usage/v1/check", "/USAGE", "/v1/usage"]
    assert [ask(nginx.port, path, headers=KEY).status for path in others] == [200] * 4
    assert [each["path"] for each in api.received] == others, "they are the API's"

    def refused(status: int) -> httpx.Response | None:
        answer = httpx.get(nginx.url + "/usage", headers=KEY)
        return answer if answer.status_code == status else None

    assert wait_until(lambda: refused(429)).json()["error"]["code"] == "TOO_MANY_REQUESTS"
    server.stop()
    assert wait_until(lambda: refused(503)).json()["error"]["code"] == "LIMITER_UNAVAILABLE"


def test_connections_to_tidegate_are_kept(tidegates: Callable[..., Serve], start: Callable[..., Nginx]) -> None:
    server = tidegates(UNHURRIED)
    nginx = start([server.port])
    for _ in range(100):
        assert ask(nginx.port, ITEM, headers=KEY).status == 200
    # Those that were closed by us stand there for a minute.
    ends = re.findall(rf" 0100007F:{server.port:04X} ", Path("/proc/net/tcp").read_text())
    assert len(ends) < 20


async def test_a_killed_instance_costs_no_client_an_error(tidegates: Callable[..., Serve], start: Callable[..., Nginx]) -> None:
    servers = [await asyncio.to_thread(tidegates, UNHURRIED) for _ in range(2)]
    nginx = await asyncio.to_thread(start, [server.port for server in servers])
    statuses: list[int] = []
    ended = asyncio.Event()

    async def load(client: httpx.AsyncClient) -> None:
        while not ended.is_set():
            statuses.append((await client.get(ITEM, headers=KEY)).status_code)

    async with httpx.AsyncClient(base_url=nginx.url, timeout=PATIENCE_S) as client:
        loads = [asyncio.create_task(load(client)) for _ in range(8)]
        await asyncio.sleep(0.5)
        servers[0].process.kill()
        await asyncio.sleep(1.5)
        ended.set()
        await asyncio.gather(*loads)
    assert len(statuses) > 50
    assert set(statuses) == {200}


@pytest.mark.parametrize("away", ["gone", "hung"])
@pytest.mark.parametrize("when_away", ["closed", "open"])
def test_one_variable_reports_what_holds_while_all_are_unavailable(
    when_away: str, away: str, tidegates: Callable[..., Serve], start: Callable[..., Nginx], api: Api
) -> None:
    servers = [tidegates(UNHURRIED) for _ in range(2)]
    nginx = start([server.port for server in servers], when_away=when_away, patient=False)
    for server in servers:
        server.process.send_signal(signal.SIGKILL if away == "gone" else signal.SIGSTOP)
    times = 8 if away == "gone" else 3  # each of those waits for both instances
    for _ in range(times):
        answer = httpx.get(nginx.url + ITEM, headers=KEY, timeout=PATIENCE_S)
        assert answer.status_code == (200 if when_away == "open" else 503)
        if when_away == "closed":
            assert answer.headers["x-tidegate-error"] == "LIMITER_UNAVAILABLE"
            assert answer.json() == {
                "error": {
                    "code": "LIMITER_UNAVAILABLE",
                    "message": "the request cannot be decided now: try again later",
                    "details": {},
                }
            }
        assert not any(name in answer.headers for name in ("x-ratelimit-remaining", "retry-after"))
    assert len(api.received) == (times if when_away == "open" else 0)


def test_what_a_rule_rejects_stays_rejected_where_the_gateway_is_open(
    tidegates: Callable[..., Serve], start: Callable[..., Nginx]
) -> None:
    strict = UNHURRIED.replace("limits =", "on_failure = 'deny'\n  limits =")
    server = tidegates(strict, TIDEGATE_COUNTERS__URL=f"redis://127.0.0.1:{free_port()}")
    answer = httpx.get(start([server.port], when_away="open").url + ITEM, headers=KEY)
    assert (answer.status_code, answer.headers["x-tidegate-error"]) == (503, "STORE_UNAVAILABLE")


def test_whatever_else_answers_in_tidegates_place_lets_nothing_pass(start: Callable[..., Nginx], api: Api) -> None:
    answers = free_port()
    for status in (302, 400, 403, 404, 405, 413, 418, 429):
        http = f"server {{ listen 127.0.0.1:{answers}; location / {{ return {status}; }} }}"
        with Nginx(http, answers):
            answer = httpx.get(start([answers], when_away="open").url + ITEM, headers=KEY)
        assert answer.status_code == 503, status
        assert answer.json()["error"]["code"] == "LIMITER_UNAVAILABLE"
    assert api.received == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may start an nginx that gives up being root")
def test_the_worker_is_not_root(start: Callable[..., Nginx]) -> None:
    nginx = start([free_port()])
    assert nginx._process is not None
    pid = nginx._process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    # It listens before it has started its worker, which then gives up being root.
    wait_until(lambda: bool(children.read_text().split()), PATIENCE_S, "the worker runs")
    worker = children.read_text().split()[0]
    status = Path(f"/proc/{worker}/status")
    wait_until(lambda: bool(re.search(r"^Uid:\t33\t", status.read_text(), re.MULTILINE)), PATIENCE_S, "the worker is www-data")
