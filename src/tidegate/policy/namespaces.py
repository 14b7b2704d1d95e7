"""`[[namespaces]]` of a policy: limits for subjects that a back end names itself, without an endpoint, an API key or a tier.

Precedence: an override for the exact subject, an override with `*`, the namespace's limits, the limits of the request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import msgspec

from tidegate.errors import PolicyError
from tidegate.policy.fields import member_of, short
from tidegate.policy.globs import Glob
from tidegate.policy.limits import Algorithm, Limit, LimitSet, OnFailure, fit_limits

MAX_SUBJECT: Final = 256
MAX_OVERRIDES: Final = 10_000
MAX_PATTERN_OVERRIDES: Final = 100
"""Overrides with `*` of one namespace: each is compared with the subject, at 0.2 µs."""
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)


class NamespaceOverride(msgspec.Struct, frozen=True, gc=False):
    """Other limits for some subjects of a namespace.

    Args:
        subject: 1 to 256 characters; `*` matches any run of characters.
        limits: what holds for them.
    """

    subject: str
    limits: tuple[Limit, ...]


class Namespace(msgspec.Struct, frozen=True, gc=False):
    """Subjects that are limited alike.

    Args:
        name: 1 to 64 of `[A-Za-z0-9_.-]`.
        limits: of every subject; empty where each request brings its own.
        algorithm: how they count.
        on_failure: what is answered while the counter store is unavailable.
        overrides: for single subjects; an exact one comes before one with `*`, then the earlier one.
    """

    name: str
    limits: tuple[Limit, ...] = ()
    algorithm: Algorithm = Algorithm.SLIDING_WINDOW
    on_failure: OnFailure = OnFailure.DEFAULT
    overrides: tuple[NamespaceOverride, ...] = ()

    @classmethod
    def make(
        cls,
        name: object,
        limits: Iterable[Limit | str] = (),
        algorithm: object = Algorithm.SLIDING_WINDOW,
        on_failure: object = OnFailure.DEFAULT,
        overrides: Iterable[tuple[object, Iterable[Limit | str]]] = (),
    ) -> Namespace:
        """Validate a namespace.

        Args:
            name: see the class; so are all others.
            limits: limits or their texts.
            overrides: pairs of subject and limits.

        Raises:
            PolicyError: naming the field, its value and the remedy.
        """
        require_name(name)
        assert isinstance(name, str)
        chosen = member_of(Algorithm, algorithm, "algorithm")
        parsed = _limits(limits)
        if parsed:
            fit_limits(chosen, parsed)
        made = tuple(_override(subject, own, chosen) for subject, own in overrides)
        if len(made) > MAX_OVERRIDES:
            raise PolicyError(f"namespace {name!r} has {len(made)} overrides; at most {MAX_OVERRIDES} are possible")
        known: set[str] = set()
        for override in made:
            if override.subject in known:
                raise PolicyError(f"namespace {name!r} has two overrides for the subject {short(override.subject)}: remove one")
            known.add(override.subject)
        patterns = sum("*" in subject for subject in known)
        if patterns > MAX_PATTERN_OVERRIDES:
            raise PolicyError(
                f"namespace {name!r} has {patterns} overrides with '*'; at most {MAX_PATTERN_OVERRIDES} are possible"
            )
        return cls(name, parsed, chosen, member_of(OnFailure, on_failure, "on_failure"), made)


class CompiledNamespace:
    """A namespace with its limits ready to be counted.

    Attributes:
        limits: of subjects without an override; None where the request has to bring limits.
    """

    __slots__ = ("_exact", "_patterns", "limits", "namespace")

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.limits = self._limit_set(namespace.limits) if namespace.limits else None
        self._exact: dict[str, LimitSet] = {}
        self._patterns: list[tuple[Glob, LimitSet]] = []
        for override in namespace.overrides:
            limits = self._limit_set(override.limits)
            if "*" in override.subject:
                self._patterns.append((Glob(override.subject), limits))
            else:
                self._exact[override.subject] = limits

    def limits_of(self, subject: str) -> LimitSet | None:
        """The limits of a subject; None where the request has to bring them. Costs 0.1 µs, and 0.2 µs for each pattern."""
        exact = self._exact.get(subject)
        if exact is not None:
            return exact
        for pattern, limits in self._patterns:
            if pattern.matches(subject):
                return limits
        return self.limits

    def _limit_set(self, limits: tuple[Limit, ...]) -> LimitSet:
        own = self.namespace
        return limit_set(own.name, own.algorithm, limits, own.on_failure)


def limit_set(
    namespace: str, algorithm: Algorithm, limits: Iterable[Limit], on_failure: OnFailure = OnFailure.DEFAULT
) -> LimitSet:
    """Limits of a namespace, ready to be counted. Those of one namespace share counters, so a change keeps consumption.

    Raises:
        PolicyError: if the limits do not fit the algorithm or each other.
    """
    # '/' is in no tier's name, and the Limiter class uses another beginning: no other counter has this name.
    return LimitSet(f"namespace/{namespace}", algorithm, limits, on_failure, rule=namespace)


def require_name(name: object) -> None:
    """Refuse what is not a namespace's name.

    Raises:
        PolicyError: naming the value and the form.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise PolicyError(f"namespace name {short(name)} must be 1 to 64 of letters, digits, '_', '.', '-'")


def _override(subject: object, limits: Iterable[Limit | str], algorithm: Algorithm) -> NamespaceOverride:
    if not isinstance(subject, str) or not 0 < len(subject) <= MAX_SUBJECT:
        raise PolicyError(f"override subject {short(subject)} must be a text of 1 to {MAX_SUBJECT} characters")
    parsed = _limits(limits)
    fit_limits(algorithm, parsed)
    return NamespaceOverride(subject, parsed)


def _limits(limits: Iterable[Limit | str]) -> tuple[Limit, ...]:
    return tuple(limit if isinstance(limit, Limit) else Limit.parse(limit) for limit in limits)
