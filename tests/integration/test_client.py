"""The client, blocking and on asyncio, at the doors' cases and at a real `tidegate serve`."""

from __future__ import annotations

import asyncio
import logging
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.cases.doors import CASES, EXPIRED, FREE, REVOKED, TIGHT, Answer
from tests.integration.client_driver import PATIENT_S, POLICY, ClientDriver
from tests.servers.tcp_proxy import TcpProxy
from tidegate import (
    ApiKeyExpired,
    ApiKeyRevoked,
    BadRequest,
    Check,
    Gate,
    InvalidApiKey,
    LimiterUnavailable,
    SettingsError,
    TidegateError,
)
from tidegate.client import AsyncClient, BreakerOptions, Client, LimitRequest
from tidegate.doors.http import DataPlane


@pytest.mark.parametrize("name", CASES)
async def test_the_doors_cases(
    name: str, gate: Gate, listen: Callable[..., Any], new_client: Callable[..., ClientDriver]
) -> None:
    asker = new_client(await listen(DataPlane(gate, {})))
    for number, (ask, expected) in enumerate(CASES[name]):
        try:
            told = await asker.check(ask.path, ask.method, api_key=ask.api_key, ip=ask.ip, cost=ask.cost)
            answer = Answer(told.status, told.limit, told.remaining, told.rule, told.tier)
            assert not told.failed
            assert ("ratelimit" in dict(told.headers)) == (expected.limit is not None)
            assert [quota.remaining for quota in told.quotas if quota.remaining is not None] == [expected.remaining][
                : len(told.quotas)
            ]
        except TidegateError as error:
            answer = Answer(error.status, code=error.code)
        assert answer == expected, f"step {number}: {ask}"


@pytest.mark.parametrize("name", CASES)
async def test_the_doors_cases_as_batches(
    name: str, gate: Gate, listen: Callable[..., Any], new_client: Callable[..., ClientDriver]
) -> None:
    asker = new_client(await listen(DataPlane(gate, {})))
    steps = [(ask, expected) for ask, expected in CASES[name] if expected.code != "BAD_REQUEST"]
    told = await asker.check_many([Check.of(ask.path, ask.method, ask.api_key, ask.ip, ask.cost) for ask, _ in steps])
    assert [
        Answer(one.status, code=one.code)
        if isinstance(one, TidegateError)
        else Answer(one.status, one.limit, one.remaining, one.rule, one.tier)
        for one in told
    ] == [expected for _, expected in steps]


async def test_a_key_that_is_not_utf8(gate: Gate, listen: Callable[..., Any], new_client: Callable[..., ClientDriver]) -> None:
    asker = new_client(await listen(DataPlane(gate, {})))
    with pytest.raises(InvalidApiKey):
        await asker.check("/api/v1/a", api_key="half \ud800 of one")
    told = await asker.check_many([Check.of("/api/v1/a", api_key=key) for key in ("\udc80", FREE)])
    assert [type(one).__name__ for one in told] == ["InvalidApiKey", "Answer"]
    with pytest.raises(BadRequest, match="path"):
        await asker.check("/\ud800", ip="198.51.100.1")
    assert not (await asker.check("/caf\xe9", ip="198.51.100.1")).failed


async def test_batches_of_any_length(gate: Gate, listen: Callable[..., Any], new_client: Callable[..., ClientDriver]) -> None:
    asker = new_client(await listen(DataPlane(gate, {})))
    assert await asker.check_many([]) == []
    told = await asker.check_many(Check.of("/everyone", api_key=FREE) for _ in range(2050))
    assert [one.allowed for one in told] == [True, True, *[False] * 2048]
    # 900 checks that are together larger than a server reads at once
    told = await asker.check_many([Check.of("/" + "x" * 3000, api_key=FREE, cost=0)] * 900)
    assert [one.remaining for one in told] == [18] * 900


async def test_what_is_left(gate: Gate, listen: Callable[..., Any], new_client: Callable[..., ClientDriver]) -> None:
    asker = new_client(await listen(DataPlane(gate, {})))
    await asker.check("/api/v1/a", api_key=FREE)
    usage = await asker.usage(FREE, ip="203.0.113.7")
    left = {rule.rule: rule.remaining for rule in usage.rules}
    assert usage.tier == "free"
    assert (left[None], left["/api/v1/*"], left["POST /login"]) == (19, 2, 2)
    assert (await asker.usage(ip="203.0.113.7")).tier == "open"
    assert (await asker.usage(ip="203.0.113.7", attributes={"user": "42"}, tier="free")).tier == "free"
    with pytest.raises(BadRequest, match="there is no tier"):
        await asker.usage(ip="203.0.113.7", tier="gold")
    for key, error in ((REVOKED, ApiKeyRevoked), (EXPIRED, ApiKeyExpired), ("nobody-knows-this", InvalidApiKey)):
        with pytest.raises(error):
            await asker.usage(key)
    for key in ("two\r\nlines", " spaces ", "caf\xe9"):
        with pytest.raises(InvalidApiKey, match="not allowed in a header") as raised:
            await asker.usage(key)
        assert key.strip() not in str(raised.value)
    with pytest.raises(BadRequest, match="not an IPv4"):
        await asker.usage(FREE, ip="here")


async def test_keys_appear_in_no_output(
    gate: Gate, listen: Callable[..., Any], new_client: Callable[..., ClientDriver], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = await listen(DataPlane(gate, {}))
    asker = new_client(url)
    told = [await asker.check("/api/v1/a", api_key=TIGHT), await asker.usage(TIGHT)]
    gone = new_client("http://127.0.0.1:1", on_failure="raise")
    for ask in (gone.check("/api/v1/a", api_key=TIGHT), gone.usage(TIGHT)):
        with pytest.raises(LimiterUnavailable) as raised:
            await ask
        told += [raised.value, raised.value.details]
    with pytest.raises(InvalidApiKey) as refused:
        await asker.check("/api/v1/a", api_key="tg_" + TIGHT)
    text = repr((told, asker.client, gone.client)) + str(refused.value) + str(told[2]) + caplog.text
    assert "127.0.0.1:1" in text
    assert TIGHT not in text


async def test_at_a_real_server(serve: Callable[..., Any], new_client: Callable[..., ClientDriver], tmp_path: Path) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    asker = new_client(serve().url)
    login = {"method": "POST", "ip": "203.0.113.7"}
    answers = [await asker.check("/login", **login) for _ in range(6)]
    assert [answer.status for answer in answers] == [200] * 5 + [429]
    assert 0 < answers[-1].retry_after <= 86_400
    assert int(dict(answers[-1].headers)["retry-after"]) >= answers[-1].retry_after
    assert not any(answer.degraded for answer in answers)
    assert [one.remaining for one in await asker.check_many([Check.of("/api/v1/a", api_key="demo-free-key-0001")] * 2)] == [
        99,
        98,
    ]
    assert {rule.rule: rule.remaining for rule in (await asker.usage("demo-free-key-0001")).rules}["/api/*"] == 98
    with pytest.raises(InvalidApiKey):
        await asker.check("/api/v1/a", api_key="nobody-knows-this")


async def test_limits_of_the_call(gate: Gate, listen: Callable[..., Any], new_client: Callable[..., ClientDriver]) -> None:
    asker = new_client(await listen(DataPlane(gate, {})))
    answers = [await asker.limit("emails", "user-42", "2/day", algorithm="fixed_window") for _ in range(3)]
    assert [(one.status, one.limit, one.remaining, one.rule) for one in answers] == [
        (200, 2, 1, "emails"),
        (200, 2, 0, "emails"),
        (429, 2, 0, "emails"),
    ]
    assert int(dict(answers[-1].headers)["retry-after"]) >= answers[-1].retry_after > 0
    assert (await asker.limit("emails", "user-43", ["2/day", "9/month"], cost=2)).remaining == 0
    one = LimitRequest("sms", "a", ("3/day",))
    wrong = LimitRequest("sms", "a", "3/day", cost=float("nan"))  # type: ignore[arg-type]
    given = [one, LimitRequest("sms", "", ("3/day",)), wrong, LimitRequest("sms", "b", "3/day"), one]  # type: ignore[arg-type]
    told = await asker.limit_many(given)
    assert [getattr(each, "remaining", each) for each in (told[0], told[3], told[4])] == [2, 2, 1]
    assert [(type(each), each.details["field"]) for each in told[1:3]] == [(BadRequest, "subject"), (BadRequest, "cost")]
    many = await asker.limit_many([LimitRequest("sms", "c", ("1500/day",))] * 2001)
    assert [each.allowed for each in many] == [True] * 1500 + [False] * 501
    for arguments, field in (
        (("emails", "a"), "limits"),
        (("emails", "a", "often"), "limits"),
        (("emails", "a", 5), "limits"),
        (("e mails", "a", "1/day"), "namespace"),
        (("emails", 42, "1/day"), "subject"),
        (("emails", "\ud800", "1/day"), "subject"),
    ):
        with pytest.raises(BadRequest) as raised:
            await asker.limit(*arguments)
        assert raised.value.details["field"] == field


async def test_limits_of_the_call_without_a_server(new_client: Callable[..., ClientDriver]) -> None:
    denied = await new_client("http://127.0.0.1:1", on_failure="deny").limit("emails", "a", "1/day")
    assert (denied.status, denied.failed) == (503, True)
    wrong = LimitRequest("emails", "a", ("1/day",), cost=-1)
    allowed, refused = await new_client("http://127.0.0.1:1").limit_many([LimitRequest("emails", "a", ("1/day",)), wrong])
    assert (allowed.allowed, allowed.degraded, refused.details["field"]) == (True, True, "cost")


async def test_one_connection_is_kept(gate: Gate, listen: Callable[..., Any], new_client: Callable[..., ClientDriver]) -> None:
    port = int((await listen(DataPlane(gate, {}))).rpartition(":")[2])
    async with TcpProxy(port) as proxy:
        asker = new_client(f"http://127.0.0.1:{proxy.port}")
        for _ in range(5):
            await asker.check("/elsewhere", ip="198.51.100.1")
        assert proxy.connections == 1
        proxy.drop_all()
        while proxy.open_connections:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert not (await asker.check("/elsewhere", ip="198.51.100.1")).failed, "a connection that ended while idle is not used"
        assert proxy.connections == 2
        await asker.close()


async def test_wait_until_it_passes(serve: Callable[..., Any], new_client: Callable[..., ClientDriver], tmp_path: Path) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(
        '[[tiers]]\nname = "t"\n[[tiers.rules]]\nendpoint = "/*"\nlimits = ["2/2s"]\nalgorithm = "sliding_log"\n'
        '[[tiers.rules]]\nendpoint = "/rare"\nlimits = ["1/day"]\nalgorithm = "sliding_log"\n[anonymous]\ntier = "t"\n'
    )
    asker = new_client(serve().url)
    started = time.monotonic()
    answers = [await asker.wait("/a", ip="203.0.113.7") for _ in range(3)]
    assert all(answer.allowed for answer in answers)
    assert time.monotonic() - started > 1.5
    started = time.monotonic()
    never = await asker.wait("/a", ip="203.0.113.7", cost=3)
    assert (never.allowed, never.retry_after) == (False, None)
    assert (await asker.wait("/rare", ip="203.0.113.7")).allowed
    denied = await asker.wait("/rare", ip="203.0.113.7", at_most_s=3600)
    assert (denied.allowed, denied.status) == (False, 429)
    assert denied.retry_after > 3600
    assert time.monotonic() - started < 600, "what cannot pass in time is not waited for"


def test_a_hundred_threads_on_one_client(serve: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(
        '[[tiers]]\nname = "t"\n[[tiers.rules]]\nendpoint = "/*"\nlimits = ["250/day"]\n[anonymous]\ntier = "t"\n'
    )
    url = serve().url
    gate = threading.Barrier(100)

    def ask(client: Client) -> list[bool]:
        gate.wait(30)
        return [client.check("/a", ip="203.0.113.7").allowed for _ in range(5)]

    with Client(url, deadline_s=60, on_failure="raise", max_connections=20) as client, ThreadPoolExecutor(100) as pool:
        allowed = [one for many in pool.map(ask, [client] * 100) for one in many]
    assert (allowed.count(True), allowed.count(False)) == (250, 250)


async def test_a_hundred_tasks_on_one_client(gate: Gate, listen: Callable[..., Any]) -> None:
    async with AsyncClient(await listen(DataPlane(gate, {})), deadline_s=60, on_failure="raise", max_connections=20) as client:
        answers = await asyncio.gather(*(client.check("/elsewhere", api_key=FREE) for _ in range(100)))
        assert [answer.allowed for answer in answers].count(True) == 20
    with pytest.raises(RuntimeError, match="closed"):
        await client.check("/elsewhere", api_key=FREE)


def test_a_process_that_forks_does_not_share_connections(serve: Callable[..., Any], tmp_path: Path) -> None:
    """As a web server that loads the application before it forks its workers does."""
    program = tmp_path / "forking.py"
    program.write_text(
        "import os, sys, warnings\n"
        "from tidegate.client import Client\n"
        "client = Client(sys.argv[1], deadline_s=30, on_failure='raise')\n"
        "path = '/api/v1/a' \n"
        "client.check(path, api_key='demo-premium-key-0001')\n"
        "mine = os.fork() == 0\n"
        "key = 'demo-free-key-0001' if mine else 'demo-premium-key-0001'\n"
        "tiers = {client.check(path, api_key=key).tier for _ in range(200)}\n"
        "assert tiers == {'free' if mine else 'premium'}, tiers\n"
        "client.close()\n"
        "if not mine:\n"
        "    assert os.wait()[1] == 0\n"
        "    print('apart')\n"
    )
    done = subprocess.run(
        [sys.executable, str(program), serve("--demo").url], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "apart\n"), done.stderr


def test_without_httpcore_it_reports_what_to_install() -> None:
    program = "import sys; sys.modules['httpcore'] = None; import tidegate.client"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("pip install 'tidegate[client]'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"urls": []}, "urls is empty"),
        ({"urls": "127.0.0.1:8080"}, "not a valid URL"),
        ({"urls": "http://a..b"}, "not a valid URL"),
        ({"urls": f"http://{'a' * 64}"}, "not a valid URL"),
        ({"urls": ["http://a", "http://user:secret@b"]}, "must not contain a user or a password"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"on_failure": "local"}, "on_failure"),
        ({"max_connections": 0}, "max_connections"),
        ({"breaker": BreakerOptions(failures=0)}, "failures of at least 1"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(SettingsError, match=message):
            kind(**arguments)


async def test_wrong_checks(new_client: Callable[..., ClientDriver]) -> None:
    asker = new_client("http://127.0.0.1:1")
    for arguments in ({"path": ""}, {"path": "/a", "cost": -1}, {"path": "/a", "ip": "here"}, {"path": "//a"}):
        with pytest.raises(BadRequest):
            await asker.check(**arguments)
    with pytest.raises(BadRequest, match="at_most_s"):
        await asker.wait("/a", at_most_s=-1)


async def test_answers_can_be_kept(new_client: Callable[..., ClientDriver]) -> None:
    """In a queue or a log: an answer is a plain record."""
    answer = await new_client("http://127.0.0.1:1", on_failure="deny").check("/a")
    assert pickle.loads(pickle.dumps(answer)) == answer


def test_the_page_reports_what_works(serve: Callable[..., Any]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    section = page.partition("## Client")[2].partition("## Middleware")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    # As it stands there, but for where the server is, and for a deadline that a busy machine keeps.
    patient = re.sub(r'(\bClient\("[^"]+"|on_failure="deny")', rf"\1, deadline_s={PATIENT_S}", "\n".join(blocks))
    program = patient.replace("http://127.0.0.1:8080", serve("--demo").url) + "\nclient.close()\n"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True 99 0.0\n200 (('ratelimit-policy', ")
    assert done.stdout.endswith("3.0 0\n")
