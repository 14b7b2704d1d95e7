"""`limit` on plain functions: whom it counts, what it charges, and what is refused at import."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import Clock
from tidegate import MemoryCounters, PolicyError, RateLimitExceeded, limit
from tidegate.counters.blocking import BlockingMemory
from tidegate.counters.holds import HoldHandle
from tidegate.doors.call_holds import RENEWALS
from tidegate.doors.stores import COUNTERS_VARIABLE, shared_store


def outcomes(call: Callable[[], Any], times: int) -> list[bool]:
    """Whether each of several calls ran."""
    ran = []
    for _ in range(times):
        try:
            call()
        except RateLimitExceeded:
            ran.append(False)
        else:
            ran.append(True)
    return ran


@pytest.fixture
def counters(clock: Clock) -> MemoryCounters:
    return MemoryCounters(clock=clock)


def test_all_calls_of_a_function_count_together_without_a_key(counters: MemoryCounters) -> None:
    @limit("2/minute", counters=counters)
    def work(number: int) -> int:
        """What it does."""
        return number * 2

    assert work(2) == 4
    assert work.__doc__ == "What it does."
    assert work.__name__ == "work"
    assert outcomes(lambda: work(1), 2) == [True, False]


async def test_async_functions(counters: MemoryCounters) -> None:
    @limit("2/minute", key="user", counters=counters)
    async def work(user: str) -> str:
        await asyncio.sleep(0)
        return user

    assert [await work("a"), await work(user="a"), await work("b")] == ["a", "a", "b"]
    with pytest.raises(RateLimitExceeded):
        await work("a")


def test_the_error_says_when_and_how_much(counters: MemoryCounters) -> None:
    @limit("1/minute", counters=counters)
    def work() -> None: ...

    work()
    with pytest.raises(RateLimitExceeded, match="rate limit 1/minute exceeded: try again in") as caught:
        work()
    error = caught.value
    assert (error.status, error.code, error.decision.allowed, error.decision.limit) == (429, "RATE_LIMIT_EXCEEDED", False, 1)
    assert error.retry_after is not None
    assert 0 < error.retry_after <= 120
    assert error.limit_headers["x-ratelimit-limit"] == "1"
    assert int(error.limit_headers["retry-after"]) >= error.retry_after
    assert b'"RATE_LIMIT_EXCEEDED"' in error.body()


def test_a_denied_call_does_not_run(counters: MemoryCounters) -> None:
    ran = []

    @limit("1/minute", counters=counters)
    def work() -> None:
        ran.append(1)

    assert outcomes(work, 3) == [True, False, False]
    assert ran == [1]


def test_methods_of_a_class(counters: MemoryCounters) -> None:
    class Service:
        @limit("1/minute", key="user", counters=counters)
        def work(self, user: str, *, fast: bool = False) -> str:
            return user

        @staticmethod
        @limit("1/minute", key="user", counters=counters)
        def plain(user: str) -> str:
            return user

        @classmethod
        @limit("1/minute", key="user", counters=counters)
        def made(cls, user: str = "nobody") -> str:
            return user

    service = Service()
    assert outcomes(lambda: service.work("a"), 2) == [True, False]
    assert service.work(user="b") == "b"
    assert outcomes(lambda: Service.plain("a"), 2) == [True, False]
    assert outcomes(Service.made, 2) == [True, False]


def test_limits_in_one_text_in_a_list_and_from_a_function(counters: MemoryCounters) -> None:
    assert outcomes(limit("5 per minute; 2/day", counters=counters)(lambda: None), 3) == [True, True, False]
    assert outcomes(limit(["5/minute", "1/day"], counters=counters, scope="list")(lambda: None), 2) == [True, False]

    @limit(lambda plan: {"free": "1/minute", "pro": "2/minute", "own": None}[plan], key="plan", counters=counters)
    def work(plan: str) -> None: ...

    assert outcomes(lambda: work("free"), 2) == [True, False]
    assert outcomes(lambda: work("pro"), 3) == [True, True, False]
    assert outcomes(lambda: work("own"), 5) == [True] * 5


def test_a_limit_of_a_function_that_is_not_understood(counters: MemoryCounters) -> None:
    @limit(lambda: "many", counters=counters)
    def work() -> None: ...

    with pytest.raises(PolicyError, match=r"test_limit\.py:\d+: limit: limit 'many' is not understood"):
        work()


def test_keys_from_functions(counters: MemoryCounters) -> None:
    @limit("1/minute", key=lambda order, **_: order["user"], counters=counters)
    def ship(order: dict[str, str], fast: bool = False) -> None: ...

    assert outcomes(lambda: ship({"user": "a"}, fast=True), 2) == [True, False]
    assert outcomes(lambda: ship({"user": "b"}), 2) == [True, False]


def test_a_key_without_a_value_counts_together(counters: MemoryCounters) -> None:
    @limit("1/minute", key="user", counters=counters)
    def work(user: str | None) -> None: ...

    assert outcomes(lambda: work(None), 2) == [True, False]
    assert outcomes(lambda: work("None"), 1) == [True]


def test_annotations_that_only_type_checkers_know(counters: MemoryCounters) -> None:
    def work(request: Unknown, user: str = "u") -> Unknown:  # type: ignore[name-defined]  # noqa: F821
        return request

    limited = limit("1/minute", key="user", counters=counters)(work)
    assert outcomes(lambda: limited(None), 2) == [True, False]


def test_functions_without_a_signature(counters: MemoryCounters) -> None:
    assert outcomes(limit("1/minute", key=dict.get, counters=counters)(lambda *_: None), 0) == []
    limited = limit("2/minute", key=str, counters=counters)(lambda value: value)
    assert outcomes(lambda: limited("a"), 3) == [True, True, False]
    assert limited("b") == "b"


def test_costs(counters: MemoryCounters) -> None:
    @limit("10/minute", cost=len, counters=counters)
    def insert(rows: list[int]) -> None: ...

    insert([1] * 7)
    assert outcomes(lambda: insert([1] * 4), 1) == [False]
    insert([1] * 3)
    assert outcomes(limit("10/minute", cost=5, counters=counters)(lambda: None), 3) == [True, True, False]


def test_the_cost_of_a_result_is_charged_afterwards(counters: MemoryCounters) -> None:
    @limit("10/minute", cost=lambda result: result["tokens"], counters=counters)
    def complete(tokens: int) -> dict[str, int]:
        return {"tokens": tokens}

    assert complete(4) == {"tokens": 4}
    assert complete(9) == {"tokens": 9}, "the cost is known afterwards: the rest of the limit is charged"
    assert outcomes(lambda: complete(1), 1) == [False]


def test_only_some_results_are_charged(counters: MemoryCounters) -> None:
    @limit("2/minute", key="user", deduct_when=lambda result: result == "wrong password", counters=counters)
    def log_in(user: str, password: str) -> str:
        return "welcome" if password == "secret" else "wrong password"

    assert outcomes(lambda: log_in("a", "secret"), 5) == [True] * 5
    assert outcomes(lambda: log_in("a", "guess"), 3) == [True, True, False]
    assert outcomes(lambda: log_in("a", "secret"), 1) == [False], "a limit that is used up denies in any case"
    assert outcomes(lambda: log_in("b", "secret"), 1) == [True]


def test_a_result_counts_while_its_call_is_in_progress(counters: MemoryCounters) -> None:
    @limit("2/minute", deduct_when=lambda result: result == "wrong password", counters=counters)
    def log_in(parallel: int) -> str:
        if parallel:
            assert outcomes(lambda: log_in(parallel - 1), 1) == [parallel > 1]
        return "wrong password" if parallel else "welcome"

    log_in(2)
    assert counters.open_holds == 0
    assert outcomes(lambda: log_in(0), 1) == [False], "the outer two failed"


def test_slots_of_functions(counters: MemoryCounters) -> None:
    @limit("2 concurrent; 5/minute", counters=counters)
    def work(depth: int) -> int:
        return work(depth - 1) if depth else counters.open_holds

    assert work(1) == 2
    with pytest.raises(RateLimitExceeded) as denied:
        work(2)
    assert (denied.value.decision.limit, denied.value.retry_after) == (2, 1)
    assert counters.open_holds == 0
    assert outcomes(lambda: work(0), 2) == [True, False], "two and two of five: what was denied was not charged"

    @limit("1 concurrent", counters=counters)
    def alone(fails: bool) -> int:
        if fails:
            raise KeyboardInterrupt
        return outcomes(lambda: alone(False), 1).count(False)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            alone(True)
    assert (alone(False), counters.open_holds) == (1, 0)


async def test_slots_of_tasks(counters: MemoryCounters) -> None:
    @limit("2 concurrent", counters=counters)
    async def work(released: asyncio.Event) -> str:
        await released.wait()
        return "done"

    released = asyncio.Event()
    tasks = [asyncio.ensure_future(work(released)) for _ in range(3)]
    await asyncio.sleep(0)
    assert (counters.open_holds, isinstance(tasks[2].exception(), RateLimitExceeded)) == (2, True)
    tasks[0].cancel()
    await asyncio.wait(tasks[:1])
    assert counters.open_holds == 1
    released.set()
    assert (await tasks[1], await work(released), counters.open_holds) == ("done", "done", 0)


async def test_outcomes_of_tasks(counters: MemoryCounters) -> None:
    async def is_wrong(result: str) -> bool:
        return result == "wrong"

    @limit("2/minute", deduct_when=is_wrong, counters=counters)
    async def log_in(result: str) -> str:
        await asyncio.sleep(0)
        return result

    async def answers(*results: str) -> list[bool]:
        found = await asyncio.gather(*map(log_in, results), return_exceptions=True)
        return [not isinstance(each, RateLimitExceeded) for each in found]

    assert await answers("right", "right", "right") == [True, True, False], "two at once"
    assert await answers("wrong") == [True]
    cancelled = asyncio.ensure_future(log_in("wrong"))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    assert await answers("wrong", "wrong") == [True, False], "the one that was cancelled does not count"


def test_slots_beside_a_cost_of_the_result(counters: MemoryCounters) -> None:
    @limit("1 concurrent; 10/minute", cost=lambda result: result, counters=counters)
    def work(cost: int) -> int:
        assert outcomes(lambda: work(1), 1) == [False]
        return cost

    assert [work(4), work(6), counters.open_holds] == [4, 6, 0]
    assert outcomes(lambda: work(1), 1) == [False]


def test_limits_that_a_function_gives_may_have_slots(counters: MemoryCounters) -> None:
    @limit(lambda depth: "1 concurrent" if depth else "5/minute", counters=counters)
    def work(depth: int) -> None:
        if depth:
            work(depth - 1)

    work(1)
    assert outcomes(lambda: work(2), 1) == [False]
    assert counters.open_holds == 0


def test_slots_of_long_calls_are_renewed() -> None:
    class Recording(BlockingMemory):
        def renew_hold_now(self, handle: HoldHandle, ttl_us: int) -> None:
            renewed.append(ttl_us)
            super().renew_hold_now(handle, ttl_us)

    renewed: list[int] = []
    store = Recording()

    @limit("1 concurrent", counters=store)
    def work() -> None:
        begun = time.monotonic()
        RENEWALS.renew_all(begun)
        assert renewed == []
        RENEWALS.renew_all(begun + 30)
        RENEWALS.renew_all(begun + 31)
        RENEWALS.renew_all(begun + 60)

    work()
    assert renewed == [3600_000_000] * 2
    RENEWALS.renew_all(time.monotonic() + 1000)
    assert len(renewed) == 2, "nothing is renewed after the end"


def test_what_slots_do_not_go_with(counters: MemoryCounters) -> None:
    class NeedsLoop:
        """A store that an event loop has to wait for."""

        charge = None

    def refused(match: str, make: Callable[[], object]) -> None:
        with pytest.raises(PolicyError, match=match):
            make()

    def numbers() -> Iterator[int]:
        yield 1

    refused("needs the URL of a store", lambda: limit("1 concurrent", counters=NeedsLoop()))  # type: ignore[arg-type]
    refused("have no effect on it", lambda: limit("1 concurrent", deduct_when=bool, counters=counters))
    refused("a generator has no known end", lambda: limit("1 concurrent", counters=counters)(numbers))
    refused("both count requests in progress", lambda: limit("1 concurrent; 2 concurrent", counters=counters))
    refused("number of requests must be a whole number", lambda: limit("0 concurrent", counters=counters))


def test_exempt_calls_are_not_counted(counters: MemoryCounters) -> None:
    @limit("1/minute", exempt_when=lambda user: user == "admin", counters=counters)
    def work(user: str) -> None: ...

    assert outcomes(lambda: work("admin"), 3) == [True] * 3
    assert outcomes(lambda: work("a"), 2) == [True, False]


def test_functions_of_one_scope_count_together(counters: MemoryCounters) -> None:
    shared = limit("2/minute", scope="mail", counters=counters)

    @shared
    def send() -> None: ...

    @shared
    def forward() -> None: ...

    @limit("2/minute", counters=counters)
    def other() -> None: ...

    send()
    forward()
    assert outcomes(send, 1) == [False]
    assert outcomes(other, 1) == [True]


def test_several_limits_on_one_function(counters: MemoryCounters) -> None:
    @limit("3/minute", key="user", counters=counters)
    @limit("4/minute", counters=counters)
    def work(user: str) -> None: ...

    assert outcomes(lambda: work("a"), 4) == [True, True, True, False]
    assert outcomes(lambda: work("b"), 2) == [True, False]


def test_what_happens_at_a_denial(counters: MemoryCounters) -> None:
    noticed = []

    @limit("1/minute", on_exceeded=lambda decision: f"later: {decision.limit}", counters=counters)
    def instead() -> str:
        return "now"

    @limit("1/minute", on_exceeded=noticed.append, error_message="slow down", counters=counters)
    def noted() -> None: ...

    @limit("1/minute", error_message=lambda user: f"{user}, slow down", counters=counters)
    def named(user: str) -> None: ...

    assert [instead(), instead()] == ["now", "later: 1"]
    noted()
    with pytest.raises(RateLimitExceeded, match=r"^slow down$"):
        noted()
    assert [decision.allowed for decision in noticed] == [False]
    named("a")
    with pytest.raises(RateLimitExceeded, match=r"^a, slow down$"):
        named("a")


async def test_functions_given_to_an_async_function_may_be_async(counters: MemoryCounters) -> None:
    async def plan_of(user: str) -> str:
        await asyncio.sleep(0)
        return "2/minute"

    async def own(user: str) -> str:
        return user

    @limit(plan_of, key=own, counters=counters)
    async def work(user: str) -> None: ...

    await work("a")
    await work("a")
    with pytest.raises(RateLimitExceeded):
        await work("a")
    await work("b")


def test_threads_count_exactly() -> None:
    @limit("100/day", counters="memory://")
    def work() -> None: ...

    ran: list[bool] = []
    threads = [threading.Thread(target=lambda: ran.extend(outcomes(work, 60))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ran.count(True) == 100


def test_a_function_on_an_event_loop_and_one_in_threads_share_a_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COUNTERS_VARIABLE, "memory://")

    @limit("2/day", scope="both kinds")
    def blocking() -> None: ...

    @limit("2/day", scope="both kinds")
    async def asynchronous() -> None: ...

    blocking()
    asyncio.run(asynchronous())
    assert outcomes(blocking, 1) == [False]
    assert shared_store(None) is shared_store("async+memory://")


def at_import(make: Callable[[], Any]) -> str:
    with pytest.raises(PolicyError) as caught:
        make()
    assert caught.value.file == __file__
    assert caught.value.line is not None
    assert str(caught.value).startswith(f"{__file__}:{caught.value.line}: limit")
    return str(caught.value)


async def asynchronous_key() -> str:
    return "a"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: limit("5/fortnight"), "unknown unit 'fortnight'"),
        (lambda: limit(""), "limits must be a text"),
        (lambda: limit([]), "limits must be a text"),
        (lambda: limit(5), "limits must be a text"),  # type: ignore[arg-type]
        (lambda: limit(["5/minute", "6/minute"]), "the same window"),
        (lambda: limit("5/minute", algorithm="gcra"), "algorithm 'gcra' is not known"),
        (lambda: limit("5/minute", key=5), "key 5 is not valid"),  # type: ignore[arg-type]
        (lambda: limit("5/minute", cost=0), "cost 0 must be"),
        (lambda: limit("5/minute", cost="2"), "cost '2' must be"),  # type: ignore[arg-type]
        (lambda: limit("5/minute", methods=[]), "methods is empty"),
        (lambda: limit("5/minute", methods=["G T"]), "methods has 'G T'"),
        (lambda: limit("5/minute", exempt_when=True), "exempt_when True is not valid"),  # type: ignore[arg-type]
        (lambda: limit("5/minute", scope=""), "scope '' must be"),
        (lambda: limit("5/minute", counters="mongodb://x"), "scheme 'mongodb': Tidegate counts in Redis or in memory"),
        (lambda: limit("5/minute", counters="localhost:6379"), "counters must be a URL"),
        (lambda: limit("5/minute", counters="redis://h1,h2"), "names several servers"),
        (lambda: limit("5/minute", trusted_proxies=["nonsense"]), "trusted_proxies has 'nonsense'"),
        (lambda: limit("5/minute", on_failure="retry"), "on_failure 'retry' is not known"),
        (lambda: limit("5/minute")("not a function"), "write @limit('100/minute') with parentheses"),
        (lambda: limit("5/minute")(staticmethod(at_import)), "below @staticmethod"),
        (lambda: limit("5/minute", key=asynchronous_key)(lambda: None), "key is async, but the function is not"),
    ],
)
def test_mistakes_fail_at_import_with_the_place(make: Callable[[], Any], expected: str) -> None:
    assert expected in at_import(make)


def test_a_key_that_the_function_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.doors.limit.loaded", lambda module: None)

    def work(user: str) -> None: ...

    for key in ("ip", "person", "api_key", "header:X-User"):
        message = at_import(lambda key=key: limit("5/minute", key=key)(work))
        assert f"limit of {__name__}.test_a_key_that_the_function_cannot_have.<locals>.work: key {key!r} needs" in message


@pytest.mark.parametrize("cost", [-1, 1.5, None, "1"])
def test_a_function_that_gives_no_cost(counters: MemoryCounters, cost: Any) -> None:
    @limit("5/minute", cost=lambda: cost, counters=counters)
    def work() -> None: ...

    with pytest.raises(Exception, match=r"test_limit\.py:\d+: the function given as cost returned"):
        work()
