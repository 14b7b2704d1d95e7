"""Logs that real servers write, as they write them: nginx, HAProxy, Envoy."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.moments import wait_until
from tests.servers.envoy import Envoy
from tests.servers.haproxy import HAProxy
from tests.servers.nginx import Nginx
from tests.servers.ports import HOST, free_port
from tidegate.tools.simulate.command import simulate

CHAIN = {b"X-Forwarded-For": b"203.0.113.7, 127.0.0.1", b"User-Agent": 'a "b" \\ é'.encode()}
POLICY = """
[[tiers]]
name = "public"
  [[tiers.rules]]
  endpoint = "/a/*"
  algorithm = "fixed_window"
  limits = ["1/day"]
  subject = "ip"
[anonymous]
tier = "public"
"""
REQUESTS = 3


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "try.policy.toml"
    path.write_text(POLICY)
    return path


def ask(port: int) -> None:
    for number in range(REQUESTS):
        httpx.get(f"http://{HOST}:{port}/a/b%20c?d={number}", headers=CHAIN)


def told(log: Path, policy: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert simulate([str(log)], policy, as_json_=True, **options) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def is_right(found: dict[str, Any], client: str) -> bool:
    """All requests of one client, the second and third of them blocked, at about this moment."""
    assert found["malformed"] == found["no_address"] == found["refused_paths"] == 0, found["malformed_examples"]
    assert found["requests"] == REQUESTS
    if found["blocked"]:  # not on the day's border
        assert found["top_blocked"] == [{"subject": client, "rule": "/a/*", "blocked": found["blocked"]}]
    assert abs(found["series"][-1][0] - time.time()) < 3600
    return True


def requests_in(log: Path) -> int:
    return log.read_text(errors="replace").count("/a/b%20c") if log.exists() else 0


FORMATS = {
    "plain": ("$remote_addr - $remote_user [$time_local] ", "127.0.0.1"),
    "vhost": ("$host:$server_port $remote_addr - $remote_user [$time_local] ", "127.0.0.1"),
    "port": ("$remote_addr:$remote_port - $remote_user [$time_local] ", "127.0.0.1"),
    "iso": ("$remote_addr - $remote_user [$time_iso8601] ", "127.0.0.1"),
    "msec": ("$remote_addr - $remote_user [$msec] ", "127.0.0.1"),
    "chain": ("$http_x_forwarded_for $remote_addr - $remote_user [$time_local] ", "203.0.113.7"),
    "quoted": ('"$http_x_forwarded_for" - $remote_user [$time_local] ', "203.0.113.7"),
}
REST = '"$request" $status $body_bytes_sent "$http_referer" "$http_user_agent"'


def test_nginx(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    formats = "".join(f"log_format {name} '{start}{REST}';\n" for name, (start, _) in FORMATS.items())
    formats += (
        """log_format fields escape=json '{"time_iso8601":"$time_iso8601","remote_addr":"$remote_addr","user":"$remote_user",'
        '"request_method":"$request_method","request_uri":"$request_uri","agent":"$http_user_agent"}';\n"""
        """log_format raw '{"msec":"$msec","remote_addr":"$remote_addr","request":"$request","agent":"$http_user_agent"}';\n"""
    )
    expected = {name: client for name, (_, client) in FORMATS.items()} | {"fields": "127.0.0.1", "raw": "127.0.0.1"}
    logs = "".join(f"access_log {name}.log {name};\n" for name in expected)
    with Nginx(f"{formats}server {{ listen {HOST}:{port}; {logs} location / {{ return 204; }} }}", port) as nginx:
        ask(port)
        for name, client in expected.items():
            log = nginx.directory / f"{name}.log"
            wait_until(lambda log=log: requests_in(log) == REQUESTS, what=f"{name}.log")
            assert is_right(told(log, policy, capsys), client), name


def test_haproxy(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    configuration = (
        "global\n  log stdout format raw local0\ndefaults\n  mode http\n  log global\n  option httplog\n"
        "  timeout connect 5s\n  timeout client 5s\n  timeout server 5s\n"
        f"frontend http-in\n  bind {HOST}:{port}\n  capture request header Host len 32\n  http-request return status 200\n"
    )
    with HAProxy(configuration, port) as haproxy:
        ask(port)
        wait_until(lambda: requests_in(haproxy.log) == REQUESTS, what="its log")
        text = "\n".join(line for line in haproxy.log.read_text().splitlines() if "/a/b%20c" in line)
    log = policy.with_name("haproxy.log")
    log.write_text(text)
    assert is_right(told(log, policy, capsys), "127.0.0.1")


ENVOY = """
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 9901}}}
static_resources:
  listeners:
  - address: {socket_address: {address: 127.0.0.1, port_value: 10000}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          route_config:
            virtual_hosts:
            - {name: all, domains: ["*"], routes: [{match: {prefix: "/"}, direct_response: {status: 200}}]}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
          access_log:
          - name: envoy.access_loggers.file
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
              path: DIRECTORY/text.log
          - name: envoy.access_loggers.file
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
              path: DIRECTORY/fields.log
              log_format:
                json_format:
                  start_time: "%START_TIME%"
                  method: "%REQ(:METHOD)%"
                  path: "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"
                  downstream_remote_address: "%DOWNSTREAM_REMOTE_ADDRESS%"
                  x_forwarded_for: "%REQ(X-FORWARDED-FOR)%"
                  user_agent: "%REQ(USER-AGENT)%"
"""


def test_envoy(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configuration = tmp_path / "envoy.yaml"
    configuration.write_text(ENVOY.replace("DIRECTORY", str(tmp_path)))
    with Envoy(str(configuration), {}) as envoy:
        ask(envoy.port)
        for name, client in (("text", "203.0.113.7"), ("fields", "127.0.0.1")):
            log = tmp_path / f"{name}.log"
            wait_until(lambda log=log: requests_in(log) == REQUESTS, what=f"{name}.log")
            assert is_right(told(log, policy, capsys), client), name
