"""The dashboards in deploy/grafana: generated, laid out, and every query of every panel answered by a real installation."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.integration.test_prometheus_rules import ALERTS, RECORDED, RUNBOOK, names_in
from tests.integration.watched import PATIENCE_S, Watched
from tests.moments import wait_until
from tests.servers.prometheus import Prometheus

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "deploy/grafana"
FILES = sorted((GRAFANA / "json").glob("*.json"))
DASHBOARDS = {file.stem: json.loads(file.read_text()) for file in FILES}
SOURCE = {"type": "prometheus", "uid": "tidegate-prometheus"}
DIVISOR = 30
BUSY_S = 20.0
BUILT_IN = {"$__rate_interval": "1m", "$__range": "5m"}
NAMES = sorted(DASHBOARDS)


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Title and expression of each query of each panel."""
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def filled_in(expression: str, dashboard: dict[str, Any]) -> str:
    """As Grafana asks it, with all of each choice chosen."""
    chosen = {f"${choice['name']}": choice["allValue"] for choice in dashboard["templating"].get("list", ())} | BUILT_IN
    return re.sub(r"\$\w+", lambda found: chosen[found[0]], expression)


def test_generating_them_again_changes_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(GRAFANA)}
    subprocess.run([sys.executable, "-m", "dashboards", str(tmp_path)], env=environment, check=True, timeout=60)
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert made == {file.name: file.read_bytes() for file in FILES}, "run `make dashboards`"
    assert set(NAMES) == {"service", "redis", "postgresql", "load_balancers", "slo"}


def test_what_is_provisioned_is_there() -> None:
    (source,) = msgspec.yaml.decode((GRAFANA / "provisioning/datasources/tidegate.yml").read_text())["datasources"]
    assert {"type": source["type"], "uid": source["uid"]} == SOURCE
    configuration = msgspec.yaml.decode((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == configuration["global"]["scrape_interval"]
    (provider,) = msgspec.yaml.decode((GRAFANA / "provisioning/dashboards/tidegate.yml").read_text())["providers"]
    assert provider["options"]["path"] in (GRAFANA / "README.md").read_text()


def test_each_has_a_uid_and_a_title_of_its_own() -> None:
    for what in ("uid", "title"):
        found = [dashboard[what] for dashboard in DASHBOARDS.values()]
        assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", NAMES)
def test_panels_say_what_they_are_and_do_not_overlap(name: str) -> None:
    dashboard = DASHBOARDS[name]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        assert 0 <= at["x"] < at["x"] + at["w"] <= 24
        for square in itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])):
            assert square not in taken, f"{panel['title']} lies on {taken[square]}"
            taken[square] = panel["title"]
    file = (ROOT / "docs/monitoring.md").read_text()
    anchors = {
        re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", file, re.MULTILINE)
    }
    titles = []
    for panel in panels(dashboard):
        titles.append(panel["title"])
        assert panel["title"]
        assert panel["datasource"] == SOURCE
        assert panel["fieldConfig"]["defaults"]["unit"]
        text, _, see = panel["description"].partition(f"\n\nWhat to do: {RUNBOOK}#")
        assert text.endswith((".", "?")), panel["title"]
        assert see in anchors, panel["title"]
        assert panel["targets"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert target["datasource"] == SOURCE
            assert target["legendFormat"]
    assert len({panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"}) < len(titles)


@pytest.mark.parametrize("name", NAMES)
def test_no_key_and_no_address_of_a_caller_is_requested(name: str) -> None:
    for title, expression in expressions(DASHBOARDS[name]):
        assert not re.search(r"\b(api_key|subject|ip|path|key)\b", re.sub(r'"[^"]*"', "", expression)), title


def steps(panel: dict[str, Any]) -> set[float]:
    return {step["value"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"] if step["value"] is not None}


def test_thresholds_are_those_of_the_alerts() -> None:
    """Where a panel says that an alert begins, and the pairs of burn rates."""
    numbers: dict[str, set[float]] = {}
    for alert in ALERTS:
        numbers.setdefault(alert["alert"], set()).update(float(number) for number in re.findall(r"[<>] ([\d.]+)", alert["expr"]))
    compared = 0
    for panel in itertools.chain.from_iterable(panels(dashboard) for dashboard in DASHBOARDS.values()):
        for name in re.findall(r"\b([A-Z][a-z]+[A-Z]\w+) (?:begins|warns)", panel["description"]):
            if numbers[name]:
                assert steps(panel) & numbers[name], (panel["title"], name)
                compared += 1
    assert compared > 12
    for panel in panels(DASHBOARDS["slo"]):
        if found := re.fullmatch(r"(\w+) and (\w+)", panel["title"]):
            (rate,) = steps(panel)
            alert = panel["description"].rpartition("#")[2]
            text = " ".join(each["expr"] for each in ALERTS if each["alert"].lower() == alert)
            budget = {"availabilitybudgetburn": "0.0001", "latencybudgetburn": "0.01"}[alert]
            least = budget if rate == 1 else f"{rate:g} * {budget}"
            assert all(f"ratio_rate{window} > {least}" in text for window in found.groups()), panel["title"]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """An installation that has seen load, a policy change, a refused policy file and a lost Redis master."""
    with Watched(tmp_path_factory.mktemp("watched"), DIVISOR) as running:
        prometheus = running.prometheus
        wait_until(lambda: len(prometheus.query("up == 1")) == len(prometheus.query("up")) > 10, PATIENCE_S, "all are scraped")
        wait_until(
            lambda: prometheus.query('sum by (status) (rate(rate_limiter_requests_total{status="blocked"}[1m])) > 0') != [],
            PATIENCE_S,
            "some are blocked",
        )
        running.write_policy("this is no policy")
        wait_until(
            lambda: prometheus.query("min(rate_limiter_policy_reload_errors_total) > 0") != [], PATIENCE_S, "the file is refused"
        )
        running.write_policy('[[tiers]]\nname = "new"\n')
        wait_until(
            lambda: (
                prometheus.query("min(rate_limiter_policy_valid) == 1 and max(changes(rate_limiter_policy_version[1m])) > 0")
                != []
            ),
            PATIENCE_S,
            "it is taken again",
        )
        running.redis.nodes[0].kill()
        wait_until(lambda: "RedisDown" in prometheus.firing(), PATIENCE_S, "the lost master is told")
        wait_until(
            lambda: prometheus.query("sum(rate_limiter_breakers_open) > 0") != [], PATIENCE_S, "the lost master is left alone"
        )
        running.redis.nodes[0].start()
        running.redis.wait_ok(PATIENCE_S)
        wait_until(
            lambda: prometheus.query("sum(rate_limiter_breakers_open) == 0 and sum(rate_limiter_counters_owed) == 0") != [],
            PATIENCE_S,
            "it is asked again",
        )
        wait_until(lambda: prometheus.query("job:rate_limiter_slow:ratio_rate30d") != [], PATIENCE_S, "budgets are recorded")
        yield running


def unanswered(prometheus: Prometheus, dashboard: dict[str, Any]) -> dict[str, Any]:
    """The queries to which there is now no answer, one that is no number, or one without a label that the legend names."""
    wrong = {}
    for panel in panels(dashboard):
        for target in panel["targets"]:
            found = prometheus.query(filled_in(target["expr"], dashboard))
            finite = all(math.isfinite(value) for _, value in found)
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            if not found or not finite or not all(named <= set(labels) for labels, _ in found):
                wrong[f"{panel['title']}: {target['expr']}"] = found
    return wrong


@pytest.mark.parametrize("name", NAMES)
def test_every_query_of_every_panel_is_answered(watched: Watched, name: str) -> None:
    # All at once, but not at any moment: on a busy machine a scrape may come too late, with a time-out of a third of a second.
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: not unanswered(watched.prometheus, DASHBOARDS[name]), BUSY_S, "all are answered")
        return
    assert unanswered(watched.prometheus, DASHBOARDS[name]) == {}


@pytest.mark.parametrize("name", NAMES)
def test_every_choice_has_something_to_choose(watched: Watched, name: str) -> None:
    for choice in DASHBOARDS[name]["templating"].get("list", ()):
        selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", choice["query"]["query"]).groups()  # type: ignore[union-attr]
        parameters = {"match[]": selector}
        assert watched.prometheus.get(f"/api/v1/label/{label}/values", **parameters)["data"], choice["name"]


def known_names(prometheus: Prometheus) -> set[str]:
    return set(prometheus.get("/api/v1/label/__name__/values")["data"])


def test_every_name_exists(watched: Watched) -> None:
    """An expression with `or` may hide a name that nobody tells; so may an alert that never fires."""
    known = known_names(watched.prometheus)
    asked = {
        name for dashboard in DASHBOARDS.values() for _, expression in expressions(dashboard) for name in names_in(expression)
    }
    assert asked - known == set()
    named = {name for rule in (*ALERTS, *RECORDED) for name in names_in(rule["expr"])}
    # Only with [tls]: `test_tls.py` reads it from such a server.
    assert named - known == {"rate_limiter_tls_certificate_expiry_timestamp_seconds"}
    assert {rule["record"] for rule in RECORDED} - known == set()


def test_real_exporters_expose_the_metrics_of_the_alerts(watched: Watched) -> None:
    prometheus = watched.prometheus
    (down,) = (alert["expr"] for alert in ALERTS if alert["alert"] == "ServiceDown")
    urls = {name: f"https://127.0.0.1:{port}" for name, port in watched.tls_ports.items()}
    wait_until(
        # Of a certificate that has ended, nothing else is told.
        lambda: [labels["instance"] for labels, _ in prometheus.query(down)] == [urls["ended"]],
        BUSY_S,
        "nothing is down but the site whose certificate has ended",
    )
    wait_until(
        lambda: [value for _, value in prometheus.query('nginx_up or up{job="haproxy"} or pg_up')] == [1] * 4,
        BUSY_S,
        "HAProxy, nginx and both PostgreSQLs are up",
    )
    wait_until(lambda: len(prometheus.query("probe_ssl_earliest_cert_expiry")) == 2, BUSY_S, "two certificates have not ended")
    days = {labels["instance"]: value for labels, value in prometheus.query("(probe_ssl_earliest_cert_expiry - time()) / 86400")}
    assert days == {urls["lasting"]: pytest.approx(90, abs=0.1), urls["ending"]: pytest.approx(5, abs=0.1)}
    warning, critical = (alert["expr"] for alert in ALERTS if alert["alert"] == "CertificateExpiry")
    assert [labels["instance"] for labels, _ in prometheus.query(warning)] == [urls["ending"]]
    assert prometheus.query(critical) == []


def over_time(prometheus: Prometheus, expression: str) -> list[float]:
    """All values since the installation runs, one for each second, as a panel or an annotation asks for them."""
    now = time.time()
    parameters = {"query": expression, "start": f"{now - 900:.0f}", "end": f"{now:.0f}", "step": "1"}
    found = prometheus.get("/api/v1/query_range", **parameters)["data"]["result"]
    return [float(value) for series in found for _, value in series["values"]]


def test_events_are_marked(watched: Watched) -> None:
    for annotation in DASHBOARDS["service"]["annotations"]["list"]:
        values = over_time(watched.prometheus, annotation["expr"])
        assert values, annotation["name"]
        assert max(values) >= 1


@pytest.mark.parametrize(
    ("name", "title", "reached"),
    [
        ("redis", "Down", 1),
        ("redis", "Up", 1),
        ("redis", "Replicas cut off", 1),
        ("redis", "Bytes behind", 1),
        ("service", "Breakers", 2),
        ("service", "Shards", 1),
        ("service", "Why without Redis", 0.1),
        ("service", "Near the limit", 0.1),
        ("service", "Shadow rules", 0.1),
        ("service", "Denied from memory", 0.1),
        ("service", "Violations written and lost", 0.1),
        ("service", "Rules that block most", 0.1),
        ("service", "Caches in trouble", 0.01),
        ("service", "Policy files", 1),
        ("postgresql", "Look-ups", 0.1),
        ("postgresql", "Tuples written", 0.1),
        ("load_balancers", "Responses by code", 0.1),
        ("slo", "No decision, by type", 0.01),
    ],
)
def test_panels_show_what_has_happened(watched: Watched, name: str, title: str, reached: float) -> None:
    """Where 0 is said while all is well, it does not stay 0."""
    dashboard = DASHBOARDS[name]
    asked = [filled_in(expression, dashboard) for each, expression in expressions(dashboard) if each == title]
    assert max(value for expression in asked for value in over_time(watched.prometheus, expression)) >= reached


def plot(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts/plot_service.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_picture_is_drawn(watched: Watched, tmp_path: Path) -> None:
    picture = tmp_path / "service.png"
    done = plot(watched.prometheus.url, picture, "--minutes", "2", "--window", "10s")
    assert done.returncode == 0, done.stderr
    drawn = picture.read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert len(drawn) > 20_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--window", "often"), "does not answer"), (("--minutes", "-1"), "--minutes is -1.0: give a positive number")],
)
def test_a_picture_that_cannot_be_drawn(watched: Watched, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    done = plot(watched.prometheus.url, tmp_path / "service.png", *arguments)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
