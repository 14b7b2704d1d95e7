"""How fast the console reacts with many API keys and rules, in Chromium.

    python -m bench.console [--smoke]

10,000 API keys, 100 customers and 1,000 rules of one tier are in a SQLite catalog. Each interaction begins when the page has
read all of its data, and is timed inside the page, from the input to the frame that shows its result, with the request to the
server where it needs one; the median of several rounds is printed. Nothing else uses the server.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
from playwright.sync_api import Page, sync_playwright
from tests.servers.ports import free_port

from bench.measure import Goal, asked_for_smoke, report

TOKEN: Final = "token-of-the-bench"
GOAL: Final = Goal(at_most=100)
START_S: Final = 60.0

# Runs an action, waits for what it makes appear, and for the frame after that; returns milliseconds.
TIMED: Final = """async ([action, selector, text]) => {
  const shown = () => [...document.querySelectorAll(selector)].some((each) => each.textContent.includes(text));
  if (shown()) throw new Error(`shown already: ${selector} ${text}`);
  const started = performance.now();
  await new Promise((resolve, reject) => {
    const deadline = setTimeout(() => reject(new Error(`not shown: ${selector} ${text}`)), 20000);
    const observer = new MutationObserver(() => {
      if (!shown()) return;
      observer.disconnect();
      clearTimeout(deadline);
      resolve();
    });
    observer.observe(document.body, {childList: true, subtree: true, characterData: true});
    const [kind, where, value] = action;
    const element = [...document.querySelectorAll(where)].find((each) => kind !== "press" || each.textContent === value);
    if (kind === "press") element.click();
    else {
      element.value = value;
      element.dispatchEvent(new Event("input", {bubbles: true}));
      if (kind === "submit") element.form.requestSubmit();
    }
  });
  await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve, 0)));
  return performance.now() - started;
}"""
INTERACTIONS: Final = (
    ("list of API keys, opened", "/system", ("press", "nav a", "Callers"), "tbody td", "key "),
    ("list of API keys, next page", "/callers", ("press", "main button", "Next page"), ".buttons button", "First page"),
    ("list of API keys, found by a name", "/callers", ("submit", "#search", "key 0077"), "tbody tr:only-child td", "key 0077"),
    ("one API key, opened", "/callers?q=key+0077", ("press", "tbody a", "key 0077"), "main h2", "key 0077"),
    ("list of customers, opened", "/system", ("press", "nav a", "Customers"), "tbody td", "customer-"),
    ("rules of a tier, opened", "/system", ("press", "nav a", "Policy"), "tbody td", "/api/0"),
    ("rules of a tier, 50 more", "/policy", ("press", "main button", "Show 50 more"), "tbody td code", "/api/75/"),
    ("rules of a tier, filtered by typing", "/policy", ("input", "#rule", "/api/77/"), "tbody tr:only-child td", "/api/77/"),
    ("form of a rule, opened", "/policy?rule=/api/77/", ("press", "tbody button", "Edit"), "dialog h2", "Edit"),
)


@contextlib.contextmanager
def console(keys: int, rules: int) -> Iterator[str]:
    """A server with so many keys and rules; gives the address of its console."""
    admin, http = free_port(), free_port()
    with tempfile.TemporaryDirectory() as directory:
        environment = {
            **os.environ,
            "TIDEGATE_SERVER__HTTP": f"127.0.0.1:{http}",
            "TIDEGATE_SERVER__ADMIN": f"127.0.0.1:{admin}",
            "TIDEGATE_SERVER__GRPC": "",
            "TIDEGATE_ADMIN__TOKEN": TOKEN,
        }
        with Path(directory, "log").open("wb") as log:
            command = [sys.executable, "-m", "tidegate", "serve"]
            server = subprocess.Popen(command, cwd=directory, env=environment, stdout=log, stderr=log)
        try:
            base = f"http://127.0.0.1:{admin}"
            with httpx.Client(
                base_url=f"{base}/admin/v1", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=START_S
            ) as client:
                _ready(client)
                _fill(client, keys, rules)
            yield base
        finally:
            server.terminate()
            server.wait()


def _ready(client: httpx.Client) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            (client.get("/system")).raise_for_status()
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def _fill(client: httpx.Client, keys: int, rules: int) -> None:
    lines = ['[[tiers]]\nname = "free"\n']
    lines += [f'[[tiers.rules]]\nendpoint = "/api/{number}/*"\nlimits = ["{number + 1}/minute"]\n' for number in range(rules)]
    lines += [f'[[customers]]\nname = "customer-{number:02}"\ntier = "free"\n' for number in range(100)]
    (client.post("/policy", content="".join(lines), headers={"Content-Type": "application/toml"})).raise_for_status()
    for start in range(0, keys, 1000):
        batch = [
            {"sha256": hashlib.sha256(f"key {number}".encode()).hexdigest(), "tier": "free", "name": f"key {number:04}"}
            for number in range(start, min(start + 1000, keys))
        ]
        (client.post("/api-keys/import", json={"keys": batch})).raise_for_status()


def _measure(page: Page, base: str, rounds: int) -> list[tuple[str, float, Goal | None]]:
    figures: list[tuple[str, float, Goal | None]] = []
    for name, path, action, selector, text in INTERACTIONS:
        taken: list[float] = []
        for _ in range(rounds):
            page.goto(base + path)
            page.locator("main:not([aria-busy])").wait_for()
            page.get_by_text("Reading the other rules").wait_for(state="detached")
            taken.append(page.evaluate(TIMED, [action, selector, text]))
        figures.append((f"{name}, ms", statistics.median(taken), GOAL))
    return figures


def main() -> None:
    """Fill a server, open its console, and measure."""
    smoke = asked_for_smoke(__doc__)
    chromium = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if chromium is None:
        print("console: not measured, Chromium is not installed: apt install chromium-headless-shell")
        return
    with console(*((100, 150) if smoke else (10_000, 1_000))) as base, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page: Any = browser.new_page()
        page.goto(base)
        page.get_by_label("Token of an operator").fill(TOKEN)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("button", name="Sign out").wait_for()
        figures = _measure(page, base, 1 if smoke else 7)
        browser.close()
    report("console", "the console with 10,000 API keys and 1,000 rules", figures, smoke=smoke)


if __name__ == "__main__":
    main()
