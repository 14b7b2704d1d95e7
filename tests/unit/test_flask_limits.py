"""Limits in Flask and in plain WSGI."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flask
import pytest
from flask import Blueprint, Flask
from flask.views import MethodView
from werkzeug.test import Client, create_environ

from tests.conftest import Clock
from tidegate import Decision, MemoryCounters, PolicyError, RateLimitExceeded, SettingsError, StoreUnavailable
from tidegate.counters.holds import HoldHandle, HoldSettlement
from tidegate.flask import RateLimits, exempt, limit
from tidegate.policy.limits import LimitSet
from tidegate.wsgi import RateLimitMiddleware


@pytest.fixture
def store(clock: Clock) -> MemoryCounters:
    return MemoryCounters(clock=clock)


@pytest.fixture
def app() -> Flask:
    return Flask(__name__)


def statuses(app: Flask, *paths: str, **arguments: Any) -> list[int]:
    client = app.test_client()
    return [client.get(path, **arguments).status_code for path in paths]


def test_a_limited_view_needs_nothing_else(app: Flask, store: MemoryCounters) -> None:
    @app.get("/")
    @limit("2/minute", counters=store)
    def view() -> str:
        return "ran"

    client = app.test_client()
    answers = [client.get("/") for _ in range(3)]
    assert [each.status_code for each in answers] == [200, 200, 429]
    assert [each.headers["X-RateLimit-Remaining"] for each in answers] == ["1", "0", "0"]
    assert [len(each.headers.getlist("RateLimit")) for each in answers] == [1, 1, 1]
    assert int(answers[2].headers["Retry-After"]) > 0
    assert answers[2].json["error"]["code"] == "RATE_LIMIT_EXCEEDED"
    assert client.get("/", environ_base={"REMOTE_ADDR": "203.0.113.9"}).status_code == 200, "each address by itself"


def test_keys(app: Flask, store: MemoryCounters) -> None:
    @app.before_request
    def log_in() -> None:
        flask.g.user = flask.request.headers.get("X-User")

    @app.get("/g")
    @limit("1/minute", key="user", counters=store)
    def by_g() -> str:
        return ""

    @app.get("/function")
    @limit("1/minute", key=lambda: flask.g.user, counters=store)
    def by_function() -> str:
        return ""

    @app.get("/request")
    @limit("1/minute", key=lambda request: request.args["q"], counters=store)
    def by_request() -> str:
        return ""

    @app.get("/item/<item>")
    @limit("1/minute", key="item", counters=store)
    def by_argument(item: str) -> str:
        return item

    @app.get("/key")
    @limit("1/minute", key="api_key", counters=store)
    def by_api_key() -> str:
        return ""

    for path in ("/g", "/function"):
        assert statuses(app, path, path, headers={"X-User": "a"}) == [200, 429]
        assert statuses(app, path, headers={"X-User": "b"}) == [200]
    assert statuses(app, "/request?q=1", "/request?q=1", "/request?q=2") == [200, 429, 200]
    assert statuses(app, "/item/1", "/item/1", "/item/2") == [200, 429, 200]
    assert statuses(app, "/key", "/key", headers={"X-API-Key": "a"}) == [200, 429]
    assert statuses(app, "/key", "/key") == [200, 429], "without a key by address"


def test_methods_costs_exempt_calls_and_responses(app: Flask, store: MemoryCounters) -> None:
    @app.route("/methods", methods=["GET", "POST"])
    @limit("1/minute", methods=["POST"], counters=store)
    def methods() -> str:
        return ""

    @app.get("/cost")
    @limit("5/minute", cost=lambda request: int(request.args["n"]), counters=store)
    def cost() -> str:
        return ""

    @app.get("/exempt")
    @limit("1/minute", exempt_when=lambda: flask.request.headers.get("X-Admin") == "1", counters=store)
    def exempted() -> str:
        return ""

    @app.get("/login/<int:status>")
    @limit("1/minute", deduct_when=lambda response: response.status_code == 401, counters=store)
    def log_in(status: int) -> Any:
        if status == 401:
            flask.abort(401)
        return flask.make_response("", status)

    client = app.test_client()
    assert [client.post("/methods").status_code for _ in range(2)] == [200, 429]
    assert statuses(app, "/methods", "/methods") == [200, 200]
    assert statuses(app, "/cost?n=3", "/cost?n=3", "/cost?n=2") == [200, 429, 200]
    assert statuses(app, *["/exempt"] * 3, headers={"X-Admin": "1"}) == [200] * 3
    assert statuses(app, "/login/200", "/login/200", "/login/401", "/login/401", "/login/200") == [200, 200, 401, 429, 429]


def test_default_limits(app: Flask, store: MemoryCounters) -> None:
    RateLimits(app, ["2/minute", "100/day"], counters=store)

    @app.get("/a/<n>")
    def a(n: str) -> str:
        return n

    @app.get("/own")
    @limit("1/minute", counters=store)
    def own() -> str:
        return ""

    @app.get("/health")
    @exempt
    def health() -> str:
        return ""

    class Things(MethodView):
        decorators = [limit("1/minute", counters=store)]  # noqa: RUF012 - as Flask has it

        def get(self) -> str:
            return ""

    app.add_url_rule("/things", view_func=Things.as_view("things"))
    assert statuses(app, "/a/1", "/a/2", "/a/3") == [200, 200, 429]
    assert statuses(app, "/own", "/own", "/health", "/health", "/health") == [200, 429, 200, 200, 200]
    assert statuses(app, "/things", "/things") == [200, 429]
    assert statuses(app, "/unknown/1", "/unknown/2", "/unknown/3") == [404, 404, 429]


def test_default_limits_by_the_response(app: Flask, store: MemoryCounters) -> None:
    RateLimits(app, "2/minute", deduct_when=lambda response: response.status_code == 401, counters=store)

    @app.get("/login/<int:status>")
    def log_in(status: int) -> Any:
        if status == 401:
            flask.abort(401)
        return flask.make_response("", status)

    client = app.test_client()
    answers = [client.get(f"/login/{status}") for status in (200, 200, 401, 200, 401, 200)]
    assert [each.status_code for each in answers] == [200, 200, 401, 200, 401, 429]
    assert [each.headers["X-RateLimit-Remaining"] for each in answers] == ["2", "2", "1", "1", "0", "0"]


def test_default_limits_by_the_cost_of_the_response(app: Flask, store: MemoryCounters) -> None:
    RateLimits(app, "5/minute", cost=lambda response: int(response.get_data()), counters=store)

    @app.get("/<int:cost>")
    def costly(cost: int) -> str:
        return str(cost)

    assert statuses(app, "/3", "/1", "/9", "/1") == [200, 200, 200, 429]


def test_a_store_that_fails_after_the_view(caplog: pytest.LogCaptureFixture, app: Flask) -> None:
    store = FailsAfterwards()
    RateLimits(app, "5/minute", cost=lambda response: 1, counters=store)
    app.get("/")(lambda: "ran")
    app.get("/login", endpoint="login")(limit("5/minute", deduct_when=lambda _: True, counters=FailsToSettle())(lambda: "ran"))
    assert app.test_client().get("/").data == b"ran"
    assert "was not charged" in caplog.text
    assert app.test_client().get("/login").data == b"ran"
    assert "hold of a limited call was not settled" in caplog.text


class FailsToSettle(MemoryCounters):
    """Opens the hold of a view, and fails to settle it."""

    def settle_hold_now(self, handle: HoldHandle, cost: int, success: bool = False) -> HoldSettlement:
        raise StoreUnavailable("the store does not answer")


class FailsAfterwards(MemoryCounters):
    """Answers the check before a view, and fails to charge it."""

    def charge_one(self, limits: LimitSet, subject: str, cost: int) -> Decision:
        if cost:
            raise StoreUnavailable("the store does not answer")
        return super().charge_one(limits, subject, cost)


@pytest.mark.parametrize("extension", [False, True])
def test_a_mistake_of_a_function_is_not_the_clients(app: Flask, store: MemoryCounters, extension: bool) -> None:
    if extension:
        RateLimits(app)
    app.get("/limits", endpoint="limits")(limit(lambda: "0/minute", counters=store)(lambda: ""))
    app.get("/cost", endpoint="cost")(limit("1/minute", cost=lambda: -1, counters=store)(lambda: ""))
    for path in ("/limits", "/cost"):
        answer = app.test_client().get(path)
        assert (answer.status_code, b".py" in answer.data) == (500, False)


def test_static_files_are_not_limited_by_default(tmp_path: Path, store: MemoryCounters) -> None:
    (tmp_path / "a.txt").write_text("a")
    app = Flask(__name__, static_folder=str(tmp_path), static_url_path="/static")
    RateLimits(app, "1/minute", counters=store)
    app.register_blueprint(Blueprint("files", __name__, static_folder=str(tmp_path)), url_prefix="/bp")
    blueprint = Blueprint("own", __name__, url_prefix="/own")
    blueprint.get("/", endpoint="static")(lambda: "")
    app.register_blueprint(blueprint)
    for path in ["/static/a.txt", f"/bp/{tmp_path.name}/a.txt"] * 2:
        with app.test_client().get(path) as answer:
            assert (answer.status_code, answer.data) == (200, b"a")
    assert statuses(app, "/own/", "/own/") == [200, 429], "a view of this name is a view"


def test_the_views_of_a_blueprint_together(app: Flask, store: MemoryCounters) -> None:
    blueprint = Blueprint("api", __name__, url_prefix="/api")
    blueprint.before_request(limit("2/minute", scope="api", counters=store)(lambda: None))
    blueprint.get("/a", endpoint="a")(lambda: "")
    blueprint.get("/b", endpoint="b")(limit("1/minute", scope="b", counters=store)(lambda: ""))
    app.register_blueprint(blueprint)
    app.get("/")(lambda: "")
    assert statuses(app, "/api/a", "/api/b", "/api/a", "/", "/") == [200, 200, 429, 200, 200]


def test_blueprints_in_blueprints(app: Flask, store: MemoryCounters) -> None:
    parent, child = Blueprint("parent", __name__, url_prefix="/parent"), Blueprint("child", __name__, url_prefix="/child")
    parent.before_request(limit("3/minute", scope="parent", counters=store)(lambda: None))
    child.before_request(limit("1/minute", scope="child", counters=store)(lambda: None))
    parent.get("/", endpoint="view")(lambda: "")
    child.get("/", endpoint="view")(lambda: "")
    child.get("/free", endpoint="free")(exempt(lambda: ""))
    parent.register_blueprint(child)
    app.register_blueprint(parent)
    # A name with a dot, which is not that of a blueprint.
    app.add_url_rule("/dotted", endpoint="no.blueprint", view_func=lambda: "")
    RateLimits(app, "2/minute", counters=store)
    assert statuses(app, "/parent/child/", "/parent/child/", "/parent/", "/parent/") == [200, 429, 200, 429]
    assert statuses(app, "/dotted", "/dotted", "/dotted") == [200, 200, 429]


def test_arguments_come_before_settings(app: Flask, store: MemoryCounters) -> None:
    app.config.update(RATELIMIT_DEFAULT="5/minute", RATELIMIT_STORAGE_URI="memory://another")
    RateLimits(app, "1/minute", counters=store)
    app.get("/")(lambda: "")
    assert statuses(app, "/", "/") == [200, 429]
    assert len(store) == 1


def test_functions_that_views_call(app: Flask, store: MemoryCounters) -> None:
    @limit("1/minute", counters=store)
    def send_mail() -> str:
        return "sent"

    @app.get("/a")
    def a() -> str:
        return send_mail()

    @app.get("/b")
    def b() -> str:
        return send_mail()

    assert statuses(app, "/a", "/b") == [200, 429]


def test_settings_of_the_app(store: MemoryCounters) -> None:
    for enabled, expected in ((True, [200, 429]), (False, [200, 200])):
        app = Flask(__name__)
        app.config.update(
            RATELIMIT_ENABLED=enabled, RATELIMIT_DEFAULT="1 per minute", RATELIMIT_STORAGE_URI=f"memory://{enabled}"
        )
        extension = RateLimits()
        extension.init_app(app)

        @app.get("/")
        def view() -> str:
            return ""

        @app.get("/own")
        @limit("1/minute", counters=store, scope=f"own {enabled}")
        def own() -> str:
            return ""

        assert statuses(app, "/", "/") == expected
        assert statuses(app, "/own", "/own") == expected


def test_a_handler_of_the_app(app: Flask, store: MemoryCounters) -> None:
    @app.get("/")
    @limit("1/minute", error_message="slow down", counters=store)
    def view() -> str:
        return ""

    @app.errorhandler(RateLimitExceeded)
    def handle(error: RateLimitExceeded) -> Any:
        return {"message": error.message, "limit": error.decision.limit}, 420

    client = app.test_client()
    client.get("/")
    denied = client.get("/")
    assert (denied.status_code, denied.json) == (420, {"message": "slow down", "limit": 1})


def test_an_error_handler_for_429(app: Flask, store: MemoryCounters) -> None:
    app.get("/")(limit("1/minute", on_exceeded=lambda decision: None, counters=store)(lambda: ""))
    app.register_error_handler(429, lambda error: ("later", 429))
    assert app.test_client().get("/").status_code == 200
    assert app.test_client().get("/").data == b"later"


def test_a_view_can_answer_a_denial_itself(app: Flask, store: MemoryCounters) -> None:
    app.get("/")(limit("1/minute", on_exceeded=lambda request, decision: (request.path, 420), counters=store)(lambda: ""))
    assert statuses(app, "/", "/") == [200, 420]


async def test_async_views(app: Flask, store: MemoryCounters) -> None:
    @limit("1/minute", key=lambda: flask.request.args["q"], counters=store)
    async def view() -> str:
        return "ran"

    ran = []
    for query in ("a", "a", "b"):
        with app.test_request_context(f"/?q={query}"):
            try:
                ran.append(await view())
            except RateLimitExceeded:
                ran.append("denied")
    assert ran == ["ran", "denied", "ran"]


@pytest.mark.parametrize("extension", [False, True])
def test_a_store_that_does_not_answer(app: Flask, extension: bool) -> None:
    if extension:
        RateLimits(app)
    app.get("/")(limit("1/minute", counters="redis://127.0.0.1:1", on_failure="deny", scope="denying")(lambda: ""))
    answer = app.test_client().get("/")
    assert (answer.status_code, answer.json["error"]["code"]) == (503, "STORE_UNAVAILABLE")
    assert b"127.0.0.1" not in answer.data


def test_mistakes() -> None:
    with pytest.raises(SettingsError, match="the first argument of RateLimits is the app, not a str"):
        RateLimits("100/minute")  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="unknown unit 'fortnight'"):
        RateLimits(default_limits="1/fortnight")


# Plain WSGI.


def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"ran"]


def test_wsgi(store: MemoryCounters) -> None:
    client = Client(RateLimitMiddleware(application, "2/minute; 100/day", counters=store, trusted_proxies=["10.0.0.0/8"]))
    answers = [client.get("/", environ_base={"REMOTE_ADDR": "203.0.113.7"}) for _ in range(3)]
    assert [each.status_code for each in answers] == [200, 200, 429]
    assert [each.headers["X-RateLimit-Remaining"] for each in answers] == ["1", "0", "0"]
    assert answers[2].json["error"]["code"] == "RATE_LIMIT_EXCEEDED"
    assert int(answers[2].headers["Retry-After"]) > 0

    def through_proxy(client_ip: str) -> int:
        headers = {"X-Forwarded-For": client_ip}
        return client.get("/", headers=headers, environ_base={"REMOTE_ADDR": "10.0.0.1"}).status_code

    assert [through_proxy(ip) for ip in ("203.0.113.7", "203.0.113.8")] == [429, 200]
    bad = client.get("/", headers={"X-Real-IP": "\xe4"}, environ_base={"REMOTE_ADDR": "10.0.0.1"})
    assert (bad.status_code, bad.json["error"]["code"]) == (400, "BAD_REQUEST")


def test_wsgi_by_the_response(store: MemoryCounters) -> None:
    def log_in(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response(environ["PATH_INFO"][1:] + " done", [("Content-Type", "text/plain")])
        yield b"ran"

    client = Client(RateLimitMiddleware(log_in, "2/minute", deduct_when=lambda got: got.status_code == 401, counters=store))
    answers = [client.get(f"/{status}") for status in (200, 200, 401, 200, 401, 200)]
    assert [each.status_code for each in answers] == [200, 200, 401, 200, 401, 429]
    assert [each.headers["X-RateLimit-Remaining"] for each in answers] == ["2", "2", "1", "1", "0", "0"]
    costs = Client(RateLimitMiddleware(log_in, "5/minute", cost=lambda response: 3, counters=MemoryCounters()))
    assert [costs.get("/200").status_code for _ in range(3)] == [200, 200, 429]


def open_slots(store: MemoryCounters) -> int:
    return store.open_holds


def run_wsgi(app: Any, path: str = "/") -> tuple[str, Iterable[bytes]]:
    """Call a WSGI app as a server does, which has to close the body that it gets."""
    started: list[str] = []
    body = app(create_environ(path), lambda status, headers, exc_info=None: started.append(status))
    return (started or [""])[0], body


def test_slots_of_wsgi_requests(store: MemoryCounters) -> None:
    def stream(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/fails":
            raise RuntimeError("before any response")
        start_response("200 OK", [])
        return iter([b"a", b"b"])

    app = RateLimitMiddleware(stream, "2 concurrent; 100/minute", counters=store)
    bodies = [run_wsgi(app)[1] for _ in range(2)]
    assert list(bodies[0]) == [b"a", b"b"]
    status, denied = run_wsgi(app)
    assert (status, open_slots(store)) == ("429 Too Many Requests", 2), "sent, and not closed"
    assert json.loads(b"".join(denied))["error"]["details"]["limit"] == 2
    bodies[0].close()  # type: ignore[attr-defined]
    assert open_slots(store) == 1
    next(iter(bodies[1]))
    bodies[1].close()  # type: ignore[attr-defined]  # the client disconnected
    assert open_slots(store) == 0
    for _ in range(3):
        with pytest.raises(RuntimeError, match="before any response"):
            run_wsgi(app, "/fails")
    assert open_slots(store) == 0
    unused = run_wsgi(app)[1]
    assert open_slots(store) == 1
    del unused
    assert open_slots(store) == 0, "a server that does not close what it drops"


def test_slots_and_outcomes_of_wsgi_requests(store: MemoryCounters) -> None:
    def log_in(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response(environ["PATH_INFO"][1:] + " done", [])
        return [b"ran"]

    limits = "3 concurrent; 1/minute"
    app = RateLimitMiddleware(log_in, limits, deduct_when=lambda response: response.status_code == 401, counters=store)
    client = Client(app)
    assert [client.get(f"/{status}").status_code for status in (200, 200, 401, 200)] == [200, 200, 401, 429]
    assert open_slots(store) == 0


def test_slots_of_flask_views(app: Flask, store: MemoryCounters) -> None:
    seen: list[int] = []

    @limit("1 concurrent", counters=store, scope="helper")
    def helper() -> None:
        seen.append(open_slots(store))

    @app.get("/stream")
    @limit("1 concurrent", counters=store)
    def stream() -> Any:
        helper()
        helper()
        return flask.Response(iter(["a", "b"]))

    @app.get("/fails")
    @limit("1 concurrent", counters=store)
    def fails() -> str:
        raise RuntimeError("a view that fails")

    @app.get("/aborts")
    @limit("1 concurrent", counters=store)
    def aborts() -> str:
        flask.abort(404)

    class Things(MethodView):
        @limit("1 concurrent", counters=store)
        def get(self) -> str:
            return "thing"

    app.add_url_rule("/things", view_func=Things.as_view("things"))
    status, body = run_wsgi(app, "/stream")
    assert (status, seen) == ("200 OK", [2, 2]), "a function that is no view ends when it returns"
    assert (run_wsgi(app, "/stream")[0], open_slots(store)) == ("429 TOO MANY REQUESTS", 1)
    body.close()  # type: ignore[attr-defined]
    assert open_slots(store) == 0
    assert statuses(app, "/fails", "/fails", "/aborts", "/aborts", "/things", "/things") == [500, 500, 404, 404, 200, 200]
    status, body = run_wsgi(app, "/things")
    assert open_slots(store) == 1
    body.close()  # type: ignore[attr-defined]
    assert open_slots(store) == 0


@pytest.mark.parametrize("propagates", [False, True])
def test_slots_of_all_flask_views(app: Flask, store: MemoryCounters, propagates: bool) -> None:
    RateLimits(app, "1 concurrent; 100/minute", counters=store)
    app.config["PROPAGATE_EXCEPTIONS"] = propagates

    @app.get("/stream")
    def stream() -> Any:
        return flask.Response(iter(["a", "b"]))

    @app.get("/fails")
    def fails() -> str:
        raise RuntimeError("a view that fails")

    _, body = run_wsgi(app, "/stream")
    assert (run_wsgi(app, "/stream")[0], open_slots(store)) == ("429 TOO MANY REQUESTS", 1)
    body.close()  # type: ignore[attr-defined]
    for _ in range(2):
        if propagates:
            with pytest.raises(RuntimeError, match="a view that fails"):
                run_wsgi(app, "/fails")
        else:
            run_wsgi(app, "/fails")[1].close()  # type: ignore[attr-defined]
    assert open_slots(store) == 0


def test_parallel_attempts_count_while_they_are_in_progress(app: Flask, store: MemoryCounters) -> None:
    inner: list[int] = []

    @app.get("/login")
    @limit("2/minute", deduct_when=lambda response: response.status_code == 401, counters=store)
    def log_in() -> Any:
        if len(inner) < 3:
            inner.append(0)
            place = len(inner) - 1
            inner[place] = app.test_client().get("/login").status_code
        return flask.Response("", 401)

    assert app.test_client().get("/login").status_code == 401
    assert inner == [401, 429], "the third attempt comes while two are in progress"
    assert statuses(app, "/login") == [429]


def test_wsgi_by_a_function_of_the_environment(store: MemoryCounters) -> None:
    client = Client(RateLimitMiddleware(application, "1/minute", key=lambda environ: environ["PATH_INFO"], counters=store))
    assert [client.get(path).status_code for path in ("/a", "/a", "/b")] == [200, 429, 200]
