"""Tidegate's own service under grpc.aio, which it was measured against before pygrpc-native was chosen: `grpcio_door.py PORT`."""

import sys
from pathlib import Path
from typing import Any

import grpc.aio
import uvloop

from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.doors.grpc.service import RateLimitService
from tidegate.gate.gate import Gate
from tidegate.policy.toml_reader import load_policy
from tidegate.settings import EnvoySettings


async def main() -> None:
    catalog = CachedCatalog(PolicyCatalog(load_policy(Path("tidegate.policy.toml"))))
    service = RateLimitService(Gate(catalog, MemoryCounters()), EnvoySettings())

    async def answer(request: bytes, _: Any) -> bytes:
        return await service.answer(request)

    server = grpc.aio.server()
    methods: dict[str, Any] = {"ShouldRateLimit": grpc.unary_unary_rpc_method_handler(answer)}
    name = "envoy.service.ratelimit.v3.RateLimitService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))
    server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    await server.start()
    await server.wait_for_termination()


uvloop.run(main())
