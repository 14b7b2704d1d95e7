"""What is seen of the gate from outside: metrics, health, logs, traces, and who was blocked.

Telemetry is told, it never decides: the gate hands over one `Observation` a check, and a fault here cannot change an answer.
Tallies are plain integers of one event loop; scrapes read them without a lock.
"""
