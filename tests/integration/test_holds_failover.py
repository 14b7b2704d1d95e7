"""Random holds over a Redis that is killed and whose replica is promoted, again and again: few runs, on real servers.

Many more of them run in virtual time: `tests/unit/test_holds_failover.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.integration.test_holds import RandomHolds, is_replicated, until_true
from tests.servers.redis_server import RedisServer

MOST_FAILOVERS = 2
"""Of one run: each starts a server."""


def test_holds_while_redis_is_killed_and_its_replica_promoted(new_redis: Callable[[], RedisServer]) -> None:
    class HoldsOverRedis(RuleBasedStateMachine):
        """Two counters of a subject at three instances, of which some die; the replica has everything when it takes over."""

        @initialize(random=st.randoms(use_true_random=False))
        def begin(self, random: Random) -> None:
            self.loop = asyncio.new_event_loop()
            self.failovers = 0
            self.server = new_redis()
            self.replica = self.replica_of(self.server)
            self.run_of = RandomHolds(random, self.server.url)

        def replica_of(self, server: RedisServer) -> RedisServer:
            replica = new_redis()
            replica.must("REPLICAOF", "127.0.0.1", str(server.port))
            return replica

        @rule(count=st.integers(5, 15))
        def work(self, count: int) -> None:
            async def steps() -> None:
                for _ in range(count):
                    await self.run_of.step()

            self.loop.run_until_complete(steps())

        @precondition(lambda self: self.failovers < MOST_FAILOVERS)
        @rule()
        def fail_over(self) -> None:
            async def moved() -> None:
                await until_true(lambda: is_replicated(self.server))
                self.server.kill()
                self.replica.must("REPLICAOF", "NO", "ONE")
                await self.run_of.close()
                self.server = self.replica
                self.run_of.connect(self.server.url)

            self.loop.run_until_complete(moved())
            self.failovers += 1
            self.replica = self.replica_of(self.server)

        def teardown(self) -> None:
            if hasattr(self, "run_of"):
                self.loop.run_until_complete(self.run_of.finish())
                self.loop.close()

    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        HoldsOverRedis,
        settings=settings(
            max_examples=3,
            stateful_step_count=8,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )
