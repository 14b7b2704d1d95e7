"""The gRPC door as a client meets it: `tidegate serve` as a process, grpcio as the client."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import httpx
import pytest

from tests.conftest import Serve, free_port
from tests.integration.ratelimit_client import ask, caller, headers, health, request, watch
from tests.moments import PATIENCE_S
from tidegate.doors.grpc.messages import NOT_SERVING, OK, OVER_LIMIT, SERVICE_UNKNOWN, SERVING

KEY, OTHER = "demo-free-key-0001", "demo-other-key-0001"
POLICY = f"""
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/api/*"
  limits = ["5/hour", "100/day"]
  [[tiers.rules]]
  endpoint = "/month/*"
  algorithm = "fixed_window"
  limits = ["7/month"]
  [[tiers.rules]]
  endpoint = "/year/*"
  algorithm = "fixed_window"
  limits = ["7/year"]
  [[tiers.rules]]
  endpoint = "/odd/*"
  limits = ["7/90s"]
  [[tiers.rules]]
  endpoint = "/by-ip/*"
  limits = ["2/hour"]
  subject = "ip"
  [[tiers.rules]]
  endpoint = "/api/*"
  limits = ["1/hour"]
  mode = "shadow"
[[api_keys]]
key = "{KEY}"
tier = "free"
[[api_keys]]
key = "{OTHER}"
tier = "free"
"""


def entries(path: str, key: str = KEY, ip: str = "203.0.113.7") -> list[tuple[str | bytes, str | bytes]]:
    return [("api_key", key), ("method", "GET"), ("path", path), ("remote_address", ip)]


@pytest.fixture
def server(serve: Callable[..., Serve], tmp_path: Any) -> Serve:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    return serve(grpc=True)


@pytest.fixture
def address(server: Serve) -> str:
    return f"127.0.0.1:{server.grpc_port}"


def test_a_check_and_its_telemetry(server: Serve, address: str) -> None:
    first = ask(address, request(entries("/api/a?x=1")))
    status = first.statuses[0]
    assert (first.overall_code, status.code, status.limit_remaining) == (OK, OK, 4)
    assert (status.current_limit.requests_per_unit, status.current_limit.unit, status.current_limit.name) == (5, 3, "/api/*")
    assert 0 < status.duration_until_reset.seconds <= 7200
    assert headers(first)["ratelimit-policy"] == '"5/hour";q=5;w=3600, "100/day";q=100;w=86400'
    codes = [ask(address, request(entries("/api/b"))).overall_code for _ in range(5)]
    assert codes == [OK] * 4 + [OVER_LIMIT]
    denied = ask(address, request(entries("/api/b")))
    assert int(headers(denied)["retry-after"]) > 0
    assert b"RATE_LIMIT_EXCEEDED" in denied.raw_body
    told = httpx.get(f"{server.url}/metrics").text
    counted = dict(re.findall(r'^rate_limiter_requests_total\{[^}]*status="(\w+)"[^}]*\} (\S+)', told, re.MULTILINE))
    assert counted == {"allowed": "5.0", "blocked": "2.0"}
    assert "rate_limiter_in_flight 0.0" in told or "rate_limiter_in_flight 1.0" in told


def test_units(address: str) -> None:
    told = {path: ask(address, request(entries(path))).statuses[0].current_limit for path in ("/month/x", "/year/x", "/odd/x")}
    assert {path: (limit.unit, limit.unit_multiplier.value) for path, limit in told.items()} == {
        "/month/x": (5, 0),
        "/year/x": (6, 0),
        "/odd/x": (1, 90),
    }


def test_hits(address: str) -> None:
    assert ask(address, request(entries("/api/a"), hits=3)).statuses[0].limit_remaining == 2
    # A descriptor's own hits go before the request's, and 0 only looks.
    assert ask(address, request(entries("/api/a"), hits=3, own_hits=[0])).statuses[0].limit_remaining == 2
    over = ask(address, request(entries("/api/a"), hits=1, own_hits=[3]))
    assert (over.overall_code, over.statuses[0].limit_remaining) == (OVER_LIMIT, 2)
    assert ask(address, request(entries("/api/a"), hits=2)).statuses[0].limit_remaining == 0
    # Nothing is left: a look says so, unlike elsewhere, for Envoy asks with hits 0 whether a request may begin.
    assert ask(address, request(entries("/api/a"), own_hits=[0])).overall_code == OVER_LIMIT
    too_many = ask(address, request(entries("/api/a"), own_hits=[2**63]))
    assert (too_many.overall_code, headers(too_many)["x-tidegate-error"]) == (OVER_LIMIT, "BAD_REQUEST")


def test_a_request_passes_whole_or_charges_nothing(address: str) -> None:
    by_ip, by_key = entries("/by-ip/x", ip="198.51.100.1"), entries("/api/a")
    for _ in range(2):
        assert ask(address, request(by_ip, by_key)).overall_code == OK
    denied = ask(address, request(by_ip, by_key))
    assert (denied.overall_code, [each.code for each in denied.statuses]) == (OVER_LIMIT, [OVER_LIMIT, OK])
    assert [each.limit_remaining for each in denied.statuses] == [0, 3]
    assert "retry-after" in headers(denied)
    # Likewise where a key is unknown.
    unknown = ask(address, request(by_key, entries("/api/a", key="demo-unknown-key-01")))
    assert ([each.code for each in unknown.statuses], unknown.statuses[0].limit_remaining) == ([OK, OVER_LIMIT], 3)
    assert headers(unknown)["x-tidegate-error"] == "INVALID_API_KEY"
    assert ask(address, request(by_key)).statuses[0].limit_remaining == 2


@pytest.mark.parametrize(
    ("message", "code", "said"),
    [
        (request(domain="tidegate"), "INVALID_ARGUMENT", "0 descriptors"),
        (request(entries("/api/a"), domain=""), "INVALID_ARGUMENT", "no domain"),
        (request(*[entries("/api/a")] * 10_000), "INVALID_ARGUMENT", "10000 descriptors; send 1 to 100"),
        (request([("k", "v")] * 65), "INVALID_ARGUMENT", "65 entries"),
        (b"\xff\xff\xff", "INVALID_ARGUMENT", "not a valid envoy.service.ratelimit.v3.RateLimitRequest"),
        (b"", "INVALID_ARGUMENT", "no domain"),
    ],
    ids=["no descriptors", "no domain", "10,000 descriptors", "65 entries", "garbage", "nothing"],
)
def test_what_the_gateway_got_wrong_is_an_error(address: str, message: Any, code: str, said: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        ask(address, message)
    assert refused.value.code().name == code
    assert said in refused.value.details()


def test_limits_sent_along_are_rejected(address: str) -> None:
    limited = request(entries("/api/a"))
    limited.descriptors[0].limit.requests_per_unit = 1_000_000
    with pytest.raises(grpc.RpcError) as refused:
        ask(address, limited)
    assert refused.value.code().name == "INVALID_ARGUMENT"


def test_forced_charges_and_negative_hits(address: str) -> None:
    forced = request([*entries("/api/a"), ("tidegate_forced", "yes")], own_hits=[9])
    assert (ask(address, forced).overall_code, ask(address, request(entries("/api/a"))).overall_code) == (OK, OVER_LIMIT)
    negative = request(entries("/api/a"), own_hits=[6])
    negative.descriptors[0].is_negative_hits = True
    refunded = ask(address, negative)
    assert (refunded.overall_code, refunded.statuses[0].limit_remaining) == (OK, 2)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (entries("//api/a"), "BAD_REQUEST"),
        (entries("/api/%2e%2e/a"), "BAD_REQUEST"),
        (entries("/" + "x" * 9000), "BAD_REQUEST"),
        ([*entries("/api/a"), ("path", "/elsewhere")], "BAD_REQUEST"),
        ([("api_key", b"demo-\xff\xfe"), ("path", "/api/a")], "INVALID_API_KEY"),
        ([("api_key", KEY), ("path", b"/api/\xff")], "BAD_REQUEST"),
        ([("api_key", KEY), ("path", "/by-ip/a"), ("remote_address", "nowhere")], "BAD_REQUEST"),
        ([("api_key", KEY), ("path", "/api/a"), ("method", "G E T")], "BAD_REQUEST"),
        ([("path", "/api/a")], "MISSING_API_KEY"),
        ([("api_key", KEY), ("path", "/by-ip/a")], "BAD_REQUEST"),
        ([("api_key", KEY), ("path", "/api/a"), ("note", "x" * 1_100_000)], "PAYLOAD_TOO_LARGE"),
    ],
)
def test_what_a_client_can_cause_is_denied_and_charges_nothing(address: str, sent: Any, code: str) -> None:
    denied = ask(address, request(sent))
    assert (denied.overall_code, headers(denied).get("x-tidegate-error")) == (OVER_LIMIT, code)
    assert code.encode() in denied.raw_body
    assert ask(address, request(entries("/api/a"))).statuses[0].limit_remaining == 4


def test_what_nothing_limits_passes(server: Serve, address: str) -> None:
    for message in (
        request(entries("/elsewhere")),
        request([("remote_address", "203.0.113.7")]),
        request([]),
        request(entries("/api/a"), domain="other"),
        request(entries("/api/a"), domain="other"),
    ):
        passed = ask(address, message)
        assert (passed.overall_code, passed.statuses[0].code, headers(passed)) == (OK, OK, {})
    _, _, err = server.stop()
    assert err.count("descriptors of domain 'other' are not limited") == 1


def test_health_and_drain(server: Serve, address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        assert health(channel) == SERVING
        assert health(channel, "envoy.service.ratelimit.v3.RateLimitService") == SERVING
        with pytest.raises(grpc.RpcError) as unknown:
            health(channel, "nobody")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        watched, strange = watch(channel), watch(channel, "nobody")
        assert next(watched).status == SERVING
        assert next(strange).status == SERVICE_UNKNOWN
        answered, stop = [], threading.Event()

        def keep_asking() -> None:
            call = caller(channel)
            while not stop.is_set():
                answered.append(call(request(entries("/elsewhere")), timeout=PATIENCE_S).overall_code)
                time.sleep(0.01)

        asking = threading.Thread(target=keep_asking)
        asking.start()
        server.process.terminate()
        # The watcher hears of it while calls are still answered.
        assert next(watched).status == NOT_SERVING
        before = len(answered)
        while len(answered) < before + 5:
            time.sleep(0.01)
        stop.set()
        asking.join()
        assert set(answered) == {OK}
    code, _, err = server.stop()
    assert (code, "Traceback" in err) == (0, False)


def test_other_methods_are_unimplemented(address: str) -> None:
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/envoy.service.ratelimit.v2.RateLimitService/ShouldRateLimit")(
            b"", timeout=PATIENCE_S, wait_for_ready=True
        )
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_many_calls_at_once_are_exact(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        call = caller(channel)
        grpc.channel_ready_future(channel).result(timeout=PATIENCE_S)
        pending = [call.future(request(entries("/api/a", OTHER)), timeout=PATIENCE_S) for _ in range(500)]
        assert sum(each.result().overall_code == OK for each in pending) == 5


def test_several_workers_share_the_port(serve: Callable[..., Serve], redis_server: Any, tmp_path: Any) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    path = f"/api/{time.time_ns()}"
    # A deadline that a busy machine keeps: past it each worker would count at its share.
    patient = {"TIDEGATE_COUNTERS__TIMEOUT_MS": "10000"}
    server = serve(grpc=True, TIDEGATE_SERVER__WORKERS="2", TIDEGATE_COUNTERS__URL=redis_server.url, **patient)
    address = f"127.0.0.1:{server.grpc_port}"
    # Each asks over a connection of its own, which the kernel gives to one of the two.
    codes = [ask(address, request(entries(path, ip=f"198.51.100.{number}"))).overall_code for number in range(8)]
    assert sorted(codes) == [OK] * 5 + [OVER_LIMIT] * 3
    assert server.stop()[0] == 0


@pytest.mark.parametrize(
    ("grpc_address", "said"),
    [
        ("127.0.0.1", "server.grpc"),
        ("192.0.2.1:80", 'grpc = "" disables the gRPC listener'),
        ("{http}", "has the port of server.http"),
    ],
)
def test_wrong_addresses(serve: Callable[..., Serve], grpc_address: str, said: str) -> None:
    port = free_port()
    code, _, err = serve(
        "--demo",
        wait=False,
        TIDEGATE_SERVER__HTTP=f"127.0.0.1:{port}",
        TIDEGATE_SERVER__GRPC=grpc_address.format(http=f"127.0.0.1:{port}"),
    ).stop_by_itself()
    assert code == 2
    assert said in err


def test_rules_for_descriptors(serve: Callable[..., Serve], tmp_path: Any) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(
        '[[tiers]]\nname = "open"\n[[tiers.rules]]\ndescriptor = { service = "pay", user = "*" }\nlimits = ["2/hour"]\n'
        '[anonymous]\ntier = "open"\n'
    )
    server = serve(grpc=True, TIDEGATE_ADMIN__TOKEN="0123456789abcdef")
    address = f"127.0.0.1:{server.grpc_port}"
    sent = request([("service", "pay"), ("user", "a")])
    answers = [ask(address, sent) for _ in range(3)]
    assert [each.overall_code for each in answers] == [OK, OK, OVER_LIMIT]
    assert answers[0].statuses[0].current_limit.name == "descriptor:service=pay&user=*"
    assert ask(address, request([("service", "pay"), ("user", "b")])).statuses[0].limit_remaining == 1
    assert ask(address, request([("service", "pay")])).statuses[0].limit_remaining == 0
    # Through the admin API a descriptor stands as an endpoint.
    with httpx.Client(
        base_url=f"http://127.0.0.1:{server.admin_port}/admin/v1", headers={"Authorization": "Bearer 0123456789abcdef"}
    ) as admin:
        made = admin.post(
            "/rate-limit-rules", json={"tier": "open", "endpoint": "descriptor:user=*&service=ship", "limits": ["1/hour"]}
        )
        assert (made.status_code, made.json()["endpoint"]) == (201, "descriptor:service=ship&user=*")
        refused = admin.post("/rate-limit-rules", json={"tier": "open", "endpoint": "descriptor:a", "limits": ["1/hour"]})
        assert (refused.status_code, "value ''" in refused.text) == (400, True)
    deadline = time.monotonic() + PATIENCE_S
    shipped = request([("service", "ship"), ("user", "a")])
    while not ask(address, shipped).statuses[0].current_limit.requests_per_unit:
        assert time.monotonic() < deadline
    assert ask(address, shipped).overall_code == OVER_LIMIT


def test_a_rule_that_denies_while_redis_is_unavailable(
    serve: Callable[..., Serve], new_redis: Callable[..., Any], tmp_path: Any
) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(
        '[[tiers]]\nname = "open"\n[[tiers.rules]]\nendpoint = "/deny"\nlimits = ["9/hour"]\non_failure = "deny"\n'
        '[[tiers.rules]]\nendpoint = "/local"\nlimits = ["9/hour"]\n[anonymous]\ntier = "open"\n'
    )
    redis = new_redis()
    server = serve(grpc=True, TIDEGATE_COUNTERS__URL=redis.url, TIDEGATE_COUNTERS__TIMEOUT_MS="5000")
    address = f"127.0.0.1:{server.grpc_port}"
    deny, local = ([("path", path), ("remote_address", "203.0.113.7")] for path in ("/deny", "/local"))
    assert ask(address, request(deny, local)).overall_code == OK
    redis.stop()
    denied = ask(address, request(deny, local))
    assert (denied.overall_code, [each.code for each in denied.statuses]) == (OVER_LIMIT, [OVER_LIMIT, OK])
    assert headers(denied)["x-tidegate-error"] == "STORE_UNAVAILABLE"
    assert ask(address, request(local)).overall_code == OK
    with grpc.insecure_channel(address) as channel:
        assert health(channel) == SERVING


BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pygrpc_native", "google", "yaml"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def test_without_the_extra_the_door_is_off_and_reports_how_to_get_it(serve: Callable[..., Serve], tmp_path: Any) -> None:
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(BLOCKER)
    without = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "blocked"), os.environ.get("PYTHONPATH", "")])}
    server = serve("--demo", grpc=True, **without)
    assert httpx.get(f"{server.url}/readyz").status_code == 200
    told = server.run("doctor")
    off = "note  gRPC listener: off: pygrpc_native, google.protobuf, yaml not installed; for Envoy, pip install 'tidegate[envoy]'"
    assert (told.returncode, off in told.stdout) == (0, True), told.stdout
    code, _, err = server.stop()
    assert (code, "gRPC is disabled: to use it with Envoy, pip install 'tidegate[envoy]'" in err) == (0, True)
    config = tmp_path / "ratelimit.yaml"
    config.write_text("domain: d\n")
    code, _, err = serve("--demo", wait=False, grpc=True, TIDEGATE_ENVOY__CONFIG=str(config), **without).stop_by_itself()
    assert (code, "envoy.config needs pygrpc_native, google.protobuf, yaml: pip install 'tidegate[envoy]'" in err) == (2, True)
    told = server.run("envoy", "check", str(config))
    assert (told.returncode, "pip install 'tidegate[envoy]'" in told.stderr) == (2, True)
