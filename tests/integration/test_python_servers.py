"""Limits under the servers of Python apps: all processes on one Redis, mostly three, admit exactly the limit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.moments import PATIENCE_S, wait_until
from tests.servers.ports import accepts, free_port
from tests.servers.redis_server import RedisServer

LIMIT, REQUESTS = 30, 60
APPS = {
    "flask_app": """
import os
from flask import Flask
from tidegate import limit

app = Flask(__name__)

@app.get("/")
@limit("30/day", key=lambda: "all")
def view():
    return str(os.getpid())
""",
    "django_app": """
import os
from django.conf import settings
settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, MIDDLEWARE=["tidegate.django.RateLimitMiddleware"])
import django
django.setup()
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.urls import path
from tidegate.django import limit

@limit("30/day", key=lambda request: "all")
def view(request):
    return HttpResponse(str(os.getpid()))

urlpatterns = [path("", view)]
app = get_wsgi_application()
""",
    "fastapi_app": """
import os
from fastapi import Depends, FastAPI
from tidegate import limit

app = FastAPI()

@app.get("/", dependencies=[Depends(limit("30/day", key=lambda: "all"))])
def view():
    return os.getpid()
""",
    "closing_app": """
from fastapi_app import app
from tidegate import RateLimitMiddleware

app.add_middleware(RateLimitMiddleware, default_limits=[])
""",
    "litestar_app": """
from litestar import Litestar, Request, get
from litestar.middleware import DefineMiddleware
from tidegate import RateLimitMiddleware, limit

@get("/")
@limit("30/day", key=lambda: "all")
async def view(request: Request) -> str:
    return "ran"

app = Litestar([view], middleware=[DefineMiddleware(RateLimitMiddleware, default_limits=["1000/day"])])
""",
    "manage": """
import sys
import django_app
from django.core.management import execute_from_command_line

execute_from_command_line(sys.argv)
""",
}
GUNICORN = ("gunicorn", "--workers", "3", "--no-control-socket", "--bind", "127.0.0.1:{port}")
UVICORN = ("uvicorn", "--workers", "3", "--port", "{port}")
SERVERS = {
    "gunicorn sync, Flask": (*GUNICORN, "flask_app:app"),
    "gunicorn gthread, Django": (*GUNICORN, "--threads", "4", "django_app:app"),
    "gunicorn uvicorn workers, FastAPI": (*GUNICORN, "--worker-class", "uvicorn.workers.UvicornWorker", "fastapi_app:app"),
    "uvicorn, FastAPI": (*UVICORN, "fastapi_app:app"),
    "uvicorn --reload, Litestar": ("uvicorn", "--reload", "--port", "{port}", "litestar_app:app"),
    "runserver, Django": ("manage", "runserver", "--noreload", "{port}"),
}


@contextmanager
def serving(command: tuple[str, ...], folder: Path, redis: RedisServer, leases: str) -> Iterator[str]:
    port = free_port()
    environment = {
        **os.environ,
        "TIDEGATE_COUNTERS__URL": redis.url,
        "TIDEGATE_COUNTERS__TIMEOUT_MS": "20000",
        "TIDEGATE_LEASES__ENABLED": leases,
        "PYTHONWARNINGS": "ignore",
    }
    filled = [part.format(port=port) for part in command]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", *filled], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        wait_until(lambda: accepts(port) or process.poll() is not None)
        assert process.poll() is None, (folder / "log").read_text()
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        print((folder / "log").read_text())


@pytest.mark.parametrize("name", SERVERS)
def test_processes_together_admit_exactly_the_limit(name: str, redis_server: RedisServer, tmp_path: Path) -> None:
    redis_server.must("FLUSHALL")
    for module, text in APPS.items():
        (tmp_path / f"{module}.py").write_text(text)
    with serving(SERVERS[name], tmp_path, redis_server, "false") as url, ThreadPoolExecutor(12) as threads:

        def get(_: int) -> httpx.Response:
            return httpx.get(url, headers={"Connection": "close"})

        answers = list(threads.map(get, range(REQUESTS)))
    passed = [each for each in answers if each.status_code == 200]
    denied = [each for each in answers if each.status_code == 429]
    assert (len(passed), len(denied)) == (LIMIT, REQUESTS - LIMIT)
    assert sorted(int(each.headers["x-ratelimit-remaining"]) for each in passed) == list(range(LIMIT))
    assert all(int(each.headers["retry-after"]) > 0 for each in denied)


@pytest.mark.parametrize("name", ["gunicorn sync, Flask", "gunicorn gthread, Django", "uvicorn, FastAPI"])
def test_processes_that_lease_admit_exactly_the_limit(name: str, redis_server: RedisServer, tmp_path: Path) -> None:
    """Units that wait at one process are given back where it has no use for them: then the last requests pass."""
    redis_server.must("FLUSHALL")
    for module, text in APPS.items():
        (tmp_path / f"{module}.py").write_text(text.replace("30/day", "300/day"))
    with serving(SERVERS[name], tmp_path, redis_server, "true") as url, ThreadPoolExecutor(12) as threads:

        def passes(_: int) -> bool:
            answer = httpx.get(url, headers={"Connection": "close"})
            assert answer.status_code in (200, 429)
            return answer.status_code == 200

        passed = sum(threads.map(passes, range(330)))
        assert passed > 150

        def all_passed() -> bool:
            nonlocal passed
            passed += passes(0)
            return passed == 300

        wait_until(all_passed)
        assert not any(threads.map(passes, range(30)))


ONE = {
    "gunicorn sync, Flask": (*GUNICORN, "--workers", "1", "flask_app:app"),
    "gunicorn uvicorn worker, FastAPI with the middleware": (
        *(*GUNICORN, "--workers", "1", "--worker-class"),
        *("uvicorn.workers.UvicornWorker", "closing_app:app"),
    ),
    "uvicorn, FastAPI with the middleware": ("uvicorn", "--port", "{port}", "closing_app:app"),
}


@pytest.mark.parametrize("name", ONE)
def test_a_server_that_ends_gives_leased_units_back(name: str, redis_server: RedisServer, tmp_path: Path) -> None:
    redis_server.must("FLUSHALL")
    for module, text in APPS.items():
        (tmp_path / f"{module}.py").write_text(text.replace("30/day", "300/day"))
    with serving(ONE[name], tmp_path, redis_server, "true") as url:
        assert [httpx.get(url).status_code for _ in range(20)] == [200] * 20
    with serving(ONE[name], tmp_path, redis_server, "true") as url:
        assert int(httpx.get(url).headers["x-ratelimit-remaining"]) == 279
