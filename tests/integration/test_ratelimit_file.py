"""Configurations of envoyproxy/ratelimit: what they count, beside that program itself where it is there; and what is refused."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from tests.cases.ratelimit_file import CONFIG, DOMAIN, OURS, STEPS, Step
from tests.conftest import Clock, Serve
from tests.integration.ratelimit_client import ask, caller, headers, health, request
from tests.moments import PATIENCE_S, wait_until
from tests.servers import forked
from tests.servers.ratelimit_peer import RateLimitPeer
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.redis.store import RedisCounters
from tidegate.doors.grpc.domains import FileDomain
from tidegate.doors.grpc.messages import NOT_SERVING, OK, OVER_LIMIT, SERVING, RateLimitResponse
from tidegate.doors.grpc.ratelimit_file import load_ratelimit, parse_ratelimit
from tidegate.doors.grpc.service import RateLimitService
from tidegate.doors.grpc.status import CallRefused
from tidegate.errors import PolicyError
from tidegate.gate.gate import Gate
from tidegate.observation import Observation
from tidegate.policy.toml_reader import parse_policy
from tidegate.settings import EnvoySettings


def _sent(step: Step) -> Any:
    return request(*step.descriptors, domain=DOMAIN, hits=step.hits, own_hits=step.own_hits)


def _compare(step: Step, response: Any) -> None:
    assert response.overall_code == step.code, step
    assert tuple((each.code, each.limit_remaining) for each in response.statuses) == step.statuses, step
    metadata = response.dynamic_metadata.fields
    assert tuple(each.number_value for each in metadata["quotaModeViolations"].list_value.values) == step.over, step
    assert [each.HasField("duration_until_reset") for each in response.statuses if each.HasField("current_limit")] == [
        number not in step.over for number, each in enumerate(response.statuses) if each.HasField("current_limit")
    ]
    if step.limit is not None:
        limit = response.statuses[0].current_limit
        assert (limit.requests_per_unit, limit.unit) == step.limit, step


def _service(counters: Any, seen: list[Observation] | None = None) -> RateLimitService:
    policy = parse_policy('[[tiers]]\nname = "x"\nlimits = ["1/day"]\n')
    observe = None if seen is None else seen.append
    service = RateLimitService(Gate(CachedCatalog(PolicyCatalog(policy)), counters, observe), EnvoySettings())
    service.domains = {each.domain: FileDomain(each) for each in parse_ratelimit([("config.yaml", CONFIG)])}
    return service


@pytest.mark.parametrize("name", [*STEPS, *OURS])
@pytest.mark.parametrize("store", ["memory", "redis"])
async def test_counts_as_the_file_says(name: str, store: str, clock: Clock, request: pytest.FixtureRequest) -> None:
    if store == "memory":
        counters: Any = MemoryCounters(clock=clock)
    else:
        server = request.getfixturevalue("new_redis")()
        counters = RedisCounters(server.url, 5)
    service = _service(counters)
    try:
        for step in {**STEPS, **OURS}[name]:
            _compare(step, RateLimitResponse.FromString(await service.answer(_sent(step).SerializeToString())))
    finally:
        await counters.close()


@pytest.fixture(scope="module")
def peer(redis_server: Any) -> Iterator[str]:
    with RateLimitPeer(CONFIG, redis_server) as running:
        yield running.address


@pytest.mark.parametrize("name", STEPS)
def test_the_peer_answers_the_same(name: str, peer: str) -> None:
    with grpc.insecure_channel(peer) as channel:
        call = caller(channel)
        for step in STEPS[name]:
            _compare(step, call(_sent(step), timeout=PATIENCE_S))


async def test_windows_begin_at_the_epoch_and_telemetry_knows_the_domain(clock: Clock, seen: list[Observation]) -> None:
    service = _service(MemoryCounters(clock=clock), seen)
    entries = (("database", "users"),)
    sent = request(entries, domain=DOMAIN).SerializeToString()
    answers = [RateLimitResponse.FromString(await service.answer(sent)) for _ in range(4)]
    hour_s = 3600 - clock.now_us // 1_000_000 % 3600
    assert answers[3].statuses[0].duration_until_reset.seconds == hour_s
    assert headers(answers[3])["retry-after"] == str(hour_s)
    clock.advance(hour_s - 0.001)
    assert RateLimitResponse.FromString(await service.answer(sent)).overall_code == OVER_LIMIT
    clock.advance(0.001)
    assert RateLimitResponse.FromString(await service.answer(sent)).overall_code == OK
    decided = [each.decision for each in seen if each.decision is not None]
    assert {(each.tier, each.rule) for each in decided} == {("peer", "database=users")}
    assert [each.denied_by is not None for each in seen] == [False, False, False, True, True, False]
    watched = request((("watched", "x"),), domain=DOMAIN).SerializeToString()
    for _ in range(2):
        await service.answer(watched)
    assert [each.shadow_denied for each in seen[-2:]] == [(), ("watched",)]


async def test_a_limit_that_envoy_sends_along(clock: Clock) -> None:
    service = _service(MemoryCounters(clock=clock))
    sent = request((("to_number", "1"),), domain=DOMAIN)
    sent.descriptors[0].limit.requests_per_unit, sent.descriptors[0].limit.unit = 1, 1
    codes = [RateLimitResponse.FromString(await service.answer(sent.SerializeToString())).overall_code for _ in range(2)]
    assert codes == [OK, OVER_LIMIT]
    sent.descriptors[0].limit.unit, sent.descriptors[0].limit.unit_multiplier.value = 2, 5
    answer = RateLimitResponse.FromString(await service.answer(sent.SerializeToString()))
    limit = answer.statuses[0].current_limit
    assert (limit.requests_per_unit, limit.unit, limit.unit_multiplier.value) == (1, 2, 5)
    clock.advance(61)
    assert RateLimitResponse.FromString(await service.answer(sent.SerializeToString())).overall_code == OVER_LIMIT
    for unit, multiplier in ((0, 1), (8, 1), (2, 0), (4, 367)):
        sent.descriptors[0].limit.unit, sent.descriptors[0].limit.unit_multiplier.value = unit, multiplier
        with pytest.raises(CallRefused, match="at most 366 days"):
            await service.answer(sent.SerializeToString())


HEAD = "domain: d\ndescriptors:\n"
REFUSED = {
    "not YAML": ("domain: [\n", 2, "invalid YAML"),
    "no mapping": ("- a\n", 1, "mapping of domain"),
    "empty": ("", 1, "0 YAML documents"),
    "two documents": ("domain: a\n---\ndomain: b\n", 1, "one domain per file"),
    "no domain": ("descriptors: []\n", 1, "'domain' is missing"),
    "empty domain": ("domain: ''\n", 1, "domain is empty"),
    "unknown field": (HEAD + "  - key: a\n    valeu: b\n", 4, "unknown field 'valeu'"),
    "quota": (HEAD + "  - key: a\n    quota_mode: perhaps\n", 4, "quota_mode must be true or false"),
    "no key": (HEAD + "  - value: a\n", 3, "'key' is missing"),
    "twice": (HEAD + "  - key: a\n  - key: a\n", 4, "is defined twice"),
    "twice with value": (HEAD + "  - {key: a, value: b}\n  - {key: a, value: b}\n", 4, "with value 'b'"),
    "wildcard twice": (HEAD + "  - {key: a, value: b*}\n  - {key: a, value: b*}\n", 4, "is defined twice"),
    "wildcard key": (HEAD + "  - key: a*\n", 3, "supported in values only"),
    "wildcard key with a value": (HEAD + "  - {key: 'a*b', value: c}\n", 3, "supported in values only"),
    "wildcards alike": (
        HEAD + "".join(f"  - {{key: a, value: 'b*{number}*c'}}\n" for number in range(1001)),
        1003,
        "more than 1000 wildcards with the same prefix and suffix as 'b*1000*c'",
    ),
    "merged into itself": (HEAD + "  - &a {key: k, <<: *a}\n", 3, "merges a mapping into itself"),
    "merged with a list": (HEAD + "  - {key: k, <<: [[]]}\n", 3, "'<<' requires a mapping"),
    "metadata": (HEAD + "  - {key: k, metadata: text}\n", 3, "metadata must be a mapping"),
    "number in quotes": (HEAD + "  - key: a\n    rate_limit: {unit: hour, requests_per_unit: '5'}\n", 4, "without quotes"),
    "field twice": (HEAD + "  - key: a\n    key: b\n", 4, "'key' is defined twice"),
    "unit": (HEAD + "  - key: a\n    rate_limit: {unit: fortnight, requests_per_unit: 1}\n", 4, "fortnight"),
    "no unit": (HEAD + "  - key: a\n    rate_limit: {requests_per_unit: 1}\n", 4, "'unit' is missing"),
    "no amount": (HEAD + "  - key: a\n    rate_limit: {unit: hour}\n", 4, "0 denies every request"),
    "negative": (HEAD + "  - key: a\n    rate_limit: {unit: hour, requests_per_unit: -1}\n", 4, "-1"),
    "too many": (HEAD + "  - key: a\n    rate_limit: {unit: hour, requests_per_unit: 4000000000}\n", 4, "1000000000"),
    "unlimited with unit": (HEAD + "  - key: a\n    rate_limit: {unlimited: true, unit: hour}\n", 4, "cannot have a unit"),
    "flag": (HEAD + "  - key: a\n    shadow_mode: perhaps\n", 4, "true or false"),
    "share": (HEAD + "  - {key: a, value: b, share_threshold: true}\n", 3, "requires a value with a '*'"),
    "itself": (
        HEAD + "  - key: a\n    rate_limit: {name: n, replaces: [{name: n}], unit: hour, requests_per_unit: 1}\n",
        4,
        "itself",
    ),
    "descriptors no list": ("domain: d\ndescriptors: {key: a}\n", 2, "must be a list"),
    "deep": ("domain: d\ndescriptors: " + "[{key: a, descriptors: " * 40 + "[]" + "}]" * 40 + "\n", 2, "more than 32 deep"),
    "very deep": ("domain: d\ndescriptors: " + "[" * 5000 + "\n", 1, "unreadable YAML"),
    "laughs": (
        "domain: d\ndescriptors:\n  - &a {key: k, descriptors: [{key: x}, {key: y}, {key: z}]}\n"
        + "".join(
            f"  - &{chr(98 + n)} {{key: k{n}, descriptors: [{{key: a, descriptors: [*{chr(97 + n)}]}}, "
            f"{{key: b, descriptors: [*{chr(97 + n)}]}}, {{key: c, descriptors: [*{chr(97 + n)}]}}]}}\n"
            for n in range(12)
        ),
        None,
        "more than 100000 descriptors",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_rejected_and_where(name: str, tmp_path: Path) -> None:
    text, line, said = REFUSED[name]
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(PolicyError) as refused:
        load_ratelimit(file)
    assert said in refused.value.reason
    assert refused.value.file == str(file)
    assert line is None or refused.value.line == line


def test_merges_of_merges_cost_no_more_than_their_text(tmp_path: Path) -> None:
    """Thirty levels, each merging the one before twice: a billion, if each merge were made anew."""
    levels = "".join(f"  - &m{n} {{key: k{n}, <<: [*m{n - 1}, *m{n - 1}]}}\n" for n in range(1, 31))
    file = tmp_path / "r.yaml"
    file.write_text(HEAD + "  - &m0 {key: k0, rate_limit: {unit: hour, requests_per_unit: 1}}\n" + levels)
    assert load_ratelimit(file)[0].limits == 31


def test_a_directory_has_a_domain_in_each_file(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"no \.yaml or \.yml file"):
        load_ratelimit(tmp_path)
    (tmp_path / "b.yaml").write_text("domain: b\n")
    (tmp_path / "a.yml").write_text("domain: a\n")
    (tmp_path / "notes.txt").write_text("no yaml: [")
    assert [each.domain for each in load_ratelimit(tmp_path)] == ["a", "b"]
    (tmp_path / "c.yaml").write_text("domain: a\n")
    with pytest.raises(PolicyError, match=r"c\.yaml: domain 'a' is also defined in .*a\.yml;"):
        load_ratelimit(tmp_path)
    with pytest.raises(PolicyError, match="cannot be read"):
        load_ratelimit(tmp_path / "nowhere.yaml")


def _check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return forked.run(("envoy", "check", *arguments), PATIENCE_S)


def test_the_command_reports_what_the_server_would(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    told = _check(str(file))
    assert (told.returncode, told.stdout) == (0, f"{file}: valid: domain peer, 26 limits\n")
    assert "'detailed_metric' only affects the statistics of envoyproxy/ratelimit" in told.stderr
    assert json.loads(_check(str(file), "--json").stdout)["domains"] == [{"domain": "peer", "limits": 26}]
    file.write_text(REFUSED["quota"][0])
    refused = _check(str(file))
    assert refused.returncode == 2
    assert f"{file}:4: quota_mode" in refused.stderr
    assert json.loads(_check(str(file), "--json").stdout)["line"] == 4


def test_serve_follows_the_file(serve: Callable[..., Serve], tmp_path: Path) -> None:
    file = tmp_path / "ratelimit.yaml"
    text = "domain: d\ndescriptors:\n  - key: k\n    rate_limit: {unit: day, requests_per_unit: %s}\n"
    file.write_text(text % "2")
    server = serve("--demo", grpc=True, TIDEGATE_ENVOY__CONFIG=str(file))
    address = f"127.0.0.1:{server.grpc_port}"
    sent = request([("k", "v")], domain="d")
    assert [ask(address, sent).overall_code for _ in range(3)] == [OK, OK, OVER_LIMIT]
    file.write_text(text % "many")
    time.sleep(1)
    assert ask(address, sent).overall_code == OVER_LIMIT
    file.write_text(text % "5")
    deadline = time.monotonic() + PATIENCE_S
    while (answer := ask(address, sent)).overall_code != OK:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # What was consumed under the old limit still counts.
    assert answer.statuses[0].limit_remaining == 2
    _, _, err = server.stop()
    assert f"{file}:4: requests_per_unit 'many' must be a whole number" in err


def _serving(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        return health(channel)


@pytest.mark.parametrize(
    ("text", "said"),
    [("domain: tidegate\n", "domain 'tidegate' is already used by the policy"), ("domain: [", "ratelimit.yaml:1: invalid YAML")],
)
def test_an_invalid_file_at_the_start_does_not_end_the_server(
    serve: Callable[..., Serve], tmp_path: Path, text: str, said: str
) -> None:
    file = tmp_path / "ratelimit.yaml"
    file.write_text(text)
    server = serve("--demo", grpc=True, TIDEGATE_ENVOY__CONFIG=str(file))
    address = f"127.0.0.1:{server.grpc_port}"
    sent = request([("k", "v")], domain="d")
    with pytest.raises(grpc.RpcError) as refused:
        ask(address, sent)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE, "no limit is known: Envoy's failure_mode_deny decides"
    assert _serving(address) == NOT_SERVING, "Envoy is to ask another instance"
    health = httpx.get(f"{server.url}/health", timeout=20)
    assert (health.status_code, health.json()["components"]["envoy_config"]["status"]) == (503, "unhealthy")
    assert httpx.get(f"{server.url}/readyz", timeout=20).status_code == 200, "the HTTP door decides"
    assert ask(address, request([("path", "/api/orders")], domain="tidegate")).overall_code == OK, "the policy's domain is known"
    file.write_text("domain: d\ndescriptors:\n  - key: k\n    rate_limit: {unit: day, requests_per_unit: 1}\n")
    wait_until(lambda: _serving(address) == SERVING, what="the valid file is applied")
    assert [ask(address, sent).overall_code for _ in range(2)] == [OK, OVER_LIMIT]
    _, _, err = server.stop()
    assert said in err
    assert err.count("[envoy] config refused, calls for its domains are answered UNAVAILABLE: ") == 1, "one line for one file"


def test_a_file_that_does_not_exist_ends_the_start(serve: Callable[..., Serve], tmp_path: Path) -> None:
    code, _, err = serve("--demo", wait=False, grpc=True, TIDEGATE_ENVOY__CONFIG=str(tmp_path / "absent.yaml")).stop_by_itself()
    assert code == 2
    assert "absent.yaml" in err
