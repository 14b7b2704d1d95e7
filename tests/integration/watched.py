"""A whole installation on loopback, watched by Prometheus with the shipped files, and load on it.

Two instances, one of two workers, over a Redis Cluster of two masters with a replica each and a PostgreSQL primary with a
replica; HAProxy and nginx in front; an exporter beside each server; Prometheus and Alertmanager. Only intervals are divided.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import httpx
import trustme

from tests.conftest import Serve
from tests.servers.exporters import BlackboxExporter, NginxExporter, PostgresExporter, RedisExporter
from tests.servers.haproxy import HAProxy
from tests.servers.nginx import Nginx
from tests.servers.ports import HOST, free_port
from tests.servers.postgres_cluster import PostgresCluster
from tests.servers.prometheus import DEPLOY, Alertmanager, Prometheus, prometheus_files
from tests.servers.redis_cluster import RedisCluster

PATIENCE_S = 60.0
POLICY = """\
[[tiers]]
name = "free"
  [[tiers.rules]]
  name = "searches"
  endpoint = "/search/*"
  limits = ["5/minute"]
  [[tiers.rules]]
  name = "all"
  endpoint = "/*"
  limits = ["1000000/day"]
[[tiers]]
name = "pro"
  [[tiers.rules]]
  name = "all"
  endpoint = "/*"
  limits = ["1000000/day"]
  [[tiers.rules]]
  name = "fewer one day"
  endpoint = "/*"
  limits = ["10/minute"]
  mode = "shadow"
  [[tiers.rules]]
  name = "payments"
  endpoint = "/pay/*"
  limits = ["100000/day"]
  on_failure = "deny"
"""
KEYS = {f"demo-{tier}-key-{number:04}": tier for tier in ("free", "pro") for number in range(20)}
CHECKS = [
    *({"path": "/items/1", "api_key": key} for key in KEYS),
    *({"path": "/search/a", "api_key": key} for key, tier in KEYS.items() if tier == "free"),
    *({"path": "/pay/1", "api_key": key} for key, tier in KEYS.items() if tier == "pro"),
    {"path": "/items/1", "api_key": "nobody's key"},
    {"path": "/items/1"},
    {"api_key": "demo-pro-key-0000"},
]
"""What is asked in turn: allowed, blocked after a while, and refused for an unknown key, none, and no path."""

NGINX = """\
upstream tidegate {{ {servers} keepalive 8; }}
server {{
    listen {HOST}:{port};
    location / {{ proxy_pass http://tidegate; proxy_http_version 1.1; proxy_set_header Connection ""; }}
    location = /nginx_status {{ stub_status; }}
}}
"""
NGINX_TLS = """\
server {{
    listen {HOST}:{port} ssl;
    ssl_certificate {name}.pem;
    ssl_certificate_key {name}.pem;
    return 204;
}}
"""
HAPROXY = """\
defaults
    mode http
    timeout connect 2s
    timeout client 10s
    timeout server 10s
frontend checks
    bind {HOST}:{port}
    default_backend tidegate
frontend metrics
    bind {HOST}:{metrics}
    http-request use-service prometheus-exporter if {{ path /metrics }}
backend tidegate
    option httpchk GET /readyz
{servers}
"""


class Watched:
    """The installation; a context manager that starts and stops all of it.

    Args:
        directory: an empty one.
        divisor: of Prometheus' and Alertmanager's intervals.
        pause_s: of each of the two clients between two checks, s.
    """

    def __init__(self, directory: Path, divisor: int, pause_s: float = 0.002) -> None:
        self.directory = directory
        self._divisor = divisor
        self._pause_s = pause_s
        self._done = threading.Event()
        self._running = contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._running.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._running.close()

    def write_policy(self, more: str = "") -> None:
        """Put a policy file there; all instances read it.

        Args:
            more: lines at its end.
        """
        keys = "".join(f'[[api_keys]]\nkey = "{key}"\ntier = "{tier}"\n' for key, tier in KEYS.items())
        (self.directory / "tidegate.policy.toml").write_text(POLICY + keys + more)

    def lose_a_master(self, for_s: float) -> None:
        """Kill a Redis master and start it again, empty.

        Args:
            for_s: for how long it is away.
        """
        master = self.redis.nodes[0]
        master.kill()
        time.sleep(for_s)
        master.start()
        self.redis.wait_ok(PATIENCE_S)

    def _start(self) -> None:
        enter = self._running.enter_context
        self.redis = enter(
            RedisCluster(masters=2, replicas=1, options={"maxmemory": "64mb", "cluster-require-full-coverage": "no"})
        )
        self.postgres = enter(PostgresCluster(replicas=1))
        self.write_policy()
        # The first one makes the tables.
        self.instances = [enter(self._serving(workers)) for workers in (1, 2)]
        nginx, nginx_exporter = self._nginx()
        haproxy, haproxy_metrics = self._haproxy()
        blackbox = enter(BlackboxExporter(self.directory / "authority.pem"))
        redis = [enter(RedisExporter(node.url)) for node in self.redis.nodes]
        queries = DEPLOY / "prometheus/postgres_queries.yml"
        postgres = [enter(PostgresExporter(server.url(), queries, settings=True)) for server in self.postgres.servers]
        alertmanager = enter(Alertmanager(self._silent()))
        port = free_port()
        files = prometheus_files(
            self.directory,
            self._divisor,
            blackbox=blackbox.address,
            tidegate=[each.url.removeprefix("http://") for each in self.instances],
            redis=[each.address for each in redis],
            postgres=[each.address for each in postgres],
            nginx=[nginx_exporter.address],
            haproxy=[haproxy_metrics],
            alertmanager=[alertmanager.address],
            prometheus=[f"{HOST}:{port}"],
            certificates=[f"https://{HOST}:{port}" for port in self.tls_ports.values()],
        )
        self.prometheus = enter(Prometheus(files, port=port))
        self._running.callback(self._done.set)
        for front in (nginx.url, haproxy.url):
            asking = threading.Thread(target=self._ask, args=(front,))
            asking.start()
            self._running.callback(asking.join)
            self._running.callback(self._done.set)

    @contextlib.contextmanager
    def _serving(self, workers: int) -> Iterator[Serve]:
        server = Serve(
            self.directory,
            TIDEGATE_SERVER__WORKERS=str(workers),
            TIDEGATE_COUNTERS__URL=self.redis.url,
            TIDEGATE_CATALOG__URL=self.postgres.primary.url(),
            TIDEGATE_CATALOG__REPLICAS=",".join(self.postgres.replica_urls()),
            TIDEGATE_BREAKER__OPEN_S="1",
            TIDEGATE_LEASES__ENABLED="true",
            # Look-ups go on: else all is in memory after a second.
            TIDEGATE_CACHE__L1_TTL_S="2",
        )
        try:
            server.wait_ready()
            # An instance that says more than a pipe holds, 64 KiB, would hang: of a lost master it says much.
            with contextlib.ExitStack() as reading:
                for pipe in filter(None, (server.process.stdout, server.process.stderr)):
                    reading.callback(pipe.close)
                    reader = threading.Thread(target=_read_to_the_end, args=(pipe,))
                    reader.start()
                    reading.callback(reader.join)
                reading.callback(server.process.terminate)
                yield server
        finally:
            server.stop()

    def _nginx(self) -> tuple[Nginx, NginxExporter]:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(self.directory / "authority.pem"))
        now = datetime.now(UTC)
        ends = {"lasting": now + timedelta(days=90), "ending": now + timedelta(days=5), "ended": now - timedelta(days=1)}
        self.tls_ports = {name: free_port() for name in ends}
        files = {}
        for name, end in ends.items():
            leaf = authority.issue_cert(HOST, not_before=now - timedelta(days=30), not_after=end)
            files[f"{name}.pem"] = leaf.private_key_and_cert_chain_pem.bytes().decode()
        port = free_port()
        servers = " ".join(f"server {HOST}:{each.port};" for each in self.instances)
        http = NGINX.format(HOST=HOST, port=port, servers=servers)
        http += "".join(NGINX_TLS.format(HOST=HOST, port=port, name=name) for name, port in self.tls_ports.items())
        nginx = self._running.enter_context(Nginx(http, port, files))
        return nginx, self._running.enter_context(NginxExporter(f"{nginx.url}/nginx_status"))

    def _haproxy(self) -> tuple[HAProxy, str]:
        port, metrics = free_port(), free_port()
        servers = "\n".join(
            f"    server tidegate{number} {HOST}:{each.port} check inter 500ms" for number, each in enumerate(self.instances, 1)
        )
        haproxy = HAProxy(HAPROXY.format(HOST=HOST, port=port, metrics=metrics, servers=servers), port)
        return self._running.enter_context(haproxy), f"{HOST}:{metrics}"

    def _silent(self) -> Path:
        """A configuration of Alertmanager that tells nobody."""
        path = self.directory / "alertmanager.yml"
        path.write_text("route: {receiver: nobody}\nreceivers: [{name: nobody}]\n")
        return path

    def _ask(self, url: str) -> None:
        with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
            for check in itertools.cycle(CHECKS):
                if self._done.wait(self._pause_s):
                    return
                client.post("/v1/check", json=check)


def _read_to_the_end(pipe: IO[str]) -> None:
    for _ in pipe:
        pass
