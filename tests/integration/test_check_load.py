"""The load of the drills tells what clients were answered and what not; the shipped files of Redis are what drills run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from drills.check_load import LOOSE, TIGHT, CheckLoad, fill, policy_of
from drills.exactness import limits_of_policy, prove
from drills.figures import admitted_of, asked_of, over_admitted, uncounted, under_admitted

from tests.conftest import Serve
from tests.servers.deployed_redis import directives, redis_cluster, redis_sentinel
from tests.servers.redis_server import RedisServer
from tidegate.policy.toml_reader import load_policy

LIMIT = 5


@pytest.fixture
def instance(tmp_path: Path, serve: Callable[..., Serve]) -> Serve:
    (tmp_path / "tidegate.policy.toml").write_text(policy_of(f"{LIMIT}/366d"))
    return serve()


async def asked(load: CheckLoad, checks: int) -> None:
    until = asyncio.Event()
    running = asyncio.create_task(load.run(until))
    for _ in range(3000):
        if len(load.seen) >= checks:
            break
        await asyncio.sleep(0.02)
    until.set()
    await running
    assert len(load.seen) >= checks


async def test_what_was_admitted_and_what_was_counted(tmp_path: Path, instance: Serve) -> None:
    fill(instance.url, 150)
    load = CheckLoad(instance.url, 300, 3, connections=4)
    await asked(load, 120)
    assert not [each for each in load.seen if each.failure or each.degraded]
    tight = admitted_of(load.seen, TIGHT)
    assert set(tight.values()) == {LIMIT}
    assert over_admitted(tight, LIMIT) == under_admitted(asked_of(load.seen, TIGHT), tight, LIMIT) == 0
    counted = await asyncio.to_thread(load.counted, instance.url)
    loose = admitted_of(load.seen, LOOSE)
    assert uncounted(loose, counted) == uncounted(counted, loose) == 0
    assert sum(loose.values()) >= 60
    reports = prove(load.answers, limits_of_policy(load_policy(tmp_path / "tidegate.policy.toml")))
    assert {each.limits: each.excess_units for each in reports} == {"public:tight": 0, "public:loose": 0}
    # What is proved can be refuted: under a stricter policy the same answers are too many.
    (tmp_path / "strict.toml").write_text(policy_of(f"{LIMIT - 1}/366d"))
    strict = prove(load.answers, limits_of_policy(load_policy(tmp_path / "strict.toml")))
    assert sum(each.excess_units for each in strict) == 3


async def test_a_stopped_server_is_reported_as_failures(instance: Serve) -> None:
    instance.stop()
    load = CheckLoad(instance.url, 300, 3, connections=4)
    await asked(load, 20)
    assert {each.failure for each in load.seen} == {"ConnectionRefusedError"}
    assert not any(each.allowed for each in load.seen)
    assert not load.answers


async def test_an_invalid_response_is_a_failure(tmp_path: Path, instance: Serve) -> None:
    # Without its policy for callers without a key, each is refused.
    (tmp_path / "tidegate.policy.toml").write_text('[[tiers]]\nname = "public"\n')
    load = CheckLoad(instance.url, 100, 3, connections=4)
    for _ in range(50):
        await asked(load, len(load.seen) + 4)
        if load.seen[-1].failure is not None:
            break
    assert load.seen[-1].failure == "status 401"


def configured(server: RedisServer, *names: str) -> dict[str, str]:
    return {name: server.must("CONFIG", "GET", name)[1].decode() for name in names}


def test_a_cluster_runs_with_the_shipped_files() -> None:
    shipped = directives("redis.conf", "cluster.conf")
    with redis_cluster(masters=3, replicas=1) as cluster:
        names = ("appendonly", "cluster-node-timeout", "cluster-require-full-coverage", "maxmemory-policy")
        for node in cluster.nodes:
            assert configured(node, *names) == {name: shipped[name] for name in names}
        (first, second) = cluster.new_nodes(2)
        assert configured(first, *names) == configured(second, *names) == {name: shipped[name] for name in names}
        assert second.facts("CLUSTER", "INFO")["cluster_known_nodes"] == "1"


def test_sentinels_run_with_the_shipped_files() -> None:
    with redis_sentinel(replicas=1) as sentinel:
        for server in sentinel.servers:
            assert configured(server, "appendonly", "maxmemory-policy") == {"appendonly": "yes", "maxmemory-policy": "noeviction"}
        reply = sentinel.sentinels[0].must("SENTINEL", "MASTER", "mymaster")
        told = dict(zip(reply[::2], reply[1::2], strict=True))
        assert (told[b"down-after-milliseconds"], told[b"failover-timeout"], told[b"quorum"]) == (b"3000", b"10000", b"2")
