"""`.venv/bin/python scripts/console_screenshots.py`: the screenshots of docs/console.md and of the README, in Debian's Chromium.

The server of each is real; the history that its charts show is made up, and the same each time.
"""

from __future__ import annotations

import asyncio
import math
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import msgspec
from playwright.async_api import Page, async_playwright

from tidegate.catalog.sql.tables import rate_limit_violations, traffic_latency, traffic_minutes
from tidegate.server.demo_traffic import CUSTOMER
from tidegate.server.instance import Instance
from tidegate.settings import Settings
from tidegate.timestamps import US_PER_S, now_us

ROOT: Final = Path(__file__).parents[1]
TARGET: Final = ROOT / "docs" / "img"
MINUTE_US: Final = 60 * US_PER_S
RULES: Final = (("/api/orders/*", 700), ("/api/search", 420), ("/api/*", 260))


async def main() -> int:
    """Take all screenshots.

    Returns:
        The exit code.
    """
    chromium = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if chromium is None:
        print("Chromium is not installed: apt install chromium-headless-shell", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as directory:
        settings = Settings()
        server = msgspec.structs.replace(settings.server, http="127.0.0.1:0", admin="127.0.0.1:0", grpc="")
        catalog = msgspec.structs.replace(settings.catalog, url=f"sqlite:///{directory}/tidegate.db")
        policy = msgspec.structs.replace(settings.policy, file=str(ROOT / "src" / "tidegate" / "example.policy.toml"))
        instance = Instance(msgspec.structs.replace(settings, server=server, catalog=catalog, policy=policy), demo=True)
        await instance.start()
        try:
            await asyncio.sleep(5)
            await _make_history(instance)
            async with async_playwright() as driver:
                browser = await driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                page = await browser.new_page(viewport={"width": 1100, "height": 760})
                await _take(page, instance.admin_url)
                dark = await browser.new_page(viewport={"width": 360, "height": 760}, color_scheme="dark")
                await _shoot(dark, f"{instance.admin_url}/", "console-small.png")
                await browser.close()
        finally:
            await instance.close()
    return 0


async def _take(page: Page, url: str) -> None:
    await _shoot(page, f"{url}/", "console-overview.png")
    await page.goto(f"{url}/callers")
    await page.get_by_role("link", name="partner import").click()
    await page.get_by_label("Path").fill("/api/orders/99")
    await page.get_by_role("button", name="Explain").click()
    await page.get_by_text("answers").first.wait_for()
    await page.set_viewport_size({"width": 1100, "height": 1180})
    await _shoot(page, None, "console-caller.png")
    await page.set_viewport_size({"width": 1100, "height": 1020})
    await _shoot(page, f"{url}/policy?tier=shop", "console-policy.png")
    await page.set_viewport_size({"width": 1100, "height": 980})
    await _shoot(page, f"{url}/customers?name={CUSTOMER}", "console-customer.png")


async def _shoot(page: Page, url: str | None, name: str) -> None:
    if url is not None:
        await page.goto(url)
    await page.locator("main:not([aria-busy])").wait_for()
    await page.wait_for_timeout(500)
    await page.screenshot(path=TARGET / name)
    print(f"{TARGET.relative_to(ROOT) / name}")


async def _make_history(instance: Instance) -> None:
    source = random.Random(4)
    now = now_us() // MINUTE_US * MINUTE_US
    minutes: list[dict[str, Any]] = []
    latency: list[dict[str, Any]] = []
    blocked: list[dict[str, Any]] = []
    for ago in range(1, 65):
        at = now - ago * MINUTE_US
        wave = 1 + 0.3 * math.sin(ago / 9)
        for rule, usual in RULES:
            units = round(usual * wave * source.uniform(0.9, 1.1))
            denied = round(units * (0.22 if rule == "/api/orders/*" and 20 < ago < 34 else 0.01))
            counts = {"allowed": units - denied, "blocked": denied, "over_limit": 0}
            minutes.append({"minute_us": at, "tier": "shop", "rule": rule, **counts})
            subject = f"i:203.0.113.{source.randint(1, 9)}"
            blocked.append({"minute_us": at, "tier": "shop", "rule": rule, "subject": subject, "blocked": denied + 1})
        latency += [
            {"step_s": 60, "at_us": at, "bucket": bucket, "checks": count}
            for bucket, count in ((0, 900), (1, 420), (2, round(60 * wave)), (3, 8))
        ]
    async with instance.catalog.database.transaction() as connection:
        await connection.execute(traffic_minutes.insert(), minutes)
        await connection.execute(traffic_latency.insert(), latency)
        await connection.execute(rate_limit_violations.insert(), blocked)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
