"""From a killed Redis to the page, through the shipped files and real servers; a listener on loopback plays PagerDuty and Slack.

Only intervals, targets, URLs and the places of the two secrets are rewritten. All intervals are divided by the same number, 30.
With `TIDEGATE_ALERT_CHAIN_DIVISOR=1` the chain runs with the shipped intervals, in about 7 minutes. The times are printed.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.moments import wait_until
from tests.servers.exporters import RedisExporter
from tests.servers.prometheus import (
    DEPLOY,
    PEER_TIMEOUT_S,
    Alertmanager,
    Prometheus,
    Receiver,
    divided,
    prometheus_files,
    run,
)
from tests.servers.redis_server import RedisServer

DIVISOR = int(os.environ.get("TIDEGATE_ALERT_CHAIN_DIVISOR", "30"))
PATIENCE_S = 100.0 if DIVISOR >= 30 else 300.0
CONSEQUENCES = {"CircuitOpen", "DegradedDecisions"}
SLOW = {"HighLatency", "LatencyBudgetBurn", "RedisLatencyHigh"}
"""What a busy machine rightly rings besides."""
ROUTING_KEY = "0123456789abcdef0123456789abcdef"
KEY = "demo-free-key-0001"
POLICY = f"""\
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/*"
  limits = ["1000000/day"]
[[api_keys]]
key = "{KEY}"
tier = "free"
"""


def alertmanager_files(directory: Path, receiver: Receiver) -> Path:
    """The shipped configuration, with the listener's addresses."""
    (directory / "slack_url").write_text(f"{receiver.url}/slack\n")
    (directory / "pagerduty_routing_key").write_text(f"{ROUTING_KEY}\n")
    text = divided((DEPLOY / "alertmanager/alertmanager.yml").read_text(), DIVISOR)
    text = text.replace("https://events.pagerduty.com/", f"{receiver.url}/")
    text = text.replace("/etc/alertmanager/", f"{directory}/")
    path = directory / "alertmanager.yml"
    path.write_text(text)
    return path


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as listening:
        yield listening


def test_amtool_accepts_the_file() -> None:
    assert "SUCCESS" in run("amtool", "check-config", DEPLOY / "alertmanager/alertmanager.yml")


@pytest.mark.parametrize(
    ("labels", "receivers"),
    [
        (("alertname=RedisDown", "severity=critical"), "pagerduty,slack"),
        (("alertname=HighLatency", "severity=warning"), "pagerduty,slack"),
        (("alertname=CircuitOpen", "severity=warning"), "slack"),
        (("alertname=RedisDownLately", "severity=none"), "nobody"),
    ],
)
def test_which_changes_return_warnings(labels: tuple[str, ...], receivers: str) -> None:
    configuration = DEPLOY / "alertmanager/alertmanager.yml"
    run("amtool", "config", "routes", "test", f"--config.file={configuration}", f"--verify.receivers={receivers}", *labels)


def test_only_intervals_are_rewritten() -> None:
    text = "global:\n  scrape_interval: 15s\n  - name: x\n    interval: 30s\n    - expr: rate(a[5m])\n      for: 2m\n"
    expected = text.replace("15s", f"{15_000 // DIVISOR}ms").replace("30s", f"{30_000 // DIVISOR}ms")
    assert divided(text, DIVISOR) == expected.replace("2m\n", f"{120_000 // DIVISOR}ms\n")


@pytest.mark.timeout(600)
def test_a_pair_notifies_once_and_outlives_one_of_each(redis_server: RedisServer, receiver: Receiver, tmp_path: Path) -> None:
    configuration = alertmanager_files(tmp_path, receiver)
    exporter = RedisExporter(redis_server.url)  # not started: it is down

    def actions() -> list[str]:
        return [body["event_action"] for _, body in receiver.of("/v2/enqueue") if body["payload"]["class"] == "RedisDown"]

    with contextlib.ExitStack() as running:
        first = running.enter_context(Alertmanager(configuration, clustered=True))
        second = running.enter_context(Alertmanager(configuration, peer=first.cluster_address))
        wait_until(
            lambda: all(len(each.get("/api/v2/status")["cluster"]["peers"]) == 2 for each in (first, second)),
            PATIENCE_S,
            "the two know each other",
        )
        files = prometheus_files(tmp_path, DIVISOR, redis=[exporter.address], alertmanager=[first.address, second.address])
        a = running.enter_context(Prometheus(files, "a"))
        b = running.enter_context(Prometheus(files, "b"))
        wait_until(lambda: actions() != [], PATIENCE_S, "the page")
        wait_until(lambda: all("RedisDown" in each.firing() for each in (a, b)), PATIENCE_S, "both evaluate it")
        wait_until(lambda: all("RedisDown" in each.alerts() for each in (first, second)), PATIENCE_S, "both are told")
        for alertmanager in (first, second):
            alerts = alertmanager.get("/api/v2/alerts")
            labels = [alert["labels"] for alert in alerts if alert["labels"]["alertname"] == "RedisDown"]
            assert labels == [
                {
                    "alertname": "RedisDown",
                    "environment": "production",
                    "instance": exporter.address,
                    "job": "redis",
                    "severity": "critical",
                }
            ]
        replicas = [re.findall(r"replica: (\w+)", each.get("/api/v1/status/config")["data"]["yaml"]) for each in (a, b)]
        assert replicas == [["a"], ["b"]]
        time.sleep(2 * PEER_TIMEOUT_S)
        assert actions() == ["trigger"]

        first.stop()
        a.stop()
        running.enter_context(exporter)
        wait_until(lambda: "resolve" in actions(), PATIENCE_S, "the ones that are left tell that it is over")
        assert actions() == ["trigger", "resolve"]


@pytest.mark.timeout(900)
def test_a_killed_redis_pages_and_a_living_one_resolves(
    serve: Callable[..., Any],
    new_redis: Callable[..., RedisServer],
    receiver: Receiver,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    redis = new_redis()
    server = serve(TIDEGATE_COUNTERS__URL=redis.url, TIDEGATE_BREAKER__OPEN_S=str(30 / DIVISOR))
    done = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=server.url) as client:
            while not done.wait(0.05):
                client.post("/v1/check", json={"path": "/a", "api_key": KEY})

    def page(action: str) -> list[tuple[float, dict[str, Any]]]:
        return [
            (at, body)
            for at, body in receiver.of("/v2/enqueue")
            if body["event_action"] == action and body["payload"]["class"] not in SLOW
        ]

    def message(beginning: str) -> list[tuple[float, dict[str, Any]]]:
        return [(at, body) for at, body in receiver.of("/slack") if body["attachments"][0]["title"].startswith(beginning)]

    with (
        RedisExporter(redis.url) as exporter,
        Alertmanager(alertmanager_files(tmp_path, receiver)) as alertmanager,
        Prometheus(
            prometheus_files(
                tmp_path, DIVISOR, tidegate=[server.url[7:]], redis=[exporter.address], alertmanager=[alertmanager.address]
            )
        ) as prometheus,
    ):
        asking = threading.Thread(target=ask)
        asking.start()
        try:
            wait_until(lambda: len(prometheus.query("up == 1")) == 3, PATIENCE_S, "all targets are up")
            wait_until(
                lambda: prometheus.query("sum(rate_limiter_requests_per_second) > 1") != [], PATIENCE_S, "requests are recorded"
            )
            assert prometheus.query("alertmanager_notifications_failed_total") != []
            assert prometheus.firing() <= SLOW
            assert page("trigger") == []

            killed = time.monotonic()
            redis.kill()
            wait_until(lambda: bool(page("trigger") and message("critical: RedisDown")), PATIENCE_S, "the page and the message")
            ((paged, event),) = page("trigger")
            assert event["routing_key"] == ROUTING_KEY
            assert event["payload"]["severity"] == "critical"
            assert event["payload"]["class"] == "RedisDown"
            assert event["payload"]["summary"] == f"Redis is down! ({exporter.address})"
            assert (
                event["payload"]["custom_details"]["runbook"]
                == "https://git.example.com/tidegate/blob/main/docs/monitoring.md#redisdown"
            )
            ((told, said),) = message("critical: RedisDown")
            assert f"Redis is down! ({exporter.address})" in said["attachments"][0]["text"]

            # What follows from it fires too, and is known to Alertmanager, and nobody is told.
            wait_until(lambda: prometheus.firing() >= CONSEQUENCES, PATIENCE_S, "the consequences fire")
            wait_until(
                lambda: all(alertmanager.alerts().get(name) for name in CONSEQUENCES),
                PATIENCE_S,
                "the consequences are inhibited",
            )
            time.sleep(90 / DIVISOR)  # three times the wait of their group

            started = time.monotonic()
            redis.start()
            wait_until(lambda: bool(page("resolve") and message("Over: RedisDown")), PATIENCE_S, "both are told that it is over")
            ((resolved, over),) = page("resolve")
            assert over["dedup_key"] == event["dedup_key"]

            # Rates over minutes still show the outage: quiet all the same.
            assert "DegradedDecisions" in prometheus.firing()
            time.sleep(90 / DIVISOR)
            assert {body["payload"]["class"] for _, body in receiver.of("/v2/enqueue")} - SLOW == {"RedisDown"}
            titles = {body["attachments"][0]["title"] for _, body in receiver.of("/slack")}
            assert {title for title in titles if title.split()[1] not in SLOW} == {
                "critical: RedisDown (production)",
                "Over: RedisDown (production)",
            }
        finally:
            done.set()
            asking.join()
    with capsys.disabled():
        print(
            f"\nintervals divided by {DIVISOR}: from kill to PagerDuty {paged - killed:.1f} s, to Slack {told - killed:.1f} s;"
            f" from start to PagerDuty's resolve {resolved - started:.1f} s"
        )
