"""The HTTP data plane: an RSGI app without a framework.

Every answer that is not 2xx or 429 has the error form `{"error": {"code", "message", "details"}}`; `/v1/authorize` answers
204, 401, 403 and 429 without a body, and says the error's code in `X-Tidegate-Error`. Gateways that know no other refusal than
401 and 403 get every other one as 403, if they request it. A check never gets a bare 500: an unhandled exception is logged and
answered 503. Bodies, headers, and the time a body may take are bounded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final

from tidegate.decision import Check, Decision
from tidegate.doors.bearer import refuse_bearer_key
from tidegate.doors.callers_auth import CallersAuth, scope_of
from tidegate.doors.client_address import TrustedProxies, address_or_none, peer_address
from tidegate.doors.http_exchange import PlainRequest
from tidegate.doors.http_holds import HOLDS, HoldRequests, is_holds
from tidegate.doors.http_limits import LIMIT, LIMIT_BATCH, LimitRequests
from tidegate.doors.http_requests import (
    AUTHORIZE,
    AUTHORIZE_ENVOY,
    BODY_TIMEOUT_S,
    MAX_CHECK_BYTES,
    MAX_HEADER_BYTES,
    Scope,
    allow_methods,
    bound_headers,
    check_of,
    is_envoy,
    read_authorize,
    read_batch,
    read_body,
    read_check,
    read_usage_query,
)
from tidegate.doors.http_reserve import ReserveRequests, is_reserve
from tidegate.doors.http_responses import JSON, Prepared, Response, StatusRecorder, authorize_response, error_response
from tidegate.doors.key_sources import KeySources, bearer_key
from tidegate.doors.plain_requests import authorize_layouts, facts_check, plain_authorize, plain_check
from tidegate.doors.refusals import InternalError, NotFound
from tidegate.doors.request_headers import read_attributes, single
from tidegate.doors.responses import (
    NO_STORE,
    authorize_answer,
    check_lines,
    decision_body,
    encode,
    error_body,
    limit_headers,
    usage_body,
)
from tidegate.doors.token_attributes import token_attributes, with_body_token
from tidegate.errors import BadRequest, TidegateError
from tidegate.gate.gate import Gate, Observer
from tidegate.observation import Observation
from tidegate.policy.attributes import NO_ATTRIBUTES, CallerPolicy
from tidegate.policy.paths import STRICT, PathRules
from tidegate.telemetry.access import AccessLog
from tidegate.telemetry.requests import CURRENT, Request, current, note
from tidegate.time_slice import TimeSlice
from tidegate.wire import MAX_BATCH_BYTES

__all__ = ["MAX_BATCH_BYTES", "MAX_CHECK_BYTES", "DataPlane", "Response"]

logger = logging.getLogger(__name__)

_CHECK_PATH: Final = "/v1/check"
_AUTHORIZE_TARGET: Final = AUTHORIZE.encode()
_CHECK_TARGET: Final = _CHECK_PATH.encode()
_UNHANDLED: Final = "unhandled exception while a request was answered"


class DataPlane:
    """The app.

    Args:
        gate: decides.
        pages: path → what answers `GET` there: health, metrics and the like.
        observe: callback run for requests that were refused before the gate.
        trusted: whose forwarding headers are believed.
        body_timeout_s: how long a body may take.
        access: writes about a sample of the requests; None for no such log.
        paths: which spellings of a path are let through.
        callers: who may call; None for anyone.
        keys: where requests to `/v1/authorize` carry API keys.
    """

    def __init__(
        self,
        gate: Gate,
        pages: Mapping[str, Callable[[], Awaitable[Response]]],
        observe: Observer | None = None,
        trusted: TrustedProxies | None = None,
        body_timeout_s: float = BODY_TIMEOUT_S,
        access: AccessLog | None = None,
        paths: PathRules = STRICT,
        callers: CallersAuth | None = None,
        keys: KeySources | None = None,
    ) -> None:
        self.draining = False
        self.in_flight = 0
        self.answered = 0
        self._gate = gate
        self._limits = LimitRequests(gate.request_limits, body_timeout_s)
        self._holds = HoldRequests(gate, body_timeout_s, paths)
        self._reservations = ReserveRequests(gate, body_timeout_s, paths)
        self._pages = pages
        self._observe = observe
        self._trusted = trusted or TrustedProxies()
        self._body_timeout_s = body_timeout_s
        self._access = access
        self._paths = paths
        self._callers = callers
        self._keys = keys or KeySources()
        self.layouts = authorize_layouts()
        self._reads_facts = access is None and callers is None and self._keys.is_default
        # The policy, within a turn in which it reads no more than `facts_check` of plain requests.
        self._turn_policy: CallerPolicy | None = None

    async def __rsgi__(self, scope: Scope, proto: Any) -> None:
        """Answer one request."""
        if scope.proto != "http":
            proto.close(404)
            return
        self.in_flight += 1
        request = Request(scope.headers, False, scope.client, self._trusts_client)
        # Granian runs each request in a task of its own: nobody else sees it, and nothing is to be put back.
        CURRENT.set(request)
        access = self._access
        # Probes and scrapes are nobody's requests.
        if access is not None and scope.path.startswith("/v1/") and access.is_sampled():
            request.sampled = True
            proto = StatusRecorder(proto)
            started_ns = time.perf_counter_ns()
        try:
            path = scope.path
            if self._callers is not None and path.startswith("/v1/"):
                await self._authenticate(self._callers, scope)
            if path == AUTHORIZE:
                await self._authorize(scope, proto)
            elif path.startswith(AUTHORIZE_ENVOY) and is_envoy(path):
                await self._authorize(scope, proto, for_envoy=True)
            elif path == _CHECK_PATH:
                await self._check(scope, proto)
            elif path == "/v1/check/batch":
                await self._batch(scope, proto)
            elif path in (LIMIT, LIMIT_BATCH):
                await self._limit(scope, proto)
            elif is_holds(path):
                await self._hold(scope, proto)
            elif is_reserve(path):
                await self._reserve(scope, proto)
            elif path == "/v1/usage":
                await self._usage(scope, proto)
            else:
                await self._page(scope, proto)
        except TidegateError as error:
            self._respond(proto, error_response(scope, error, current()))
        except Exception:
            logger.exception(_UNHANDLED)
            self._respond(proto, error_response(scope, _internal_error(request), request))
        finally:
            self.in_flight -= 1
            self.answered += 1
            if access is not None and request.sampled:
                access.write(
                    request,
                    AUTHORIZE_ENVOY if is_envoy(scope.path) else scope.path[:200],
                    proto.status,
                    time.perf_counter_ns() - started_ns,
                )
            request.over = True

    def answer_now(self, request: PlainRequest) -> Coroutine[Any, Any, None] | None:
        """Answer a plain request; nothing is awaited where the gate decides at once.

        Args:
            request: whose turn it is.

        Returns:
            None where it was answered; else what answers its exchange when awaited.
        """
        policy = self._turn_policy
        check: Check | None = None
        is_authorize = True
        try:
            if policy is not None:
                if request.policy is policy:
                    check = request.check
                elif (facts := request.facts) is not None:
                    check = facts_check(request, facts, self._trusted, policy)
            if check is None:
                is_authorize = request.target == _AUTHORIZE_TARGET
                check = self._plain_check(request, is_authorize)
                if check is None:
                    exchange = request.open()
                    return self.__rsgi__(exchange, exchange)
            decision = self._gate.check_now(check)
            if not isinstance(decision, Decision):
                return self._answer_later(request, check, decision)
            connection = request.connection
            if is_authorize and decision.allowed and not self.draining and not connection.closing:
                connection.answer_plain(request, authorize_answer(connection.server.heads[204], decision))
            else:
                self._answer_decided(request, decision, is_authorize)
        except Exception as error:  # noqa: BLE001 - raised again where the request is known to whoever logs it
            return self._answer_later(request, check, _fail(error))
        self.answered += 1
        return None

    def _plain_check(self, request: PlainRequest, is_authorize: bool) -> Check | None:
        """The check of a plain request, read from its headers and body; None where it has to be read otherwise."""
        gate, callers = self._gate, self._callers
        if self._access is not None or not (callers is None or callers.is_known(request.values, request.connection.peer_names)):
            return None
        if is_authorize:
            policy = gate.catalog.active_policy
            if policy is None or not self._keys.is_default or request.method not in ("GET", "HEAD"):
                return None
            if request.policy is policy:
                return request.check
            return plain_authorize(request, self._trusted, MAX_HEADER_BYTES, policy, gate.tokens)
        if request.target == _CHECK_TARGET and request.method == "POST":
            return request.check or plain_check(request, MAX_HEADER_BYTES, MAX_CHECK_BYTES, gate)
        return None

    def begin_turn(self) -> None:
        """Plain requests that arrived together are answered next: what they have in common is looked at once."""
        gate = self._gate
        policy = gate.catalog.active_policy
        if policy is not None and self._reads_facts and policy.jwt is None and not policy.attributes:
            self._turn_policy = policy
        gate.begin_turn()

    def end_turn(self) -> None:
        """They were answered, or what answers them has begun."""
        self._turn_policy = None
        self._gate.end_turn()

    async def _answer_later(self, request: PlainRequest, check: Check | None, decision: Awaitable[Decision]) -> None:
        self.in_flight += 1
        known = Request(request, False, request.connection.client, self._trusts_client)
        known.check = check
        CURRENT.set(known)
        try:
            self._answer_decided(request, await decision, request.target == _AUTHORIZE_TARGET)
        except TidegateError as error:
            exchange = request.open()
            self._respond(exchange, error_response(exchange, error, known))
        except Exception:
            logger.exception(_UNHANDLED)
            exchange = request.open()
            self._respond(exchange, error_response(exchange, _internal_error(known), known))
        finally:
            self.in_flight -= 1
            self.answered += 1
            known.over = True

    def _answer_decided(self, request: PlainRequest, decision: Decision, is_authorize: bool) -> None:
        """Answer with bytes made of a template, unless the connection ends or a cache has to know more."""
        connection = request.connection
        if self.draining or connection.closing or (is_authorize and not decision.allowed):
            exchange = request.open()
            if is_authorize:
                prepared = authorize_response(exchange, decision, False, self._gate.catalog.active_policy, self._keys)
            else:
                prepared = _check_response(decision)
            self._respond(exchange, prepared)
        elif is_authorize:
            connection.answer_plain(request, authorize_answer(connection.server.heads[204], decision))
        else:
            head = connection.server.heads[200 if decision.allowed else 429]
            connection.answer_plain(request, head + check_lines(decision))

    async def _authenticate(self, callers: CallersAuth, scope: Scope) -> None:
        try:
            await callers.require(scope, scope_of(scope.path))
        except TidegateError as error:
            raise self._seen(error) from None

    async def _authorize(self, scope: Scope, proto: Any, for_envoy: bool = False) -> None:
        if not for_envoy:
            allow_methods(scope, ("GET", "HEAD"))
        headers = scope.headers
        try:
            bound_headers(headers)
            catalog = self._gate.catalog
            policy = catalog.cached_caller_policy() or await catalog.caller_policy()
            sent = read_authorize(scope, self._trusted, for_envoy, policy.attributes, self._keys)
            if not sent.api_key and not self._keys.bearer:
                await refuse_bearer_key(self._gate, headers, sent.ip)
            attributes = sent.attributes
            # A bearer token that was read as an API key is no token of the issuer.
            if policy.jwt is not None and not (self._keys.bearer and sent.api_key and bearer_key(headers) == sent.api_key):
                attributes = {**attributes, **await token_attributes(self._gate, policy, headers, sent.ip)}
            check = Check.of(
                sent.uri,
                sent.method,
                sent.api_key,
                sent.ip,
                paths=self._paths,
                strict_ip=False,
                attributes=attributes,
            )
        except TidegateError as error:
            raise self._seen(error) from None
        note(check)
        self._respond(proto, authorize_response(scope, await self._gate.check(check), for_envoy, policy, self._keys))

    async def _check(self, scope: Scope, proto: Any) -> None:
        allow_methods(scope, ("POST",))
        headers = scope.headers
        try:
            bound_headers(headers)
            sent = read_check(await read_body(headers, proto, MAX_CHECK_BYTES, self._body_timeout_s))
            check = check_of(sent, single(headers, "x-api-key"), self._paths)
            if check.api_key is None:
                await refuse_bearer_key(self._gate, headers, check.ip)
            check = await with_body_token(self._gate, check, sent.bearer)
        except TidegateError as error:
            raise self._seen(error) from None
        note(check)
        self._respond(proto, _check_response(await self._gate.check(check)))

    async def _batch(self, scope: Scope, proto: Any) -> None:
        allow_methods(scope, ("POST",))
        headers = scope.headers
        try:
            bound_headers(headers)
            sent = read_batch(await read_body(headers, proto, MAX_BATCH_BYTES, self._body_timeout_s))
            header_key = single(headers, "x-api-key")
            if not header_key and not all(each.api_key for each in sent):
                await refuse_bearer_key(self._gate, headers, peer_address(scope.client))
        except TidegateError as error:
            raise self._seen(error) from None
        answers: list[Decision | TidegateError | None] = []
        checks: list[Check] = []
        slice_ = TimeSlice()
        for each in sent:
            if slice_.over:
                await slice_.pause()
            try:
                check = check_of(each, header_key, self._paths)
                checks.append(await with_body_token(self._gate, check, each.bearer) if each.bearer else check)
                answers.append(None)
            except TidegateError as error:
                answers.append(self._seen(error))
        decided = iter(await self._gate.check_many(checks))
        whole = [next(decided) if answer is None else answer for answer in answers]
        decisions = []
        for answer in whole:
            if slice_.over:
                await slice_.pause()
            decisions.append(error_body(answer) if isinstance(answer, TidegateError) else decision_body(answer))
        self._respond(proto, Prepared(200, [JSON], encode({"decisions": decisions})))

    async def _limit(self, scope: Scope, proto: Any) -> None:
        try:
            checks = await self._limits.read(scope, proto)
        except TidegateError as error:
            raise self._seen(error) from None
        for each in checks:
            if isinstance(each, TidegateError):
                self._seen(each)
        self._respond(proto, await self._limits.answer(scope, checks))

    async def _hold(self, scope: Scope, proto: Any) -> None:
        try:
            body = await self._holds.read(scope, proto)
            opening = await self._holds.open_of(scope, body) if scope.path == HOLDS else None
        except TidegateError as error:
            raise self._seen(error) from None
        self._respond(proto, await (self._holds.end(scope, body) if opening is None else self._holds.open(*opening)))

    async def _reserve(self, scope: Scope, proto: Any) -> None:
        try:
            asked = await self._reservations.read(scope, proto)
            if asked is not None and asked[1] is None and self._callers is not None:
                # The scope `check` does not allow limits that the request itself names.
                await self._callers.require(scope, "limit")
        except TidegateError as error:
            raise self._seen(error) from None
        self._respond(
            proto, await (self._reservations.cancel(scope.path) if asked is None else self._reservations.reserve(*asked))
        )

    async def _usage(self, scope: Scope, proto: Any) -> None:
        allow_methods(scope, ("GET", "HEAD"))
        headers = scope.headers
        try:
            bound_headers(headers)
            ip = address_or_none(self._trusted.client(peer_address(scope.client), headers))
            api_key = single(headers, "x-api-key")
            if not api_key:
                await refuse_bearer_key(self._gate, headers, ip)
            attributes, tier = await self._usage_attributes(scope, ip)
            usage = await self._gate.usage(api_key, ip, attributes=attributes, tier=tier)
        except TidegateError as error:
            raise self._seen(error) from None
        self._respond(proto, Prepared(200, [JSON, NO_STORE], None if scope.method == "HEAD" else encode(usage_body(usage))))

    async def _usage_attributes(self, scope: Scope, ip: str | None) -> tuple[Mapping[str, str], str | None]:
        """What a trusted peer sends, in headers of the policy or in the query: attributes, tier. And the claims of a token."""
        attributes, tier = read_usage_query(scope.query_string)
        is_trusted = self._trusts_client(scope.client)
        if not is_trusted and (attributes or tier is not None):
            raise BadRequest("attributes and tier are read from trusted proxies only: leave them out", field="query")
        policy = await self._gate.catalog.caller_policy()
        sent = read_attributes(scope.headers, policy.attributes) if is_trusted else NO_ATTRIBUTES
        claims = NO_ATTRIBUTES if policy.jwt is None else await token_attributes(self._gate, policy, scope.headers, ip)
        return {**sent, **attributes, **claims}, tier

    async def _page(self, scope: Scope, proto: Any) -> None:
        page = self._pages.get(scope.path)
        if page is None:
            raise NotFound(f"there is nothing at {scope.path[:200]!r}: see /openapi.json")
        allow_methods(scope, ("GET", "HEAD"))
        made = await page()
        headers = [("content-type", made.content_type), NO_STORE]
        self._respond(proto, Prepared(made.status, headers, None if scope.method == "HEAD" else made.body))

    def _trusts_client(self, client: str) -> bool:
        return self._trusted.trusts(peer_address(client))

    def _seen(self, error: TidegateError) -> TidegateError:
        """Report an error to telemetry that does not reach the gate."""
        observation = Observation(None, error.code, 0)
        if self._observe is not None:
            self._observe(observation)
        if self._access is not None:
            self._access.observe(observation)
        return error

    def _respond(self, proto: Any, prepared: Prepared) -> None:
        status, headers, body = prepared
        if self.draining:
            headers.append(("connection", "close"))
        if body is None:
            proto.response_empty(status, headers)
        else:
            proto.response_bytes(status, headers, body)


def _check_response(decision: Decision) -> Prepared:
    return Prepared(200 if decision.allowed else 429, [*limit_headers(decision), JSON], encode(decision_body(decision)))


def _internal_error(request: Request) -> InternalError:
    return InternalError(f"internal error of the limiter: see its log for the request id {request.id}")


async def _fail(error: Exception) -> Decision:
    raise error
