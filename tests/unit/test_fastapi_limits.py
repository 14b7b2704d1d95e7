"""Limits in FastAPI and Starlette: as dependency, as decorator, by the middleware without a policy."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, WebSocket
from fastapi import Request as FastApiRequest
from fastapi import Response as FastApiResponse
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute

from tests.asgi_client import AsgiClient
from tests.conftest import Clock
from tidegate import MemoryCounters, PolicyError, RateLimitExceeded, RateLimitMiddleware, SettingsError, exempt, limit
from tidegate.doors.stores import close_shared
from tidegate.fastapi import document_limits


def counted(clock: Clock) -> MemoryCounters:
    return MemoryCounters(clock=clock)


def user_of(request: Request) -> str | None:
    return request.headers.get("x-user")


async def test_a_dependency_needs_no_request_parameter(clock: Clock) -> None:
    app = FastAPI()
    store = counted(clock)

    @app.get("/def", dependencies=[Depends(limit("2/minute", key=user_of, counters=store))])
    def blocking() -> str:
        return "ran"

    limited = Depends(limit("2/minute", key=user_of, counters=store))

    @app.get("/async")
    async def asynchronous(decision: Any = limited) -> int:
        return int(decision.remaining)

    client = AsgiClient(app)
    for path, bodies in (("/def", [b'"ran"', b'"ran"']), ("/async", [b"1", b"0"])):
        answers = [await client.get(path, {"x-user": "a"}) for _ in range(3)]
        assert [each.status for each in answers] == [200, 200, 429]
        assert [each.body for each in answers[:2]] == bodies
        assert [each.headers["x-ratelimit-remaining"] for each in answers] == ["1", "0", "0"]
        assert int(answers[2].headers["retry-after"]) > 0
        assert answers[2].json()["error"]["code"] == "RATE_LIMIT_EXCEEDED"
        assert (await client.get(path, {"x-user": "b"})).status == 200


async def test_retry_after_is_when_it_passes(clock: Clock) -> None:
    app = FastAPI(dependencies=[Depends(limit("1/minute", algorithm="fixed_window", counters=counted(clock)))])
    app.get("/")(lambda: "ran")
    client = AsgiClient(app)
    await client.get("/")
    denied = await client.get("/")
    clock.advance(int(denied.headers["retry-after"]))
    assert (denied.status, (await client.get("/")).status) == (429, 200)


async def test_dependencies_of_the_app_count_each_endpoint_and_leave_out_exempt_ones(clock: Clock) -> None:
    app = FastAPI(dependencies=[Depends(limit("1/minute", counters=counted(clock)))])

    @app.get("/a/{number}")
    def a(number: int) -> None: ...

    @app.get("/b")
    def b() -> None: ...

    @app.get("/health")
    @exempt
    def health() -> None: ...

    client = AsgiClient(app)
    assert [(await client.get(path)).status for path in ("/a/1", "/a/2", "/b", "/b", *["/health"] * 3)] == [
        *(200, 429, 200, 429),
        *(200, 200, 200),
    ]


async def test_one_scope_for_several_endpoints(clock: Clock) -> None:
    shared = limit("2/minute", scope="search", counters=counted(clock))
    app = FastAPI()
    app.get("/a", dependencies=[Depends(shared)])(lambda: 1)
    app.get("/b", dependencies=[Depends(shared)])(lambda: 1)
    client = AsgiClient(app)
    assert [(await client.get(path)).status for path in ("/a", "/b", "/a", "/b")] == [200, 200, 429, 429]


async def test_several_dependencies_send_the_headers_of_the_strictest(clock: Clock) -> None:
    store = counted(clock)
    app = FastAPI()
    wanted = [Depends(limit("3/minute", counters=store)), Depends(limit("9/hour", key=user_of, counters=store))]
    app.get("/", dependencies=wanted)(lambda: 1)
    client = AsgiClient(app)
    answers = [await client.get("/", {"x-user": f"u{number}"}) for number in range(4)]
    assert [each.headers["x-ratelimit-limit"] for each in answers] == ["3"] * 4
    assert [each.status for each in answers] == [200, 200, 200, 429]


async def test_decorated_endpoints(clock: Clock) -> None:
    store = counted(clock)
    app = FastAPI()

    @app.get("/plain/{item}")
    @limit("1/minute", key="item", counters=store)
    def plain(item: str) -> str:
        return item

    @app.get("/request")
    @limit("1/minute", key="ip", counters=store)
    async def with_request(request: FastApiRequest, n: int = 1) -> int:
        return n

    @app.get("/response")
    @limit("1/minute", key=lambda request: request.headers.get("x-user"), counters=store)
    def own_response(request: FastApiRequest) -> Response:
        return PlainTextResponse("own")

    client = AsgiClient(app)
    answers = [await client.get(path) for path in ("/plain/a", "/plain/a", "/plain/b")]
    assert [each.status for each in answers] == [200, 429, 200]
    assert "rate limit 1/minute exceeded" in answers[1].json()["detail"]
    assert int(answers[1].headers["retry-after"]) > 0
    first, second = [await client.get("/request?n=5") for _ in range(2)]
    assert (first.status, first.body, first.headers["x-ratelimit-remaining"], second.status) == (200, b"5", "0", 429)
    assert second.json()["error"]["code"] == "RATE_LIMIT_EXCEEDED"
    first, second = [await client.get("/response") for _ in range(2)]
    assert (first.body, first.headers["x-ratelimit-remaining"], second.status) == (b"own", "0", 429)
    parameters = (await client.get("/openapi.json")).json()["paths"]["/request"]["get"]["parameters"]
    assert [each["name"] for each in parameters] == ["n"], "what the decorator adds is not shown"


async def test_endpoints_that_take_their_response_as_slowapi_demands(clock: Clock) -> None:
    """FastAPI hands the response to one parameter alone: that of the endpoint."""
    store = counted(clock)
    app = FastAPI()

    @app.get("/async")
    @limit("9/day", key="ip", counters=store)
    @limit("2/minute", key="ip", counters=store)
    async def waiting(request: FastApiRequest, response: FastApiResponse) -> str:
        response.headers["x-own"] = "yes"
        return "ran"

    @app.get("/def")
    @limit("1/minute", key="ip", counters=store)
    def blocking(request: FastApiRequest, answer: Annotated[FastApiResponse, "of the endpoint"]) -> str:
        answer.status_code = 201
        return "ran"

    client = AsgiClient(app)
    first, second, third = [await client.get("/async") for _ in range(3)]
    assert (first.status, first.body, first.headers["x-own"]) == (200, b'"ran"', "yes")
    assert first.headers["x-ratelimit-remaining"] == "1"
    assert (second.status, third.status) == (200, 429)
    first, second = [await client.get("/def") for _ in range(2)]
    assert (first.status, first.headers["x-ratelimit-remaining"], second.status) == (201, "0", 429)


async def test_several_limits_on_one_endpoint(clock: Clock) -> None:
    store = counted(clock)
    app = FastAPI()

    @app.get("/{account}")
    @limit("2/minute", key="account", counters=store)
    @limit("3/minute", key="ip", counters=store)
    def endpoint(request: FastApiRequest, account: str) -> str:
        return account

    client = AsgiClient(app)
    answers = [await client.get(path) for path in ("/a", "/a", "/a", "/b", "/c")]
    assert [each.status for each in answers] == [200, 200, 429, 200, 429]
    assert [each.headers["x-ratelimit-limit"] for each in answers] == ["2", "2", "2", "3", "3"]


async def test_only_failed_log_ins_are_counted(clock: Clock) -> None:
    app = FastAPI()

    @app.post("/login")
    @limit(
        "2/minute", key="ip", deduct_when=lambda response: getattr(response, "status_code", 200) == 401, counters=counted(clock)
    )
    async def log_in(request: FastApiRequest) -> str:
        if request.headers.get("x-password") != "secret":
            raise HTTPException(401, "wrong password")
        return "welcome"

    client = AsgiClient(app)
    good = {"x-password": "secret"}
    statuses = [(await client.post("/login", headers)).status for headers in (good, good, good, {}, {}, {}, good)]
    assert statuses == [200, 200, 200, 401, 401, 429, 429]


async def test_methods(clock: Clock) -> None:
    app = FastAPI()
    dependency = Depends(limit("1/minute", methods=["post"], counters=counted(clock)))
    app.api_route("/", methods=["GET", "POST"], dependencies=[dependency])(lambda: 1)
    client = AsgiClient(app)
    assert [(await client.get("/")).status for _ in range(3)] == [200] * 3
    assert [(await client.post("/")).status for _ in range(2)] == [200, 429]


async def test_a_handler_of_the_app_answers(clock: Clock) -> None:
    app = FastAPI()
    app.get("/", dependencies=[Depends(limit("1/minute", counters=counted(clock)))])(lambda: 1)

    @app.exception_handler(RateLimitExceeded)
    async def handle(request: FastApiRequest, error: RateLimitExceeded) -> Response:
        return JSONResponse({"wait": error.decision.limit}, 420)

    client = AsgiClient(app)
    await client.get("/")
    denied = await client.get("/")
    assert (denied.status, denied.json()) == (420, {"wait": 1})


async def test_starlette_endpoints(clock: Clock) -> None:
    @limit("1/minute", counters=counted(clock))
    async def endpoint(request: Request) -> Response:
        return PlainTextResponse("ran")

    client = AsgiClient(Starlette(routes=[Route("/", endpoint)]))
    answers = [await client.get("/") for _ in range(2)]
    assert [each.status for each in answers] == [200, 429]
    assert [each.headers["x-ratelimit-remaining"] for each in answers] == ["0", "0"]
    assert answers[1].headers["content-type"] == "application/json"


async def test_web_sockets_at_connect_and_by_message(clock: Clock) -> None:
    store = counted(clock)
    messages = limit("2/minute", scope="messages", counters=store)
    app = FastAPI()

    limited = Depends(limit("2/minute", counters=store))

    @app.websocket("/ws")
    async def talk(websocket: WebSocket, _: Any = limited) -> None:
        await websocket.accept()
        while True:
            await websocket.receive_text()
            try:
                await messages.check(websocket)
            except RateLimitExceeded:
                await websocket.close(1008)
                return
            await websocket.send_text("ok")

    client = AsgiClient(app)
    assert await client.talk("/ws", ["a", "b", "c"]) == ["ok", "ok", 1008]
    assert await client.talk("/ws", ["a"]) == [1008], "the messages of one client count together"
    assert await client.talk("/ws", ["a"]) == [429], "refused before it is accepted"
    assert await client.talk("/ws", ["a"], denial_response=False) == [1008]


async def test_the_middleware_without_a_policy(clock: Clock) -> None:
    store = counted(clock)

    @exempt
    async def health(request: Request) -> Response:
        return PlainTextResponse("ok")

    @limit("3/minute", counters=store)
    async def own(request: Request) -> Response:
        return PlainTextResponse("own")

    async def plain(request: Request) -> Response:
        return PlainTextResponse("plain")

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    routes = [Route("/health", health), Route("/own", own), Route("/plain/{n}", plain), WebSocketRoute("/ws", socket)]
    app = Starlette(routes=[*routes, Mount("/sub", routes=[Route("/inner", own), Route("/other", plain)])])
    app.add_middleware(RateLimitMiddleware, default_limits=["1/minute", "5/day"], counters=store)
    client = AsgiClient(app)
    statuses = {
        path: [(await client.get(path)).status for _ in range(2)] for path in ("/health", "/own", "/plain/1", "/sub/inner")
    }
    assert statuses == {"/health": [200, 200], "/own": [200, 200], "/plain/1": [200, 429], "/sub/inner": [200, 429]}
    assert (await client.get("/plain/2")).status == 429, "one endpoint, whatever its path parameters"
    assert [(await client.get(f"/unknown/{number}")).status for number in range(2)] == [404, 429]
    assert (await client.get("/own")).headers["x-ratelimit-limit"] == "3"
    assert await client.talk("/ws", []) == [1000]
    assert await client.talk("/ws", []) == [429]
    assert int((await client.get("/plain/1")).headers["retry-after"]) > 0


async def test_the_middleware_knows_included_routers(clock: Clock) -> None:
    app, router = FastAPI(), APIRouter(prefix="/v1")
    own = limit("2/minute", counters=counted(clock))

    @router.get("/a/{n}")
    def a(n: int) -> None: ...

    @router.get("/own", dependencies=[Depends(own)])
    def with_own() -> None: ...

    app.include_router(router)
    app.add_middleware(RateLimitMiddleware, default_limits="1/minute", counters=counted(clock))
    document_limits(app)
    client = AsgiClient(app)
    assert [(await client.get(path)).status for path in ("/v1/a/1", "/v1/a/2")] == [200, 429]
    assert [(await client.get("/v1/own")).status for _ in range(3)] == [200, 200, 429]
    clock.advance(120)
    described = (await client.get("/openapi.json")).json()["paths"]
    assert {path: sorted(each["get"]["responses"]) for path, each in described.items()} == {
        "/v1/a/{n}": ["200", "422"],
        "/v1/own": ["200", "429"],
    }
    assert "Retry-After" in described["/v1/own"]["get"]["responses"]["429"]["headers"]
    assert own.responses[429]["description"].startswith("Too Many Requests")


async def test_who_the_client_is_behind_proxies(clock: Clock) -> None:
    app = FastAPI()
    trusting = limit("1/minute", trusted_proxies=["10.0.0.0/8"], counters=counted(clock))
    app.get("/", dependencies=[Depends(trusting)])(lambda: 1)
    client = AsgiClient(app, peer="10.1.2.3")
    stranger = AsgiClient(app, peer="198.51.100.7")
    assert [(await client.get("/", {"x-forwarded-for": f"203.0.113.{n}"})).status for n in (1, 2, 1)] == [200, 200, 429]
    assert [(await stranger.get("/", {"x-forwarded-for": f"203.0.113.{n}"})).status for n in (5, 6)] == [200, 429]
    assert [(await AsgiClient(app, peer=None).get("/")).status for _ in range(2)] == [200, 429]
    peers = ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1")
    assert [(await AsgiClient(app, peer=peer).get("/")).status for peer in peers] == [200, 429, 200]


async def test_a_store_that_does_not_answer_and_a_bad_request() -> None:
    app = FastAPI()
    denying = limit("1/minute", counters="redis://127.0.0.1:1", on_failure="deny", scope="denying")
    app.get("/dependency", dependencies=[Depends(denying)])(lambda: 1)

    @app.get("/decorated")
    @denying
    def decorated(request: FastApiRequest) -> None: ...

    app.get("/local", dependencies=[Depends(limit("1/minute", counters="redis://127.0.0.1:1"))])(lambda: 1)
    app.get("/bad", dependencies=[Depends(limit("1/minute", trusted_proxies=["203.0.113.0/24"]))])(lambda: 1)
    client = AsgiClient(app)
    for path in ("/dependency", "/decorated"):
        answer = await client.get(path)
        assert (answer.status, answer.headers["x-tidegate-error"]) == (503, "STORE_UNAVAILABLE")
        assert "127.0.0.1" not in answer.json()["detail"]
    assert [(await client.get("/local")).status for _ in range(2)] == [200, 429], "counted in this process meanwhile"
    bad = await client.get("/bad", {"x-real-ip": "\u00e4"})
    assert (bad.status, bad.headers["x-tidegate-error"]) == (400, "BAD_REQUEST")
    await close_shared()


def test_what_a_dependency_cannot_do() -> None:
    app = FastAPI()
    with pytest.raises(PolicyError, match=r"test_fastapi_limits\.py:\d+: limit: a dependency runs before the response exists"):
        app.get("/", dependencies=[Depends(limit("1/minute", deduct_when=bool))])(lambda: 1)
    with pytest.raises(PolicyError, match="a dependency does not know when its request ends"):
        app.get("/", dependencies=[Depends(limit("1 concurrent"))])(lambda: 1)


async def test_slots_of_all_endpoints(clock: Clock) -> None:
    app = FastAPI()
    store = counted(clock)
    in_progress: list[int] = []

    @app.get("/")
    async def view() -> str:
        in_progress.append(store.open_holds)
        in_progress.append((await client.get("/")).status)
        return "ran"

    client = AsgiClient(RateLimitMiddleware(app, default_limits="1 concurrent", counters=store))
    assert [(await client.get("/")).status for _ in range(2)] == [200, 200]
    assert (in_progress, store.open_holds) == ([1, 429, 1, 429], 0)
    with pytest.raises(PolicyError, match="which is not known here"):
        await limit(lambda: "1 concurrent", counters=store).check(HTTPConnection({"type": "http", "headers": []}))


@pytest.mark.parametrize("arguments", [{}, {"policy": "examples/app.policy.toml", "default_limits": "1/minute"}])
def test_the_middleware_needs_one_of_three(arguments: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="exactly one of 'gate', 'policy' and 'default_limits'"):
        RateLimitMiddleware(FastAPI(), **arguments)
