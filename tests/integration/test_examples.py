"""The applications in `examples/`, as their first lines say to run them, asked as their callers ask."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Serve
from tests.moments import MINUTE_S, PATIENCE_S, stay_within
from tests.servers.ports import free_port

EXAMPLES = Path(__file__).parents[2] / "examples"
KEY = {"X-API-Key": "demo-free-key-0001"}


@pytest.fixture
def run() -> Iterator[Callable[..., str]]:
    """Runs an application of the examples on a free port; gives its URL."""
    started: list[subprocess.Popen[bytes]] = []

    def start(interface: str, app: str, **environment: str) -> str:
        port = free_port()
        process = subprocess.Popen(
            [sys.executable, "-m", "granian", "--interface", interface, "--port", str(port), app],
            cwd=EXAMPLES,
            env={**os.environ, "TIDEGATE_DEADLINE_S": "20", **environment},  # which a busy machine keeps
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        started.append(process)
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and process.poll() is None:
            try:
                httpx.get(f"{url}/nothing-is-here", timeout=PATIENCE_S)
            except httpx.TransportError:
                time.sleep(0.05)
            else:
                stay_within(MINUTE_S, 5)
                return url
        raise AssertionError(f"{app} did not start (exit code {process.poll()})")

    yield start
    for process in started:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(PATIENCE_S)


@pytest.fixture(params=["fastapi_app", "flask_app"])
def app_url(request: pytest.FixtureRequest, run: Callable[..., str], serve: Callable[..., Serve]) -> str:
    """The URL of each application; of a limiter beside it where it needs one."""
    if request.param == "fastapi_app":
        return run("asgi", "fastapi_app:app")
    return run("wsgi", "flask_app:app", TIDEGATE_URL=_limiter(serve).url)


def _limiter(serve: Callable[..., Serve], **options: Any) -> Serve:
    return serve(TIDEGATE_POLICY__FILE=str(EXAMPLES / "app.policy.toml"), **options)


def test_limits_hold_and_are_in_the_headers(app_url: str) -> None:
    with httpx.Client(base_url=app_url, timeout=PATIENCE_S) as caller:
        answers = [caller.get("/api/items", headers=KEY) for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 5 + [429]
        assert answers[0].json() == ["tide", "gate"]
        assert [answer.headers["x-ratelimit-remaining"] for answer in answers] == ["4", "3", "2", "1", "0", "0"]
        assert '"5/minute";q=5;w=60' in answers[0].headers["ratelimit-policy"]
        assert answers[0].headers["ratelimit"].startswith('"5/minute";r=4')
        assert "retry-after" not in answers[4].headers
        assert 0 < int(answers[5].headers["retry-after"]) <= 60
        assert answers[5].json()["error"]["code"] == "RATE_LIMIT_EXCEEDED"


def test_callers_without_a_key_are_counted_by_address(app_url: str) -> None:
    with httpx.Client(base_url=app_url, timeout=PATIENCE_S) as caller:
        assert [caller.post("/login").status_code for _ in range(4)] == [200, 200, 200, 429]
        free = caller.get("/api/items")
        assert (free.status_code, "ratelimit" in free.headers) == (200, False), "no rule holds for them here"


def test_refusals(app_url: str) -> None:
    with httpx.Client(base_url=app_url, timeout=PATIENCE_S) as caller:
        unknown = caller.get("/api/items", headers={"X-API-Key": "nobody-knows-this"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (401, "INVALID_API_KEY")
        other_spelling = caller.get("//api/items", headers=KEY)
        assert other_spelling.status_code in (400, 404), "it is refused, or it is no path of the app; it is not served uncounted"
        assert caller.get("/api/items", headers=KEY).headers["x-ratelimit-remaining"] == "4"


def test_an_export_costs_three(run: Callable[..., str]) -> None:
    url = run("asgi", "fastapi_app:app")
    answers = [httpx.get(f"{url}/api/export", headers=KEY, timeout=PATIENCE_S) for _ in range(2)]
    assert [(answer.status_code, answer.headers["x-ratelimit-remaining"]) for answer in answers] == [(200, "2"), (429, "2")]


def test_without_its_limiter_the_flask_app_serves(run: Callable[..., str], serve: Callable[..., Serve]) -> None:
    limiter = _limiter(serve)
    with httpx.Client(base_url=run("wsgi", "flask_app:app", TIDEGATE_URL=limiter.url), timeout=PATIENCE_S) as caller:
        assert [caller.get("/api/items", headers=KEY).status_code for _ in range(6)] == [200] * 5 + [429]
        limiter.process.kill()
        limiter.stop_by_itself()
        answers = [caller.get("/api/items", headers=KEY) for _ in range(20)]
        assert [answer.status_code for answer in answers] == [200] * 20
        assert not any("ratelimit" in answer.headers for answer in answers)


def test_the_flask_app_asks_the_second_limiter(run: Callable[..., str], serve: Callable[..., Serve]) -> None:
    urls = f"http://127.0.0.1:{free_port()},{_limiter(serve).url}"
    url = run("wsgi", "flask_app:app", TIDEGATE_URL=urls)
    answers = [httpx.get(f"{url}/api/items", headers=KEY, timeout=PATIENCE_S) for _ in range(6)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429]
