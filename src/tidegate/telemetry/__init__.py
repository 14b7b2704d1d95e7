"""Metrics, health, logs and traces.

Telemetry observes and never decides: the gate passes one `Observation` per check, and no decision depends on what happens here.
Counts are plain integers of one event loop; scrapes read them without a lock.
"""
