"""In which order the workers of pytest-xdist take the tests, and in which portions: whole files, and of some files single tests.

Two cores are busy all the time where tests that wait run beside tests that compute, and no worker is left alone with a long one
at the end. So both kinds take turns, the longest first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain, zip_longest
from typing import Final

import pytest
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

WAITING_S: Final = {
    "test_alert_chain.py": 50,
    "test_balancer_pair.py": 45,
    "test_balancers.py": 15,
    "test_console.py": 50,
    "test_console_outages.py": 30,
    "test_edge_cache.py": 15,
    "test_file_ownership.py": 50,
    "test_grafana.py": 45,
    "test_holds.py": 20,
    "test_invalidation.py": 155,
    "test_leases.py": 35,
    "test_log_shipping.py": 95,
    "test_logs.py": 50,
    "test_nginx_gateway.py": 75,
    "test_postgres_failover.py": 65,
    "test_postgres_plans.py": 55,
    "test_redis_cluster_scripts.py": 95,
    "test_redis_failures.py": 45,
    "test_replicas.py": 80,
    "test_reshard.py": 140,
    "test_simulate_servers.py": 12,
    "test_slow_redis.py": 35,
    "test_stack.py": 45,
    "test_tutorials.py": 70,
    "test_workers.py": 90,
}
"""The files that take long, mostly since they wait for servers, and about how long, s."""

COMPUTING_S: Final = {
    "test_admin_fields.py": 45,
    "test_admin_schemathesis.py": 30,
    "test_algorithms.py": 20,
    "test_callers_page.py": 12,
    "test_change_log.py": 15,
    "test_cli_keys.py": 20,
    "test_docs_site.py": 20,
    "test_model.py": 12,
    "test_prometheus_rules.py": 25,
    "test_python_pages.py": 12,
}
"""The files that take long since they compute, and about how long, s; of all others every test counts the same."""

APART: Final = frozenset(
    {
        "test_admin_fields.py",
        "test_file_ownership.py",
        "test_invalidation.py",
        "test_logs.py",
        "test_nginx_gateway.py",
        "test_redis_cluster_scripts.py",
        "test_reshard.py",
        "test_stack.py",
        "test_tutorials.py",
        "test_workers.py",
    }
)
"""Those whose tests share nothing that takes long to start: any worker takes any of them."""

_USUAL_S: Final = 0.4


class Portions(LoadScopeScheduling):  # type: ignore[misc]
    """Gives a worker a whole file at a time, of a file of `APART` one test."""

    def _split_scope(self, nodeid: str) -> str:
        return portion_of(nodeid)


def portion_of(nodeid: str) -> str:
    """Name what is run by one worker without a break.

    Args:
        nodeid: of a test.

    Returns:
        The path of its file, or the test itself.
    """
    path = nodeid.partition("::")[0]
    return nodeid if _file_of(path) in APART else path


def in_order(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Order tests for workers that take portion after portion from the beginning of the list.

    Args:
        items: in the order of their files.

    Returns:
        The same: of those that wait and those that compute a portion each, the longest first.
    """
    portions: dict[str, list[pytest.Item]] = {}
    for item in items:
        portions.setdefault(portion_of(item.nodeid), []).append(item)
    shares = Counter(_file_of(portion) for portion in portions)

    def length_s(portion: str) -> float:
        file = _file_of(portion)
        known_s = WAITING_S.get(file) or COMPUTING_S.get(file)
        return len(portions[portion]) * _USUAL_S if known_s is None else known_s / shares[file]

    longest_first = sorted(portions, key=length_s, reverse=True)
    waiting = [portion for portion in longest_first if _file_of(portion) in WAITING_S]
    computing = [portion for portion in longest_first if _file_of(portion) not in WAITING_S]
    turns = chain.from_iterable(zip_longest(waiting, computing))
    return [item for portion in turns if portion is not None for item in portions[portion]]


def _file_of(portion: str) -> str:
    return portion.partition("::")[0].rpartition("/")[2]
