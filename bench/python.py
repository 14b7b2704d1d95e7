"""CPU of one limited call inside its framework, beside slowapi, flask-limiter, django-ratelimit and fastapi-limiter.

    python -m bench.python [--smoke] [--only PEER]

What is compared is the CPU time of the limit alone. For each peer there are three apps with one endpoint each, at the same path:
without a limit, with the peer's limit, with ours. The app without a limit has the same parameters, and the same dependency where
the limit is one, which does nothing: what the framework itself does for a limited endpoint is subtracted from both. The headers
of the limit are part of its cost, where the peer sends them. Requests are handed to the app in this process, without a network;
1,000 clients take turns on 1,000,000/minute, so that every request is charged. 16 requests are in flight in the asyncio apps, one
in the blocking ones.

The apps take turns every few hundred requests. For each app the median over all turns of the process's CPU time; the ratio
is (peer - without) / (ours - without) of these. On Redis the CPU time of Redis itself is not counted.

On Redis our limits lease units of clients who come often, by default, so what one costs depends on how often a client comes. The
ratios are of the default, after warm-up turns in which every client came five times. Beside them, without a goal: the same with
`leases=False`, and the default with clients who come once each, of whom nothing is leased, and with 10 clients. Peers cost the
same for all of these. On a machine so slow that each of the 1,000 clients comes less than three times in ten seconds, nothing of
them is leased either.

fastapi-limiter counts on Redis only, and sends no limit headers; beside it, what a dependency costs that waits for a PING: the
floor for any limit under FastAPI that asks Redis. Last, `Limiter.wait`: what 160 callers of four instances on one Redis ask of it
until all have passed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
import warnings
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

import uvloop
from fastapi import Depends, FastAPI, Request, Response

from bench.measure import Goal, report
from bench.redis_server import redis_server
from tidegate import Limiter, limit
from tidegate.counters.blocking_leases import BlockingLeases
from tidegate.counters.factory import guard_of
from tidegate.doors.stores import TIMEOUT_VARIABLE, shared_store

LIMIT = "1000000/minute"
CLIENTS = [f"10.1.{number // 250}.{number % 250}" for number in range(1000)]
IN_FLIGHT = 16
PEERS = ("slowapi", "flask-limiter", "django-ratelimit", "fastapi-limiter")
APPS = ("bare", "peer", "tidegate")
UNLEASED, RARE, BUSY = FURTHER = ("unleased", "rare", "busy")
"""Further apps with our limit: without leases; with clients who come once each; with 10 clients."""
WARM_UP = 5
"""How often each client comes before anything is measured."""
PING = b"*1\r\n$4\r\nPING\r\n"
PATH = "/items"
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


def fastapi_app(url: str, peer: str, which: str) -> FastAPI:
    """FastAPI with slowapi or fastapi-limiter, with our limit, or without one.

    Args:
        url: of the store.
        peer: name of the other limiter.
        which: of APPS, or a further one.
    """
    app = FastAPI()

    if peer == "slowapi":

        async def endpoint(request: Request) -> str:
            return "ran"

        async def with_response(request: Request, response: Response) -> str:
            return "ran"

        if which == "bare":
            app.get(PATH)(with_response)
        elif which == "tidegate":
            app.get(PATH)(limit(LIMIT, key="ip", counters=url)(endpoint))
        elif which in FURTHER:
            app.get(PATH)(limit(LIMIT, key="ip", scope=which, counters=url, leases=which != UNLEASED)(endpoint))
        else:
            from slowapi import Limiter
            from slowapi.util import get_remote_address

            slow = Limiter(key_func=get_remote_address, storage_uri=url, headers_enabled=True)
            app.state.limiter = slow
            app.get(PATH)(slow.limit(LIMIT)(with_response))
        return app

    async def nothing(request: Request, response: Response) -> None: ...

    async def by_address(request: Request) -> str:
        return f"{request.client.host if request.client else ''}:{request.scope['path']}"

    async def without_parameters() -> str:
        return "ran"

    dependency: Any = nothing
    if which == "tidegate":
        dependency = limit(LIMIT, counters=url)
    elif which in FURTHER:
        dependency = limit(LIMIT, scope=which, counters=url, leases=which != UNLEASED)
    elif which == "peer":
        from fastapi_limiter.depends import RateLimiter

        dependency = RateLimiter(times=1_000_000, minutes=1, identifier=by_address)
    app.get(PATH, dependencies=[Depends(dependency)])(without_parameters)
    return app


class Pings(asyncio.Protocol):
    """The least that waiting for Redis costs: commands of one turn of the loop in one write, nothing to build or to decode."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._unsent = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for _ in range(data.count(b"\n")):
            self._waiting.popleft().set_result(None)

    def ping(self) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        self._waiting.append(loop.create_future())
        if not self._unsent:
            loop.call_soon(self._flush)
        self._unsent += 1
        return self._waiting[-1]

    def _flush(self) -> None:
        self._transport.write(PING * self._unsent)
        self._unsent = 0


async def pinging_app(url: str) -> FastAPI:
    """FastAPI with a dependency that waits for a PING."""
    address = urlsplit(url)
    assert address.hostname is not None
    assert address.port is not None
    _, pings = await asyncio.get_running_loop().create_connection(Pings, address.hostname, address.port)
    app = FastAPI()

    async def ping(request: Request, response: Response) -> None:
        await pings.ping()

    async def endpoint() -> str:
        return "ran"

    app.get(PATH, dependencies=[Depends(ping)])(endpoint)
    return app


def flask_app(url: str, which: str) -> Any:
    """Flask with flask-limiter, with our limit, or without one."""
    from flask import Flask

    app = Flask(__name__)

    def view() -> str:
        return "ran"

    if which == "peer":
        from flask_limiter import Limiter
        from flask_limiter.util import get_remote_address

        theirs = Limiter(get_remote_address, app=app, storage_uri=url, headers_enabled=True)
        app.get(PATH)(theirs.limit(LIMIT)(view))
    elif which == "bare":
        app.get(PATH)(view)
    else:
        app.get(PATH)(limit(LIMIT, scope=which, counters=url, leases=which != UNLEASED)(view))
    return app


def django_apps(url: str, cache: dict[str, Any]) -> dict[str, Serve]:
    """Django with django-ratelimit, with our limit, or without one: one project, whose URLs change."""
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

    serve = wsgi_serve(WSGIHandler())
    views = {
        "bare": view,
        "peer": ratelimit(key="ip", rate="1000000/m", method=["GET"])(view),
        **{which: limit(LIMIT, scope=which, counters=url, leases=which != UNLEASED)(view) for which in ("tidegate", *FURTHER)},
    }

    def served(which: str) -> Serve:
        urls = (path(PATH.strip("/"), views[which]),)

        def one(at: str, client: str) -> int:
            settings.ROOT_URLCONF = urls  # in each of the three apps alike
            return int(serve(at, client))

        return one

    on_redis = FURTHER if url != "memory://" else ()
    return {which: served(which) for which in (*APPS, *on_redis)}


def client(which: str, number: int) -> str:
    """Address of the client of a request to an app."""
    if which == RARE:
        return f"10.{2 + number // 62_500}.{number // 250 % 250}.{number % 250}"
    return CLIENTS[number % (10 if which == BUSY else len(CLIENTS))]


def warm_up_turns(url_has_leases: bool, count: int) -> int:
    """Turns that are not measured."""
    return WARM_UP * len(CLIENTS) // count if url_has_leases else 2


async def measure_async(apps: dict[str, Callable[[str, str], Awaitable[int]]], turns: int, count: int) -> dict[str, float]:
    """CPU µs of a request to each app."""
    found: dict[str, list[float]] = {which: [] for which in apps}
    warm_up = warm_up_turns(UNLEASED in apps, count)
    for turn in range(turns + warm_up):
        for which, serve in apps.items():
            started = time.process_time()
            for first in range(0, count, IN_FLIGHT):
                asked = [serve(PATH, client(which, turn * count + each)) for each in range(first, first + IN_FLIGHT)]
                statuses = await asyncio.gather(*asked)
                if set(statuses) != {200}:
                    raise RuntimeError(f"{which} answered {statuses}")
            if turn >= warm_up:
                found[which].append((time.process_time() - started) / count * 1e6)
    return {which: statistics.median(each) for which, each in found.items()}


def measure_blocking(apps: dict[str, Serve], turns: int, count: int) -> dict[str, float]:
    """The same for WSGI."""
    found: dict[str, list[float]] = {which: [] for which in apps}
    warm_up = warm_up_turns(UNLEASED in apps, count)
    for turn in range(turns + warm_up):
        for which, serve in apps.items():
            started = time.process_time()
            for each in range(count):
                status = serve(PATH, client(which, turn * count + each))
                if status != 200:
                    raise RuntimeError(f"{which} answered {status}")
            if turn >= warm_up:
                found[which].append((time.process_time() - started) / count * 1e6)
    return {which: statistics.median(each) for which, each in found.items()}


def rows(peer: str, store: str, found: dict[str, float]) -> list[tuple[str, float, Goal | None]]:
    """What the limits cost, and the ratio."""
    theirs, ours = found["peer"] - found["bare"], max(found["tidegate"] - found["bare"], 0.1)
    floor = (
        [(f"{peer}, {store}: waiting for a PING instead, µs CPU", found["ping"] - found["bare"], None)] if "ping" in found else []
    )
    further = [
        (f"{peer}, {store}: {what}", value, None)
        for which, name in (
            (UNLEASED, "Tidegate's limit with leases=False"),
            (RARE, "Tidegate's limit, clients who come once"),
            (BUSY, "Tidegate's limit, 10 clients"),
        )
        if which in found
        for what, value in (
            (f"{name}, µs CPU", found[which] - found["bare"]),
            ("its ratio", theirs / (found[which] - found["bare"])),
        )
    ]
    return [
        *floor,
        (f"{peer}, {store}: the request without a limit, µs CPU", found["bare"], None),
        (f"{peer}, {store}: its limit, µs CPU", theirs, None),
        (f"{peer}, {store}: Tidegate's limit, µs CPU", ours, None),
        (f"{peer}, {store}: ratio", theirs / ours, Goal(at_least=3)),
        *further,
    ]


async def waiting(url: str, permits: int) -> list[tuple[str, float, Goal | None]]:
    """Store calls for each caller that waits until it passes, and how many places the callers changed in the queue."""
    limiters = [Limiter("200/second burst 1", algorithm="token_bucket", name="wait", counters=url) for _ in range(4)]
    stores = [guard for limiter in limiters if (guard := guard_of(limiter.counters)) is not None]
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


def require_redis(url: str) -> None:
    """Fail if our limits decided anything without Redis: the figure would be of another path."""
    store = shared_store(url)
    guard, blocking = guard_of(store._of_loop()), store._blocking
    without = bool(guard and guard.degraded) or bool(isinstance(blocking, BlockingLeases) and blocking.store._breakers)
    if without:
        raise RuntimeError("calls were decided without Redis")


async def beside_fastapi_limiter(url: str, turns: int, count: int) -> dict[str, float]:
    """CPU µs of a request, beside fastapi-limiter and beside a PING."""
    from fastapi_limiter import FastAPILimiter
    from redis.asyncio import from_url

    await FastAPILimiter.init(from_url(url))
    try:
        apps = {which: asgi_serve(fastapi_app(url, "fastapi-limiter", which)) for which in (*APPS, *FURTHER)}
        apps["ping"] = asgi_serve(await pinging_app(url))
        return await measure_async(apps, turns, count)
    finally:
        await FastAPILimiter.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the smallest size: that it works, not how fast or how much")
    parser.add_argument("--only", choices=PEERS, default="", help="one peer; without Limiter.wait")
    arguments = parser.parse_args()
    smoke, only = arguments.smoke, arguments.only
    # The deadline is long, so that a busy machine makes a figure worse and does not decide calls without Redis.
    os.environ[TIMEOUT_VARIABLE] = "5000"
    warnings.simplefilter("ignore")  # of the peers
    turns, count = (2, 160) if smoke else (30, 160)
    figures: list[tuple[str, float, Goal | None]] = []

    def run_async(make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(make())

    with redis_server() as redis:
        for store, url in (("memory", "memory://"), ("Redis", redis.url)):
            apps = (*APPS, *FURTHER) if store == "Redis" else APPS
            if only in ("", "slowapi"):
                slow = {which: asgi_serve(fastapi_app(url, "slowapi", which)) for which in apps}
                figures += rows("slowapi", store, run_async(lambda slow=slow: measure_async(slow, turns, count)))  # type: ignore[misc]
            if only in ("", "flask-limiter"):
                flask = {which: wsgi_serve(flask_app(url, which)) for which in apps}
                figures += rows("flask-limiter", store, measure_blocking(flask, turns, count))
        if only in ("", "fastapi-limiter"):
            figures += rows("fastapi-limiter", "Redis", run_async(lambda: beside_fastapi_limiter(redis.url, turns, count)))
        require_redis(redis.url)
        waited = [] if only else run_async(lambda: waiting(redis.url, 20 if smoke else 160))
        caches: dict[str, dict[str, Any]] = {
            "memory": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache", "OPTIONS": {"MAX_ENTRIES": 100_000}},
            "Redis": {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": redis.url},
        }
        for store, url in (("memory", "memory://"), ("Redis", redis.url)) if only in ("", "django-ratelimit") else ():
            figures += rows("django-ratelimit", store, _django(url, caches[store], turns, count))
    figures += waited
    report("python", "One limited request inside its framework, CPU of the limit alone", figures, smoke=smoke)


def _django(url: str, cache: dict[str, Any], turns: int, count: int) -> dict[str, float]:
    """In a process of its own: Django has one configuration for each."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure_django, (url, cache, turns, count))


def _measure_django(url: str, cache: dict[str, Any], turns: int, count: int) -> dict[str, float]:
    warnings.simplefilter("ignore")
    os.environ[TIMEOUT_VARIABLE] = "5000"
    found = measure_blocking(django_apps(url, cache), turns, count)
    if url != "memory://":
        require_redis(url)
    return found


if __name__ == "__main__":
    main()
