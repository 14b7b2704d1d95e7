"""What a drill's table says, computed from what clients saw: gaps, recovery, percentiles, units above and below the limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Final

from drills.admissions import Admission
from drills.check_load import Seen

QUIET_S: Final = 2.0
Wanted = Callable[[Seen], bool]


def percentile_ms(seen: Iterable[Seen], quantile: float) -> float:
    """A quantile of how long answers took, by the nearest rank.

    Args:
        seen: checks; failed ones do not count.
        quantile: 0 to 1.

    Returns:
        ms; 0 where there was no answer.
    """
    latencies = sorted(each.latency_s for each in seen if each.failure is None)
    if not latencies:
        return 0.0
    # The smallest that so large a part does not exceed; ceil in whole numbers, as 0.99 * 100 is a little more than 99.
    rank = -(-len(latencies) * round(quantile * 10_000) // 10_000)
    return latencies[max(rank, 1) - 1] * 1000


def bucket_percentile_ms(counts: Mapping[float, int], quantile: float) -> float:
    """A quantile of a histogram: within a bucket, observations are taken to lie evenly, as Prometheus does.

    Args:
        counts: how many were no longer than so many s; the last of them is infinite.
        quantile: 0 to 1.

    Returns:
        ms; 0 where the histogram is empty; the last finite bound where the quantile lies above it.
    """
    bounds = sorted(counts)
    rank = quantile * counts[bounds[-1]] if bounds else 0.0
    below_s, below = 0.0, 0
    for bound in bounds:
        if rank and counts[bound] >= rank:
            inside = below_s if bound == float("inf") else below_s + (bound - below_s) * (rank - below) / (counts[bound] - below)
            return inside * 1000
        below_s, below = bound, counts[bound]
    return 0.0


def between(seen: Iterable[Seen], since_s: float, until_s: float) -> list[Seen]:
    """Checks that were sent in a span of time.

    Args:
        since_s: its first moment, s since the start.
        until_s: its end, which does not belong to it.
    """
    return [each for each in seen if since_s <= each.at_s < until_s]


def longest_gap_s(seen: Iterable[Seen], began_s: float = 0.0, ended_s: float | None = None) -> float:
    """The longest time in which no check was answered.

    Args:
        seen: checks of the whole run.
        began_s: when the first one was due, s since the start.
        ended_s: when the load ended; silence before it counts. None: with the last answer.

    Returns:
        s.
    """
    moments = [began_s, *sorted(each.end_s for each in seen if each.failure is None)]
    if ended_s is not None:
        moments.append(max(ended_s, moments[-1]))
    return max((after - before for before, after in pairwise(moments)), default=0.0)


def recovery_s(seen: Iterable[Seen], event_s: float, is_bad: Wanted) -> float | None:
    """From the event until it is over: the last bad answer before 2 s without any.

    A busy machine lets a check miss its deadline now and then; such strays, long after, are not of the event.

    Args:
        seen: checks of the whole run.
        event_s: when it happened, s since the start.
        is_bad: what counts as bad.

    Returns:
        s; 0 where nothing bad came within 2 s of the event; None where no 2 s without a bad answer came before the end.
    """
    ordered = sorted((each for each in seen if each.end_s >= event_s), key=lambda each: each.end_s)
    last_bad_s = event_s
    for each in ordered:
        if each.end_s - last_bad_s >= QUIET_S:
            return last_bad_s - event_s
        if is_bad(each):
            last_bad_s = each.end_s
    return None


def over_admitted(admitted: Mapping[str, int], limit: int) -> int:
    """Units above the limit, all subjects together.

    Args:
        admitted: units by subject.
    """
    return sum(max(units - limit, 0) for units in admitted.values())


def under_admitted(asked: Mapping[str, int], admitted: Mapping[str, int], limit: int) -> int:
    """Units that were asked for, that the limit had room for, and that were not admitted; all subjects together.

    Args:
        asked: units by subject.
        admitted: units by subject.
    """
    return sum(max(min(units, limit) - admitted.get(subject, 0), 0) for subject, units in asked.items())


def under_in_windows(answers: Iterable[Admission], limit: int, window_us: int) -> tuple[int, int]:
    """As `under_admitted` for windows that end meanwhile, as fixed windows do; of whole windows alone.

    An answer belongs to the window in which it came: one sent before a window's end and admitted after it is the next one's,
    where the limit was met before the end.

    Args:
        answers: of one limit of one rule.
        limit: of each window.
        window_us: its length, µs; windows begin at multiples of it since the epoch.

    Returns:
        Units not admitted, all subjects and windows together; and how many windows of subjects were looked at.
    """
    asked: Counter[tuple[str, int]] = Counter()
    admitted: Counter[tuple[str, int]] = Counter()
    for answer in answers:
        window = answer.subject, answer.to_us // window_us
        asked[window] += answer.cost
        admitted[window] += answer.cost if answer.allowed else 0
    if not asked:
        return 0, 0
    numbers = {number for _, number in asked}
    first, last = min(numbers), max(numbers)  # neither is whole
    whole = [window for window in asked if first < window[1] < last]
    return sum(max(min(asked[window], limit) - admitted[window], 0) for window in whole), len(whole)


def asked_of(seen: Iterable[Seen], rule: str) -> Counter[str]:
    """Checks by subject.

    Args:
        seen: checks.
    """
    return Counter(each.ip for each in seen if each.rule == rule)


def admitted_of(seen: Iterable[Seen], rule: str) -> Counter[str]:
    """Admitted checks by subject.

    Args:
        seen: checks.
    """
    return Counter(each.ip for each in seen if each.rule == rule and each.allowed)


def uncounted(admitted: Mapping[str, int], counted: Mapping[str, int]) -> int:
    """Units that were admitted and that Redis does not know; all subjects together.

    Args:
        admitted: by subject.
        counted: by subject.
    """
    return sum(max(units - counted.get(subject, 0), 0) for subject, units in admitted.items())
