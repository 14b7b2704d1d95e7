"""CPU time of one thread: for bounds on work that hold however busy the machine is.

Other processes do not count, but they share caches and cores, so one measurement may be several times too large and none is too
small. The best of several tries is compared, and measuring ends with the first one that is good enough.
"""

from __future__ import annotations

import time
from collections.abc import Callable

TRIES = 5


def cpu_s(work: Callable[[], object]) -> float:
    """CPU time of this thread that one call takes, s."""
    began_ns = time.thread_time_ns()
    work()
    return (time.thread_time_ns() - began_ns) / 1e9


def assert_cpu_below(bound_s: float, work: Callable[[], object]) -> None:
    """Assert that a call takes less than a bound, at its best.

    Args:
        bound_s: of CPU time, s; a hundred times what the call takes, and far below what the wrong complexity takes.
        work: called up to `TRIES` times.
    """
    taken_s: list[float] = []
    for _ in range(TRIES):
        taken_s.append(cpu_s(work))
        if taken_s[-1] < bound_s:
            return
    raise AssertionError(f"{min(taken_s):.3f} s of CPU time, at the best of {TRIES}: not below {bound_s} s")


def assert_growth_below(factor: float, cost_s: Callable[[int], float], small: int, large: int) -> None:
    """Assert that a cost at a large size is less than a multiple of the cost at a small one, at the best of both.

    Args:
        factor: far from the ratio of the right complexity and from that of a wrong one, on a scale of logarithms.
        cost_s: measures the CPU time at a size, s; called up to `TRIES` times for each size.
        small: the small size.
        large: the large size.
    """
    cost_s(small)  # what is done once for all, such as imports, is no part of it
    least_s = {small: float("inf"), large: float("inf")}
    for _ in range(TRIES):
        for size in least_s:
            least_s[size] = min(least_s[size], cost_s(size))
        if least_s[large] < factor * least_s[small]:
            return
    raise AssertionError(
        f"{least_s[large]:.6f} s of CPU time at {large:,} and {least_s[small]:.6f} s at {small:,}: "
        f"{least_s[large] / least_s[small]:.1f} times as much, not below {factor:g} times"
    )
