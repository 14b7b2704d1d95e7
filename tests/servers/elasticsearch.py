"""OpenSearch as a process, laid out by `scripts/fetch-opensearch`; its API is Elasticsearch's as far as logs need it."""

from __future__ import annotations

import os
import pwd
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.servers.ports import HOST, free_port
from tests.servers.prometheus import Service

LAYOUT = Path(sys.prefix) / "opensearch"
HEAP = "256m"
_ACCOUNT = "nobody"
"""OpenSearch refuses to run as root."""

_LOG4J = """\
status = error
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = [%d{ISO8601}][%-5p][%-25c{1.}] %m%n
rootLogger.level = warn
rootLogger.appenderRef.console.ref = console
"""


class OpenSearch(Service):
    """One node without plugins, so without users and TLS; its indices outlive stops and starts, on the same port."""

    start_s = 150.0
    stop_s = 20.0

    def __init__(self) -> None:
        if not (LAYOUT / "version").exists():
            pytest.skip(f"OpenSearch is not in {LAYOUT}: run scripts/fetch-opensearch {LAYOUT}")
        super().__init__("java", "/_cluster/health?wait_for_status=yellow&timeout=1s")
        self._transport_port = free_port()
        home = self.directory / "home"
        shutil.copytree(LAYOUT, home)  # it reads nothing outside its home, and the account may not see ours
        (home / "config").mkdir()
        (home / "config/log4j2.properties").write_text(_LOG4J)
        (home / "config/opensearch.yml").write_text(
            f"cluster.name: tidegate-tests\ndiscovery.type: single-node\nnetwork.host: {HOST}\nhttp.port: {self.port}\n"
            f"transport.port: {self._transport_port}\npath.data: {self.directory}/data\npath.logs: {self.directory}/logs\n"
            # Else a nearly full disk of the machine makes indices read-only.
            "cluster.routing.allocation.disk.threshold_enabled: false\n"
        )
        (self.directory / "tmp").mkdir()
        if os.geteuid() == 0:
            account = pwd.getpwnam(_ACCOUNT)
            for path in (self.directory, *self.directory.rglob("*")):
                os.chown(path, account.pw_uid, account.pw_gid)

    def arguments(self) -> Sequence[str]:
        home = self.directory / "home"
        return (
            f"-Xms{HEAP}",
            f"-Xmx{HEAP}",
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            "-Djava.security.manager=allow",
            f"-Djava.io.tmpdir={self.directory}/tmp",
            f"-Dopensearch.path.home={home}",
            f"-Dopensearch.path.conf={home}/config",
            "-Dopensearch.distribution.type=tar",
            "-Dlog4j2.disable.jmx=true",
            "-Dlog4j.shutdownHookEnabled=false",  # else it waits for itself when it stops
            "-cp",
            f"{home}/lib/*",
            "org.opensearch.bootstrap.OpenSearch",
        )

    def options(self) -> Mapping[str, Any]:
        return {"user": _ACCOUNT, "extra_groups": []} if os.geteuid() == 0 else {}

    def count(self, index: str, query: str = "*") -> int:
        """Count documents, with all that are stored up to now.

        Args:
            index: or a pattern of indices; none of that name counts as 0.
            query: in Lucene's syntax.

        Returns:
            How many match.
        """
        self.call("POST", f"/{index}/_refresh")
        return int(self.call("GET", f"/{index}/_count?q={query}")["count"])

    def documents(self, index: str, query: str = "*", size: int = 10_000) -> list[dict[str, Any]]:
        """Fetch documents, with all that are stored up to now.

        Args:
            index: or a pattern of indices.
            query: in Lucene's syntax.
            size: how many at most, up to 10,000.

        Returns:
            Hits with `_index`, `_id` and `_source`.
        """
        self.call("POST", f"/{index}/_refresh")
        hits: list[dict[str, Any]] = self.call("GET", f"/{index}/_search?q={query}&size={size}")["hits"]["hits"]
        return hits

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Ask the API for JSON.

        Args:
            method: of HTTP.
            path: with its query.
            body: to send as JSON; None for none.

        Returns:
            What it answers.

        Raises:
            RuntimeError: with the answer, if its status is not 2xx.
            ConnectionError: with the answer, if it is 503: shards that are not there yet.
        """
        answer = httpx.request(method, self.url + path, json=body, timeout=30)
        if not answer.is_success:
            kind = ConnectionError if answer.status_code == 503 else RuntimeError
            raise kind(f"{method} {path}: {answer.status_code} {answer.text}")
        return answer.json()
