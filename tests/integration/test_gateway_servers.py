"""The starters of nginx and HAProxy: what they promise to the tests that use them."""

from __future__ import annotations

import httpx
import pytest

from tests.servers.haproxy import HAProxy
from tests.servers.nginx import Nginx
from tests.servers.ports import free_port
from tests.servers.process_tree import has_ended, tree_of

HAPROXY = """\
global
    stats socket {socket} mode 600
defaults
    mode http
    timeout connect 1s
    timeout client 5s
    timeout server 5s
frontend entry
    bind 127.0.0.1:{port}
    default_backend apps
backend apps
    server app1 127.0.0.1:{app}
"""


def test_nginx_serves_its_configuration_and_ends_with_its_worker() -> None:
    port = free_port()
    with Nginx(f"server {{ listen 127.0.0.1:{port}; include extra.conf; }}", port, {"extra.conf": "return 200 here;"}) as nginx:
        assert httpx.get(nginx.url).text == "here"
        assert nginx._process is not None
        tree = tree_of(nginx._process.pid)
        assert len(tree) == 2
    assert all(map(has_ended, tree))
    with pytest.raises(httpx.ConnectError):
        httpx.get(nginx.url)


def test_nginx_reports_what_is_wrong_with_a_configuration() -> None:
    port = free_port()
    with pytest.raises(RuntimeError, match='unknown directive "lissen"'), Nginx(f"server {{ lissen {port}; }}", port):
        raise AssertionError("it started")


def test_haproxy_over_nginx(tmp_path: object) -> None:
    app, port = free_port(), free_port()
    http = f'server {{ listen 127.0.0.1:{app}; return 200 "from the app"; }}'
    with Nginx(http, app):
        path = f"{tmp_path}/admin.sock"
        with HAProxy(HAPROXY.format(port=port, app=app, socket=path), port) as haproxy:
            assert httpx.get(haproxy.url).text == "from the app"
            assert haproxy.states(path, "apps") == {"app1": "no check"}
            haproxy.kill()
            with pytest.raises(httpx.ConnectError):
                httpx.get(haproxy.url)


def test_haproxy_reports_what_is_wrong_with_a_configuration() -> None:
    port = free_port()
    with pytest.raises(RuntimeError, match="unknown keyword 'bint'"), HAProxy(f"frontend a\n    bint :{port}\n", port):
        raise AssertionError("it started")
