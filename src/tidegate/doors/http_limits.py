"""`POST /v1/limit` and `POST /v1/limit/batch`: checks that name a namespace, a subject and their own limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from tidegate.decision import Decision
from tidegate.doors.http_requests import MAX_CHECK_BYTES, Scope, allow_methods, bound_batch, bound_headers, decoded, read_body
from tidegate.doors.http_responses import JSON, Prepared
from tidegate.doors.responses import decision_body, encode, error_body, limit_headers
from tidegate.errors import TidegateError
from tidegate.gate.request_limits import LimitCheck, RequestLimits
from tidegate.policy.namespaces import CompiledNamespace
from tidegate.time_slice import TimeSlice
from tidegate.wire import MAX_BATCH_BYTES, LimitBatchRequest, LimitRequest, whole_cost

LIMIT: Final = "/v1/limit"
LIMIT_BATCH: Final = "/v1/limit/batch"
_LIMIT: Final = msgspec.json.Decoder(LimitRequest)
_BATCH: Final = msgspec.json.Decoder(LimitBatchRequest)


class LimitRequests:
    """Answers both paths.

    Args:
        limits: decides.
        body_timeout_s: how long a body may take, s.
    """

    def __init__(self, limits: RequestLimits, body_timeout_s: float) -> None:
        self._limits = limits
        self._body_timeout_s = body_timeout_s

    async def read(self, scope: Scope, proto: Any) -> list[LimitCheck | TidegateError]:
        """Read a request to either path; an error in one check of a batch is that check's own.

        Raises:
            TidegateError: if the request as a whole is invalid.
        """
        allow_methods(scope, ("POST",))
        bound_headers(scope.headers)
        if scope.path == LIMIT:
            body = await read_body(scope.headers, proto, MAX_CHECK_BYTES, self._body_timeout_s)
            # Here an invalid check is an invalid request.
            one = decoded(_LIMIT, body, "a limit check")
            return [self._check_of(await self._limits.namespaces(), one)]
        body = await read_body(scope.headers, proto, MAX_BATCH_BYTES, self._body_timeout_s)
        sent = decoded(_BATCH, body, "a batch of limit checks").checks
        bound_batch(sent)
        namespaces = await self._limits.namespaces()
        checks: list[LimitCheck | TidegateError] = []
        time_slice = TimeSlice()
        for each in sent:
            if time_slice.over:
                await time_slice.pause()
            try:
                checks.append(self._check_of(namespaces, each))
            except TidegateError as error:
                checks.append(error)
        return checks

    async def answer(self, scope: Scope, checks: list[LimitCheck | TidegateError]) -> Prepared:
        """Decide what `read` gave.

        Raises:
            StoreUnavailable: for a single check, if the counter store fails and the namespace says deny.
        """
        if scope.path == LIMIT and isinstance(checks[0], LimitCheck):
            decision = await self._limits.check(checks[0])
            headers = [*limit_headers(decision), JSON]
            return Prepared(200 if decision.allowed else 429, headers, encode(decision_body(decision)))
        outcomes = iter(await self._limits.check_many([each for each in checks if isinstance(each, LimitCheck)]))
        results: list[Decision | TidegateError] = [next(outcomes) if isinstance(each, LimitCheck) else each for each in checks]
        time_slice = TimeSlice()
        decisions = []
        for result in results:
            if time_slice.over:
                await time_slice.pause()
            decisions.append(error_body(result) if isinstance(result, TidegateError) else decision_body(result))
        return Prepared(200, [JSON], encode({"decisions": decisions}))

    def _check_of(self, namespaces: Mapping[str, CompiledNamespace], sent: LimitRequest) -> LimitCheck:
        return self._limits.read(
            namespaces, sent.namespace, sent.subject, sent.limits or (), sent.algorithm, whole_cost(sent.cost)
        )
