"""The control plane as `tidegate serve` runs it, on a listener of its own."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.moments import PATIENCE_S, wait_until

TOKEN = "0123456789abcdef-of-a-test"


def _first_token(server: Any) -> str:
    found = re.search(r"tga_[0-9A-Za-z]{40}", server.process.stdout.readline())
    assert found
    return found[0]


def _admin(server: Any, token: str) -> httpx.Client:
    return httpx.Client(
        base_url=f"http://127.0.0.1:{server.admin_port}/admin/v1", headers={"Authorization": f"Bearer {token}"}, timeout=10
    )


def test_from_nothing_to_a_key_that_is_limited_and_revoked(serve: Callable[..., Any]) -> None:
    server = serve(admin=True)
    with _admin(server, _first_token(server)) as admin, httpx.Client(base_url=server.url) as http:
        assert admin.post("/tiers", json={"name": "free"}).status_code == 201
        rule = {"tier": "free", "endpoint": "/api/*", "limits": ["2/hour"]}
        assert admin.post("/rate-limit-rules", json=rule).status_code == 201
        key = admin.post("/api-keys", json={"tier": "free", "name": "n"}).json()
        check = {"path": "/api/a", "api_key": key["api_key"]}
        assert [http.post("/v1/check", json=check).status_code for _ in range(3)] == [200, 200, 429]
        assert admin.post("/counters/reset", json={"api_key_id": key["id"]}).json() == {"reset": 1}
        assert http.post("/v1/check", json=check).status_code == 200
        assert admin.post(f"/api-keys/{key['id']}/revoke", json={"reason": "over"}).status_code == 200
        assert http.post("/v1/check", json=check).status_code == 403
        # The two planes are two listeners.
        assert http.get("/admin/v1/tiers").status_code == 404
        assert admin.post(f"http://127.0.0.1:{server.admin_port}/v1/check", json=check).status_code == 404
    assert server.stop()[0] == 0
    again = serve(admin=True)
    assert "tga_" not in again.process.stdout.readline()


def test_the_settings_name_an_operator(serve: Callable[..., Any]) -> None:
    server = serve(TIDEGATE_ADMIN__TOKEN=TOKEN)
    assert "tga_" not in server.process.stdout.readline()
    with _admin(server, TOKEN) as admin:
        assert admin.get("/tiers").status_code == 200
        assert admin.get("/tokens").json()["items"] == []
    code, out, err = server.stop()
    assert (code, TOKEN in out + err) == (0, False)


def _refuses(server: Any) -> bool:
    """Whether it takes no more connections, which it does from the beginning of its drain on."""
    try:
        httpx.get(f"http://127.0.0.1:{server.admin_port}/admin/v1/openapi.json")
    except httpx.TransportError:
        return True
    return False


def test_a_drain_finishes_what_is_in_flight(serve: Callable[..., Any]) -> None:
    server = serve(TIDEGATE_ADMIN__TOKEN=TOKEN)
    answered: list[int] = []
    begun, ending = threading.Event(), threading.Event()

    def slow() -> Any:
        yield b'{"name": '
        begun.set()
        assert ending.wait(PATIENCE_S)
        yield b'"slow"}'

    def ask() -> None:
        with _admin(server, TOKEN) as admin:
            answered.append(admin.post("/tiers", content=slow(), headers={"Content-Type": "application/json"}).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(begun.is_set, what="a part of the body is sent")
    server.process.terminate()
    wait_until(lambda: _refuses(server), what="it drains")
    ending.set()
    assert server.stop()[0] == 0
    thread.join(PATIENCE_S)
    assert answered == [201]


def test_it_can_be_switched_off(serve: Callable[..., Any]) -> None:
    server = serve(TIDEGATE_SERVER__ADMIN="")
    assert "tga_" not in server.process.stdout.readline()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{server.admin_port}/admin/v1/openapi.json")
    assert server.stop()[0] == 0


def test_a_wrong_address_or_token_is_reported(serve: Callable[..., Any]) -> None:
    first = serve(TIDEGATE_ADMIN__TOKEN=TOKEN)
    for environment, words in (
        ({"TIDEGATE_SERVER__ADMIN": f"127.0.0.1:{first.admin_port}"}, ("port is in use", 'admin = ""')),
        ({"TIDEGATE_SERVER__ADMIN": "nowhere"}, ("server.admin",)),
        ({"TIDEGATE_ADMIN__TOKEN": "short-secret"}, ("admin.token", "16 characters")),
    ):
        code, _, err = serve(wait=False, **environment).stop_by_itself()
        assert code == 2
        assert all(word in err for word in words), err
        assert "short-secret" not in err
    port = first.admin_port
    assert first.stop()[0] == 0
    same = {"TIDEGATE_SERVER__HTTP": f"127.0.0.1:{port}", "TIDEGATE_SERVER__ADMIN": f"127.0.0.1:{port}"}
    code, _, err = serve(wait=False, **same).stop_by_itself()
    assert (code, "port of server.http" in err) == (2, True)


def test_requests_without_a_token_write_a_bounded_number_of_safe_lines(serve: Callable[..., Any]) -> None:
    server = serve(TIDEGATE_ADMIN__TOKEN=TOKEN, TIDEGATE_SERVER__LOG_FORMAT="text")
    forged = "%0A2026-11-30 02:00:00,000 INFO tidegate: forged%1B[2J".replace(" ", "%20")
    with httpx.Client(base_url=f"http://127.0.0.1:{server.admin_port}") as anonymous:
        for _ in range(200):
            assert anonymous.post(f"/admin/v1/tiers{forged}").status_code == 400
            assert anonymous.post("/nothing").status_code == 404
    with _admin(server, TOKEN) as admin:
        assert admin.post("/tiers", json={"name": "free"}).status_code == 201
    code, _, err = server.stop()
    assert code == 0
    lines = err.splitlines()
    assert not any(line.startswith("2026-11-30 02:00:00") for line in lines)
    assert "\x1b" not in err
    assert 1 <= sum("POST" in line and " answered 40" in line for line in lines) <= 30
    assert any("POST /admin/v1/tiers answered 201" in line for line in lines)
