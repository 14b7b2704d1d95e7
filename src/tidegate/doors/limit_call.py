"""One call of a limited function, and what is read from its result."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from tidegate.counters.holds import HoldSettlement
from tidegate.decision import MAX_COST, Decision
from tidegate.doors.call_holds import CallHold
from tidegate.doors.limit_arguments import Place, UserFunction
from tidegate.doors.request_view import RequestView
from tidegate.errors import PolicyError, clip
from tidegate.policy.limits import LimitSet

Steps = Generator[Any, Any, Any]
"""Yields (limits, subject, cost) to be decided, a step of a hold, or something to be awaited; receives the result."""


class LimitCall:
    """One call of a limited function, or one request of a dependency.

    Args:
        ends: whether its end will be known, which a concurrency limit needs.
    """

    __slots__ = (
        "args", "cost", "decision", "denied", "ends", "hold", "kept", "kwargs", "name", "parameter", "pending", "rates",
        "subject", "view",
    )  # fmt: skip
    rates: LimitSet | None
    subject: str
    cost: int
    kept: Decision
    """The decision whose headers the request gets: of its limits the strictest. These four are set once there is a decision."""

    def __init__(
        self,
        name: str,
        view: RequestView | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        parameter: tuple[int, Any] | None = None,
        ends: bool = True,
    ) -> None:
        self.name = name
        self.view = view
        self.args = args
        self.kwargs = kwargs
        self.parameter = parameter
        self.ends = ends
        self.pending = False
        self.denied = False
        self.decision: Decision | None = None
        self.hold: CallHold | None = None

    @property
    def unfinished(self) -> bool:
        """Whether it has to be charged or settled when it has run."""
        return self.pending or self.hold is not None

    def ask(self, function: UserFunction) -> Any:
        """Call a function of the user."""
        return function.call(None if self.view is None else self.view.native, self.args, self.kwargs)


def settled_decision(limits: LimitSet, settled: HoldSettlement, before: Decision | None) -> Decision:
    """What is left after a settlement, as a decision."""
    binding = next((each for each in limits.limits if each.capacity == settled.limit), limits.limits[0])
    at_us = 0 if before is None else before.at_us
    return Decision(True, binding, settled.remaining, settled.reset_after_us or 0, 0, at_us, limits)


def response_of(error: BaseException) -> Any:
    """What an exception that ends as a response says to `deduct_when`; None for others, which are not charged."""
    if hasattr(error, "get_response"):
        return error.get_response()
    return error if hasattr(error, "status_code") else None


def charged(place: Place, cost: Any) -> int:
    """A cost that a function gave."""
    if type(cost) is not int or not 0 <= cost <= MAX_COST:
        raise PolicyError(
            f"the function given as cost returned {clip(cost)}; it must return a whole number from 0 to {MAX_COST}",
            place.file,
            place.line,
        )
    return cost
