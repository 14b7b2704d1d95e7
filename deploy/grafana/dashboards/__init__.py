"""Grafana dashboards for Tidegate, as code: `make dashboards` writes their JSON to `json/`.

`promql.py`, `panels.py` and `layout.py` have what they share; the others are one dashboard each, `service.py` together with
`service_parts.py`.
Every panel says what to look at and what to do when it moves, and draws the thresholds of the alerts.
"""
