"""Real servers for tests: Redis, Valkey, PostgreSQL, Prometheus, nginx, HAProxy, keepalived, Envoy, OpenSearch, rsyslog and more;
and a proxy that spoils answers.

Every server is a process of its own on free loopback ports below the range that the system hands out, or in network namespaces of
its own, with a temporary directory that goes with it; nothing persists. `deployed.py` starts them as deploy/ configures them,
`fixtures.py` has the pytest fixtures. Where a binary is missing, a test skips and says which package has it. Servers may be used
from several threads, each object's calls then come one after the other.
"""
