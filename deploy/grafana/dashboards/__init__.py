"""Grafana dashboards for Tidegate, as code: `make dashboards` writes their JSON to `json/`.

`panels.py` has what they share; each of the others is one dashboard, a list of rows of lines of panels. Every panel says what to
look at and what to do when it moves, and draws the thresholds of the alerts.
"""
