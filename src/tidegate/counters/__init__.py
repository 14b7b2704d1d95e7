"""Where counts live. `CounterStore` is the port; `memory` is the embedded default, `redis` is shared by many instances, and
`guarded` stands before it and decides while it is away.

A store charges all counters of a `Charge` in one atomic step or none of them, by its own clock. Where it cannot answer it says
`StoreUnavailable`; it never guesses (a `guarded` one answers in its place, and says that it does). Stores serve one event loop;
they may be shared by any number of tasks of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import msgspec

from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import LimitSet


class Charge(msgspec.Struct, frozen=True, gc=False):
    """What one check asks of a store.

    Args:
        counters: pairs of limits and the subject they count, the rule's first. Usually all have one subject. Where a rule
            counts by another subject than its tier's own limits, a store that shards by subject may need more than one step
            for them, but must never admit more than any limit.
        cost: units, 0 (peek) or more.
    """

    counters: tuple[tuple[LimitSet, str], ...]
    cost: int = 1


class LateAnswer(StoreUnavailable):
    """The deadline of a charge passed, and the store has not answered yet. It may have charged; it is slow, or gone.

    Args:
        message: see `TidegateError`.
        answer: has the store's answer when it comes, and fails when it cannot come any more.
        details: see `TidegateError`.

    Attributes:
        decode: makes a decision of what `answer` brings; it raises `StoreUnavailable` where that is none.
    """

    def __init__(self, message: str, answer: asyncio.Future[Any], **details: object) -> None:
        super().__init__(message, reason="timeout", **details)
        self.answer = answer
        self.decode: Callable[[Any], Decision] | None = None


ChargeOutcome: TypeAlias = Decision | StoreUnavailable


class CounterStore(Protocol):
    """The port of the counters."""

    async def charge(self, charges: Sequence[Charge]) -> Sequence[ChargeOutcome]:
        """Decide each charge on its own, in order.

        Args:
            charges: any number of them.

        Returns:
            For each its decision, or why there is none: a part of the store may be away while others answer. `at_us` is the
            store's clock and `holds_until_us` says how long the answer holds.
        """
        ...

    async def windows(self, counters: Sequence[tuple[LimitSet, str]]) -> Sequence[Sequence[Decision] | None]:
        """What is left of each limit of a counter by itself; charges nothing.

        Args:
            counters: pairs of limits and subject, any number.

        Returns:
            For each a decision for every one of its limits, in their order; None where the store does not answer.
        """
        ...

    async def reset(self, counters: Sequence[tuple[LimitSet, str]]) -> None:
        """Forget what was consumed.

        Args:
            counters: pairs of limits and subject.

        Raises:
            StoreUnavailable: if the store does not answer.
        """
        ...

    async def ping(self) -> None:
        """Find out whether the store answers.

        Raises:
            StoreUnavailable: if it does not.
        """
        ...

    async def close(self) -> None:
        """Give back what the store holds; it is not used afterwards."""
        ...
