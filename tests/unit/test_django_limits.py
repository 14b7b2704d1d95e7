"""Limits in Django, in sync and async views, and in Django REST framework."""

from __future__ import annotations

import asyncio
from typing import Any

import django
import pytest
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path

if not settings.configured:
    settings.configure(
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF=__name__,
        SECRET_KEY="for tests",
        MIDDLEWARE=["tidegate.django.RateLimitMiddleware"],
        TIDEGATE={"default_limits": ["2/minute"]},
        REST_FRAMEWORK={
            "DEFAULT_THROTTLE_RATES": {"anon": "2/min", "user": "3/min; 100/day", "uploads": "1/min"},
            "DEFAULT_AUTHENTICATION_CLASSES": [],
            "UNAUTHENTICATED_USER": None,
        },
    )
    django.setup()

from django.test import AsyncClient, Client, RequestFactory, override_settings
from django.utils.decorators import method_decorator
from django.views import View
from rest_framework.response import Response
from rest_framework.views import APIView

from tests.moments import wait_until
from tidegate import Decision, PolicyError, SyncLimiter
from tidegate.django import RateLimitMiddleware, exempt, limit
from tidegate.doors.stores import SWITCHES
from tidegate.doors.wsgi_requests import put_django_headers
from tidegate.drf import AnonRateThrottle, RateThrottle, ScopedRateThrottle, UserRateThrottle


def decided(limits: str) -> Decision:
    """A decision by some limits."""
    return SyncLimiter(limits).check("one")


@pytest.fixture(autouse=True)
def nothing_consumed() -> None:
    for store in list(SWITCHES.memory):
        store.clear()


def plain(request: HttpRequest, number: int = 0) -> HttpResponse:
    return HttpResponse("plain")


@exempt
def health(request: HttpRequest) -> HttpResponse:
    return HttpResponse("ok")


@limit("1/minute")
def own(request: HttpRequest) -> HttpResponse:
    return HttpResponse("own")


@limit("1/minute", key="ip")
async def asynchronous(request: HttpRequest) -> HttpResponse:
    return HttpResponse("async")


@limit("1/minute", block=False)
def limited(request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"{request.limited}")  # type: ignore[attr-defined]


@limit("1/minute", key=lambda request: request.GET.get("q"), methods=["POST"])
def by_query(request: HttpRequest) -> HttpResponse:
    return HttpResponse("")


@limit("1/minute", key="user")
def by_user(request: HttpRequest) -> HttpResponse:
    return HttpResponse("")


@limit("2/minute", deduct_when=lambda response: response.status_code == 401)
def log_in(request: HttpRequest) -> HttpResponse:
    return HttpResponse("", status=int(request.GET["status"]))


@limit("1 concurrent", scope="stream")
def stream(request: HttpRequest) -> StreamingHttpResponse:
    if "fails" in request.GET:
        raise RuntimeError("a view that fails")
    return StreamingHttpResponse([b"a", b"b"])


@limit("1 concurrent; 100/minute", scope="asynchronous stream")
async def asynchronous_stream(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse([b"a", b"b"])


class Thing(View):
    @method_decorator(limit("1/minute"))
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("")

    @limit("1/minute")
    def post(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("")


class User:
    is_authenticated = True

    def __init__(self, pk: int) -> None:
        self.pk = pk


class Api(APIView):  # type: ignore[misc]
    throttle_classes = (AnonRateThrottle, UserRateThrottle)

    def initial(self, request: Any, *args: Any, **kwargs: Any) -> None:
        if "HTTP_X_USER" in request.META:
            request.user = User(int(request.META["HTTP_X_USER"]))
        super().initial(request, *args, **kwargs)

    def get(self, request: Any) -> Response:
        return Response({"ran": True})


class Uploads(Api):
    throttle_classes = (ScopedRateThrottle,)
    throttle_scope = "uploads"


class Burst(UserRateThrottle):
    rate = "1/min"
    scope = "burst"


class Own(Api):
    throttle_classes = (Burst,)


exempt(Api), exempt(Uploads), exempt(Own)

urlpatterns = [
    path("plain/<int:number>", plain),
    path("health", health),
    path("own", own),
    path("async", asynchronous),
    path("limited", limited),
    path("query", by_query),
    path("user", by_user),
    path("login", log_in),
    path("stream", stream),
    path("async-stream", asynchronous_stream),
    path("thing", Thing.as_view()),
    path("api", Api.as_view()),
    path("uploads", Uploads.as_view()),
    path("burst", Own.as_view()),
]


def statuses(*paths: str, **headers: Any) -> list[int]:
    client = Client()
    return [client.get(path, headers=headers).status_code for path in paths]


def test_default_limits_hold_for_each_view() -> None:
    answers = [Client().get(f"/plain/{number}") for number in range(3)]
    assert [each.status_code for each in answers] == [200, 200, 429]
    assert [each.headers["X-RateLimit-Remaining"] for each in answers] == ["1", "0", "0"]
    assert answers[2].json()["error"]["code"] == "RATE_LIMIT_EXCEEDED"
    assert int(answers[2].headers["Retry-After"]) > 0
    assert Client(REMOTE_ADDR="203.0.113.9").get("/plain/1").status_code == 200
    assert statuses(*["/health"] * 4) == [200] * 4


def test_views_with_a_limit_of_their_own() -> None:
    answers = [Client().get("/own") for _ in range(2)]
    assert [each.status_code for each in answers] == [200, 429]
    assert [each.headers["X-RateLimit-Limit"] for each in answers] == ["1", "1"]
    assert statuses("/thing", "/thing") == [200, 429]
    assert [Client().post("/thing").status_code for _ in range(2)] == [200, 429]
    assert statuses("/login?status=200", *["/login?status=401"] * 3, "/login?status=200") == [200, 401, 401, 429, 429]
    assert [Client().post(f"/query?q={q}").status_code for q in "aab"] == [200, 429, 200]
    assert statuses("/query?q=a") == [200], "other methods are not limited"


def open_slots() -> int:
    return sum(store.open_holds for store in SWITCHES.memory)


@pytest.mark.parametrize("path", ["/stream", "/async-stream"])
def test_slots_of_views(path: str) -> None:
    streaming = Client().get(path)
    assert (streaming.status_code, open_slots()) == (200, 1)
    assert (Client().get(path).status_code, open_slots()) == (429, 1)
    assert b"".join(streaming.streaming_content) == b"ab"  # type: ignore[attr-defined]
    assert open_slots() == 0, "the client closes a response that it has read"
    abandoned = Client().get(path)
    abandoned.close()
    assert open_slots() == 0


async def test_slots_of_views_on_an_event_loop() -> None:
    streaming = await AsyncClient().get("/async-stream")
    assert [(await AsyncClient().get(path)).status_code for path in ("/async-stream", "/stream")] == [429, 200]
    await asyncio.to_thread(streaming.close)  # as Django's ASGI handler does it
    assert open_slots() == 1, "of the other view, whose response is open"


def test_slots_of_views_that_fail() -> None:
    client = Client(raise_request_exception=False)
    assert [client.get("/stream?fails").status_code for _ in range(2)] == [500, 500]
    assert open_slots() == 0


def test_slots_of_responses_that_are_dropped() -> None:
    """As middleware does that answers 304 instead."""
    streaming = stream(RequestFactory().get("/stream"))
    assert (streaming.status_code, open_slots()) == (200, 1)
    del streaming
    wait_until(lambda: open_slots() == 0)


def test_default_limits_that_need_the_response() -> None:
    """Slots until the response was sent, and outcomes."""

    def outcome(request: HttpRequest) -> HttpResponse:
        return HttpResponse("", status=int(request.GET["status"]))

    slots = {"default_limits": "1 concurrent", "scope": "default slots"}
    failures = {"default_limits": "1/day", "deduct_when": lambda response: response.status_code == 401, "scope": "failures"}

    def answers(middleware: RateLimitMiddleware, status: int) -> HttpResponse:
        request = RequestFactory().get(f"/?status={status}")
        denied = middleware.process_view(request, outcome)
        middleware.get_response = lambda request: denied or outcome(request)
        answer: HttpResponse = middleware(request)
        return answer

    with override_settings(TIDEGATE=slots):
        middleware = RateLimitMiddleware(plain)
    first = answers(middleware, 200)
    assert (first.status_code, answers(middleware, 200).status_code) == (200, 429)
    first.close()
    assert (answers(middleware, 200).status_code) == 200
    with override_settings(TIDEGATE=failures):
        middleware = RateLimitMiddleware(plain)
    assert [answers(middleware, status).status_code for status in (200, 200, 401, 200)] == [200, 200, 401, 429]


def test_a_limit_that_does_not_block_says_so() -> None:
    assert [Client().get("/limited").content for _ in range(2)] == [b"False", b"True"]


def was_limited(view: Any, path: str = "/", **request: Any) -> bool:
    """What `request.limited` was in a view."""
    return bool(view(RequestFactory().generic(request.pop("method", "GET"), path, **request)))


def test_stacked_limits() -> None:
    """One that passes does not hide another that denied; each counts its own methods."""

    @limit("1/minute", key=lambda: "min", block=False)
    @limit("10/day", key=lambda: "day", block=False)
    def stacked(request: Any) -> bool:
        return bool(request.limited)

    @limit("1/minute", methods="GET", block=False)
    @limit("1/minute", methods=["POST"], block=False)
    def by_method(request: Any) -> bool:
        return bool(request.limited)

    assert [was_limited(stacked) for _ in range(2)] == [False, True]
    assert [was_limited(by_method, method=method) for method in ("GET", "POST", "GET", "POST")] == [False, False, True, True]


def test_classes_of_views() -> None:
    """Decorated by method, from outside, and as a whole; each class counts by itself."""

    class First(View):
        def get(self, request: Any) -> bool:
            return bool(request.limited)

    class Second(View):
        def get(self, request: Any) -> bool:
            return bool(request.limited)

    whole = limit("1/minute", block=False)(First.as_view())
    views = [method_decorator(limit("1/minute", block=False), name="get")(each).as_view() for each in (First, Second)]
    assert [was_limited(view) for view in (*views, *views)] == [False, False, True, True]
    assert was_limited(whole), "the decorator of the method is below it"


def test_keys_of_the_request() -> None:
    def limited(scope: str, key: Any) -> Any:
        return limit("1/minute", key=key, block=False, scope=scope)(lambda request: request.limited)

    by_get = limited("get", lambda request: request.GET.get("q"))
    by_post = limited("post", lambda request: request.POST.get("q"))
    assert [was_limited(by_get, f"/?q={q}") for q in "aabb"] == [False, True, False, True]
    form = "application/x-www-form-urlencoded"
    assert [was_limited(by_post, method="POST", data=f"q={q}", content_type=form) for q in "aabb"] == [False, True, False, True]
    by_header = limited("header", "header:x-tenant")
    assert [was_limited(by_header, HTTP_X_TENANT=tenant) for tenant in "aab"] == [False, True, False]
    assert [was_limited(by_header) for _ in range(2)] == [False, True], "without the header the address is counted"
    by_ip = limited("ip", "ip")
    addresses = ("203.0.113.7", "203.0.113.7", "203.0.113.8", "2001:db8::1", "2001:db8::2", "2001:db8:0:1::1")
    assert [was_limited(by_ip, REMOTE_ADDR=address) for address in addresses] == [False, True, False, False, True, False]


def test_limits_by_the_request() -> None:
    """A function may give other limits to other users, and None for no limit; 0 is refused, naming the text."""

    @limit(lambda request: request.GET.get("rate"), block=False)
    def view(request: Any) -> bool:
        return bool(getattr(request, "limited", False))

    assert [was_limited(view, "/?rate=1/m") for _ in range(2)] == [False, True]
    assert [was_limited(view, "/?rate=3/m") for _ in range(3)] == [False, False, True], "what was consumed stays consumed"
    assert [was_limited(view) for _ in range(3)] == [False] * 3
    with pytest.raises(PolicyError, match="limit '0/m': the amount must be a whole number"):
        view(RequestFactory().get("/?rate=0/m"))


def test_users() -> None:
    def get(pk: int | None) -> int:
        request = HttpRequest()
        request.method, request.META = "GET", {"REMOTE_ADDR": "203.0.113.7"}
        request.user = User(pk) if pk else None  # type: ignore[assignment]
        return int(by_user(request).status_code)

    assert [get(pk) for pk in (1, 1, 2, None, None)] == [200, 429, 200, 200, 429]


async def test_async_views_under_asgi() -> None:
    answers = [await AsyncClient().get("/async") for _ in range(2)]
    assert [each.status_code for each in answers] == [200, 429]
    assert [each.headers["X-RateLimit-Remaining"] for each in answers] == ["0", "0"]
    assert [(await AsyncClient().get("/plain/1")).status_code for _ in range(3)] == [200, 200, 429]


def test_a_store_that_does_not_answer() -> None:
    denying = limit("1/minute", counters="redis://127.0.0.1:1", on_failure="deny")(plain)
    request = HttpRequest()
    request.META = {"REMOTE_ADDR": "203.0.113.7"}
    answer = denying(request)
    assert (answer.status_code, b"STORE_UNAVAILABLE" in answer.content, b"127.0.0.1" in answer.content) == (503, True, False)


def test_settings() -> None:
    with override_settings(TIDEGATE={"default_limits": "1/fortnight"}), pytest.raises(ImproperlyConfigured, match="fortnight"):
        RateLimitMiddleware(plain)
    with override_settings(TIDEGATE={"default_limit": "1/day", "default_limits": "1/day"}), pytest.raises(ImproperlyConfigured):
        RateLimitMiddleware(plain)
    with override_settings(TIDEGATE=["1/day"]), pytest.raises(ImproperlyConfigured, match="must be a dict"):
        RateLimitMiddleware(plain)
    with override_settings(TIDEGATE={"enabled": False, "default_limits": "1/day"}):
        assert RateLimitMiddleware(plain)._limit is None
        off = limit("1/minute")(plain)
        request = HttpRequest()
        request.META = {"REMOTE_ADDR": "203.0.113.7"}
        assert [off(request).status_code for _ in range(3)] == [200] * 3
    with override_settings(TIDEGATE={"counters": "mongodb://x"}), pytest.raises(PolicyError, match=r"test_django_limits\.py:\d+"):
        limit("1/minute")


def test_rest_framework() -> None:
    answers = [Client().get("/api") for _ in range(3)]
    assert [each.status_code for each in answers] == [200, 200, 429]
    assert int(answers[2].headers["Retry-After"]) > 0
    assert "throttled" in answers[2].json()["detail"]
    assert answers[0].headers["X-RateLimit-Remaining"] == "1"
    client = Client(headers={"X-User": "1"})
    assert [client.get("/api").status_code for _ in range(4)] == [200, 200, 200, 429]
    assert statuses("/api", **{"X-User": "2"}) == [200]
    assert statuses("/uploads", "/uploads") == [200, 429]
    assert statuses("/burst", "/burst") == [200, 429]


def test_throttles_without_a_rate() -> None:
    class Unknown(UserRateThrottle):
        scope = "unknown"

    class Nameless(RateThrottle):
        scope = None

    with pytest.raises(ImproperlyConfigured, match="has no rate for the scope 'unknown'"):
        Unknown().get_rate(None)
    with pytest.raises(ImproperlyConfigured, match="needs a scope or a rate"):
        Nameless().get_rate(None)
    with pytest.raises(NotImplementedError, match="needs a method get_key"):
        Nameless().get_key(None, None)
    assert ScopedRateThrottle().allow_request(None, None), "a view without throttle_scope is not limited"


def test_headers_are_set_as_django_sets_them() -> None:
    """`put_django_headers` writes several at once where the headers are kept as it expects; else one by one."""
    decision = decided("1/minute")
    quick, slow, by_hand = HttpResponse("a", headers={"RateLimit": "other"}), HttpResponse("a"), HttpResponse("a")
    put_django_headers(quick, decision)
    slow.headers = OtherHeaders(slow.headers)  # type: ignore[assignment]
    put_django_headers(slow, decision)
    for name, value in decision.headers:
        by_hand.headers[name] = value
    assert dict(quick.items()) == dict(by_hand.items()) == slow.headers
    assert quick.serialize_headers().count(b"ratelimit: ") == 1


class OtherHeaders(dict[str, str]):
    """Headers of a class that keeps them in another way."""
