"""A coroutine without a task: it is resumed by what it awaits, in its own context, and gets results and exceptions alike."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar

import pytest

from tidegate.doors.continuation import Continuation

NAME: ContextVar[str] = ContextVar("name", default="")


async def test_it_runs_at_once_until_it_waits_and_then_with_what_came() -> None:
    loop = asyncio.get_running_loop()
    first: asyncio.Future[int] = loop.create_future()
    second: asyncio.Future[int] = loop.create_future()
    steps: list[object] = []

    async def run() -> None:
        NAME.set("inside")
        steps.append("began")
        steps.append(await first)
        await asyncio.sleep(0)
        try:
            await second
        except ZeroDivisionError as error:
            steps.append(error)
        steps.append(NAME.get())

    Continuation(run(), loop).start()
    assert steps == ["began"]
    assert NAME.get() == "", "its context is its own"
    first.set_result(1)
    error = ZeroDivisionError()
    second.set_exception(error)
    while len(steps) < 4:
        await asyncio.sleep(0)
    assert steps == ["began", 1, error, "inside"]


async def test_what_waits_for_nothing_ends_at_once() -> None:
    ended: list[bool] = []

    async def run() -> None:
        ended.append(True)

    Continuation(run(), asyncio.get_running_loop()).start()
    assert ended == [True]


async def test_several_that_wait_for_one_future_are_resumed_in_order() -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    order: list[int] = []

    async def run(number: int) -> None:
        await future
        order.append(number)

    for number in range(3):
        Continuation(run(number), loop).start()
    assert order == []
    future.set_result(None)
    with pytest.raises(asyncio.InvalidStateError):
        future.set_result(None)
    while len(order) < 3:
        await asyncio.sleep(0)
    assert order == [0, 1, 2]
