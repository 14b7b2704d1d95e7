"""What 100,000 blocked networks cost a check, and what the look costs where there are none.

    python -m bench.access [--smoke]

The networks have the prefix lengths of public block lists (half of them single addresses, a quarter /24, the rest /8 to /31; for
IPv6 /32 to /64), so nearly every address shares its first 16 bits with some of them. The addresses looked up are not blocked,
each is another one, and none is cached. Process CPU time; the median of rounds in which all variants take turns.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable

from bench.measure import Goal, asked_for_smoke, report
from tidegate.catalog.blocks import CIDR, Block, BlockIndex
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check, Decision
from tidegate.gate.gate import Gate
from tidegate.policy.networks import NOT_FOUND
from tidegate.policy.toml_reader import parse_policy

POLICY = """
[anonymous]
tier = "free"
[[tiers]]
name = "free"
[[tiers.rules]]
endpoint = "/*"
limits = ["1000000000/day"]
"""


def networks(count: int, rng: random.Random) -> list[str]:
    """Distinct networks, one in ten of IPv6."""
    found: dict[str, None] = {}
    while len(found) < count:
        if rng.random() < 0.1:
            prefix = rng.choice((32, 40, 48, 56, 64))
            found[str(ipaddress.IPv6Network((0x2A << 120 | rng.getrandbits(120), prefix), strict=False))] = None
        else:
            prefix = rng.choice((32, 32, 32, 32, 24, 24, rng.randint(16, 31), rng.randint(20, 31)))
            address = rng.randrange(1 << 24, 224 << 24)
            found[str(ipaddress.IPv4Network((address, prefix), strict=False))] = None
    return list(found)


def index_of(texts: list[str]) -> BlockIndex:
    """Blocks of networks."""
    index = BlockIndex()
    for number, text in enumerate(texts):
        index.apply(Block(number, CIDR, text))
    return index


def unblocked(index: BlockIndex, count: int, rng: random.Random) -> list[str]:
    """IPv4 addresses outside of all networks."""
    found: list[str] = []
    while len(found) < count:
        address = rng.randrange(1 << 24, 224 << 24)
        if index.named.ipv4.find(address) == NOT_FOUND:
            found.append(str(ipaddress.IPv4Address(address)))
    return found


async def gate_of(index: BlockIndex | None) -> Gate:
    """A gate that counts in memory."""
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), MemoryCounters())
    await gate.check(Check.of("/warm", ip="192.0.2.1"))
    if index is not None:
        gate.catalog.access.replace_blocks(index)
    return gate


def timed(work: Callable[[], None]) -> int:
    """CPU ns of one call."""
    started = time.process_time_ns()
    work()
    return time.process_time_ns() - started


async def measure(smoke: bool) -> None:
    """Print the table."""
    rng = random.Random(7)
    blocked = 1_000 if smoke else 100_000
    texts = networks(blocked, rng)
    tracemalloc.start()
    index = index_of(texts)
    memory = tracemalloc.get_traced_memory()[0] / blocked
    tracemalloc.stop()
    load_us = timed(lambda: void(index_of(texts))) / blocked / 1000
    addresses = unblocked(index, 500 if smoke else 10_000, rng)
    checks = [Check.of("/a", ip=address) for address in addresses]
    gates = {"none": await gate_of(None), "few": await gate_of(index_of(["203.0.113.0/24"])), "many": await gate_of(index)}

    def decide(gate: Gate) -> Callable[[], None]:
        def run() -> None:
            for check in checks:
                assert isinstance(gate.check_now(check), Decision)

        return run

    def admit(gate: Gate) -> Callable[[], None]:
        def run() -> None:
            for check in checks:
                assert not gate.access.admit(check.ip, check.attributes)

        return run

    work = {f"check, {name}": decide(gate) for name, gate in gates.items()}
    work |= {f"admit, {name}": admit(gate) for name, gate in gates.items()}
    for each in work.values():
        each()
    rounds = [{name: timed(each) / len(checks) for name, each in work.items()} for _ in range(3 if smoke else 7)]
    ns = {name: statistics.median(each[name] for each in rounds) for name in work}
    added = statistics.median(each["check, many"] - each["check, none"] for each in rounds)
    report(
        "access",
        f"{blocked:,} blocked networks; checks of distinct addresses that are not blocked",
        [
            ("check without blocks, CPU ns", ns["check, none"], None),
            ("check with 1 blocked network, CPU ns", ns["check, few"], None),
            ("check with all of them, CPU ns", ns["check, many"], None),
            ("the look alone, CPU ns", ns["admit, many"], None),
            ("added to a check by all of them, CPU ns", added, Goal(at_most=1000)),
            ("check with all of them ÷ without", ns["check, many"] / ns["check, none"], None),
            ("memory of a blocked network, bytes", memory, Goal(at_most=400)),
            ("reading a block into memory, CPU µs", load_us, None),
        ],
        smoke=smoke,
    )


def void(_: object) -> None:
    """Drop a result."""


def main() -> None:
    """Measure and print."""
    asyncio.run(measure(asked_for_smoke(__doc__)))


if __name__ == "__main__":
    main()
