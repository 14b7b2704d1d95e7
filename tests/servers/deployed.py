"""The configurations in deploy/ as they would be installed, but for ports and paths."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.servers.nginx import Nginx
from tests.servers.redis_server import HOST, free_port

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
    tidegate: Sequence[int], api: int, when_away: str = "closed", edge: bool = False, patient: bool = True, level: str = "info"
) -> Nginx:
    """deploy/nginx/gateway.conf on a free port.

    Args:
        tidegate: ports of the instances.
        api: port of the API.
        when_away: `closed` or `open`.
        edge: whether it keeps denials.
        patient: whether it waits longer for Tidegate than is deployed: on a busy machine a first answer may take a second.
        level: from which on errors are logged.

    Returns:
        The nginx, not started; its edge cache is in `denials` in its directory.
    """
    port = free_port()
    instance = "server 127.0.0.1:8080 max_fails=3 fail_timeout=30s;"
    text = configured(
        "nginx/gateway.conf",
        {
            "listen 80;": f"listen {HOST}:{port};",
            instance: "\n    ".join(instance.replace("8080", str(each)) for each in tidegate),
            "127.0.0.1:8000": f"{HOST}:{api}",
            "default closed": f"default {when_away}",
            "default off": f"default {'tidegate_denials' if edge else 'off'}",
        },
    )
    files = snippets()
    if patient:
        files["snippets/tidegate-server.conf"] = configured(
            "nginx/tidegate-server.conf",
            {"proxy_connect_timeout 250ms;": "proxy_connect_timeout 10s;", "proxy_read_timeout 1s;": "proxy_read_timeout 20s;"},
        )
    made = Nginx(text, port, files, level)
    if edge:
        folder = made.directory / "denials"
        folder.mkdir(mode=0o700)
        if os.geteuid() == 0:
            shutil.chown(folder, "www-data")
        made.add(configured("nginx/edge-cache.conf", {"/run/tidegate-denials": str(folder)}))
    return made
