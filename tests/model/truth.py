"""What the counters must say, as far as anybody can know: whole histories, held against the slow oracles of `tests.oracles`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import NamedTuple

from tests import oracles
from tests.model.faults import Told
from tidegate.counters import Charge
from tidegate.counters.fallback import share_of
from tidegate.decision import Decision
from tidegate.policy.limits import Algorithm, Limit, LimitSet


class Place(NamedTuple):
    """One limit of one subject, whatever its amount."""

    name: str
    algorithm: Algorithm
    window: str
    subject: str


class Held(NamedTuple):
    """One limit of a charge."""

    place: Place
    limit: Limit
    limits: LimitSet


class Admitted(NamedTuple):
    """What an instance admitted by its share."""

    at_us: int
    cost: int
    asked: int
    """By which question to the instance."""


def held_by(charge: Charge) -> list[Held]:
    """All limits of a charge."""
    return [
        Held(Place(limits.name, limits.algorithm, limit.window_name, subject), limit, limits)
        for limits, subject in charge.counters
        for limit in limits.limits
    ]


class Truth(Told):
    """Bounds of what the store has counted, and all that is owed to it.

    Args:
        clock: of the store, µs since the epoch.
    """

    def __init__(self, instances: int, clock: Callable[[], int]) -> None:
        self.instances = instances
        self._clock = clock
        self.known: dict[Place, oracles.History] = defaultdict(list)
        """What the store has counted for certain."""
        self.maybe: dict[Place, oracles.History] = defaultdict(list)
        """What it may have counted besides."""
        self.owed: list[dict[Place, list[Admitted]]] = [defaultdict(list) for _ in range(instances)]
        self.unanswered: list[dict[Place, list[Admitted]]] = [defaultdict(list) for _ in range(instances)]
        """What was put back, and may use up the instance's share until the store decides a charge."""
        self._replica: tuple[dict[Place, oracles.History], dict[Place, oracles.History]] = ({}, {})
        self.limit_of: dict[Place, Held] = {}
        self.asked = 0

    @property
    def now_us(self) -> int:
        """The store's clock."""
        return self._clock()

    # What the faults tell.

    def charged(self, charge: Charge, decision: Decision) -> None:
        if decision.allowed and charge.cost:
            for held in held_by(charge):
                self.maybe[held.place].append((decision.at_us, charge.cost))

    def absorbed(self, instance: int, limits: LimitSet, subject: str, answered: bool) -> None:
        for held in held_by(Charge(((limits, subject),))):
            self.drop_expired(instance, held, self.now_us)
            debt = self.owed[instance][held.place]
            certain, besides = self._put_back(held, debt)
            self.maybe[held.place] += besides if answered else certain + besides
            if answered:
                self.known[held.place] += certain
                self.unanswered[instance][held.place] += debt
                debt.clear()

    def wiped(self, counters: Iterable[tuple[LimitSet, str]]) -> None:
        # It may come late, and then wipes what was counted after it was asked for.
        for counter in counters:
            for held in held_by(Charge((counter,))):
                self.maybe[held.place] += self.known.pop(held.place, [])

    def replicate(self) -> None:
        self._replica = (_copied(self.known), _copied(self.maybe))

    def fail_over(self) -> None:
        known, maybe = self._replica
        for place, history in self.known.items():
            kept = list(known.get(place, ()))
            self.maybe[place] += [each for each in history if each not in kept]
        for place, history in maybe.items():
            self.maybe[place] += history
        self.known = defaultdict(list, _copied(known))
        self.replicate()

    def forget(self, instance: int, counters: Iterable[tuple[LimitSet, str]]) -> None:
        """A reset: other instances may deny for a second yet, by what they remember."""
        for counter in counters:
            for held in held_by(Charge((counter,))):
                self.maybe[held.place] += self.known.pop(held.place, [])
                self.owed[instance].pop(held.place, None)
                self.unanswered[instance].pop(held.place, None)

    # What is held against it.

    def least(self, held: Held, now: int) -> int:
        """Units that certainly count."""
        return oracles.used(held.limits.algorithm, held.limit, sorted(self.known[held.place]), now)

    def most(self, held: Held, now: int) -> int:
        """Units that may count."""
        history = self.known[held.place] + self.maybe[held.place]
        for owed in self.owed:
            history = history + [(each.at_us, each.cost) for each in owed[held.place]]
        return oracles.used(held.limits.algorithm, held.limit, sorted(each for each in history if each[0] <= now), now)

    def share(self, held: Held) -> Limit:
        """The limit of one instance alone."""
        return share_of(held.limit, self.instances, held.limits)

    def least_of_share(self, instance: int, held: Held, now: int) -> int:
        """Units that an instance counts by itself."""
        history = [(each.at_us, each.cost) for each in self.owed[instance][held.place]]
        return oracles.used(held.limits.algorithm, self.share(held), sorted(history), now)

    def most_of_share(self, instance: int, held: Held, now: int) -> int:
        """Units that use up the share of an instance at most."""
        debts = self.owed[instance][held.place] + self.unanswered[instance][held.place]
        return oracles.used(held.limits.algorithm, self.share(held), sorted((each.at_us, each.cost) for each in debts), now)

    def drop_expired(self, instance: int, held: Held, now: int) -> None:
        """What an instance counts no more by itself it need not put back; a sliding window's last fraction of a unit goes so."""
        debt = self.owed[instance][held.place]
        if debt and not self.least_of_share(instance, held, now):
            self.maybe[held.place] += [(each.at_us, each.cost) for each in debt]
            debt.clear()

    def debts(self, instance: int, now: int) -> list[Place]:
        """What an instance owes and has not put back, as far as it still counts."""
        return [
            place
            for place, debt in self.owed[instance].items()
            if debt and self.least_of_share(instance, self.limit_of[place], now) > 0
        ]

    def _put_back(self, held: Held, debt: list[Admitted]) -> tuple[oracles.History, oracles.History]:
        """What a debt adds to the store where it arrives, and what it may add besides."""
        history = [(each.at_us, each.cost) for each in debt]
        if not held.limits.algorithm.is_bucket:
            return history, []
        # A bucket is put back as the level that is left of it, by the share's rate, and rounded up to whole tokens.
        now, share, level, last = self.now_us, self.share(held), Fraction(0), 0
        for at, cost in [*sorted(history), (now, 0)]:
            level = max(level - Fraction(share.amount * (at - last), share.window_us), Fraction(0)) + cost
            last = at
        return ([(now, int(level))] if level >= 1 else []), [(now, 2)]


def _copied(histories: dict[Place, oracles.History]) -> dict[Place, oracles.History]:
    return {place: list(history) for place, history in histories.items()}
