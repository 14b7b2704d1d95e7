"""Holds of the clients: context managers that reserve a cost, and charge what was used when they end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from tidegate.client.answer import Answer
from tidegate.client.core import ClientCore
from tidegate.client.replies import headers_to_pass_on
from tidegate.client.steps import Reply, Steps
from tidegate.decision import MAX_COST, Check
from tidegate.errors import BadRequest, TidegateError, clip
from tidegate.wire import HoldAnswer, HoldRenewedBody, HoldRequest, HoldSettledBody, RenewRequest, SettleRequest

logger = logging.getLogger("tidegate.client")

_HOLDS: Final = "/v1/holds"
_OPENED: Final = msgspec.json.Decoder(HoldAnswer)
_SETTLED: Final = msgspec.json.Decoder(HoldSettledBody)
_RENEWED: Final = msgspec.json.Decoder(HoldRenewedBody)
_ENCODE: Final = msgspec.json.Encoder().encode


class HeldAnswer(Answer, frozen=True, gc=False, kw_only=True):
    """The answer to a reservation.

    Args:
        hold: id of the hold; None where it was denied.
        reserved: units reserved.
        expires_after: seconds until it expires.
    """

    hold: str | None = None
    reserved: int = 0
    expires_after: int | None = None


def hold_request(check: Check, bearer: str | None, ttl_s: int, clamp: bool) -> HoldRequest:
    """The request for a hold.

    Args:
        check: whose cost is the most that it may cost.
        bearer: JSON Web Token of the caller.
        ttl_s: seconds until the hold expires.
        clamp: whether a cost above the most that the limits ever admit is lowered.
    """
    attributes: dict[str, str | None] | None = dict(check.attributes) or None
    return HoldRequest(
        check.path, check.method, check.api_key, check.ip, check.cost, attributes, check.tier, bearer, ttl_s, clamp or None
    )


class _ClientHold:
    """What both kinds have in common.

    Attributes:
        answer: to the reservation; a denial raises nothing. None before it was made.
        settlement: the server's answer at the end; None before, and where no server answered.
    """

    def __init__(self, core: ClientCore, request: HoldRequest) -> None:
        self.answer: HeldAnswer | Answer | None = None
        self.settlement: HoldSettledBody | None = None
        self._core = core
        self._request = request
        self._used: int | None = None
        self._success: bool | None = None

    @property
    def allowed(self) -> bool:
        """Whether the request may pass."""
        return self.answer is not None and self.answer.allowed

    @property
    def id(self) -> str | None:
        """Id of the hold; None where there is none."""
        return self.answer.hold if isinstance(self.answer, HeldAnswer) else None

    def settle(self, cost: int, *, success: bool = False) -> None:
        """Set what was used: it is charged when the context ends. The last call counts.

        Args:
            cost: units, 0 (cancels) to 1,000,000,000. Where the rule counts failures: 1 for a failure, else 0.
            success: whether the request succeeded; a rule with `clear_on_success` then forgets the failures before it.

        Raises:
            BadRequest: if the cost is no such number.
        """
        if type(cost) is not int or not 0 <= cost <= MAX_COST:
            raise BadRequest(f"cost {clip(cost)} must be a whole number from 0 to {MAX_COST}", field="cost")
        self._used = cost
        self._success = success or None

    def _open_steps(self) -> Steps[Answer]:
        try:
            body = _ENCODE(self._request)
        except UnicodeEncodeError:
            raise BadRequest("the request has text that is not valid Unicode: decode it with the right encoding") from None
        return self._core.decide_with(_HOLDS, body, _read_opened)

    def _settle_steps(self, hold: str, failed: bool) -> Steps[HoldSettledBody]:
        reserved = self.answer.reserved if isinstance(self.answer, HeldAnswer) else 0
        used = (0 if failed else reserved) if self._used is None else self._used
        return self._core.repeat(f"{_HOLDS}/{hold}/settle", _ENCODE(SettleRequest(used, self._success)), _decoded(_SETTLED))

    def _renew_steps(self, hold: str, ttl_s: int) -> Steps[HoldRenewedBody]:
        return self._core.repeat(f"{_HOLDS}/{hold}/renew", _ENCODE(RenewRequest(ttl_s)), _decoded(_RENEWED))

    def _failed(self, error: TidegateError) -> None:
        logger.warning("hold not settled, its units come back when it expires: %s", error)


class ClientHold(_ClientHold):
    """A hold of a `Client`, for `with`.

    Args:
        core: makes the steps.
        request: for the hold.
        run: runs steps.
    """

    def __init__(self, core: ClientCore, request: HoldRequest, run: Callable[[Steps[Any]], Any]) -> None:
        super().__init__(core, request)
        self._run = run

    def renew(self, ttl_s: int) -> None:
        """Let the hold expire later.

        Args:
            ttl_s: after how many seconds from now, 1 to 3600.

        Raises:
            HoldEnded: if it has expired.
            LimiterUnavailable: if no server answered.
        """
        if self.id is not None:
            self._run(self._renew_steps(self.id, ttl_s))

    def __enter__(self) -> Self:
        self.answer = self._run(self._open_steps())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.id is not None:
            try:
                self.settlement = self._run(self._settle_steps(self.id, kind is not None))
            except TidegateError as failure:
                self._failed(failure)


class AsyncClientHold(_ClientHold):
    """A hold of an `AsyncClient`, for `async with`.

    Args:
        core: makes the steps.
        request: for the hold.
        run: runs steps.
    """

    def __init__(self, core: ClientCore, request: HoldRequest, run: Callable[[Steps[Any]], Coroutine[Any, Any, Any]]) -> None:
        super().__init__(core, request)
        self._run = run

    async def renew(self, ttl_s: int) -> None:
        """See `ClientHold.renew`."""
        if self.id is not None:
            await self._run(self._renew_steps(self.id, ttl_s))

    async def __aenter__(self) -> Self:
        self.answer = await self._run(self._open_steps())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.id is not None:
            # A cancellation here must not cancel the settlement.
            await asyncio.shield(asyncio.ensure_future(self._end(self.id, kind is not None)))

    async def _end(self, hold: str, failed: bool) -> None:
        try:
            self.settlement = await self._run(self._settle_steps(hold, failed))
        except TidegateError as failure:
            self._failed(failure)


def _read_opened(reply: Reply) -> Answer:
    return HeldAnswer(**msgspec.structs.asdict(_OPENED.decode(reply.body)), headers=headers_to_pass_on(reply))


def _decoded(decoder: msgspec.json.Decoder[Any]) -> Callable[[Reply], Any]:
    return lambda reply: decoder.decode(reply.body)
