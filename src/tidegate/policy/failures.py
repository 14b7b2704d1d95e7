"""Rules that count failures, such as wrong passwords: what is a failure, and what follows when a limit of them is reached."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Final, Self

import msgspec

from tidegate.errors import PolicyError
from tidegate.policy.durations import duration_s, duration_text
from tidegate.policy.fields import short

DEFAULT_STATUSES: Final = (401, 403)
MAX_STATUSES: Final = 32
MAX_PENALTIES: Final = 16
MAX_PENALTY_S: Final = 30 * 86_400
COUNTS: Final = ("requests", "failures")


class FailureCount(msgspec.Struct, frozen=True, gc=False):
    """How a rule counts failures.

    Args:
        statuses: of responses that are failures, in order; 100 to 599.
        clear_on_success: whether a success forgets the failures before it, and the penalties.
        penalty_s: for how many seconds a subject is denied when it reaches a limit for the first time, the second time and so on;
            the last one holds for all further times. Each longer than the one before; none where the limits alone deny.
    """

    statuses: tuple[int, ...] = DEFAULT_STATUSES
    clear_on_success: bool = False
    penalty_s: tuple[int, ...] = ()

    @classmethod
    def make(cls, count: object, statuses: object = None, clear_on_success: object = None, penalty: object = None) -> Self | None:
        """Read the fields of a rule.

        Args:
            count: `requests` or `failures`.
            statuses: numbers of HTTP; None or none for 401 and 403.
            clear_on_success: true or false; None for false.
            penalty: texts such as `5m`; None or none for no penalty.

        Returns:
            What is counted; None for requests.

        Raises:
            PolicyError: naming the field, its value and the remedy.
        """
        if count not in COUNTS:
            raise PolicyError(f"count {short(count)} is not known: use one of {', '.join(COUNTS)}")
        given = (("statuses", statuses), ("clear_on_success", clear_on_success), ("penalty", penalty))
        if count == "requests":
            for name, value in given:
                if value:
                    raise PolicyError(
                        f"{name} {short(value)} needs count = 'failures' on the same rule: add it, or leave {name} out"
                    )
            return None
        if clear_on_success is not None and not isinstance(clear_on_success, bool):
            raise PolicyError(f"clear_on_success {short(clear_on_success)} must be true or false")
        return cls(_statuses(statuses), bool(clear_on_success), _penalties(penalty))

    @property
    def penalty(self) -> list[str]:
        """The penalties as a policy writes them."""
        return [duration_text(seconds) for seconds in self.penalty_s]

    @property
    def stored(self) -> dict[str, object]:
        """What the catalog stores; `of_stored` reads it."""
        return {"statuses": list(self.statuses), "clear_on_success": self.clear_on_success, "penalty": self.penalty}

    @classmethod
    def of_stored(cls, stored: dict[str, object] | None) -> Self | None:
        """Read what the catalog stores; None for a rule that counts requests."""
        return None if stored is None else cls.make("failures", **stored)

    @property
    def fields(self) -> dict[str, object]:
        """The fields of a rule, as the admin API has them."""
        return {"count": "failures", **self.stored}


NO_FAILURES: Final[dict[str, object]] = {"count": "requests", "statuses": [], "clear_on_success": False, "penalty": []}
"""The fields of a rule that counts requests, as the admin API has them."""


def _statuses(given: object) -> tuple[int, ...]:
    if not given:
        return DEFAULT_STATUSES
    if not isinstance(given, list | tuple) or len(given) > MAX_STATUSES:
        raise PolicyError(f"statuses {short(given)} must be a list of 1 to {MAX_STATUSES} HTTP statuses such as [401, 403]")
    for status in given:
        if isinstance(status, bool) or not isinstance(status, int) or not 100 <= status <= 599:
            raise PolicyError(f"statuses has {short(status)}, which must be a whole number from 100 to 599")
    return tuple(sorted(set(given)))


def _penalties(given: object) -> tuple[int, ...]:
    if not given:
        return ()
    if not isinstance(given, list | tuple) or len(given) > MAX_PENALTIES:
        raise PolicyError(f'penalty {short(given)} must be a list of 1 to {MAX_PENALTIES} durations such as ["1m", "5m", "1h"]')
    seconds = [_penalty(each) for each in given]
    for before, after in itertools.pairwise(seconds):
        if after <= before:
            raise PolicyError(
                f"penalty has {duration_text(after)} after {duration_text(before)}: each must be longer than the one before"
            )
    return tuple(seconds)


def _penalty(text: object) -> int:
    seconds = duration_s(text)
    if seconds is None or not 1 <= seconds <= MAX_PENALTY_S:
        raise PolicyError(f"penalty has {short(text)}, which must be a duration from 1s to 30d, such as 5m")
    return seconds


def require_countable(failures: Iterable[object], mode: str, sold: object, acts: object, algorithm: str) -> None:
    """Refuse what does not go together with counting failures.

    Args:
        failures: limits per window of the rule.
        mode: of the rule.
        sold: quotas of the rule.
        acts: action of the rule.
        algorithm: of the rule.

    Raises:
        PolicyError: naming the field and the remedy.
    """
    if acts is not None:
        raise PolicyError("count 'failures' does nothing beside an action, which counts nothing: leave one of them out")
    if sold:
        raise PolicyError("quotas count requests, not failures: leave them out, or move them to the tier")
    if not list(failures):
        raise PolicyError("count 'failures' needs limits per window, such as limits = [\"5/15m\"]")
    if mode != "enforce":
        raise PolicyError(f"mode {short(mode)} does not go with count = 'failures', which has to deny attempts: use enforce")
    if algorithm not in ("sliding_window", "sliding_log"):
        raise PolicyError(
            f"algorithm {short(algorithm)} does not go with count = 'failures', which counts exactly, with the time of each "
            "failure: leave it out"
        )
