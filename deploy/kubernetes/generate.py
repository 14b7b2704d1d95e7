"""Makes what the Prometheus operator wants to have out of deploy/prometheus, so that nothing is written twice: `make manifests`.

The rules are taken over as they stand. Of prometheus.yml the names of the jobs and the intervals are taken, as the alerts ask for
`job="redis"` and the like.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

import msgspec

HERE = Path(__file__).parent
SOURCE = HERE.parent / "prometheus"
TARGET = HERE / "components" / "prometheus-operator"

_HEADER = "# Made by deploy/kubernetes/generate.py from deploy/prometheus: change it there, then `make manifests`.\n"

_RULE = """\
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: tidegate-{name}
  namespace: tidegate
  labels: {{app.kubernetes.io/part-of: tidegate}}
spec:
"""

_MONITOR = """\
apiVersion: monitoring.coreos.com/v1
kind: {kind}
metadata:
  name: tidegate-{job}
  namespace: tidegate
  labels: {{app.kubernetes.io/part-of: tidegate}}
spec:
  selector: {{matchLabels: {selector}}}
  {endpoints}:
    - port: {port}
      interval: {interval}
      scrapeTimeout: {timeout}
      relabelings:
        - {{action: replace, targetLabel: job, replacement: {job}}}
"""

# CloudNativePG's own exporter has other names for what the alerts ask for.
_RENAMED = {"cnpg_collector_up": "pg_up", "cnpg_pg_replication_lag": "pg_replication_lag_seconds"}


def rules() -> str:
    """The recording rules and the alerts.

    Returns:
        Two PrometheusRules.
    """
    made = []
    for name in ("recording", "alerts"):
        text = (SOURCE / f"{name}.yml").read_text(encoding="utf-8")
        made.append(_RULE.format(name=name) + textwrap.indent(text[text.index("groups:") :], "  "))
    return _HEADER + "---\n".join(made)


def monitors() -> str:
    """What is scraped: the data planes, each Redis, each PostgreSQL.

    Returns:
        A ServiceMonitor and two PodMonitors.

    Raises:
        KeyError: if prometheus.yml has no job of one of these names.
    """
    configuration = msgspec.yaml.decode((SOURCE / "prometheus.yml").read_bytes())
    jobs = {job["job_name"]: job for job in configuration["scrape_configs"]}
    made = []
    for job, kind, selector, port in (
        ("tidegate", "ServiceMonitor", "{app.kubernetes.io/name: tidegate, app.kubernetes.io/component: data-plane}", "http"),
        ("redis", "PodMonitor", "{app.kubernetes.io/name: redis, app.kubernetes.io/component: node}", "metrics"),
        ("postgres", "PodMonitor", "{cnpg.io/cluster: tidegate-db}", "metrics"),
    ):
        made.append(
            _MONITOR.format(
                kind=kind,
                job=job,
                selector=selector,
                endpoints="endpoints" if kind == "ServiceMonitor" else "podMetricsEndpoints",
                port=port,
                interval=jobs[job].get("scrape_interval", configuration["global"]["scrape_interval"]),
                timeout=jobs[job].get("scrape_timeout", configuration["global"]["scrape_timeout"]),
            )
            + (_renaming(_RENAMED) if job == "postgres" else "")
        )
    return _HEADER + "---\n".join(made)


def _renaming(names: Mapping[str, str]) -> str:
    lines = [
        f"        - {{action: replace, sourceLabels: [__name__], regex: {old}, targetLabel: __name__, replacement: {new}}}\n"
        for old, new in names.items()
    ]
    return "      metricRelabelings:\n" + "".join(lines)


if __name__ == "__main__":
    (TARGET / "rules.yaml").write_text(rules(), encoding="utf-8")
    (TARGET / "monitors.yaml").write_text(monitors(), encoding="utf-8")
