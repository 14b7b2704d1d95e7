"""The applications in `examples/`, as their first lines say to run them, asked as their callers ask."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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

    def start(interface: str, app: str, *options: str, **environment: str) -> str:
        port = free_port()
        process = subprocess.Popen(
            [sys.executable, "-m", "granian", "--interface", interface, "--port", str(port), *options, app],
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


class StalledModel(BaseHTTPRequestHandler):
    """An API of a language model that streams three chunks and then nothing until the test ends."""

    released = threading.Event()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b'data: {"choices": [{}]}\n\n' * 3)
        self.wfile.flush()
        self.released.wait(PATIENCE_S)

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


def test_a_caller_of_the_llm_gateway_who_leaves_frees_the_reservation(run: Callable[..., str]) -> None:
    model = ThreadingHTTPServer(("127.0.0.1", 0), StalledModel)
    threading.Thread(target=model.serve_forever, daemon=True).start()
    try:
        upstream = f"http://127.0.0.1:{model.server_port}"
        url = run("asgi", "llm_gateway:app", "--factory", UPSTREAM_URL=upstream, TOKEN_LIMIT="1000/day")
        body = {"max_tokens": 500, "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
        with httpx.Client(base_url=url, headers={"authorization": "Bearer user-42"}, timeout=PATIENCE_S) as caller:
            with caller.stream("POST", "/v1/chat/completions", json=body) as answer:
                assert answer.status_code == 200, answer.read()
                assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
                lines = answer.iter_lines()  # kept: when it is collected, httpx closes the connection
                assert next(lines).startswith("data:")
                # Two such reservations do not fit side by side.
                assert caller.post("/v1/chat/completions", json=body).status_code == 429
            deadline = time.monotonic() + PATIENCE_S
            status = 429
            while status == 429 and time.monotonic() < deadline:
                with caller.stream("POST", "/v1/chat/completions", json=body) as answer:
                    status = answer.status_code
            assert status == 200
    finally:
        StalledModel.released.set()
        model.shutdown()
        model.server_close()
