"""Pages of other sites and the middleware, in a real browser: who sends an API key asks with a preflight first."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.routing import Route

from tests.servers.browser import find_chromium
from tests.servers.ports import free_port
from tidegate import Gate, RateLimitMiddleware
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.doors.asgi import EXPOSED_HEADERS
from tidegate.doors.http_asgi import AsgiAdapter
from tidegate.policy.toml_reader import parse_policy
from tidegate.server.listener import Listener

KEY = "policy-file-key-0001"
POLICY = f"""\
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/a"
  limits = ["2/day"]
[[api_keys]]
key = "{KEY}"
tier = "free"
"""
FETCH = """async ([url, key]) => {
    try {
        const answer = await fetch(url, {headers: {"X-API-Key": key}});
        const names = ["X-RateLimit-Remaining", "Retry-After", "RateLimit", "X-Tidegate-Error"];
        return [answer.status, Object.fromEntries(names.map(name => [name, answer.headers.get(name)]))];
    } catch (error) {
        return [0, {}];
    }
}"""


def limiter(**options: Any) -> Middleware:
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), MemoryCounters())
    return Middleware(RateLimitMiddleware, gate=gate, **options)


def cors(**options: Any) -> Middleware:
    return Middleware(CORSMiddleware, allow_origins=["*"], allow_headers=["X-API-Key"], **options)


def app_of(*middleware: Middleware) -> Starlette:
    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse("passed")

    return Starlette(routes=[Route("/a", answer, methods=["GET", "OPTIONS"])], middleware=middleware)


@pytest.fixture
async def serve_app() -> AsyncIterator[Callable[..., Any]]:
    """Serves an ASGI app on a free port of loopback; gives its URL."""
    listeners = []

    async def start(app: Any) -> str:
        port = free_port()
        listeners.append(Listener(AsgiAdapter(app), "127.0.0.1", port))
        await listeners[-1].start()
        return f"http://127.0.0.1:{port}"

    yield start
    for listener in listeners:
        await listener.stop(5)


async def test_a_page_of_another_site_in_a_browser(serve_app: Callable[..., Any]) -> None:
    playwright = pytest.importorskip("playwright.async_api", reason="the browser is driven by the package playwright")

    async def page_of_the_site(request: Request) -> HTMLResponse:
        return HTMLResponse("<title>site</title>")

    site = await serve_app(Starlette(routes=[Route("/", page_of_the_site)]))
    exposing = cors(expose_headers=EXPOSED_HEADERS)
    apis = {
        # As documented: the CORS middleware outside, and so before this one.
        "right": await serve_app(app_of(exposing, limiter())),
        "right, nothing named": await serve_app(app_of(cors(), limiter())),
        "wrong": await serve_app(app_of(limiter(), exposing)),
        "wrong, preflights pass": await serve_app(app_of(limiter(pass_preflights=True), exposing)),
    }
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(
            executable_path=find_chromium(),
            args=["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
        )
        page = await browser.new_page()
        await page.goto(site)
        found = {name: [await page.evaluate(FETCH, [f"{url}/a", KEY]) for _ in range(3)] for name, url in apis.items()}
        mistyped = await page.evaluate(FETCH, [f"{apis['right']}/a", "tg_mistyped"])
        await browser.close()
    statuses = {name: [status for status, _ in answers] for name, answers in found.items()}
    assert statuses == {
        "right": [200, 200, 429],
        "right, nothing named": [200, 200, 429],
        "wrong": [0, 0, 0],
        # A denial has no Access-Control-Allow-Origin: the page sees that it failed, not why.
        "wrong, preflights pass": [200, 200, 0],
    }
    for name in ("right", "right, nothing named"):
        assert [headers["X-RateLimit-Remaining"] for _, headers in found[name]] == ["1", "0", "0"]
        denied = found[name][2][1]
        assert int(denied["Retry-After"]) > 0
        assert denied["RateLimit"].startswith('"2/day";r=0')
    assert (mistyped[0], mistyped[1]["X-Tidegate-Error"]) == (401, "INVALID_API_KEY")


PREFLIGHT = {"Origin": "http://site", "Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "x-api-key"}


async def test_preflights_pass_uncounted_if_configured() -> None:
    for passes, status in ((False, 401), (True, 200)):
        transport = httpx.ASGITransport(app_of(limiter(pass_preflights=passes), cors()))
        async with httpx.AsyncClient(transport=transport, base_url="http://api") as http:
            for _ in range(5):
                assert (await http.options("/a", headers=PREFLIGHT)).status_code == status
            # Not one of these is a preflight, and each needs a key.
            for method, missing in (("OPTIONS", "Origin"), ("OPTIONS", "Access-Control-Request-Method"), ("GET", "")):
                sent = {name: value for name, value in PREFLIGHT.items() if name != missing}
                assert (await http.request(method, "/a", headers=sent)).status_code == 401
            counted = await http.get("/a", headers={"X-API-Key": KEY})
            assert counted.headers["x-ratelimit-remaining"] == "1"


async def test_headers_are_exposed_to_other_sites_alone() -> None:
    transport = httpx.ASGITransport(app_of(limiter()))
    async with httpx.AsyncClient(transport=transport, base_url="http://api", headers={"X-API-Key": KEY}) as http:
        answers = [await http.get("/a", headers={"Origin": "http://site"}) for _ in range(3)]
        answers.append(await http.get("/a", headers={"Origin": "http://site", "X-API-Key": "tg_mistyped"}))
        own = await http.get("/a")
    assert [answer.status_code for answer in answers] == [200, 200, 429, 401]
    for answer in answers:
        assert answer.headers["access-control-expose-headers"] == ", ".join(EXPOSED_HEADERS)
        assert set(answer.headers) & {name.lower() for name in EXPOSED_HEADERS}
    assert "access-control-expose-headers" not in own.headers
