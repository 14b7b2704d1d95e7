"""Store calls of the Zipf workload of `bench.leases` in simulated time: the machine's speed does not matter.

    python -m bench.lease_simulation [--rate 12000] [--spread] [--algorithm sliding_window] [--seconds 120]

50 instances, 100,000 subjects with exponent 1.1, limits of 1,000/minute, with affinity or without (`--spread`). Leases, demand
and remembered denials are those of the server; the store is the Python twin of the Lua and answers at once. Prints for every 30 s
the calls for a check: charges, requests for leases, and calls that give leases back (one for up to 50). The first minute is the
cold start.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from itertools import accumulate

from tests.model.lease_store import LeaseStore

from tidegate.counters import Charge, Counters, GrantingDecision, LastDecision
from tidegate.counters.denial_cache import DenialCache
from tidegate.counters.lease_table import LeaseTable
from tidegate.policy.limits import Algorithm, Limit, LimitSet

INSTANCES, SUBJECTS, EXPONENT = 50, 100_000, 1.1
TTL_US, SWEEP_US, RETURN_SWEEPS, RETURNS = 5_000_000, 50_000, 5, 50
MINUTE_US = 60_000_000
START_US = 1_700_000_000_000_000 // MINUTE_US * MINUTE_US


class Instance:
    """The leases and denials of one instance, and what it sends to the store."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.table = LeaseTable(TTL_US, SUBJECTS, lambda: simulation.now_us * 1000)
        self.table.divisor, self.table.slow_divisor = 16, 64
        self.denials = DenialCache()

    def check(self, counters: Counters) -> str:
        """Decide a check; returns what decided it."""
        table, now_us = self.table, self.simulation.now_us
        if table.take(counters, 1) is not None:
            if table.renewals:
                self.renew()
            return "leased"
        request = table.request(counters, 1, now_us * 1000)
        decision = self.denials.find(counters, 1, now_us)
        decided = "denied before"
        if decision is None:
            decided = "call"
            decision = self.simulation.store.charge(Charge(counters, 1, request))
            following = decision.following if isinstance(decision, GrantingDecision | LastDecision) else None
            denial = following or decision
            if not denial.allowed:
                self.denials.remember(counters, 1, denial, now_us, TTL_US)
        table.answered(counters)
        if request is not None:
            table.accept(counters, request, decision, now_us * 1000, 0)
        return decided

    def renew(self) -> None:
        """Send the requests for leases that are to be renewed."""
        wanted, self.table.renewals = self.table.renewals, []
        for counters in wanted:
            request = self.table.renewal(counters, self.simulation.now_us * 1000)
            if request is not None:
                self.simulation.seen["renewal"] += 1
                decision = self.simulation.store.charge(Charge(counters, 0, request))
                self.table.accept(counters, request, decision, self.simulation.now_us * 1000, 0)

    def sweep(self, number: int) -> None:
        """What an instance does every 50 ms."""
        self.table.sweep(2_000)
        self.renew()
        if self.table.urgent or len(self.table.returns) >= RETURNS or number % RETURN_SWEEPS == 0:
            returns, self.table.returns, self.table.urgent = self.table.returns, [], False
            self.simulation.seen["return"] += -(-len(returns) // RETURNS)
            for each in returns:
                self.simulation.store.give_back(each)


class Simulation:
    """All instances on one store."""

    def __init__(self, algorithm: Algorithm, rate: float, spread: bool) -> None:
        self.now_us = START_US
        self.store = LeaseStore(lambda: self.now_us)
        self.seen: Counter[str] = Counter()
        self.instances = [Instance(self) for _ in range(INSTANCES)]
        limits = LimitSet("zipf", algorithm, [Limit.parse("1000/minute")])
        self.counters: list[Counters] = [((limits, f"u{number}"),) for number in range(SUBJECTS)]
        self._weights = list(accumulate(1 / rank**EXPONENT for rank in range(1, SUBJECTS + 1)))
        self._rate, self._spread = rate, spread

    def run(self, seconds: float) -> None:
        """Checks at the rate; prints every 30 s."""
        chosen, checks, sweeps = random.Random(7), 0, 0
        numbers: list[int] = []
        while checks < seconds * self._rate:
            self.now_us = START_US + round(checks / self._rate * 1e6)
            while self.now_us - START_US >= sweeps * SWEEP_US:
                sweeps += 1
                for each in self.instances:
                    each.sweep(sweeps)
            if not numbers:
                numbers = chosen.choices(range(SUBJECTS), cum_weights=self._weights, k=10_000)
            number = numbers.pop()
            place = checks if self._spread else number
            self.seen[self.instances[place % INSTANCES].check(self.counters[number])] += 1
            checks += 1
            if checks % round(30 * self._rate) == 0:
                self._print(checks / self._rate)

    def _print(self, at_s: float) -> None:
        seen, self.seen = self.seen, Counter()
        count = sum(seen[decided] for decided in ("leased", "denied before", "call"))
        calls = seen["call"] + seen["renewal"] + seen["return"]
        parts = ", ".join(f"{what} {seen[what] / count:.4f}" for what in ("leased", "denied before", "call", "renewal", "return"))
        print(f"{at_s - 30:4.0f} to {at_s:4.0f} s: store calls per check {calls / count:.3f} ({parts})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=12_000, help="checks a second of all instances")
    parser.add_argument("--spread", action="store_true", help="without affinity")
    parser.add_argument("--algorithm", type=Algorithm, default=Algorithm.SLIDING_WINDOW)
    parser.add_argument("--seconds", type=float, default=120)
    asked = parser.parse_args()
    Simulation(asked.algorithm, asked.rate, asked.spread).run(asked.seconds)


if __name__ == "__main__":
    main()
