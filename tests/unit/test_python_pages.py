"""The examples of the pages for Python apps are run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(r'^```python(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
HEAD = """
import asyncio, sys
from django.conf import settings
settings.configure(ALLOWED_HOSTS=["*"])
from fastapi.testclient import TestClient
from tidegate import RateLimitExceeded

def outcomes(call, times):
    ran = []
    for _ in range(times):
        try:
            ran.append(call())
        except RateLimitExceeded:
            ran.append(None)
    return ran
"""
AFTER = {
    "Arguments": "",
    "FastAPI and Starlette": """
client = TestClient(app)
assert [client.get("/items").status_code for _ in range(11)] == [200] * 10 + [429]
assert [client.post("/login").json() for _ in range(9)] == ["welcome"] * 9
assert "429" in client.get("/openapi.json").json()["paths"]["/items"]["get"]["responses"]
""",
    "Litestar": """
from litestar.testing import TestClient as LitestarClient
with LitestarClient(app) as client:
    answers = [client.get("/search", headers={"X-User": "ann"}) for _ in range(11)]
    assert [each.status_code for each in answers] == [200] * 10 + [429]
    assert (answers[0].headers["x-ratelimit-limit"], answers[10].headers["retry-after"] > "") == ("10", True)
    assert "exceeded: try again in" in answers[10].json()["detail"]
    assert client.get("/search", headers={"X-User": "bob"}).headers["x-ratelimit-remaining"] == "9"
    assert client.get("/items").headers["x-ratelimit-limit"] == "100"
""",
    "Flask": 'assert [app.test_client().get("/search").status_code for _ in range(11)] == [200] * 10 + [429]',
    "Django": "",
    "WSGI": "assert callable(application)",
    "Without a framework": "",
    "Waiting in order": "assert (place.wait_s, 59 < later.wait_s <= 60) == (0, True)",
    "Per user, else per address": 'assert TestClient(app).get("/search").headers["x-ratelimit-limit"] == "60"',
    "Per plan": """
assert outcomes(lambda: export("ann"), 3)[2] is None
assert outcomes(lambda: export("bob"), 3)[2] == "export of bob"
""",
    "Log-in protection": """
client = TestClient(app)
log_in = lambda password: client.post(f"/login/ann?password={password}").status_code
assert [log_in("secret") for _ in range(9)] == [200] * 9
assert [log_in("guess") for _ in range(6)] == [401] * 5 + [429]
assert log_in("secret") == 429
""",
    "Expensive endpoints by cost": """
client = app.test_client()
assert [client.get(path).status_code for path in ("/report?days=99", "/item", "/item")] == [200, 200, 429]
""",
    "Costs known afterwards": """
spent = asyncio.run(complete("ann", "x" * 300))
assert spent["tokens"] == 12000
assert outcomes(lambda: asyncio.run(complete("ann", "x")), 1) == [None]
""",
    "Background jobs": """
from celery.contrib.testing.worker import start_worker

partner_api = SyncLimiter("1/2s", algorithm="leaky_bucket")
app.conf.update(result_backend="cache+memory://", worker_hijack_root_logger=False)
ran = []

@app.task(name="another")
def another():
    ran.append("another")

with start_worker(app, perform_ping_check=False, pool="solo", concurrency=1, loglevel="ERROR"):
    orders = [send_order.delay(number) for number in range(2)]
    another.delay().get(timeout=60)
    assert orders[0].get(timeout=60) == "order 0 sent"
    assert not orders[1].ready(), "the only worker is free while the order waits"
    assert orders[1].get(timeout=60) == "order 1 sent"
""",
    "Calls in progress": "assert outcomes(lambda: export('acme'), 2) == [None, None]",
    "From several processes": """
limiter = Client("http://127.0.0.1:1")
assert call_partner("x") == "called x", "on_failure decides: there is no server"
""",
    "Outgoing calls to another API": "assert asyncio.run(call('x')) == 'called x'",
}


def sections(page: str) -> list[tuple[str, str]]:
    """Heading and block of each example."""
    text = (DOCS / page).read_text()
    found = []
    for match in _BLOCK.finditer(text):
        headings = re.findall(r"^#+ (.*)$", text[: match.start()], re.MULTILINE)
        found.append(("Arguments" if len(headings) == 1 else headings[-1], match[2]))
    return found


@pytest.mark.parametrize("page", ["python-apps.md", "cookbook.md"])
def test_the_examples_of_a_page(page: str) -> None:
    found = sections(page)
    assert len(found) >= 6
    runs = "".join(f"exec(compile({block + AFTER[heading]!r}, {heading!r}, 'exec'), dict(shared))\n" for heading, block in found)
    program = f"{HEAD}\nshared = dict(globals())\n{runs}"
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_tests_of_the_page_on_testing(tmp_path: Path) -> None:
    for file, text in _BLOCK.findall((DOCS / "testing.md").read_text()):
        (tmp_path / file).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (ran.returncode, "2 passed" in ran.stdout) == (0, True), ran.stdout
