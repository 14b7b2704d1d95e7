"""Which of three kinds a test is. Every test gets exactly one, here and nowhere else; no file marks its own tests.

- `unit`: needs Python alone. No root, no Debian package, no server.
- `servers`: needs real servers: Redis, PostgreSQL, nginx, Envoy, or a running Tidegate.
- `deploy`: holds the files in `deploy/` to real servers and tools.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from tests.servers import fixtures

UNIT = "unit"
SERVERS = "servers"
DEPLOY = "deploy"

MEANINGS = {
    UNIT: "needs Python alone: no root, no Debian package, no server",
    SERVERS: "needs real servers, such as Redis and PostgreSQL, or a running Tidegate",
    DEPLOY: "holds the files in deploy/ to real servers and tools",
}
"""Marker → what `pytest --markers` says of it."""

DEPLOY_FILES = frozenset(
    {
        "test_alert_chain.py",
        "test_balancer_pair.py",
        "test_balancers.py",
        "test_containers.py",
        "test_edge_cache.py",
        "test_envoy_ext_authz.py",
        "test_envoy_prefix.py",
        "test_envoy_ratelimit.py",
        "test_envoy_tricks.py",
        "test_gateway_attributes.py",
        "test_gateway_cors.py",
        "test_gateway_tricks.py",
        "test_grafana.py",
        "test_kubernetes.py",
        "test_log_shipping.py",
        "test_mesh_pages.py",
        "test_nginx_gateway.py",
        "test_pin_images.py",
        "test_postgres_failover.py",
        "test_prometheus_rules.py",
        "test_redis_cluster_scripts.py",
        "test_redis_users.py",
        "test_reshard.py",
        "test_slow_tidegate.py",
        "test_traefik_gateway.py",
    }
)
"""Files of `tests/integration` whose subject is `deploy/`."""

SERVER_FIXTURES = frozenset(fixtures.__all__) | {"serve"}
"""What starts a server: a test that asks for one of these is not `unit`, wherever its file is."""


def kind_of(path: Path, fixture_names: Collection[str]) -> str:
    """Find the kind of a test.

    Args:
        path: of its file, with the folder below `tests/`.
        fixture_names: all that it uses, also through other fixtures.

    Returns:
        The name of its marker.
    """
    if path.name in DEPLOY_FILES:
        return DEPLOY
    if "unit" in path.parts[-2:-1] and SERVER_FIXTURES.isdisjoint(fixture_names):
        return UNIT
    return SERVERS
