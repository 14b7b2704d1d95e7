"""Requests in time order, in bounded memory."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from tidegate.tools.simulate.log_formats import Request
from tidegate.tools.simulate.time_order import TimeOrder


def request(at_us: int, ip: str = "10.0.0.1", path: str = "/") -> Request:
    return Request(at_us, ip, "GET", path, ip, "")


def ordered(requests: list[Request], window_s: int = 120, most: int = 1_000) -> tuple[list[Request], TimeOrder]:
    emitted: list[Request] = []
    order = TimeOrder(emitted.append, window_s, most)
    for each in requests:
        order.add(each)
    order.finish()
    return emitted, order


@given(
    st.lists(st.tuples(st.integers(0, 600_000_000), st.sampled_from("abc"), st.integers(0, 60_000_000)), max_size=60),
)
def test_whatever_is_shuffled_within_the_window_comes_sorted(drawn: list[tuple[int, str, int]]) -> None:
    # A log is written when requests end: each line stands as much too late as its request took, here up to a minute.
    written = [request(at, ip) for at, ip, took in sorted(drawn, key=lambda each: each[0] + each[2])]
    emitted, order = ordered(written, window_s=60)
    assert emitted == sorted(written)
    assert order.late == 0
    latest = [max(each.at_us for each in written[: number + 1]) for number in range(len(written))]
    assert order.out_of_order == sum(each.at_us < before for each, before in zip(written, latest, strict=True))


@given(st.lists(st.integers(0, 300_000_000), max_size=80), st.integers(0, 30), st.integers(1, 20))
def test_nothing_is_lost_or_held_beyond_the_bound(times: list[int], window_s: int, most: int) -> None:
    emitted: list[Request] = []
    order = TimeOrder(emitted.append, window_s, most)
    for number, at_us in enumerate(times, 1):
        order.add(request(at_us))
        assert number - len(emitted) <= most
    order.finish()
    assert sorted(each.at_us for each in emitted) == sorted(times)
    descents = sum(after.at_us < before.at_us for before, after in itertools.pairwise(emitted))
    assert descents <= 2 * order.late <= 2 * order.out_of_order


def test_a_line_later_than_the_window_comes_at_once_and_is_counted() -> None:
    emitted: list[Request] = []
    order = TimeOrder(emitted.append, 10, 1_000)
    for second in (100, 105, 120):
        order.add(request(second * 1_000_000))
    assert [each.at_us for each in emitted] == [100_000_000, 105_000_000]
    order.add(request(110_000_000))  # exactly the window: still in time
    order.add(request(109_999_999))
    assert emitted[-1].at_us == 109_999_999
    order.finish()
    assert [each.at_us for each in emitted[-2:]] == [110_000_000, 120_000_000]
    assert (order.out_of_order, order.late) == (2, 1)


def test_a_flood_within_one_second_stays_within_the_bound() -> None:
    emitted: list[Request] = []
    order = TimeOrder(emitted.append, 120, 100)
    for number in range(10_000):
        order.add(request(5_000_000, str(number)))
        assert number + 1 - len(emitted) <= 100
    order.finish()
    assert len(emitted) == 10_000
    assert order.late == 0


def test_long_paths_weigh_more() -> None:
    emitted: list[Request] = []
    order = TimeOrder(emitted.append, 10_000, 1_000)
    most = 0
    for second in range(1_000):
        order.add(request(second * 1_000_000, path="/" + "a" * 8_000))
        most = max(most, second + 1 - len(emitted))
    assert most <= 1_000 * 256 // 8_000
    order.finish()
    for second in range(1_000, 1_900):
        order.add(request(second * 1_000_000))
    assert len(emitted) == 1_000, "what was emitted weighs no more"


def test_a_line_from_the_far_future_does_not_stop_the_clock() -> None:
    requests = [request(second * 1_000_000) for second in range(100)]
    requests.insert(50, request(90_000_000_000_000_000))
    emitted, order = ordered(requests)
    assert emitted[-1].at_us == 90_000_000_000_000_000
    assert [each.at_us for each in emitted[:-1]] == sorted(each.at_us for each in requests if each.at_us < 10**9)
    assert order.late == 50


def test_equal_times_have_one_order() -> None:
    requests = [request(1_000_000, str(number)) for number in range(50)]
    shuffled = requests[:]
    random.Random(1).shuffle(shuffled)
    assert ordered(shuffled)[0] == ordered(requests)[0]
