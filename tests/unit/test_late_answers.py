"""What an instance admits at a deadline, and what becomes of the answers that come later."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from tidegate.counters import Charge, LateAnswer
from tidegate.counters.late_answers import MAX_PREPAID, LateAnswers
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import Algorithm, Limit, LimitSet

LIMITS = LimitSet("l", Algorithm.FIXED_WINDOW, [Limit.parse("40/day")])
AT_US = 1_700_000_000_000_000
ChargeResult = tuple[bool, "Decision | StoreUnavailable"]


class Made:
    """Late answers with a clock that is set, and what was settled."""

    def __init__(self) -> None:
        self.now_us = 1_000_000_000
        self.settled: list[ChargeResult] = []
        self.late = LateAnswers(lambda: self.now_us, lambda _c, admitted, _a, answer: self.settled.append((admitted, answer)))

    def wait(self, charge: Charge, admitted: bool) -> asyncio.Future[Decision]:
        answer: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self.late.track(charge, LateAnswer("late", answer), admitted, self.now_us)
        return answer


def charge(cost: int = 1, limits: LimitSet = LIMITS, subject: str = "s") -> Charge:
    return Charge(((limits, subject),), cost)


def said(allowed: bool, remaining: int = 30, limits: LimitSet = LIMITS) -> Decision:
    return Decision(allowed, limits.limits[0], remaining, 3_600_000_000, 0 if allowed else 60_000_000, AT_US, limits)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def admitted_of(made: Made, instances: int) -> int:
    """How many in a row are admitted while nothing is answered."""
    count = 0
    while made.late.may_admit(charge(), instances):
        made.wait(charge(), True)
        count += 1
    return count


@pytest.mark.parametrize(
    ("remaining", "instances", "most"),
    [(None, 1, 20), (None, 3, 3), (None, 50, 1), (19, 3, 3), (16, 3, 2), (10, 3, 0), (0, 3, 0), (30, 3, 6), (7, 1, 7), (0, 1, 0)],
)
async def test_what_is_admitted_is_a_share_of_what_remains_above_the_reserve(
    remaining: int | None, instances: int, most: int
) -> None:
    made = Made()
    if remaining is not None:
        made.late.observe(charge().counters, said(True, remaining))
    assert admitted_of(made, instances) == most
    await made.late.close(0)


async def test_what_was_heard_of_an_earlier_window_does_not_count() -> None:
    made = Made()
    made.late.observe(charge().counters, said(True, 0))
    assert not made.late.may_admit(charge(), 3)
    made.now_us += 3_600_000_000
    assert made.late.may_admit(charge(), 3)


async def test_an_answer_ends_what_is_outstanding() -> None:
    made = Made()
    answers = [made.wait(charge(), True) for _ in range(3)]
    assert not made.late.may_admit(charge(), 3)
    answers[0].set_result(said(True, 30))
    await settle()
    assert made.settled == [(True, said(True, 30))]
    assert made.late.may_admit(charge(), 3), "20 above the reserve, of which 6 are this one's; 2 are outstanding"
    answers[1].set_exception(StoreUnavailable("gone", reason="disconnected"))
    answers[2].set_result(said(False, 0))
    await settle()
    assert made.late.answers == {"allowed": 1, "denied": 1, "lost": 1}
    assert not made.late.may_admit(charge(), 3), "nothing remains"
    assert not made.late._outstanding


async def test_what_was_charged_for_nobody_serves_one_check_of_the_same_cost_within_its_window() -> None:
    made = Made()
    for _ in range(2):
        made.wait(charge(2), False).set_result(said(True))
    await settle()
    assert made.late.take_prepaid(charge(1)) is None
    assert made.late.take_prepaid(charge(2, subject="t")) is None
    assert made.late.take_prepaid(charge(2)) == said(True)
    made.now_us += 1_000_000
    assert made.late.take_prepaid(charge(2)) is None, "a second is over"
    assert not made.late.prepaid
    assert made.late.used == 1


@pytest.mark.parametrize("algorithm", [Algorithm.SLIDING_LOG, Algorithm.TOKEN_BUCKET, Algorithm.LEAKY_BUCKET])
async def test_algorithms_without_windows_keep_nothing_for_later(algorithm: Algorithm) -> None:
    made = Made()
    limits = LimitSet("l", algorithm, [Limit.parse("40/day")])
    made.wait(charge(1, limits), False).set_result(said(True, 30, limits))
    await settle()
    assert made.late.take_prepaid(charge(1, limits)) is None


async def test_a_window_that_is_about_to_end_ends_what_was_paid_in_it() -> None:
    made = Made()
    answer = Decision(True, LIMITS.limits[0], 30, 10, 0, 86_400_000_000 * 20_000 - 300_000, LIMITS)
    made.wait(charge(), False).set_result(answer)
    await settle()
    made.now_us += 299_999
    assert made.late.prepaid
    made.now_us += 1
    assert made.late.take_prepaid(charge()) is None


async def test_what_is_paid_and_heard_is_bounded_and_swept() -> None:
    made = Made()
    for number in range(MAX_PREPAID + 50):
        made.late._keep_prepaid(charge(subject=f"s{number}"), said(True))
    assert len(made.late.prepaid) == MAX_PREPAID
    made.now_us += 1_000_000
    made.late.sweep()
    assert not made.late.prepaid


async def test_what_has_not_come_at_the_end_is_lost() -> None:
    made = Made()
    made.wait(charge(), True)
    await settle()
    await made.late.close(0)
    assert [(admitted, type(answer)) for admitted, answer in made.settled] == [(True, StoreUnavailable)]


async def test_what_others_use_until_the_deadline_is_kept_back() -> None:
    """Four units a second are used: within two seconds, eight, and as many for safety."""
    made = Made()
    made.late.observe(charge().counters, said(True, 19))
    assert made.late.may_admit(charge(), 3)
    made.now_us += 1_000_000
    made.late.observe(charge().counters, msgspec.structs.replace(said(True, 15), at_us=AT_US + 1_000_000))
    assert made.late.may_admit(charge(), 3)
    made.now_us += 2_000_000
    assert not made.late.may_admit(charge(), 3)
    assert made.late.may_admit(charge(), 1), "a single instance knows all that is used"
    made.late.observe(charge().counters, said(True, 19))
    assert not made.late.may_admit(charge(), 3), "an older answer that comes later says nothing new"


async def test_what_remained_is_known_until_its_window_ends() -> None:
    made = Made()
    sliding = LimitSet("l", Algorithm.SLIDING_WINDOW, [Limit.parse("40/minute")])
    bucket = LimitSet("l", Algorithm.TOKEN_BUCKET, [Limit.parse("40/minute")])
    for limits in (sliding, bucket):
        made.late.observe(charge(limits=limits).counters, said(True, 7, limits))
    into_us = AT_US % 60_000_000
    made.now_us += 60_000_000 - into_us - 1
    assert made.late.remaining(charge(limits=sliding).counters) == 7
    assert made.late.remaining(charge(limits=bucket).counters) is None, "a bucket fills all the time"
    made.now_us += 1
    assert made.late.remaining(charge(limits=sliding).counters) is None


async def test_one_answer_alone_is_used_for_a_moment_only() -> None:
    made = Made()
    made.late.observe(charge().counters, said(True, 19))
    assert made.late.may_admit(charge(), 3)
    made.now_us += 200_001
    assert not made.late.may_admit(charge(), 3), "nobody knows how fast the others use it up"
    assert made.late.may_admit(charge(), 1)
    made.late.observe(charge().counters, msgspec.structs.replace(said(True, 19), at_us=AT_US + 200_000))
    assert made.late.may_admit(charge(), 3)
    made.now_us += 10_000_000
    assert not made.late.may_admit(charge(), 3), "that nothing was used in 0.2 s says little of 10 s"
    for number in range(1, 8):
        made.late.observe(charge().counters, msgspec.structs.replace(said(True, 19), at_us=AT_US + number * 10_000_000))
        made.now_us += 10_000_000
    assert made.late.may_admit(charge(), 3), "nothing was used in 10 s, again and again"
    made.late.observe(charge(subject="leased").counters, said(True, 30))
    made.now_us += 10_000_000
    assert made.late.may_admit(charge(subject="leased"), 3), "half of the limit remained"


async def test_what_leases_decided_since_the_answer_is_kept_back_for_each_other_instance() -> None:
    made = Made()
    made.late.observe(charge().counters, said(True, 30))
    assert made.late.may_admit(charge(), 3, leased=3)
    assert not made.late.may_admit(charge(), 3, leased=4), "30 - 2 * 2 * 4 leave four for each, and four were used"
    assert made.late.may_admit(charge(), 1, leased=0)


async def test_an_old_answer_and_few_units_of_leases_say_little_of_what_the_others_used() -> None:
    made = Made()
    made.late.observe(charge().counters, said(True, 39))
    assert made.late.may_admit(charge(9), 3)
    made.now_us += 200_001
    assert made.late.may_admit(charge(3), 3), "nothing is leased: (20 - 10) / 3"
    assert not made.late.may_admit(charge(4), 3), "it shows no rate: half of the limit may be left"
    assert made.late.may_admit(charge(2), 3, leased=0), "(20 - 2 * 2 * 3) / 3"
    assert not made.late.may_admit(charge(3), 3, leased=0)
    assert not made.late.may_admit(charge(), 3, leased=1), "2 * 2 * 6 may be used"
