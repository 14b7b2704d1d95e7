"""`POST /v1/holds`, `…/{id}/settle` and `…/{id}/renew`: requests whose cost is known only when they have ended."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from tidegate.counters.holds import HoldSettlement
from tidegate.decision import Check
from tidegate.doors.bearer import refuse_bearer_key
from tidegate.doors.http_requests import MAX_CHECK_BYTES, Scope, allow_methods, bound_headers, check_of, decoded, read_body
from tidegate.doors.http_responses import JSON, Prepared
from tidegate.doors.refusals import NotFound
from tidegate.doors.request_headers import single
from tidegate.doors.responses import decision_body, encode, limit_headers
from tidegate.doors.token_attributes import with_body_token
from tidegate.errors import BadRequest
from tidegate.gate.gate import Gate
from tidegate.gate.holds import OpenedHold
from tidegate.gate.request_limits import LimitCheck
from tidegate.policy.paths import PathRules
from tidegate.telemetry.requests import note
from tidegate.timestamps import US_PER_S
from tidegate.wire import (
    CheckRequest,
    HoldAnswer,
    HoldRenewedBody,
    HoldRequest,
    HoldSettledBody,
    RenewRequest,
    ReserveRequest,
    SettleRequest,
    whole_cost,
)

HOLDS: Final = "/v1/holds"
_OPEN: Final = msgspec.json.Decoder(HoldRequest)
_SETTLE: Final = msgspec.json.Decoder(SettleRequest)
_RENEW: Final = msgspec.json.Decoder(RenewRequest)


def is_holds(path: str) -> bool:
    """Whether a path is answered here."""
    return path == HOLDS or path.startswith(f"{HOLDS}/")


class HoldRequests:
    """Answers all three paths.

    Args:
        gate: decides.
        body_timeout_s: how long a body may take, s.
        paths: which spellings of a path are let through.
    """

    def __init__(self, gate: Gate, body_timeout_s: float, paths: PathRules) -> None:
        self._gate = gate
        self._body_timeout_s = body_timeout_s
        self._paths = paths

    async def read(self, scope: Scope, proto: Any) -> bytes:
        """The body of a request to any of the paths.

        Raises:
            TidegateError: if the request as a whole is invalid.
        """
        allow_methods(scope, ("POST",))
        bound_headers(scope.headers)
        return await read_body(scope.headers, proto, MAX_CHECK_BYTES, self._body_timeout_s)

    async def open_of(self, scope: Scope, body: bytes) -> tuple[HoldRequest, Check | None]:
        """What a request to `/v1/holds` asks for: the request, and its check; None where it names its own limits.

        Raises:
            TidegateError: if it is invalid.
        """
        sent = decoded(_OPEN, body, "a request for a hold")
        return sent, await check_in(sent, scope, self._gate, self._paths)

    async def open(self, sent: HoldRequest, check: Check | None) -> Prepared:
        """Open what `open_of` gave.

        Raises:
            TidegateError: see `Holds.open`.
        """
        ttl_s = 60 if sent.ttl_s is None else sent.ttl_s
        if check is None:
            limit_check = await limits_in(sent, self._gate)
            return _opened(await self._gate.holds.open_limit(limit_check, ttl_s, clamp=bool(sent.clamp)))
        note(check)
        return _opened(await self._gate.holds.open(check, ttl_s, clamp=bool(sent.clamp)))

    async def end(self, scope: Scope, body: bytes) -> Prepared:
        """Settle or renew.

        Raises:
            TidegateError: see `Holds.settle` and `Holds.renew`; `NotFound` for another path.
        """
        hold, _, action = scope.path[len(HOLDS) + 1 :].partition("/")
        if action == "settle":
            sent = decoded(_SETTLE, body, "a settlement")
            return _settled(hold, await self._gate.holds.settle(hold, whole_cost(sent.cost), success=bool(sent.success)))
        if action == "renew":
            ttl_s = await self._gate.holds.renew(hold, decoded(_RENEW, body, "a renewal").ttl_s)
            return Prepared(200, [JSON], encode(HoldRenewedBody(hold, ttl_s)))
        raise NotFound(f"there is nothing at {scope.path[:200]!r}: POST {HOLDS}/{{id}}/settle or {HOLDS}/{{id}}/renew")


async def check_in(sent: HoldRequest | ReserveRequest, scope: Scope, gate: Gate, paths: PathRules) -> Check | None:
    """The check of a request that may name its own limits instead; None where it does, see `limits_in`.

    Args:
        paths: which spellings of a path are let through.

    Raises:
        TidegateError: if it is invalid.
    """
    if sent.namespace is not None:
        _refuse_check_fields(sent)
        return None
    if sent.path is None:
        raise BadRequest("path is missing: send the request to decide, or namespace and subject", field="path")
    if sent.subject is not None or sent.limits or sent.algorithm is not None:
        raise BadRequest("subject, limits and algorithm need a namespace: leave them out beside path", field="namespace")
    asked = CheckRequest(sent.path, sent.method, sent.api_key, sent.ip, sent.cost, sent.attributes, sent.tier, sent.bearer)
    check = check_of(asked, single(scope.headers, "x-api-key"), paths)
    if check.api_key is None:
        await refuse_bearer_key(gate, scope.headers, check.ip)
    return await with_body_token(gate, check, sent.bearer)


async def limits_in(sent: HoldRequest | ReserveRequest, gate: Gate) -> LimitCheck:
    """The limits that a request names.

    Raises:
        TidegateError: see `RequestLimits.read`.
    """
    limits = gate.request_limits
    namespaces = await limits.namespaces()
    return limits.read(namespaces, sent.namespace, sent.subject, sent.limits or (), sent.algorithm, whole_cost(sent.cost))


def _refuse_check_fields(sent: HoldRequest | ReserveRequest) -> None:
    for name in ("path", "api_key", "ip", "attributes", "tier", "bearer"):
        if getattr(sent, name) is not None:
            raise BadRequest(f"{name} and namespace came together: send a check, or limits of your own", field=name)


def _opened(opened: OpenedHold) -> Prepared:
    decision = opened.decision
    expires_after = opened.ttl_s if opened.hold is not None else None
    said = msgspec.structs.astuple(decision_body(decision))
    # In the order of the fields: by their names it would take as long as the hold.
    body = HoldAnswer(*said, opened.hold, opened.reserved, expires_after)  # type: ignore[call-arg]
    headers = [*limit_headers(decision), JSON]
    if opened.hold is not None:
        headers.append(("x-tidegate-hold", opened.hold))  # for gateways, which read headers only
    return Prepared(200 if decision.allowed else 429, headers, encode(body))


def _settled(hold: str, settled: HoldSettlement) -> Prepared:
    reset_after = None if settled.reset_after_us is None else settled.reset_after_us / US_PER_S
    body = HoldSettledBody(hold, settled.cost, settled.late, settled.limit, settled.remaining, reset_after)
    return Prepared(200, [JSON], encode(body))
