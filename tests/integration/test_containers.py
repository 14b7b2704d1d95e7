"""The files in deploy/docker: linted, read by compose, held to the configurations that they mount; PostgreSQL's scripts are run.

No engine runs here. `scripts/try-image` builds the image and runs it without one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from tests.moments import PATIENCE_S, wait_until
from tests.servers.ports import HOST, free_port
from tests.servers.postgres import PostgresServer, programs
from tidegate._version import __version__
from tidegate.settings_loader import load_settings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy" / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def dockerfile() -> list[str]:
    """Its instructions, each on one line."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def image_environment() -> dict[str, str]:
    """What the image sets."""
    *_, line = (line for line in dockerfile() if line.startswith("ENV"))
    return dict(pair.split("=", 1) for pair in line.split()[1:])


def ports_of(name: str) -> dict[str, str]:
    return dict(re.fullmatch(r"(.+):(\d+)", port).groups() for port in SERVICES[name].get("ports", ()))  # type: ignore[union-attr]


def address(name: str) -> str | None:
    networks = SERVICES[name].get("networks")
    return networks["inside"]["ipv4_address"] if isinstance(networks, dict) else None


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What make-secrets writes."""
    directory = tmp_path_factory.mktemp("docker")
    shutil.copy(DOCKER / "make-secrets", directory)
    for _ in range(2):
        said = subprocess.run(
            ["sh", directory / "make-secrets"], capture_output=True, text=True, timeout=PATIENCE_S, check=True
        ).stdout
        assert "admin_token" in said
    return directory / "secrets"


def test_dockerfile_is_clean() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    command = [str(beside) if beside.exists() else "hadolint", "--failure-threshold", "style", str(DOCKER / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_image_is_what_it_says() -> None:
    lines = dockerfile()
    assert sum(line.startswith("FROM") for line in lines) == 2
    last = lines[max(place for place, line in enumerate(lines) if line.startswith("FROM")) :]
    (user,) = [line for line in last if line.startswith("USER")]
    assert user == "USER 10001:10001"
    assert last[-2:] == ['ENTRYPOINT ["tidegate"]', 'CMD ["serve"]'], "in exec form: signals reach the process"
    assert f"tidegate:{__version__}" in (DOCKER / "Dockerfile").read_text()
    assert "ARG LOCK=image" in lines, "all that a server can use"
    settings = load_settings(None, image_environment())
    assert (settings.server.http, settings.server.admin) == ("0.0.0.0:8080", "")
    # What is copied is let through, and nothing that is not.
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for line in lines if line.startswith("COPY") and "--from" not in line for word in line.split()[1:-1]}
    assert copied == let_through


def test_health_check_reports_ready_from_not(serve: Any) -> None:
    (line,) = [line for line in dockerfile() if line.startswith("HEALTHCHECK")]
    command = yaml.safe_load(line.partition("CMD ")[2])
    assert command[0] == "python"

    def healthy(server: Any) -> bool:
        environment = {**os.environ, "TIDEGATE_SERVER__HTTP": f"0.0.0.0:{server.port}"}
        done = subprocess.run(
            [sys.executable, *command[1:]], env=environment, capture_output=True, timeout=PATIENCE_S, check=False
        )
        return done.returncode == 0

    server = serve()
    assert healthy(server)
    server.stop()
    assert not healthy(server)


def test_compose_reads_the_file(secrets: Path, tmp_path: Path) -> None:
    compose = shutil.which("docker-compose")
    if compose is None:
        pytest.skip("docker-compose is not installed: it comes with the Debian package docker-compose")
    # Beside the secrets, which are not in the repository; paths are only read where they are relative to it.
    deploy = tmp_path / "deploy"
    shutil.copytree(DOCKER, deploy / "docker", ignore=shutil.ignore_patterns("secrets"))
    shutil.copytree(secrets, deploy / "docker" / "secrets")
    command = [compose, "-f", str(deploy / "docker" / "compose.yaml"), "config"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert set(yaml.safe_load(done.stdout)["services"]) == set(SERVICES)


def test_topology_is_whole() -> None:
    images = {name: re.sub(r".*/|:.*", "", service["image"]) for name, service in SERVICES.items()}
    counted = {image: sum(each == image for each in images.values()) for image in set(images.values())}
    assert counted == {
        "tidegate": 4,  # three data planes and a control plane
        "haproxy": 2,
        "redis": 7,  # six nodes and the job that makes the cluster
        "redis_exporter": 6,
        "postgres": 3,
        "postgres-exporter": 3,
        "prometheus": 2,
        "alertmanager": 2,
        "grafana": 1,
    }
    for name, service in SERVICES.items():
        assert re.search(r":v?\d+\.?\d*", service["image"]), f"{name}'s image is pinned"
        assert service["logging"]["options"]["max-size"]
        assert "no-new-privileges:true" in service["security_opt"]
        if images[name] != "postgres":
            assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"]), name
        # What can be reached from outside can be so from this machine alone.
        assert all(each.startswith("127.0.0.1:") for each in service.get("ports", ())), name
    nodes = SERVICES["cluster"]["command"]
    assert nodes == [f"redis{number}:6379" for number in range(1, 7)]
    for number in range(1, 7):
        assert SERVICES[f"redis{number}"]["environment"]["NODE_IP"] == address(f"redis{number}")
    assert [name for name in SERVICES if "build" in SERVICES[name] and f":{__version__}" not in SERVICES[name]["image"]] == []


def test_what_is_mounted_is_there() -> None:
    for name, service in SERVICES.items():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if not source.startswith("."):
                assert source in COMPOSE["volumes"], name
                continue
            assert (DOCKER / source).exists(), f"{name} mounts {source}"
            assert volume.endswith(":ro"), f"{name} could write {source}"
    for name in ("primary", "replica"):
        assert os.access(DOCKER / "postgres" / name, os.X_OK)


def test_addresses_are_those_that_the_configurations_name() -> None:
    for file in (ROOT / "deploy" / "prometheus" / "targets").glob("*.yml"):
        if file.name == "nginx.yml":
            assert any("no-targets.yml:/etc/prometheus/targets/nginx.yml" in each for each in SERVICES["prometheus1"]["volumes"])
            continue
        for group in yaml.safe_load(file.read_text()):
            for target in group["targets"]:
                name, _, port = target.partition(":")
                assert name in SERVICES, target
                if port in {"9121", "9187"}:
                    exporters = [each for each in SERVICES.values() if each.get("network_mode") == f"service:{name}"]
                    assert len(exporters) == 1, f"an exporter is in the network of {name}"
    assert yaml.safe_load((DOCKER / "no-targets.yml").read_text()) == []
    configuration = (ROOT / "deploy" / "haproxy" / "haproxy.cfg").read_text()
    servers = dict(re.findall(r"^\s*server (\S+) ([\d.]+):8080", configuration, re.MULTILINE))
    assert servers == {name: address(name) for name in ("tidegate1", "tidegate2", "tidegate3")}
    # HAProxy wants two files for each connection, and ends where it cannot have them.
    (most,) = re.findall(r"^\s*maxconn (\d+)", configuration, re.MULTILINE)
    for name in ("balancer1", "balancer2"):
        assert SERVICES[name]["ulimits"]["nofile"]["hard"] >= 2 * int(most) + 100


def test_settings_and_secrets_are_understood(secrets: Path) -> None:
    def environment(name: str) -> dict[str, str]:
        found = {**image_environment()}
        for file in SERVICES[name]["env_file"]:
            lines = (secrets.parent / file).read_text().split()
            found |= dict(line.split("=", 1) for line in lines)
        return found | SERVICES[name]["environment"]

    data_plane, control = (load_settings(None, environment(name)) for name in ("tidegate1", "control"))
    assert (data_plane.server.admin, data_plane.admin.token) == ("", None)
    assert control.server.admin == "0.0.0.0:8082"
    assert control.admin.token == (secrets / "admin_token").read_text().strip()
    assert re.findall(r"@([^/]+)/", " ".join((data_plane.catalog.url, *data_plane.catalog.replicas))) == [
        "db1,db2,db3",
        "db2",
        "db3",
    ]
    assert data_plane.counters.min_instances == 3
    grace_s = int(SERVICES["tidegate1"]["stop_grace_period"].removesuffix("s"))
    assert data_plane.server.drain_s + 2 < grace_s
    assert data_plane.policy.file == "/etc/tidegate/tidegate.policy.toml"
    for name, secret in COMPOSE["secrets"].items():
        assert (secrets.parent / secret["file"]).exists(), name
    passwords = [
        (secrets / f"{name}_password").read_text().strip()
        for name in ("superuser", "database", "redis", "redis_tidegate", "redis_exporter", "grafana")
    ]
    assert len(set(passwords)) == 6
    assert all(re.fullmatch(r"[0-9a-f]{48}", each) for each in passwords)
    assert secrets.stat().st_mode & 0o077 == 0, "the folder is closed to others"


def test_no_secret_is_committed() -> None:
    done = subprocess.run(
        ["git", "ls-files", "deploy/docker/secrets"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    if done.returncode != 0:
        pytest.skip("this is no checkout of git")
    assert done.stdout == ""
    ignored = subprocess.run(
        ["git", "check-ignore", "-q", "deploy/docker/secrets/redis_password"], cwd=ROOT, timeout=PATIENCE_S, check=False
    )
    assert ignored.returncode == 0


@pytest.fixture
def primary() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


def test_postgres_scripts_make_a_primary_and_a_replica(primary: PostgresServer, secrets: Path) -> None:
    directory = programs()
    assert directory is not None
    home = primary.directory / "home"
    account: dict[str, Any] = {}
    for name in ("primary", "replica"):
        shutil.copy(DOCKER / "postgres" / name, primary.directory)
    shutil.copytree(secrets, primary.directory / "secrets")
    home.mkdir()
    if os.geteuid() == 0:
        account = {"user": "postgres", "group": "postgres", "extra_groups": []}
        for path in (primary.directory, home, *(primary.directory / "secrets").iterdir(), primary.directory / "secrets"):
            shutil.chown(path, "postgres", "postgres")
    environment = {
        "PATH": f"{directory}:{os.environ['PATH']}",
        "LC_ALL": "C",
        "SECRETS": str(primary.directory / "secrets"),
        "POSTGRES_USER": "postgres",
        "PGHOST": HOST,
        "PGPORT": str(primary.port),
        "PGDATA": str(primary.data),
    }
    primary.drop_database("tidegate")
    # As the image does: it lets in who has a password. What the script adds stands behind.
    hba = primary.data / "pg_hba.conf"
    hba.write_text("local all all trust\nhost all postgres all trust\nhost all all all scram-sha-256\n")
    done = subprocess.run(
        ["sh", primary.directory / "primary"], env=environment, capture_output=True, text=True, timeout=60, check=False, **account
    )
    assert done.returncode == 0, done.stderr
    primary.execute("SELECT pg_reload_conf()", "postgres")
    password = {name: (secrets / f"{name}_password").read_text().strip() for name in ("database", "exporter")}

    def ask(user: str, words: str, port: int, query: str) -> list[Any]:
        url = f"postgresql://{user}:{words}@{HOST}:{port}/tidegate"
        with psycopg.connect(url, autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(query)
            return [] if cursor.description is None else cursor.fetchall()

    ask("tidegate", password["database"], primary.port, "CREATE TABLE seen (n int)")
    ask("tidegate", password["database"], primary.port, "INSERT INTO seen VALUES (1)")
    assert ask("exporter", password["exporter"], primary.port, "SELECT pg_has_role('pg_monitor', 'member')") == [(True,)]
    with pytest.raises(psycopg.OperationalError):
        ask("tidegate", "wrong", primary.port, "SELECT 1")

    port = free_port()
    following = {**environment, "PGDATA": str(home / "pgdata")}
    del following["PGHOST"], following["PGPORT"]
    options = ["-c", f"port={port}", "-c", f"unix_socket_directories={home}", "-c", f"listen_addresses={HOST}"]
    # No fewer than its primary has, else it refuses to follow.
    options += ["-c", "max_connections=200", "-c", "fsync=off"]
    log = (primary.directory / "replica.log").open("w")
    process = subprocess.Popen(
        ["sh", primary.directory / "replica", f"{HOST}:{primary.port}", *options],
        env=following,
        cwd=home,
        stdout=log,
        stderr=subprocess.STDOUT,
        **account,
    )

    def rows() -> list[Any]:
        assert process.poll() is None, (primary.directory / "replica.log").read_text()
        try:
            return ask("tidegate", password["database"], port, "SELECT n, pg_is_in_recovery() FROM seen ORDER BY n")
        except psycopg.OperationalError:
            return []

    try:
        wait_until(lambda: rows() == [(1, True)], 60, "the replica has what the primary has")
        ask("tidegate", password["database"], primary.port, "INSERT INTO seen VALUES (2)")
        wait_until(lambda: rows() == [(1, True), (2, True)], 60, "the replica follows")
        ((kept,),) = primary.execute("SELECT count(*) FROM pg_replication_slots WHERE active", "postgres")
        assert kept == 1
    finally:
        process.send_signal(2)
        process.wait(PATIENCE_S)
        log.close()
