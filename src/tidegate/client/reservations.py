"""Reservations of the clients: a place in the queue, and waiting for its moment."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import msgspec

from tidegate.client.answer import Answer
from tidegate.client.bodies import check_body, limit_body
from tidegate.client.core import ClientCore
from tidegate.client.replies import headers_to_pass_on
from tidegate.client.steps import Reply, Steps
from tidegate.decision import Check
from tidegate.errors import BadRequest, TidegateError, clip
from tidegate.retry_pause import checked_wait_s, retry_pause_s
from tidegate.wire import LimitRequest, ReservationCancelledBody, ReserveAnswer

logger = logging.getLogger("tidegate.client")

MAX_WAIT_S: Final = 3600.0
"""How far ahead a server gives places, s."""
_TIMER_S: Final = 0.001
"""Timers of event loops are rounded to so much: no caller may go before its moment."""
_GIVE_BACK_S: Final = 2.0
"""How long a cancelled caller waits until its place is given back; that goes on afterwards."""
_RESERVE: Final = "/v1/reserve"
_ANSWER: Final = msgspec.json.Decoder(ReserveAnswer)
_CANCELLED: Final = msgspec.json.Decoder(ReservationCancelledBody)


class ReservedAnswer(Answer, frozen=True, gc=False, kw_only=True):
    """The answer to a reservation: `allowed` where there is a place; `retry_after` of a denial is how long the wait would be.

    Args:
        wait_s: seconds from the answer until the caller may go; 0 where it may go now, or has no place.
        reservation: id for `cancel`; None where there is nothing to give back.
    """

    wait_s: float = 0.0
    reservation: str | None = None


class PlaceRequest:
    """The body of a request for a place, without `at_most_s`.

    Args:
        request: a check, or a check that names its own limits.
        bearer: JSON Web Token of the caller of a check.

    Raises:
        BadRequest: if a text has no form in JSON, or a field of the limits is invalid.
    """

    def __init__(self, request: Check | LimitRequest, bearer: str | None = None) -> None:
        self._body = check_body(request, bearer) if isinstance(request, Check) else limit_body(request)

    def steps(self, core: ClientCore, at_most_s: float) -> Steps[Answer]:
        """Steps of one request for a place.

        Raises:
            BadRequest: if the time is not a number from 0 to 3600.
        """
        if isinstance(at_most_s, bool) or not isinstance(at_most_s, int | float) or not 0 <= at_most_s <= MAX_WAIT_S:
            raise BadRequest(
                f"at_most_s {clip(at_most_s)} must be a number of seconds from 0 to {MAX_WAIT_S:.0f}", field="at_most_s"
            )
        return core.decide_with(_RESERVE, b'{"at_most_s":%b,' % str(at_most_s).encode() + self._body[1:], _read_place)


def cancel_steps(core: ClientCore, reservation: str) -> Steps[bool]:
    """Steps that give a place back.

    Raises:
        BadRequest: if the id has characters that no id has.
    """
    if (
        not isinstance(reservation, str)
        or not reservation.isascii()
        or not reservation.replace("-", "").replace("_", "").isalnum()
    ):
        raise BadRequest(
            f"reservation {clip(reservation)} is not an id: pass the `reservation` of the answer of `reserve`",
            field="reservation",
        )
    return core.repeat(f"{_RESERVE}/{reservation}/cancel", b"{}", lambda reply: _CANCELLED.decode(reply.body).given_back)


def wait_blocking(reserve: Callable[[float], Answer], cancel: Callable[[str], object], at_most_s: float) -> Answer:
    """Take a place and wait for its moment: one request where there is a place in time.

    Args:
        reserve: takes how far ahead the moment may be, s.
        cancel: gives a place back by its id, when an exception such as that of a signal ends the wait.
        at_most_s: how long to wait, s, 0 or more.

    Returns:
        The answer; immediately a denial if there is no place in time.
    """
    give_up_at = time.monotonic() + checked_wait_s(at_most_s)
    while True:
        answer = reserve(_ahead_s(give_up_at))
        if isinstance(answer, ReservedAnswer) and answer.wait_s:
            try:
                time.sleep(answer.wait_s + _TIMER_S)
            except BaseException:
                if answer.reservation is not None:
                    try:
                        cancel(answer.reservation)
                    except TidegateError as error:
                        _not_cancelled(error)
                raise
        pause_s = _pause_s(answer, give_up_at)
        if pause_s is None:
            return answer
        time.sleep(pause_s)


class AsyncWaiting:
    """As `wait_blocking`, on an event loop."""

    def __init__(self) -> None:
        self._returning: set[asyncio.Task[None]] = set()

    async def wait(
        self,
        reserve: Callable[[float], Coroutine[Any, Any, Answer]],
        cancel: Callable[[str], Awaitable[object]],
        at_most_s: float,
    ) -> Answer:
        """See `wait_blocking`; the place is given back when the caller is cancelled."""
        give_up_at = time.monotonic() + checked_wait_s(at_most_s)
        while True:
            reserving = asyncio.ensure_future(reserve(_ahead_s(give_up_at)))
            try:
                answer = await asyncio.shield(reserving)
                if isinstance(answer, ReservedAnswer) and answer.wait_s:
                    await asyncio.sleep(answer.wait_s + _TIMER_S)
            except asyncio.CancelledError:
                await self._give_back(reserving, cancel)
                raise
            pause_s = _pause_s(answer, give_up_at)
            if pause_s is None:
                return answer
            await asyncio.sleep(pause_s)

    async def _give_back(self, reserving: asyncio.Future[Answer], cancel: Callable[[str], Awaitable[object]]) -> None:
        async def give_back() -> None:
            try:
                answer = await reserving
                if isinstance(answer, ReservedAnswer) and answer.reservation is not None:
                    await cancel(answer.reservation)
            except TidegateError as error:
                _not_cancelled(error)

        task = asyncio.ensure_future(give_back())
        self._returning.add(task)
        task.add_done_callback(self._returning.discard)
        await asyncio.wait((task,), timeout=_GIVE_BACK_S)


def _ahead_s(give_up_at: float) -> float:
    return min(max(give_up_at - time.monotonic(), 0.0), MAX_WAIT_S)


def _pause_s(answer: Answer, give_up_at: float) -> float | None:
    return None if answer.allowed else retry_pause_s(answer.retry_after, give_up_at - time.monotonic())


def _not_cancelled(error: TidegateError) -> None:
    logger.info("reservation not cancelled, its units stay charged: %s", error)


def _read_place(reply: Reply) -> Answer:
    return ReservedAnswer(**msgspec.structs.asdict(_ANSWER.decode(reply.body)), headers=headers_to_pass_on(reply))
