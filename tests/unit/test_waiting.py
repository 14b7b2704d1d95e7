"""`wait` and `reserve` of both limiters: in order, with one call of the store, and nothing charged for who gives up."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from tests.model.virtual_time import VirtualLoop
from tidegate import BadRequest, Limiter, MemoryCounters, SyncLimiter


class Counted(MemoryCounters):
    """Counts its calls."""

    calls = 0

    def charge_one(self, *arguments: Any) -> Any:
        self.calls += 1
        return super().charge_one(*arguments)

    async def reserve(self, *arguments: Any) -> Any:
        self.calls += 1
        return await super().reserve(*arguments)


def run(make: Any) -> Any:
    """Run a coroutine of (loop, store, limiter) in an event loop in which waiting takes no time."""
    loop = VirtualLoop()
    store = Counted(clock=loop.now_us)
    limiter = Limiter("10/second burst 1", algorithm="token_bucket", counters=store)
    coroutine: Coroutine[Any, Any, Any] = make(loop, store, limiter)
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


def test_callers_pass_in_order_with_one_call_of_the_store_each() -> None:
    async def main(loop: VirtualLoop, store: Counted, limiter: Limiter) -> None:
        passed: list[int] = []
        began = loop.time()

        async def job(number: int) -> None:
            assert (await limiter.wait("job", at_most_s=600)).allowed
            assert loop.time() - began >= number / 10, "not before its moment"
            passed.append(number)

        await asyncio.gather(*(job(number) for number in range(160)))
        assert passed == list(range(160))
        assert 15.9 <= loop.time() - began < 16
        assert store.calls == 160

    run(main)


def test_an_algorithm_without_reservations_is_checked_in_turns() -> None:
    async def main(loop: VirtualLoop, store: Counted, _: Limiter) -> None:
        limiter = Limiter("2/second", algorithm="sliding_log", counters=store)
        passed: list[int] = []

        async def job(number: int) -> None:
            assert (await limiter.wait("job", at_most_s=600)).allowed
            passed.append(number)

        await asyncio.gather(*(job(number) for number in range(20)))
        assert passed == list(range(20))
        assert store.calls <= 2 * 20
        assert len(limiter._waiting.turns) == 0
        with pytest.raises(BadRequest, match=r"'sliding_log' gives no reservations; use .*`wait`"):
            await limiter.reserve("job", at_most_s=1)

    run(main)


def test_a_reservation_is_seen_by_checks_and_can_be_cancelled() -> None:
    async def main(loop: VirtualLoop, store: Counted, limiter: Limiter) -> None:
        first = await limiter.reserve("job", at_most_s=0)
        assert (first.allowed, first.wait_s, await limiter.cancel(first)) == (True, 0, False), "it may go: nothing to cancel"
        second = await limiter.reserve("job", at_most_s=10)
        third = await limiter.reserve("job", at_most_s=10)
        assert [second.wait_s, third.wait_s] == [0.1, 0.2]
        assert (third.at - second.at).total_seconds() == 0.1
        denied = await limiter.reserve("job", at_most_s=0.2)
        assert (denied.allowed, denied.decision.retry_after, denied.wait_s) == (False, 0.3, 0)
        assert (await limiter.check("job")).retry_after == 0.3
        assert await limiter.cancel(third)
        assert (await limiter.reserve("job", at_most_s=10)).at == third.at
        await asyncio.sleep(0.15)
        assert not await limiter.cancel(second), "its moment has passed"

    run(main)


def test_who_cannot_pass_in_time_is_denied_and_charged_nothing() -> None:
    async def main(loop: VirtualLoop, store: Counted, limiter: Limiter) -> None:
        began = loop.time()
        assert (await limiter.wait("job", at_most_s=0)).allowed
        denied = await limiter.wait("job", at_most_s=0.05)
        assert (denied.allowed, denied.retry_after, loop.time()) == (False, 0.1, began), "at once"
        assert (await limiter.wait("job", 5, at_most_s=600)).retry_after is None, "it never passes"
        slow = [asyncio.ensure_future(limiter.wait("job", at_most_s=seconds)) for seconds in (10, 0.02, 10)]
        await asyncio.sleep(0.05)
        slow[0].cancel()
        answers = await asyncio.gather(*slow, return_exceptions=True)
        assert isinstance(answers[0], asyncio.CancelledError)
        assert [getattr(each, "allowed", None) for each in answers[1:]] == [False, True]
        assert len(limiter._waiting.turns) == 0
        assert loop.time() - began < 0.3, "who was cancelled was charged nothing"

    run(main)


@pytest.mark.parametrize("at_most_s", [-1, math.nan])
def test_a_time_that_makes_no_sense(at_most_s: float) -> None:
    with SyncLimiter("1/day") as blocking:
        with pytest.raises(BadRequest, match="at_most_s"):
            blocking.wait("u", at_most_s=at_most_s)
        with pytest.raises(BadRequest, match="at_most_s"):
            asyncio.run(Limiter("1/day").wait("u", at_most_s=at_most_s))
        with pytest.raises(BadRequest, match="at_most_s"):
            blocking.reserve("u", at_most_s=at_most_s)


def test_threads() -> None:
    with SyncLimiter("50/second burst 1", algorithm="token_bucket") as limiter:
        place = limiter.reserve("other", at_most_s=0)
        assert (place.wait_s, limiter.reserve("other", at_most_s=0).allowed) == (0, False)
        assert limiter.cancel(limiter.reserve("other", at_most_s=600))
        allowed: list[bool] = []
        threads = [threading.Thread(target=lambda: allowed.append(limiter.wait("job", at_most_s=600).allowed)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert allowed == [True] * 8
