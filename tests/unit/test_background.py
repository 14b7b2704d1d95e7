"""Background tasks that fail are logged, counted, restarted, and visible in the health report."""

from __future__ import annotations

import asyncio
import logging

import pytest

from tests.moments import until
from tidegate.background import FIRST_PAUSE_S, MAX_PAUSE_S, SETTLED_S, TaskSupervisor, stop
from tidegate.telemetry.health import Health


class Work:
    """Fails so often, then runs until it is cancelled."""

    def __init__(self, *failures: BaseException | None) -> None:
        self.failures = list(failures)
        self.starts = 0
        self.cancelled = False

    async def __call__(self) -> None:
        self.starts += 1
        if self.failures:
            failure = self.failures.pop(0)
            if failure is None:
                return
            raise failure
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


async def test_failure_is_logged_counted_and_restarted(caplog: pytest.LogCaptureFixture) -> None:
    supervisor = TaskSupervisor()
    work = Work(ValueError("broken"))
    task = supervisor.start("one", work)
    assert supervisor.failures == {"one": 0}, "there from the beginning, so that the first failure is a rise"
    await until(lambda: work.starts == 2)
    assert supervisor.failures == {"one": 1}
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "background task one failed, restarting" in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)
    await stop(task)
    assert work.cancelled
    assert task.cancelled()


@pytest.mark.parametrize("failure", [None, asyncio.CancelledError()], ids=["it returns", "what it waits for is cancelled"])
async def test_what_ends_without_an_exception_is_restarted_too(failure: BaseException | None) -> None:
    supervisor = TaskSupervisor()
    work = Work(failure)
    task = supervisor.start("one", work)
    await until(lambda: work.starts == 2)
    assert supervisor.failures == {"one": 1}
    await stop(task)


async def test_a_deadline_inside_the_work_is_no_cancellation_of_it() -> None:
    supervisor = TaskSupervisor()
    rounds = 0

    async def work() -> None:
        nonlocal rounds
        while True:
            try:
                async with asyncio.timeout(0):
                    await asyncio.sleep(1000)
            except TimeoutError:
                rounds += 1
            if rounds == 3:
                raise ValueError("after deadlines")

    task = supervisor.start("one", work)
    await until(lambda: supervisor.failures["one"] == 1)
    await stop(task)
    assert task.cancelled()


async def test_pauses_double_up_to_the_longest_and_begin_anew_once_settled(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0

    async def pause(_: float) -> None:
        await asyncio.sleep(0)

    async def work() -> None:
        nonlocal now
        if supervisor.failures["one"] == 9:
            now += SETTLED_S
        raise ValueError

    supervisor = TaskSupervisor(lambda: now, pause)
    task = supervisor.start("one", work)
    await until(lambda: supervisor.failures["one"] >= 10)
    await stop(task)
    said = [float(record.getMessage().split()[-2]) for record in caplog.records[:10]]
    assert said == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, MAX_PAUSE_S, MAX_PAUSE_S, MAX_PAUSE_S, 0.1]


async def test_health_shows_a_failing_task_until_it_has_settled() -> None:
    now = 100.0
    supervisor = TaskSupervisor(lambda: now)
    health = Health(supervisor.failing)
    work = Work(ValueError("broken"))
    task = supervisor.start("one", work)
    other = supervisor.start("one", Work())
    await until(lambda: work.starts == 2)
    report = await health.report()
    assert report.status == report.components["rate_limiter"].status == "unhealthy"
    assert "one (ValueError)" in (report.components["rate_limiter"].reason or "")
    now += FIRST_PAUSE_S + SETTLED_S
    assert (await health.report()).status == "healthy"
    await stop(task, other)


async def test_a_failing_task_that_is_stopped_is_no_longer_failing() -> None:
    supervisor = TaskSupervisor()
    work = Work(ValueError("broken"))
    task = supervisor.start("one", work)
    await until(lambda: work.starts == 2)
    assert supervisor.failing()
    await stop(task)
    assert supervisor.failing() == []


async def test_stop_takes_tasks_that_never_began_and_none() -> None:
    work = Work()
    task = TaskSupervisor().start("one", work)
    await stop(task, None)
    assert task.cancelled()
    assert work.starts == 0
