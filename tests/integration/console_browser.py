"""The console in a real browser, for tests: one server, one browser, and what went wrong in its pages."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import Serve
from tests.moments import PATIENCE_S
from tests.servers.browser import find_chromium

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser is driven by the package playwright")

TOKEN = "token-of-the-console-tests"


class Console:
    """The server, its browser, and what went wrong in its pages."""

    def __init__(self, server: Serve, browser: Any) -> None:
        self.server = server
        self.browser = browser
        self.base = f"http://127.0.0.1:{server.admin_port}"
        self.problems: list[str] = []
        self.refusals = "400|401|404|409|412|429"
        self.api = httpx.Client(base_url=f"{self.base}/admin/v1", headers={"Authorization": f"Bearer {TOKEN}"})
        self.checks = httpx.Client(base_url=server.url)

    def open(self, path: str = "/", token: str = TOKEN, **options: Any) -> Any:
        """A page of a new browser session, signed in."""
        context = self.browser.new_context(**options)
        context.set_default_timeout(PATIENCE_S * 1000)
        page = context.new_page()
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("dialog", lambda dialog: self.problems.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: None if request.url.startswith(self.base) else self.problems.append(request.url))
        page.goto(self.base + path)
        page.get_by_label("Token of an operator").fill(token)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("button", name="Sign out").wait_for()
        return page

    def _note(self, message: Any) -> None:
        # The browser reports each answer of 400 and above; those of the API are part of some tests.
        refused = re.search(rf"status of ({self.refusals}) ", message.text) and "/admin/v1/" in message.location.get("url", "")
        if message.type in ("error", "warning") and not refused:
            self.problems.append(message.text)

    def check(self, key: str, path: str, **fields: Any) -> int:
        return self.checks.post("/v1/check", json={"api_key": key, "path": path, **fields}).status_code

    def any_key(self) -> dict[str, Any]:
        """An API key of the tier free, which is made with a rule if the journey that makes it has not run."""
        if self.api.get("/tiers/free").status_code == 404:
            self.post("/tiers", name="free")
            self.post("/rate-limit-rules", tier="free", endpoint="/api/*", limits=["2/hour"])
        items = self.api.get("/api-keys").json()["items"]
        return items[0] if items else self.post("/api-keys", tier="free", name="any")

    def wait_for_violation(self, rule: str) -> None:
        """Until a blocked check of a rule is recorded; with pauses, since the control plane limits requests."""
        page = self.browser.new_page()
        params = {"rule": rule}
        while not self.api.get("/violations/top", params=params).json()["items"]:
            page.wait_for_timeout(300)
        page.close()

    def post(self, path: str, **body: Any) -> Any:
        made = self.api.post(path, json=body)
        assert made.status_code == 201, made.text
        return made.json()


@contextlib.contextmanager
def opened(server: Serve) -> Iterator[Console]:
    """A browser for the console of a server, which ends with it."""
    try:
        chromium = find_chromium()
        server.wait_ready()
        with sync_api.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            made = Console(server, browser)
            yield made
            made.api.close()
            made.checks.close()
            browser.close()
    finally:
        server.stop()


def see(page: Any, text: str) -> None:
    """Wait until a text is on the page."""
    page.get_by_text(text).first.wait_for()


def settled(page: Any) -> None:
    """Wait until a view has read all that it shows; a stream of the server stays open."""
    page.locator("main:not([aria-busy])").wait_for()
