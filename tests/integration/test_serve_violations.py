"""What is blocked at a running server is found at its control plane, and outlives it."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import Serve
from tests.moments import PATIENCE_S, wait_until

TOKEN = "token-of-the-settings"
KEY = "demo-free-key-0001"
POLICY = f"""
[[tiers]]
name = "free"
limits = ["5/hour"]
  [[tiers.rules]]
  endpoint = "/login"
  subject = "ip"
  limits = ["2/hour"]
  [[tiers.rules]]
  endpoint = "/login"
  mode = "shadow"
  limits = ["1/hour"]
[[customers]]
name = "acme"
tier = "free"
[[api_keys]]
key = "{KEY}"
customer = "acme"
"""


def _shown(server: Serve, path: str = "") -> list[dict[str, Any]]:
    url = f"http://127.0.0.1:{server.admin_port}/admin/v1/violations{path}"
    answer = httpx.get(url, headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 200, answer.text
    return list(answer.json()["items"])


def test_violations_are_counted_for_whom_they_were(serve: Callable[..., Serve], tmp_path: Path) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    server = serve(TIDEGATE_ADMIN__TOKEN=TOKEN, TIDEGATE_VIOLATIONS__FLUSH_S="0.2")
    with httpx.Client(base_url=server.url) as client:

        def check(path: str, count: int) -> list[bool]:
            body = {"api_key": KEY, "path": path, "ip": "203.0.113.7"}
            return [client.post("/v1/check", json=body).json()["allowed"] for _ in range(count)]

        assert check("/login", 4) == [True, True, False, False], "the rule blocks the address twice"
        assert check("/x", 4) == [True, True, True, False], "the tier blocks the key once"
        assert check("/login", 1) == [False], "both would block: the one that holds longer is told"
        deadline = time.monotonic() + PATIENCE_S
        while sum(each["blocked"] for each in _shown(server)) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        key_id = httpx.get(
            f"http://127.0.0.1:{server.admin_port}/admin/v1/api-keys", headers={"Authorization": f"Bearer {TOKEN}"}
        ).json()["items"][0]["id"]
        by_subject = {(each["rule"], each["subject"]): each["blocked"] for each in _shown(server)}
        assert by_subject[("", f"k:{key_id}")] >= 1, by_subject
        assert by_subject[("/login", "i:203.0.113.7")] >= 2, by_subject
        assert sum(by_subject.values()) == 4, by_subject
        # What the shadow rule would have blocked, which blocked nothing.
        wait_until(lambda: sum(each["blocked"] for each in _shown(server, "?mode=shadow")) == 4)
        watched = {(each["rule"], each["subject"]) for each in _shown(server, "?mode=shadow")}
        assert watched == {("/login shadow", f"k:{key_id}")}
        hit = _shown(server, "/top?mode=shadow&by=customer")
        assert hit == [{"subject": None, "tier": None, "rule": None, "customer": "acme", "blocked": 4}]
        assert [(each["customer"], each["blocked"]) for each in _shown(server, "/top?by=customer")] == [("acme", 1)]
        scraped = client.get("/metrics").text
        assert "rate_limiter_violations_written_total 4.0" in scraped
        assert "rate_limiter_violations_dropped_total 0.0" in scraped
        check("/x", 3)
    code, _, _ = server.stop()
    assert code == 0
    with sqlite3.connect(tmp_path / "tidegate.db") as database:
        assert database.execute("SELECT sum(blocked) FROM rate_limit_violations").fetchone() == (7,), "the drain writes the rest"


def test_violations_can_be_switched_off(serve: Callable[..., Serve], tmp_path: Path) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    server = serve(TIDEGATE_VIOLATIONS__ENABLED="false")
    for _ in range(7):
        httpx.post(f"{server.url}/v1/check", json={"api_key": KEY, "path": "/x"})
    assert "violations" not in httpx.get(f"{server.url}/metrics").text
    assert server.stop()[0] == 0
    with sqlite3.connect(tmp_path / "tidegate.db") as database:
        assert database.execute("SELECT count(*) FROM rate_limit_violations").fetchone() == (0,)
