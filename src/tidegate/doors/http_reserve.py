"""`POST /v1/reserve` and `…/{id}/cancel`: callers that wait for their moment instead of being denied."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from tidegate.decision import Check
from tidegate.doors.http_holds import check_in, limits_in
from tidegate.doors.http_requests import MAX_CHECK_BYTES, Scope, allow_methods, bound_headers, decoded, read_body
from tidegate.doors.http_responses import JSON, Prepared
from tidegate.doors.refusals import NotFound
from tidegate.doors.responses import decision_body, encode, limit_headers
from tidegate.gate.gate import Gate
from tidegate.policy.paths import PathRules
from tidegate.telemetry.requests import note
from tidegate.wire import ReservationCancelledBody, ReserveAnswer, ReserveRequest

RESERVE: Final = "/v1/reserve"
_RESERVE: Final = msgspec.json.Decoder(ReserveRequest)


def is_reserve(path: str) -> bool:
    """Whether a path is answered here."""
    return path == RESERVE or path.startswith(f"{RESERVE}/")


class ReserveRequests:
    """Answers both paths.

    Args:
        gate: decides.
        body_timeout_s: how long a body may take, s.
        paths: which spellings of a path are let through.
    """

    def __init__(self, gate: Gate, body_timeout_s: float, paths: PathRules) -> None:
        self._gate = gate
        self._body_timeout_s = body_timeout_s
        self._paths = paths

    async def read(self, scope: Scope, proto: Any) -> tuple[ReserveRequest, Check | None] | None:
        """What a request asks for: the reservation, and its check, None where it names its own limits; None for a cancellation.

        Raises:
            TidegateError: if it is invalid.
        """
        allow_methods(scope, ("POST",))
        bound_headers(scope.headers)
        body = await read_body(scope.headers, proto, MAX_CHECK_BYTES, self._body_timeout_s)
        if scope.path != RESERVE:
            return None
        sent = decoded(_RESERVE, body, "a request for a reservation")
        return sent, await check_in(sent, scope, self._gate, self._paths)

    async def reserve(self, sent: ReserveRequest, check: Check | None) -> Prepared:
        """Answer what `read` gave.

        Raises:
            TidegateError: see `Reservations.reserve`.
        """
        reservations = self._gate.reservations
        if check is None:
            place = await reservations.reserve_limit(await limits_in(sent, self._gate), sent.at_most_s)
        else:
            note(check)
            place = await reservations.reserve(check, sent.at_most_s)
        decision = place.decision
        body = ReserveAnswer(
            **msgspec.structs.asdict(decision_body(decision)), wait_s=place.wait_s, reservation=place.reservation
        )
        return Prepared(200 if decision.allowed else 429, [*limit_headers(decision), JSON], encode(body))

    async def cancel(self, path: str) -> Prepared:
        """Give a place back.

        Raises:
            TidegateError: see `Reservations.cancel`; `NotFound` for another path.
        """
        reservation, _, action = path[len(RESERVE) + 1 :].partition("/")
        if action != "cancel":
            raise NotFound(f"there is nothing at {path[:200]!r}: POST {RESERVE}/{{id}}/cancel")
        given_back = await self._gate.reservations.cancel(reservation)
        return Prepared(200, [JSON], encode(ReservationCancelledBody(reservation, given_back)))
