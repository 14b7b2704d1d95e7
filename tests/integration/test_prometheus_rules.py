"""The files in deploy/prometheus: the tools accept them, every alert is tried, every name that they use exists."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.moments import PATIENCE_S, wait_until
from tests.servers.exporters import PostgresExporter, RedisExporter
from tests.servers.postgres_cluster import PostgresCluster
from tests.servers.prometheus import run
from tests.servers.redis_server import RedisServer
from tidegate.errors import TidegateError

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy" / "prometheus"
RUNBOOK = "https://git.example.com/tidegate/blob/main/docs/monitoring.md"
TESTS = sorted((DEPLOY / "tests").glob("*.yml"))

REDIS_EXPORTER = {
    "redis_up",
    "redis_memory_used_bytes",
    "redis_memory_max_bytes",
    "redis_keyspace_hits_total",
    "redis_keyspace_misses_total",
}
POSTGRES_EXPORTER = {"pg_up", "pg_replication_lag_seconds"}
OTHERS = {
    "up",  # Prometheus, of each target
    "ALERTS",  # Prometheus, of each alert
    "nginx_up",  # nginx-prometheus-exporter
    "alertmanager_notifications_failed_total",
    "probe_ssl_earliest_cert_expiry",  # blackbox exporter
    "probe_success",
}

POLICY = """\
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/*"
  limits = ["2/minute"]
[[api_keys]]
key = "demo-free-key-0001"
tier = "free"
"""


def rules(name: str) -> list[dict[str, Any]]:
    return [rule for group in msgspec.yaml.decode((DEPLOY / name).read_text())["groups"] for rule in group["rules"]]


ALERTS = rules("alerts.yml")
RECORDED = rules("recording.yml")
RULE_FILES = ("recording.yml", "alerts.yml")
COMPLETE = "surroundings"
"""The file of tests that runs as it is shipped, with all rules: the one that takes the least time."""


def names_in(expression: str) -> set[str]:
    """The names of the metrics that an expression reads."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", "", bare)
    words = re.findall(r"(?<![\w:.])([a-zA-Z_:][\w:]*)\s*(\(?)", bare)
    return {word for word, opens in words if not opens and word not in {"and", "or", "unless", "bool", "offset"}}


def exposed(text: str) -> set[str]:
    """The names of the series that an exposition has, or would have as soon as something is counted."""
    names = set()
    for family in text_string_to_metric_families(text):
        names |= {sample.name for sample in family.samples}
        names |= {"counter": {f"{family.name}_total"}, "histogram": {f"{family.name}_bucket", f"{family.name}_count"}}.get(
            family.type, {family.name}
        )
    return names


def tried() -> Iterator[tuple[str, list[tuple[str, float, set[str]]]]]:
    """Of each test of the rules: its name, and by alert and time in s the severities that fire."""
    for file in TESTS:
        for test in msgspec.yaml.decode(file.read_text())["tests"]:
            yield (
                test["name"],
                [
                    (
                        case["alertname"],
                        seconds(case["eval_time"]),
                        {alert["exp_labels"]["severity"] for alert in case.get("exp_alerts", ())},
                    )
                    for case in test["alert_rule_test"]
                ],
            )


def read_by(test: dict[str, Any]) -> set[str]:
    """The alerts and recorded series that a test of the rules looks at, and all that those are computed from."""
    found: set[str] = set()
    new = {case["alertname"] for case in test["alert_rule_test"]}
    new |= {name for case in test.get("promql_expr_test", ()) for name in names_in(case["expr"])}
    while new:
        found |= new
        expressions = [rule["expr"] for rule in ALERTS + RECORDED if rule.get("alert", rule.get("record")) in new]
        alerts = {name for expression in expressions for name in re.findall(r'ALERTS\{alertname="(\w+)"', expression)}
        new = alerts.union(*map(names_in, expressions)) - found
    return found


def with_rules_that_are_read(file: Path, directory: Path) -> list[Path]:
    """Write the tests of a file so that each has the rules that it reads and no others.

    At every step promtool evaluates all rules of the files, for 6 hours of samples too, whatever a test looks at: that took ten
    times as long.
    """
    whole = msgspec.yaml.decode(file.read_text())
    assert whole["rule_files"] == [f"../{name}" for name in RULE_FILES]
    tests: dict[frozenset[str], list[dict[str, Any]]] = {}
    for test in whole["tests"]:
        tests.setdefault(frozenset(read_by(test)), []).append(test)
    written = []
    for number, (names, those) in enumerate(tests.items()):
        for name in RULE_FILES:
            groups = msgspec.yaml.decode((DEPLOY / name).read_text())["groups"]
            for group in groups:
                group["rules"] = [rule for rule in group["rules"] if rule.get("alert", rule.get("record")) in names]
            (directory / f"{number}-{name}").write_bytes(msgspec.yaml.encode({"groups": groups}))
        rule_files = [f"{number}-{name}" for name in RULE_FILES]
        written.append(directory / f"{number}.yml")
        written[-1].write_bytes(msgspec.yaml.encode({**whole, "rule_files": rule_files, "tests": those}))
    return written


def seconds(duration: str) -> float:
    return sum(int(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in re.findall(r"(\d+)([hms])", duration))


def test_promtool_accepts_the_files() -> None:
    said = run("promtool", "check", "config", DEPLOY / "prometheus.yml")
    assert "FAILED" not in said
    run("promtool", "check", "rules", DEPLOY / "alerts.yml", DEPLOY / "recording.yml")


@pytest.mark.parametrize("file", TESTS, ids=lambda path: path.stem)
def test_every_alert_fires_and_clears(file: Path, tmp_path: Path) -> None:
    files = [file] if file.stem == COMPLETE else with_rules_that_are_read(file, tmp_path)
    said = run("promtool", "test", "rules", *files, directory=file.parent)
    assert said.count("SUCCESS") == len(files), said


def test_what_a_test_of_the_rules_reads() -> None:
    availability = {"alert_rule_test": [{"alertname": "AvailabilityBudgetBurn"}]}
    ratios = {f"job:rate_limiter_unavailable:ratio_rate{window}" for window in ("5m", "30m", "1h", "6h", "2h", "1d", "3d")}
    assert read_by(availability) & {rule["record"] for rule in RECORDED} == ratios
    budget = {"alert_rule_test": [], "promql_expr_test": [{"expr": "round(job:rate_limiter_slow:ratio_rate30d, 0.001)"}]}
    assert read_by(budget) >= {"job:rate_limiter_slow:rate5m", "job:rate_limiter_requests:rate5m"}
    assert "RedisDown" in read_by({"alert_rule_test": [{"alertname": "RedisDownLately"}]}), "an alert reads another one"


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: f"{alert['alert']}-{alert['labels']['severity']}")
def test_every_alert_is_tried_firing_clearing_and_just_below(alert: dict[str, Any]) -> None:
    name, severity = alert["alert"], alert["labels"]["severity"]
    fires = clears = below = False
    for title, cases in tried():
        moments = sorted((at, severity in severities) for case, at, severities in cases if case == name)
        firing = [at for at, fired in moments if fired]
        fires = fires or bool(firing)
        clears = clears or (bool(firing) and not moments[-1][1])
        below = below or (bool(moments) and not firing and title.startswith(f"{name} just below"))
    assert fires, "no case in which it fires"
    assert clears, "no case in which it fires and later does not"
    assert below, "no case just below its threshold in which it does not fire"


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: f"{alert['alert']}-{alert['labels']['severity']}")
def test_every_alert_reports_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"critical", "warning", "none"}
    annotations = alert["annotations"]
    assert annotations["summary"]
    assert annotations["description"]
    page, _, anchor = annotations["runbook_url"].partition("#")
    assert page == RUNBOOK
    assert anchor == name_of_heading(alert["alert"])
    assert "\n    kubectl " in runbook()[alert["alert"]], "what to do in Kubernetes"


def name_of_heading(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")


def runbook() -> dict[str, str]:
    """The sections of the runbook by alert."""
    text = (ROOT / "docs" / "monitoring.md").read_text().partition("\n## Runbook\n")[2]
    return {part.partition("\n")[0]: part for part in re.split(r"^### ", text, flags=re.MULTILINE)[1:]}


def test_the_runbook_has_the_alerts_and_names_what_is_deployed() -> None:
    assert set(runbook()) == {alert["alert"] for alert in ALERTS}
    lines = [line for part in runbook().values() for line in part.splitlines() if line.startswith("    kubectl -n tidegate ")]
    manifests = "".join(path.read_text() for path in (ROOT / "deploy" / "kubernetes").rglob("*.yaml"))
    kinds = r"\b(?:deploy/(?!kubernetes/)|(?:get|describe|delete) (?:hpa|job|cluster|secret|configmap) )([a-z][\w-]+)"
    for name in {name for line in lines for name in re.findall(kinds, line)}:
        assert re.search(rf"[nN]ame: {name}\b", manifests), name
    for label, value in {pair for line in lines for pair in re.findall(r" -l ([\w./]+)=([\w-]+)", line)}:
        assert f"{label}: {value}" in manifests or label == "cnpg.io/cluster", label


def test_the_address_of_the_runbook_can_be_set(tmp_path: Path) -> None:
    files = [DEPLOY / "alerts.yml", ROOT / "deploy/kubernetes/components/prometheus-operator/rules.yaml"]
    files += (ROOT / "deploy/grafana/json").glob("*.json")
    copies = [tmp_path / path.name for path in files]
    for path, copy in zip(files, copies, strict=True):
        copy.write_text(path.read_text())

    def set_to(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = ["sh", DEPLOY / "set-runbooks", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)

    for url in ("https://docs.example.com/tidegate/monitoring/", "https://wiki.example.com/x?page=1&y", RUNBOOK):
        if "&" in url:  # means something to sed
            assert set_to(url, *copies).returncode == 2
            continue
        done = set_to(url, *copies)
        assert (done.returncode, done.stderr) == (0, "")
        for path, copy in zip(files, copies, strict=True):
            assert copy.read_text() == path.read_text().replace(f"{RUNBOOK}#", f"{url}#")
            assert f"{url}#" in copy.read_text()
    for arguments in ((), (RUNBOOK,), ("docs/monitoring.md", copies[0]), ("https://", copies[0])):
        assert set_to(*arguments).returncode == 2
    (tmp_path / "other.yml").write_text("groups: []\n")
    assert set_to(RUNBOOK, tmp_path / "other.yml").returncode == 1


def test_errors_of_callers_are_distinguished_from_ours() -> None:
    """One pattern everywhere, which has every code that callers cause and none of ours."""
    text = (DEPLOY / "alerts.yml").read_text() + (DEPLOY / "recording.yml").read_text()
    (client,) = set(re.findall(r'type=~"([^"]+)"', text))
    assert set(re.findall(r'type!~"([^"]+)"', text)) == {client, f"redis_.+|{client}"}

    def subclasses(kind: type[TidegateError]) -> Iterator[type[TidegateError]]:
        yield kind
        for each in kind.__subclasses__():
            yield from subclasses(each)

    def decides(kind: type[TidegateError]) -> bool:
        """Whether a check can be answered with it: the others are of the command line and the control plane."""
        return kind.__module__ == "tidegate.errors" and not kind.code.endswith("_REFUSED")

    codes = {each.code.lower(): each.status for each in subclasses(TidegateError) if decides(each)}
    assert {"invalid_api_key", "bad_request", "store_unavailable", "internal"} <= set(codes)
    for code, status in codes.items():
        assert bool(re.fullmatch(client, code)) == (status < 500), code
    for ours in ("db_connection", "redis_timeout", "redis_disconnected"):
        assert not re.fullmatch(client, ours)


def test_the_requirement_holds() -> None:
    """Names, severities and durations that are agreed."""
    agreed = {alert["alert"]: (alert["labels"]["severity"], alert.get("for")) for alert in ALERTS}
    assert agreed["HighLatency"] == ("warning", "5m")
    assert agreed["HighErrorRate"] == ("critical", "2m")
    assert agreed["RedisDown"] == ("critical", "1m")
    assert agreed["SuspiciousActivity"] == ("warning", "5m")
    assert {name for name, (severity, _) in agreed.items() if severity == "critical"}.isdisjoint({"HighClientErrorRate"})
    configuration = msgspec.yaml.decode((DEPLOY / "prometheus.yml").read_text())
    assert configuration["global"]["scrape_interval"] == "15s"
    assert all("scrape_interval" not in job for job in configuration["scrape_configs"])
    assert "rate_limiter_requests_per_second" in {rule["record"] for rule in RECORDED}


def test_names_are_found_in_expressions() -> None:
    expression = 'sum by (le, x) (rate(a_total{b="c, d"}[5m])) / on(x) (e:f_g offset 5m > 0) or vector(0) and h == 1e3 * 14.4'
    assert names_in(expression) == {"a_total", "e:f_g", "h"}


def test_every_name_in_an_expression_exists_and_every_metric_is_documented(
    serve: Callable[..., Any], new_redis: Callable[..., RedisServer], postgres_url: str, tmp_path: Path
) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    # One database as its own replica: the names are those of a real one.
    server = serve(
        TIDEGATE_COUNTERS__URL=new_redis().url, TIDEGATE_CATALOG__URL=postgres_url, TIDEGATE_CATALOG__REPLICAS=postgres_url
    )
    tidegate = exposed(httpx.get(f"{server.url}/metrics").text)
    known = tidegate | {rule["record"] for rule in RECORDED} | REDIS_EXPORTER | POSTGRES_EXPORTER | OTHERS
    unknown = {name: rule.get("alert") or rule["record"] for rule in ALERTS + RECORDED for name in names_in(rule["expr"]) - known}
    assert not unknown
    documented = set(re.findall(r"`(rate_limiter_\w+)`", (ROOT / "docs/monitoring.md").read_text()))
    assert {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in tidegate} <= documented


def test_redis_exporter_has_its_names(redis_server: RedisServer) -> None:
    with RedisExporter(redis_server.url) as exporter:
        assert exposed(httpx.get(f"{exporter.url}/metrics").text) >= REDIS_EXPORTER


def test_a_replica_that_has_replayed_everything_does_not_lag(postgres_cluster: PostgresCluster) -> None:
    """The query file on a real replica: 0 however long nobody writes, then the age of what it has not replayed."""
    replica = postgres_cluster.replicas[0]
    with PostgresExporter(replica.url(), DEPLOY / "postgres_queries.yml") as exporter:

        def lag() -> float:
            text = httpx.get(f"{exporter.url}/metrics").raise_for_status().text
            assert exposed(text) >= POSTGRES_EXPORTER
            (found,) = (
                sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
                if sample.name == "pg_replication_lag_seconds"
            )
            return found

        postgres_cluster.primary.execute("CREATE TABLE IF NOT EXISTS lag_seen (n int)")
        wait_until(lambda: lag() == 0, 60, "the replica has replayed what it received")
        replica.pause_replay()
        try:
            # The first one that it would replay since it started, or one of many: both are a lag.
            postgres_cluster.primary.execute("INSERT INTO lag_seen VALUES (1)")
            wait_until(lambda: lag() > 0, 60, "what is received and not replayed is a lag")
        finally:
            replica.resume_replay()
        wait_until(lambda: lag() == 0, 60, "the lag is over")
        postgres_cluster.primary.execute("DROP TABLE lag_seen")
