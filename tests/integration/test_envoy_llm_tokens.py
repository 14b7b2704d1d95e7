"""Real Envoy with the shipped `deploy/envoy/llm_tokens.yaml`, only ports substituted, before an API of language models."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.moments import wait_until
from tests.servers.envoy import GRPC, SERVICE, Envoy
from tests.servers.ports import HOST

USERS = ("demo-user-key-00001", "demo-user-key-00002")
POLICY = """
[[tiers]]
name = "users"
  [[tiers.rules]]
  endpoint = "/v1/chat/completions"
  methods = ["POST"]
  algorithm = "sliding_log"
  limits = ["1000/hour", "5000/day"]
""" + "".join(f'[[api_keys]]\nkey = "{key}"\ntier = "users"\n' for key in USERS)

LOG_INS = """
[[tiers]]
name = "anybody"
  [[tiers.rules]]
  endpoint = "/login"
  methods = ["POST"]
  subject = "ip"
  limits = ["2/day"]
  count = "failures"
[anonymous]
tier = "anybody"
"""


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the chat completions of OpenAI do, with as many tokens as the request's `max_tokens`."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        if self.path.startswith("/login"):
            self.answer("text/plain", "", int(self.path.rpartition("=")[2]))
            return
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        used = {"prompt_tokens": 1, "completion_tokens": asked["max_tokens"] - 1, "total_tokens": asked["max_tokens"]}
        if not asked.get("stream"):
            body = {"object": "chat.completion", "choices": [{"message": {"content": "a"}}]}
            self.answer("application/json", json.dumps(body | ({} if asked.get("silent") else {"usage": used})))
            return
        events: list[dict[str, Any]] = [{"choices": [{"delta": {"content": word}}], "usage": None} for word in ("a", "b")]
        # Some APIs say after each word what was used so far; the last one counts.
        events.append({"choices": [], "usage": used | {"total_tokens": 7}})
        events.append({"choices": [], "usage": used})
        self.answer("text/event-stream", "".join(f"data: {json.dumps(each)}\n\n" for each in events) + "data: [DONE]\n\n")

    def answer(self, kind: str, body: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer((HOST, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield int(server.server_address[1])
    server.shutdown()
    thread.join()
    server.server_close()


def test_tokens_of_answers_are_charged_to_the_user(serve: Callable[..., Any], api: int, tmp_path: Any) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    tidegate = serve(grpc=True)

    def left(key: str) -> list[int]:
        (rule,) = httpx.get(f"{tidegate.url}/v1/usage", headers={"X-API-Key": key}).json()["rules"]
        return [each["remaining"] for each in rule["windows"]]

    with Envoy("llm_tokens.yaml", {GRPC: tidegate.grpc_port, SERVICE: api}) as envoy:
        envoy.wait_healthy("tidegate")

        def chat(key: str, tokens: int, **more: bool) -> httpx.Response:
            body = {"model": "m", "messages": [], "max_tokens": tokens, **more}
            return httpx.post(f"{envoy.url}/v1/chat/completions", headers={"X-API-Key": key}, json=body)

        first, second = USERS
        assert chat(first, 300).json()["usage"]["total_tokens"] == 300
        wait_until(lambda: left(first) == [700, 4700])
        streamed = chat(first, 250, stream=True)
        assert (streamed.status_code, streamed.text.count("data: ")) == (200, 5)
        wait_until(lambda: left(first) == [450, 4450])
        # An answer without usage charges nothing, and a request alone neither.
        assert chat(first, 99, silent=True).headers["x-ratelimit-remaining"] == "450"
        # All tokens count, also those above the limit: then nothing passes.
        assert chat(first, 700, stream=True).status_code == 200
        wait_until(lambda: left(first) == [0, 3750])
        denied = chat(first, 1)
        assert (denied.status_code, denied.json()["error"]["code"]) == (429, "RATE_LIMIT_EXCEEDED")
        assert (chat(second, 1).status_code, left(first)) == (200, [0, 3750])


def test_failed_log_ins_are_counted_by_their_status(serve: Callable[..., Any], api: int, tmp_path: Any) -> None:
    """With the two changes of docs/envoy.md."""
    (tmp_path / "tidegate.policy.toml").write_text(LOG_INS)
    tidegate = serve(grpc=True)
    changes = {
        '"%DYNAMIC_METADATA(llm:total_tokens)%"': '"%RESPONSE_CODE%"',
        'descriptor_key: tidegate_forced, descriptor_value: "true"': "descriptor_key: tidegate_forced, descriptor_value: status",
    }

    def left() -> int:
        body = {"path": "/login", "method": "POST", "ip": HOST, "cost": 0}
        found: int = httpx.post(f"{tidegate.url}/v1/check", json=body).json()["remaining"]
        return found

    with Envoy("llm_tokens.yaml", {GRPC: tidegate.grpc_port, SERVICE: api}, changes) as envoy:
        envoy.wait_healthy("tidegate")

        def log_in(status: int) -> int:
            return httpx.post(f"{envoy.url}/login?status={status}").status_code

        assert [log_in(status) for status in (200, 302, 500, 401)] == [200, 302, 500, 401]
        wait_until(lambda: left() == 1, what="one failure")
        assert [log_in(status) for status in (200, 200, 403)] == [200, 200, 403]
        wait_until(lambda: left() == 0, what="two failures")
        assert log_in(200) == 429
