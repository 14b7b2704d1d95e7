"""Both sides of each example on the page for those who come from another limiter: they give the same answers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers.redis_server import RedisServer

PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"
BLOCKS: dict[str, str] = dict(re.findall(r'^```python title="([^"]+)"\n(.*?)^```$', PAGE.read_text(), re.M | re.S))
NAMES = sorted({title.partition(" ")[2] for title in BLOCKS})
ASGI = """
from starlette.testclient import TestClient
with TestClient(app) as client:
    print([client.get("/items").status_code for _ in range(4)])
"""
FLASK = """
client = app.test_client()
print([client.get(path).status_code for path in ["/items"] * 3 + ["/other"] * 4 + ["/ping"] * 5])
"""
CONFIGURE = """
import django
from django.conf import settings
settings.configure(
    ALLOWED_HOSTS=["*"],
    SILENCED_SYSTEM_CHECKS=["django_ratelimit.E003", "django_ratelimit.W001"],
    REST_FRAMEWORK={
        "DEFAULT_THROTTLE_RATES": {"anon": "2/min"}, "DEFAULT_AUTHENTICATION_CLASSES": [], "UNAUTHENTICATED_USER": None
    },
)
django.setup()
from django.test import RequestFactory
"""
DRIVERS = {
    "slowapi": ("", ASGI, "[200, 200, 429, 429]"),
    "fastapi-limiter": ("", ASGI, "[200, 200, 429, 429]"),
    "flask-limiter": ("", FLASK, "[200, 200, 429, 200, 200, 200, 429, 200, 200, 200, 200, 200]"),
    "django-ratelimit": (
        CONFIGURE,
        'print([search(RequestFactory().get("/")).content for _ in range(4)])\n',
        "[b'False', b'False', b'True', b'True']",
    ),
    "django rest framework": (
        CONFIGURE,
        'print([Items.as_view()(RequestFactory().get("/")).status_code for _ in range(4)])\n',
        "[200, 200, 429, 429]",
    ),
    "pyrate-limiter": ("", 'print([allowed(name) for name in "aaa"])\n', "[True, True, False]"),
}


def test_every_example_is_run() -> None:
    assert set(NAMES) == set(DRIVERS)
    assert set(BLOCKS) == {f"{side} {name}" for side in ("before", "after") for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_before_and_after_give_the_same_answers(name: str, redis_server: RedisServer, tmp_path: Path) -> None:
    before, drive, expected = DRIVERS[name]
    sides = "".join(
        f"exec(compile({BLOCKS[f'{side} {name}'] + drive!r}, {side!r}, 'exec'), dict(shared))\n" for side in ("before", "after")
    )
    program = f"REDIS_URL = {redis_server.url!r}\n{before}\nshared = dict(globals())\n{sides}"
    # What other packages warn of is not examined here.
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (ran.returncode, ran.stdout.splitlines()) == (0, [expected, expected]), ran.stderr
