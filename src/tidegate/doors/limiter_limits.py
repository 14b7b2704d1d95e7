"""What `Limiter` and `SyncLimiter` have in common: their limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tidegate.counters import Charge
from tidegate.counters.reservations import can_reserve
from tidegate.decision import MAX_COST, Decision
from tidegate.doors.limited_subject import LimitedSubject, checked_cost, fit_subject
from tidegate.errors import BadRequest, PolicyError, clip
from tidegate.gate.holds import checked_ttl_s, fitting_cost
from tidegate.gate.request_limits import counter_subject
from tidegate.policy.fields import member_of
from tidegate.policy.limits import Algorithm, Limit, LimitSet, OnFailure
from tidegate.policy.namespaces import MAX_SUBJECT, CompiledNamespace
from tidegate.timestamps import US_PER_S


class LimiterLimits:
    """What both limiters have in common: the limits, and what is refused before anything is charged."""

    def __init__(
        self,
        limits: str | Sequence[str],
        *,
        algorithm: str,
        counters: Any,  # noqa: ARG002 - opened by the subclass
        name: str | None,
        on_failure: str,
        leases: bool | None,
    ) -> None:
        texts = [limits] if isinstance(limits, str) else list(limits)
        label = name or ", ".join(texts)
        # '/' is in no tier's name: no rule of a policy on the same store has this name.
        self._limits = LimitSet(
            f"limiter/{label}",
            member_of(Algorithm, algorithm, "algorithm"),
            [Limit.parse(text) for text in texts],
            member_of(OnFailure, on_failure, "on_failure"),
            rule=label,
            leases=leases is not False,
        )
        self._label = label
        self._most_at_once = min(MAX_COST, *(limit.capacity for limit in self._limits.limits))

    _namespace: CompiledNamespace | None = None
    """Whose limits apply, with overrides for single subjects, instead of `_limits`; see `from_policy`."""

    @classmethod
    def from_policy(cls, path: str | Path, namespace: str, *, counters: Any = "memory://", leases: bool | None = None) -> Self:
        """A limiter with the limits, algorithm and overrides of `[[namespaces]]` in a policy file, which is read once.

        It counts together with `POST /v1/limit` of the same namespace on the same store.

        Args:
            path: of the policy file.
            namespace: name of one that has limits.
            counters: URL or a store.
            leases: as for `Limiter`.

        Raises:
            PolicyError: if the policy is refused or has no such namespace.
            SettingsError: if the URL is not understood.
        """
        from tidegate.policy.toml_reader import load_policy  # most limiters have no policy file: a fifth of the import

        known = {each.name: each for each in load_policy(Path(path)).namespaces}
        found = known.get(namespace)
        if found is None or not found.limits:
            names = ", ".join(name for name, each in known.items() if each.limits) or "none"
            raise PolicyError(f"the policy has no [[namespaces]] with limits named {clip(namespace)}: it has {names}", str(path))
        texts = [limit.text for limit in found.limits]
        made = cls(
            texts, algorithm=found.algorithm, counters=counters, name=namespace, on_failure=found.on_failure, leases=leases
        )
        made._namespace = CompiledNamespace(found)
        return made

    def _counter(self, subject: LimitedSubject) -> tuple[LimitSet, str]:
        """The limits of a subject, and the name it is counted by."""
        if self._namespace is None:
            return self._limits, fit_subject(subject)
        if type(subject) is not str or not 0 < len(subject) <= MAX_SUBJECT:
            raise BadRequest(f"subject {clip(subject)} must be a text of 1 to {MAX_SUBJECT} characters", field="subject")
        limits = self._namespace.limits_of(subject)
        assert limits is not None, "checked by from_policy"
        return limits, counter_subject(subject)

    def _charges(self, asked: Sequence[tuple[LimitedSubject, int]]) -> list[Charge]:
        return [Charge((self._counter(subject),), checked_cost(cost)) for subject, cost in asked]

    def _not_reservable(self) -> BadRequest:
        if not can_reserve((self._limits,)):
            return BadRequest(
                f"algorithm '{self._limits.algorithm}' gives no reservations; use fixed_window, sliding_window, token_bucket or "
                "leaky_bucket, or `wait`",
                field="algorithm",
            )
        return BadRequest("this counter store gives no reservations; give its URL as counters, or use `wait`", field="counters")

    def _reservation(
        self, subject: LimitedSubject, cost: int, ttl_s: int, clamp: bool
    ) -> tuple[tuple[tuple[LimitSet, str], ...], int, int]:
        """The counters of a hold, the units to reserve, and after how many µs it expires."""
        counters = (self._counter(subject),)
        return counters, fitting_cost(counters, checked_cost(cost), clamp), checked_ttl_s(ttl_s) * US_PER_S

    def _allowed_in_tests(self) -> Decision:
        """While `tidegate.testing.allow_all` holds."""
        limit = self._limits.limits[0]
        return Decision(True, limit, limit.capacity, limits=self._limits)
