"""Limits in the request and namespaces: precedence, bounds, and that no two subjects share a counter."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.counters.memory import MemoryCounters
from tidegate.errors import BadRequest, PolicyError
from tidegate.gate import request_limits
from tidegate.gate.request_limits import LimitCheck, RequestLimits, counter_subject
from tidegate.observation import Observation
from tidegate.policy.namespaces import CompiledNamespace, Namespace

EMAILS = Namespace.make(
    "emails",
    ["2/minute"],
    "fixed_window",
    overrides=[("vip-*", ["4/minute"]), ("vip-blocked", ["1/minute"]), ("*@acme", ["3/minute"])],
)
OPEN = Namespace.make("open", algorithm="token_bucket")


class Decider(RequestLimits):
    """With the namespaces of a policy, and a clock that stands still."""

    def __init__(self, *namespaces: Namespace, observe: Any = None) -> None:
        self.known = {namespace.name: CompiledNamespace(namespace) for namespace in namespaces}
        super().__init__(MemoryCounters(clock=lambda: 1_700_000_000_000_000), self.load, observe)

    async def load(self) -> dict[str, CompiledNamespace]:
        return self.known

    def sent(self, *fields: Any, **named: Any) -> LimitCheck:
        return self.read(self.known, *fields, **named)


async def admitted(limits: Decider, namespace: str, subject: str, *sent: object, tries: int = 10) -> int:
    decisions = [await limits.check(limits.sent(namespace, subject, *sent)) for _ in range(tries)]
    return sum(decision.allowed for decision in decisions)


@pytest.mark.parametrize(
    ("subject", "units"), [("user-1", 2), ("vip-1", 4), ("vip-blocked", 1), ("vip-9@acme", 4), ("user@acme", 3)]
)
async def test_an_exact_override_comes_before_a_pattern_and_both_before_the_namespace(subject: str, units: int) -> None:
    assert await admitted(Decider(EMAILS), "emails", subject, ["9/minute"]) == units


async def test_a_namespace_that_is_not_in_the_policy_takes_the_limits_of_the_request() -> None:
    limits = Decider(EMAILS, OPEN)
    assert await admitted(limits, "jobs", "a", ["3/minute"]) == 3
    assert await admitted(limits, "open", "a", ["5/minute burst 2"]) == 2  # the namespace's algorithm
    assert await admitted(limits, "open", "b", ["5/minute"], "sliding_log") == 5


async def test_namespaces_do_not_share_counters_and_changed_limits_keep_consumption() -> None:
    limits = Decider()
    assert await admitted(limits, "a", "user", ["3/minute"]) == 3
    assert await admitted(limits, "b", "user", ["3/minute"]) == 3
    assert await admitted(limits, "a", "user", ["5/minute"]) == 2


async def test_a_batch_is_charged_in_order_and_observed() -> None:
    seen: list[Observation] = []
    limits = Decider(EMAILS, observe=seen.append)
    outcomes = await limits.check_many([limits.sent("emails", "user-1", cost=cost) for cost in (1, 0, 2, 1)])
    assert [outcome.allowed for outcome in outcomes] == [True, True, False, True]  # type: ignore[union-attr]
    assert [one.subject for one in seen] == ["n:user-1"] * 4
    assert [one.denied_by is not None for one in seen] == [False, False, True, False]
    assert seen[0].decision is not None
    assert (seen[0].decision.rule, seen[0].decision.tier) == ("emails", None)


@pytest.mark.parametrize("algorithm", ["fixed_window", "sliding_window", "sliding_log", "token_bucket", "leaky_bucket"])
async def test_reset_finds_every_algorithm(algorithm: str) -> None:
    limits = Decider()
    first = await admitted(limits, "jobs", "a", ["3/minute"], algorithm)
    await limits.reset("jobs", "a")
    assert await admitted(limits, "jobs", "a", ["3/minute"], algorithm) == first


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        (("", "a", ["1/s"]), "namespace"),
        (("a/b", "a", ["1/s"]), "namespace"),
        ((7, "a", ["1/s"]), "namespace"),
        (("x" * 65, "a", ["1/s"]), "namespace"),
        (("jobs", "", ["1/s"]), "subject"),
        (("jobs", 7, ["1/s"]), "subject"),
        (("jobs", "x" * 257, ["1/s"]), "subject"),
        (("jobs", "a"), "limits"),
        (("jobs", "a", "1/s"), "limits"),
        (("jobs", "a", [7]), "limits"),
        (("jobs", "a", ["1/s"] * 17), "limits"),
        (("jobs", "a", ["1/s", "2/s"]), "limits"),
        (("jobs", "a", ["often"]), "limits"),
        (("jobs", "a", ["1/s"], "magic"), "algorithm"),
        (("jobs", "a", ["1/s"], None, -1), "cost"),
        (("jobs", "a", ["1/s"], None, 1.5), "cost"),
    ],
)
def test_bad_input_names_the_field(sent: tuple[object, ...], field: str) -> None:
    limits = Decider()
    with pytest.raises(BadRequest) as refused:
        limits.sent(*sent)
    assert refused.value.details["field"] == field
    assert not limits._compiled


def test_compiled_limits_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_limits, "MAX_COMPILED", 3)
    limits = Decider()
    first = limits.sent("jobs", "a", ["1/s"])
    for amount in range(2, 6):
        limits.sent("jobs", "a", [f"{amount}/s"])
        assert limits.sent("jobs", "b", ["1/s"]).limits is first.limits  # in use, so it stays
    assert len(limits._compiled) == 3


@given(st.sets(st.text(st.characters(exclude_categories=()), min_size=1, max_size=256), min_size=2, max_size=8))
def test_distinct_subjects_never_share_a_counter(subjects: set[str]) -> None:
    hashed = {counter_subject(subject) for subject in subjects}
    # A subject that looks like the counter of another one is a subject of its own.
    hashed |= {counter_subject(counted) for counted in hashed if len(counted) <= 256}
    assert len(hashed) >= len(subjects)
    assert len({counter_subject(subject) for subject in subjects}) == len(subjects)
    assert all(len(counted) <= 130 for counted in hashed)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "a b"}, "namespace name"),
        ({"limits": ["often"]}, "not understood"),
        ({"algorithm": "magic"}, "algorithm"),
        ({"overrides": [("", ["1/s"])]}, "override subject"),
        ({"overrides": [("a", [])]}, "limit"),
        ({"overrides": [("a", ["1/s"]), ("a", ["2/s"])]}, "two overrides"),
        ({"overrides": [(f"{number}*", ["1/s"]) for number in range(101)]}, "at most 100"),
    ],
)
def test_a_wrong_namespace_is_refused_with_the_remedy(fields: dict[str, object], words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        Namespace.make(**{"name": "emails", **fields})  # type: ignore[arg-type]
