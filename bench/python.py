"""CPU of one limited call inside its framework, beside slowapi, flask-limiter, django-ratelimit and fastapi-limiter.

    python -m bench.python [--smoke]

Each app has three endpoints that do the same: without a limit, with the peer's limit, with ours. Requests are handed to the app
in this process, without a network; 1,000 clients take turns on 1,000,000/minute, so that every request is charged. What a limit
costs is the CPU time of a request with it less that of one without; the headers of the limit are part of it, where the peer sends
them. Rounds are interleaved; medians, and the median of the ratios round by round. 16 requests are in flight in the asyncio apps,
one in the blocking ones. On Redis the process's own CPU time is counted, not that of Redis. fastapi-limiter counts on Redis only.
Last, `Limiter.wait`: what 160 callers of four instances on one Redis ask of it until all have passed.
"""

from __future__ import annotations

import asyncio
import statistics
import time
import warnings
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import uvloop
from fastapi import Depends, FastAPI, Request, Response

from bench.measure import Goal, asked_for_smoke, report
from bench.redis_server import redis_server
from tidegate import Limiter, limit
from tidegate.counters.guarded import GuardedCounters

LIMIT = "1000000/minute"
CLIENTS = [f"10.1.{number // 250}.{number % 250}" for number in range(1000)]
IN_FLIGHT = 16
PATHS = ("bare", "peer", "tidegate")
Serve = Callable[[str, str], Any]
"""Answers one request: path and client's address."""


def asgi_serve(app: Any) -> Callable[[str, str], Awaitable[int]]:
    """Hands requests to an ASGI app."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def serve(path: str, client: str) -> int:
        status = 0

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost")],
            "client": (client, 4711),
            "server": ("127.0.0.1", 80),
        }
        await app(scope, receive, send)
        return status

    return serve


def wsgi_serve(app: Any) -> Serve:
    """Hands requests to a WSGI app."""
    import io

    def serve(path: str, client: str) -> int:
        statuses: list[str] = []
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": path,
            "QUERY_STRING": "",
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": client,
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(),
            "wsgi.errors": io.StringIO(),
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
            "wsgi.version": (1, 0),
        }
        body = app(environ, lambda status, headers, *_: statuses.append(status))
        b"".join(body)
        if hasattr(body, "close"):
            body.close()
        return int(statuses[0][:3])

    return serve


def fastapi_app(url: str, peer: str) -> FastAPI:
    """FastAPI with slowapi or fastapi-limiter."""
    app = FastAPI()

    @app.get("/bare")
    async def bare() -> str:
        return "ran"

    if peer == "slowapi":
        from slowapi import Limiter
        from slowapi.util import get_remote_address

        slow = Limiter(key_func=get_remote_address, storage_uri=url, headers_enabled=True)
        app.state.limiter = slow

        async def theirs(request: Request, response: Response) -> str:
            return "ran"

        async def ours(request: Request) -> str:
            return "ran"

        app.get("/peer")(slow.limit(LIMIT)(theirs))
        app.get("/tidegate")(limit(LIMIT, key="ip", counters=url)(ours))
    else:
        from fastapi_limiter.depends import RateLimiter

        async def by_address(request: Request) -> str:
            return f"{request.client.host if request.client else ''}:{request.scope['path']}"

        async def without_parameters() -> str:
            return "ran"

        once = RateLimiter(times=1_000_000, minutes=1, identifier=by_address)
        app.get("/peer", dependencies=[Depends(once)])(without_parameters)
        app.get("/tidegate", dependencies=[Depends(limit(LIMIT, counters=url))])(without_parameters)
    return app


def flask_app(url: str) -> Any:
    """Flask with flask-limiter."""
    from flask import Flask
    from flask_limiter import Limiter
    from flask_limiter.util import get_remote_address

    app = Flask(__name__)
    theirs = Limiter(get_remote_address, app=app, storage_uri=url, headers_enabled=True)

    @app.get("/bare")
    @theirs.exempt
    def bare() -> str:
        return "ran"

    @app.get("/peer")
    @theirs.limit(LIMIT)
    def peer() -> str:
        return "ran"

    # In an app of its own: the extension of the peer also works on views that it does not limit.
    own = Flask(__name__)

    def view() -> str:
        return "ran"

    own.add_url_rule("/tidegate", "tidegate", limit(LIMIT, counters=url)(view))
    own.add_url_rule("/bare", "bare", view)

    def serve(environ: Any, start_response: Any) -> Any:
        return (app if environ["PATH_INFO"] == "/peer" else own)(environ, start_response)

    return serve


def django_app(url: str, cache: dict[str, Any]) -> Any:
    """Django with django-ratelimit."""
    import django
    from django.conf import settings

    settings.configure(ALLOWED_HOSTS=["*"], MIDDLEWARE=[], CACHES={"default": cache})
    django.setup()
    from django.core.handlers.wsgi import WSGIHandler
    from django.http import HttpResponse
    from django.urls import path
    from django_ratelimit.decorators import ratelimit

    def view(request: Any) -> Any:
        return HttpResponse("ran")

    settings.ROOT_URLCONF = (
        path("bare", view),
        path("peer", ratelimit(key="ip", rate="1000000/m", method=["GET"])(view)),
        path("tidegate", limit(LIMIT, counters=url)(view)),
    )
    return WSGIHandler()


async def rounds_async(serve: Callable[[str, str], Awaitable[int]], rounds: int, count: int) -> dict[str, list[float]]:
    """CPU µs of a request, by path, for each round."""
    found: dict[str, list[float]] = {path: [] for path in PATHS}
    for number in range(rounds + 1):
        for path in PATHS:
            started = time.process_time()
            for first in range(0, count, IN_FLIGHT):
                asked = [serve(f"/{path}", CLIENTS[each % 1000]) for each in range(first, first + IN_FLIGHT)]
                statuses = await asyncio.gather(*asked)
                if set(statuses) != {200}:
                    raise RuntimeError(f"/{path} answered {statuses}")
            if number:
                found[path].append((time.process_time() - started) / count * 1e6)
    return found


def rounds_blocking(serve: Serve, rounds: int, count: int) -> dict[str, list[float]]:
    """The same for WSGI."""
    found: dict[str, list[float]] = {path: [] for path in PATHS}
    for number in range(rounds + 1):
        for path in PATHS:
            started = time.process_time()
            for each in range(count):
                status = serve(f"/{path}", CLIENTS[each % 1000])
            if status != 200:
                raise RuntimeError(f"/{path} answered {status}")
            if number:
                found[path].append((time.process_time() - started) / count * 1e6)
    return found


def rows(peer: str, store: str, found: dict[str, list[float]]) -> list[tuple[str, float, Goal | None]]:
    """What the limits cost, and the ratio."""
    theirs = [each - bare for each, bare in zip(found["peer"], found["bare"], strict=True)]
    ours = [max(each - bare, 0.1) for each, bare in zip(found["tidegate"], found["bare"], strict=True)]
    ratio = statistics.median(their / our for their, our in zip(theirs, ours, strict=True))
    return [
        (f"{peer}, {store}, µs CPU", statistics.median(theirs), None),
        (f"Tidegate beside {peer}, {store}, µs CPU", statistics.median(ours), None),
        (f"ratio to {peer}, {store}", ratio, Goal(at_least=3)),
    ]


async def waiting(url: str, permits: int) -> list[tuple[str, float, Goal | None]]:
    """Store calls for each caller that waits until it passes, and how many places the callers changed in the order of asking."""
    limiters = [Limiter("200/second burst 1", algorithm="token_bucket", name="wait", counters=url) for _ in range(4)]
    stores = [limiter.counters for limiter in limiters if isinstance(limiter.counters, GuardedCounters)]
    for limiter in limiters:
        await limiter.check("warm-up")
    before = sum(store.store_calls for store in stores)
    passed: list[int] = []

    async def one(number: int) -> None:
        if not (await limiters[number % 4].wait("job", at_most_s=600)).allowed:
            raise RuntimeError("a caller was denied")
        passed.append(number)

    callers = []
    for number in range(permits):
        callers.append(asyncio.ensure_future(one(number)))
        await asyncio.sleep(0.001)
    await asyncio.gather(*callers)
    calls = sum(store.store_calls for store in stores) - before
    for limiter in limiters:
        await limiter.close()
    moved = max(abs(place - number) for place, number in enumerate(passed))
    return [
        ("wait: store calls for each caller that passes", calls / permits, Goal(at_most=1.1)),
        ("wait: largest change of places, 5 ms each", moved, Goal(at_most=2)),
    ]


def main() -> None:
    """Measure and print."""
    smoke = asked_for_smoke(__doc__)
    warnings.simplefilter("ignore")  # of the peers
    rounds, count = (2, 160) if smoke else (5, 1_600)
    figures: list[tuple[str, float, Goal | None]] = []

    def run_async(make: Callable[[], Coroutine[Any, Any, dict[str, list[float]]]]) -> dict[str, list[float]]:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(make())

    with redis_server() as redis:
        for store, url in (("memory", "memory://"), ("Redis", redis.url)):
            slow = asgi_serve(fastapi_app(url, "slowapi"))
            figures += rows("slowapi", store, run_async(lambda slow=slow: rounds_async(slow, rounds, count)))  # type: ignore[misc]
            figures += rows("flask-limiter", store, rounds_blocking(wsgi_serve(flask_app(url)), rounds, count))

        async def with_fastapi_limiter() -> dict[str, list[float]]:
            from fastapi_limiter import FastAPILimiter
            from redis.asyncio import from_url

            await FastAPILimiter.init(from_url(redis.url))
            try:
                return await rounds_async(asgi_serve(fastapi_app(redis.url, "fastapi-limiter")), rounds, count)
            finally:
                await FastAPILimiter.close()

        figures += rows("fastapi-limiter", "Redis", run_async(with_fastapi_limiter))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            waited = runner.run(waiting(redis.url, 20 if smoke else 160))
        caches = {
            "memory": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"},
            "Redis": {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": redis.url},
        }
        for store, url in (("memory", "memory://"), ("Redis", redis.url)):
            figures += rows("django-ratelimit", store, _django(url, caches[store], rounds, count))
    figures += waited
    report("python", "One limited request inside its framework, CPU of the limit alone", figures, smoke=smoke)


def _django(url: str, cache: dict[str, Any], rounds: int, count: int) -> dict[str, list[float]]:
    """In a process of its own: Django has one configuration for each."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure_django, (url, cache, rounds, count))


def _measure_django(url: str, cache: dict[str, Any], rounds: int, count: int) -> dict[str, list[float]]:
    warnings.simplefilter("ignore")
    return rounds_blocking(wsgi_serve(django_app(url, cache)), rounds, count)


if __name__ == "__main__":
    main()
