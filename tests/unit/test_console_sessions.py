"""Sessions of the console: who gets one, what it permits, when it ends, and what pages of other sites cannot do with it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select, update

from tests.integration.admin_api import TOKEN, Admin, open_admin
from tidegate.admin.sessions import MAX_SESSIONS
from tidegate.catalog.sql.tables import console_sessions
from tidegate.doors.admin.app import ConsoleOptions
from tidegate.doors.console import VIEWS, static_files

SESSION = "/session"


@pytest.fixture
async def admin(tmp_path: Path) -> AsyncIterator[Admin]:
    made = await open_admin(f"sqlite:///{tmp_path}/tidegate.db", console=ConsoleOptions(demo_token=TOKEN))
    yield made
    await made.close()


def _browser(admin: Admin, peer: str = "192.0.2.1", host: str = "admin") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=admin.app, client=(peer, 1234))
    return httpx.AsyncClient(transport=transport, base_url=f"http://{host}/admin/v1")


async def _sign_in(http: httpx.AsyncClient, token: str = TOKEN) -> dict[str, str]:
    """Sign in; returns the header that changes need."""
    answer = await http.post(SESSION, json={"token": token})
    assert answer.status_code == 201, answer.text
    return {"X-CSRF-Token": answer.json()["csrf_token"]}


def _refused(answer: httpx.Response, status: int, code: str) -> None:
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text


async def test_a_session_reads_and_changes_with_its_csrf_token_until_it_is_signed_out(admin: Admin) -> None:
    async with _browser(admin) as http:
        answer = await http.post(SESSION, json={"token": TOKEN})
        cookie = answer.headers["set-cookie"]
        assert re.fullmatch(r"tidegate_session=tgs_[\w-]{43}; Max-Age=43200; Path=/; HttpOnly; SameSite=Strict", cookie), cookie
        assert TOKEN not in answer.text + cookie
        assert answer.headers["cache-control"] == "no-store"
        csrf = {"X-CSRF-Token": answer.json()["csrf_token"]}
        assert (await http.get(SESSION)).json() == answer.json()
        _refused(await http.post("/tiers", json={"name": "a"}), 403, "CROSS_SITE_REQUEST")
        _refused(await http.post("/tiers", json={"name": "a"}, headers={"X-CSRF-Token": "0" * 64}), 403, "CROSS_SITE_REQUEST")
        assert (await http.post("/tiers", json={"name": "a"}, headers=csrf)).status_code == 201
        assert (await http.get("/audit-log")).json()["items"][0]["actor"] == "settings"
        stolen = http.cookies.get("tidegate_session") or ""
        _refused(await http.delete(SESSION), 403, "CROSS_SITE_REQUEST")
        signed_out = await http.delete(SESSION, headers=csrf)
        assert (signed_out.status_code, "Max-Age=0" in signed_out.headers["set-cookie"]) == (204, True)
        _refused(await http.get("/tiers"), 401, "MISSING_TOKEN")
        assert (await http.get(SESSION)).json()["name"] is None
        http.cookies.set("tidegate_session", stolen)
        _refused(await http.get("/tiers"), 401, "INVALID_TOKEN")


async def test_pages_of_other_sites_change_nothing(admin: Admin) -> None:
    async with _browser(admin) as http:
        csrf = await _sign_in(http)
        for headers in (
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
        ):
            _refused(await http.post("/tiers", json={"name": "a"}, headers={**csrf, **headers}), 403, "CROSS_SITE_REQUEST")
            _refused(await http.post(SESSION, json={"token": TOKEN}, headers=headers), 403, "CROSS_SITE_REQUEST")
        own = {"Origin": "http://admin", "Sec-Fetch-Site": "same-origin"}
        assert (await http.post("/tiers", json={"name": "a"}, headers={**csrf, **own})).status_code == 201
        # What a form of another site could send.
        text = {"Content-Type": "text/plain"}
        _refused(await http.post(SESSION, content=f'{{"token":"{TOKEN}"}}', headers=text), 400, "BAD_REQUEST")
    for path in (*VIEWS, "/admin/v1/openapi.json", "/admin/v1/tiers", "/nothing"):
        answer = await admin.http.get(f"http://admin{path}")
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"], path
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-frame-options"] == "DENY"


async def test_a_viewer_reads_and_signs_out(admin: Admin) -> None:
    viewer = (await admin.http.post("/tokens", json={"name": "v", "role": "viewer"})).json()
    async with _browser(admin) as http:
        csrf = await _sign_in(http, viewer["token"])
        assert (await http.get(SESSION)).json()["role"] == "viewer"
        assert (await http.get("/tiers")).status_code == 200
        _refused(await http.post("/tiers", json={"name": "a"}, headers=csrf), 403, "FORBIDDEN")
        _refused(await http.get("/tokens"), 403, "FORBIDDEN")
        assert (await http.delete(SESSION, headers=csrf)).status_code == 204


async def test_sessions_end_with_their_token_with_idleness_and_with_age(admin: Admin) -> None:
    made = (await admin.http.post("/tokens", json={"name": "o", "role": "operator"})).json()
    async with _browser(admin) as http, _browser(admin) as other:
        await _sign_in(http, made["token"])
        await admin.http.delete(f"/tokens/{made['id']}")
        _refused(await http.get("/tiers"), 401, "INVALID_TOKEN")
        database = admin.catalog.database
        for column, poll, status in (("used_at_us", {}, 401), ("created_at_us", {}, 401)):
            await _sign_in(other)
            assert (await other.get("/tiers", headers=poll)).status_code == 200
            async with database.transaction() as connection:
                await connection.execute(update(console_sessions).values({column: 1}))
            assert (await other.get("/tiers")).status_code == status
        # Requests of a page that nobody looks at do not keep a session.
        await _sign_in(other)

        async def age() -> int:
            async with database.reading() as connection:
                return int((await connection.execute(select(func.max(console_sessions.c.used_at_us)))).scalar_one())

        async with database.transaction() as connection:
            await connection.execute(update(console_sessions).values(used_at_us=console_sessions.c.used_at_us - 600_000_000))
        before = await age()
        assert (await other.get("/tiers", headers={"X-Tidegate-Poll": "1"})).status_code == 200
        assert await age() == before
        assert (await other.get("/tiers")).status_code == 200
        assert await age() > before


async def test_sign_ins_are_bounded_as_bearer_tokens_are(tmp_path: Path) -> None:
    options: dict[str, Any] = {"failed_rate": "3/hour", "console": ConsoleOptions()}
    admin = await open_admin(f"sqlite:///{tmp_path}/tidegate.db", **options)
    async with _browser(admin) as http, _browser(admin) as signed_in:
        await _sign_in(signed_in)
        codes = [(await http.post(SESSION, json={"token": "wrong"})).status_code for _ in range(4)]
        assert codes == [401, 401, 401, 429]
        http.cookies.set("tidegate_session", "tgs_" + "a" * 43)
        assert (await http.get("/tiers")).status_code == 429
        assert (await signed_in.get("/tiers")).status_code == 200, "a session goes on whatever others guess"
        for body in (b"", b"[]", b'{"token": 1}', b'{"token": ""}', b'{"token": "a", "x": 1}', b"\xff", b"x" * 9000):
            answer = await http.post(SESSION, content=body, headers={"Content-Type": "application/json"})
            _refused(answer, 400, "BAD_REQUEST")
    await admin.close()


async def test_sessions_are_bounded(admin: Admin) -> None:
    rows = [
        {"sha256": f"{number:064}", "token_sha256": "0" * 64, "created_at_us": 2**53, "used_at_us": 2**53 + number}
        for number in range(MAX_SESSIONS)
    ]
    async with admin.catalog.database.transaction() as connection:
        await connection.execute(console_sessions.insert(), rows)
    async with _browser(admin) as http:
        await _sign_in(http)
    async with admin.catalog.database.reading() as connection:
        kept = (await connection.execute(select(console_sessions.c.sha256))).scalars().all()
    assert len(kept) == MAX_SESSIONS
    assert rows[0]["sha256"] not in kept


async def test_the_demo_signs_in_a_browser_on_this_machine_only(admin: Admin) -> None:
    for peer, host, status in (
        ("127.0.0.1", "127.0.0.1:8082", 201),
        ("127.0.0.1", "localhost:8082", 201),
        ("127.0.0.1", "rebound.example:8082", 400),
        ("192.0.2.1", "127.0.0.1:8082", 400),
    ):
        async with _browser(admin, peer, host) as http:
            assert (await http.post(SESSION, json={"demo": True})).status_code == status, (peer, host)


async def test_over_tls_the_cookie_is_for_this_host_alone(tmp_path: Path) -> None:
    admin = await open_admin(f"sqlite:///{tmp_path}/tidegate.db", console=ConsoleOptions(secure=True))
    async with _browser(admin) as http:
        cookie = (await http.post(SESSION, json={"token": TOKEN})).headers["set-cookie"]
        assert cookie.startswith("__Host-tidegate_session=")
        assert cookie.endswith("; Secure")
        demo = await http.post(SESSION, json={"demo": True})
        _refused(demo, 400, "BAD_REQUEST")
    await admin.close()


async def test_files_are_sent_with_their_type_and_nothing_else_is(admin: Admin) -> None:
    async with _browser(admin) as http:
        page = await http.get("http://admin/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        again = await http.get("http://admin/callers?q=x", headers={"If-None-Match": page.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        for name, file in static_files().items():
            if name != "index.html":
                answer = await http.get(f"http://admin/console/{name}")
                assert (answer.status_code, answer.headers["content-type"]) == (200, file.media_type), name
        for path in ("/console/../app.js", "/console/%2e%2e/__init__.py", "/console/", "/console/index.html", "/console/x.js"):
            assert (await http.get(f"http://admin{path}")).status_code == 404, path


def test_no_page_has_inline_script_or_style_or_makes_elements_from_text() -> None:
    for name, file in static_files().items():
        text = file.content.decode()
        if name.startswith("vendor/"):
            continue
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), name
        assert not re.search(r"https?://(?!www\.w3\.org/)", text), f"{name} names another host"
        if name.endswith(".html"):
            assert not re.search(r"<style|<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=", text), name
