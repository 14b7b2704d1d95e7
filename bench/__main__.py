"""All benches, one after the other, each in a process of its own: python -m bench [--smoke]."""

import subprocess
import sys

BENCHES = (
    "inprocess",
    "memory",
    "matching",
    "violations",
    "telemetry",
    "simulate",
    "http",
    "client",
    "gateways",
    "redis_calls",
    "redis_memory",
    "redis_http",
    "catalog",
)

for bench in BENCHES:
    subprocess.run([sys.executable, "-m", f"bench.{bench}", *sys.argv[1:]], check=True)
