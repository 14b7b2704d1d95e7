"""The configurations in deploy/ as they would be installed, but for ports and paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.servers.haproxy import HAProxy
from tests.servers.nginx import Nginx
from tests.servers.ports import HOST, free_port

DEPLOY = Path(__file__).parents[2] / "deploy"


def configured(path: str, changes: Mapping[str, str]) -> str:
    """Read a file of deploy/ with some places changed.

    Args:
        path: below deploy/.
        changes: what stands there, and what to put in its place.

    Returns:
        The text.

    Raises:
        ValueError: if one of the places is not there.
    """
    text = (DEPLOY / path).read_text()
    for old, new in changes.items():
        if old not in text:
            raise ValueError(f"{old!r} does not stand in deploy/{path}: change it here too")
        text = text.replace(old, new)
    return text


def snippets() -> dict[str, str]:
    """What deploy/nginx holds for /etc/nginx/snippets, by path below /etc/nginx."""
    return {f"snippets/{path.name}": path.read_text() for path in sorted((DEPLOY / "nginx").glob("tidegate-*.conf"))}


def gateway(
    tidegate: Sequence[int],
    api: int,
    when_away: str = "closed",
    edge: bool = False,
    patient: bool = True,
    level: str = "info",
    user: str = "",
    bearer: bool = False,
) -> Nginx:
    """deploy/nginx/gateway.conf on a free port.

    Args:
        tidegate: ports of the instances.
        api: port of the API.
        when_away: `closed` or `open`.
        edge: whether it keeps denials.
        patient: whether it waits longer for Tidegate than is deployed: on a busy machine a first answer may take a second.
        level: from which on errors are logged.
        user: what it knows of every client, for the attribute `user`.
        bearer: whether Tidegate gets the clients' tokens.

    Returns:
        The nginx, not started; its edge cache is in `denials` in its directory.
    """
    port, refusals = free_port(), free_port()
    addresses = [f"{HOST}:{each}" for each in tidegate]
    lines = _twice(addresses) if len(addresses) > 1 else [f"server {addresses[0]} max_fails=0;"]
    text = configured(
        "nginx/gateway.conf",
        {
            "listen 80;": f"listen {HOST}:{port};",
            "listen 127.0.0.1:8404;": f"listen {HOST}:{free_port()};",
            "server 127.0.0.1:8080 max_fails=0;": "\n    ".join(lines),
            "listen 127.0.0.1:8406;": f"listen {HOST}:{refusals};",
            "server 127.0.0.1:8406;": f"server {HOST}:{refusals};",
            "127.0.0.1:8000": f"{HOST}:{api}",
            "default closed": f"default {when_away}",
            "default off": f"default {'tidegate_denials' if edge else 'off'}",
            '$tidegate_user {\n    default "";': f'$tidegate_user {{\n    default "{user}";',
            '$tidegate_bearer {\n    default "";': "$tidegate_bearer {\n    default "
            + ("$http_authorization;" if bearer else '"";'),
        },
    )
    files = snippets()
    if patient:
        files["snippets/tidegate-server.conf"] = configured(
            "nginx/tidegate-server.conf",
            {"proxy_connect_timeout 250ms;": "proxy_connect_timeout 10s;", "proxy_read_timeout 2s;": "proxy_read_timeout 20s;"},
        )
    made = Nginx(text, port, files, level)
    made.change({"/run/tidegate-refusals": str(made.directory / "refusals")})
    if edge:
        made.add(configured("nginx/edge-cache.conf", {"/run/tidegate-denials": str(made.directory / "denials")}))
    return made


def _twice(addresses: Sequence[str]) -> list[str]:
    """The lines of an upstream that skips an instance that failed, and asks all where all failed."""
    lines = [f"server {each} max_fails=3 fail_timeout=5s;" for each in addresses]
    return lines + [f"server {each} max_fails=0 backup;" for each in addresses]


def haproxy(tidegate: Sequence[int], patient: bool = True) -> tuple[HAProxy, int]:
    """deploy/haproxy/haproxy.cfg on free ports.

    Args:
        tidegate: ports of the instances.
        patient: whether it waits longer for Tidegate than is deployed, but for its health checks.

    Returns:
        The HAProxy, not started, its stats socket `admin.sock` in its directory, and the port for operators.
    """
    port, operators = free_port(), free_port()
    servers = "".join(f"    server tidegate{number} {HOST}:{each}\n" for number, each in enumerate(tidegate, 1))
    changes = {
        "    user haproxy\n    group haproxy\n": "",
        "    log /dev/log local0\n": "",
        "    log global\n    option httplog\n    option dontlog-normal\n": "",
        "maxconn 20000": "maxconn 2000",  # needs more open files than tests may have
        "bind :8080": f"bind {HOST}:{port}",
        "bind :8405": f"bind {HOST}:{operators}",
        "".join(f"    server tidegate{number} 10.0.0.1{number}:8080\n" for number in (1, 2, 3)): servers,
        "stats socket /run/haproxy/admin.sock mode 660": "stats socket {directory}/admin.sock mode 600",
    }
    if patient:
        changes |= {"timeout server 2s": "timeout server 20s", "timeout connect 250ms": "timeout connect 10s"}
    return HAProxy(configured("haproxy/haproxy.cfg", changes), port), operators


def nginx_balancer(tidegate: Sequence[int], patient: bool = True) -> tuple[Nginx, int]:
    """deploy/nginx/lb.conf on a free port.

    Args:
        tidegate: ports of the instances.
        patient: whether it waits longer for Tidegate than is deployed.

    Returns:
        The nginx, not started, and the port for operators.
    """
    port, operators = free_port(), free_port()
    changes = {
        "listen 8080;": f"listen {HOST}:{port};",
        "listen 127.0.0.1:8405;": f"listen {HOST}:{operators};",
        "".join(f"    {line}\n" for line in _twice([f"10.0.0.1{number}:8080" for number in (1, 2, 3)])): "".join(
            f"    {line}\n" for line in _twice([f"{HOST}:{each}" for each in tidegate])
        ),
    }
    if patient:
        changes |= {
            "proxy_read_timeout 2s;": "proxy_read_timeout 20s;",
            "proxy_connect_timeout 250ms;": "proxy_connect_timeout 10s;",
        }
    return Nginx(configured("nginx/lb.conf", changes), port), operators
