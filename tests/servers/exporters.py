"""Exporters as processes, one beside each server: what they tell is what Prometheus knows of it.

Debian 12 and 13 have different releases of each; what differs between them is asked of the program.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from tests.servers.prometheus import Service


class RedisExporter(Service):
    """redis_exporter beside one Redis.

    Args:
        options: more of its command line.
        environment: more variables.
    """

    def __init__(self, redis_url: str, options: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        super().__init__("prometheus-redis-exporter", "/metrics")
        self._redis_url, self._options, self._environment = redis_url, options, environment or {}

    def arguments(self) -> Sequence[str]:
        return f"--redis.addr={self._redis_url}", f"--web.listen-address={self.address}", *self._options

    def environment(self) -> Mapping[str, str]:
        return self._environment


class PostgresExporter(Service):
    """postgres_exporter beside one PostgreSQL.

    Args:
        queries: a file of queries to load; None for none.
        settings: whether it tells the server's settings, hundreds of them.
    """

    def __init__(self, database_url: str, queries: Path | None = None, settings: bool = False) -> None:
        super().__init__("prometheus-postgres-exporter", "/metrics")
        self._database_url = database_url
        self._queries = queries
        self._settings = settings
        # From 0.13 on it has a pg_replication_lag_seconds of its own.
        said = subprocess.run([self.program, "--help"], capture_output=True, text=True, timeout=20, check=False)
        self.has_own_lag = "--collector.replication" in said.stdout + said.stderr

    def arguments(self) -> Sequence[str]:
        return (
            f"--web.listen-address={self.address}",
            *([] if self._settings else ["--disable-settings-metrics"]),
            *(["--no-collector.replication"] if self.has_own_lag and self._queries else []),
            *([f"--extend.query-path={self._queries}"] if self._queries else []),
        )

    def environment(self) -> Mapping[str, str]:
        return {"DATA_SOURCE_NAME": f"{self._database_url}?sslmode=disable"}


class NginxExporter(Service):
    """nginx-prometheus-exporter beside one nginx.

    Args:
        status_url: of a location with `stub_status`.
    """

    def __init__(self, status_url: str) -> None:
        super().__init__("prometheus-nginx-exporter", "/metrics")
        self._status_url = status_url

    def arguments(self) -> Sequence[str]:
        return f"--nginx.scrape-uri={self._status_url}", f"--web.listen-address={self.address}"


class BlackboxExporter(Service):
    """The blackbox exporter, with the module `http_2xx` that the certificates are asked by.

    Args:
        authority: a file of certificates that it trusts.
    """

    def __init__(self, authority: Path) -> None:
        super().__init__("prometheus-blackbox-exporter", "/metrics")
        http = {"preferred_ip_protocol": "ip4", "tls_config": {"ca_file": str(authority)}}
        self._configuration = self.directory / "blackbox.yml"
        self._configuration.write_bytes(msgspec.yaml.encode({"modules": {"http_2xx": {"prober": "http", "http": http}}}))

    def arguments(self) -> Sequence[str]:
        # It gives up this long before Prometheus does, 0.5 s where nobody says otherwise: too much where intervals are divided.
        return f"--config.file={self._configuration}", f"--web.listen-address={self.address}", "--timeout-offset=0.05"
