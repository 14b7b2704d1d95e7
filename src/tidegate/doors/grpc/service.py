"""`ShouldRateLimit`: converts requests to checks, and decisions to answers.

Descriptors of the domain `[envoy] domain` are checks under the policy: by path if they have one, else by the rules for
descriptors; all are charged or none. Descriptors of a domain from `[envoy] config` are counted by that file, each independently.
Those of any other domain are allowed, with a warning in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec
from google.protobuf.message import DecodeError

from tidegate.counters import ChargeOutcome
from tidegate.decision import Check, Decision
from tidegate.doors.grpc.adjustments import MAX_ENTRIES, adjusts, take_sign
from tidegate.doors.grpc.messages import RateLimitRequest
from tidegate.doors.grpc.replies import Part, denied, reply, reply_to_one
from tidegate.doors.grpc.request_cache import FileRequest, RequestCache
from tidegate.doors.grpc.status import CallRefused, Status
from tidegate.doors.outward import outward
from tidegate.errors import BadRequest, CatalogUnavailable, RequestTooLarge, TidegateError, clip
from tidegate.gate.charging import ChargeResult
from tidegate.gate.gate import Gate
from tidegate.gate.subjects import DescriptorCheck
from tidegate.ip_addresses import canonical_ip
from tidegate.observation import Observation
from tidegate.policy.attributes import RESERVED, is_name
from tidegate.policy.paths import STRICT, PathRules
from tidegate.settings import EnvoySettings
from tidegate.telemetry.requests import CURRENT, note
from tidegate.time_slice import TimeSlice

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES: Final = 1024 * 1024
"""Far more than the 60 KB of headers that Envoy accepts by default, so that no client request exceeds it."""

MAX_DESCRIPTORS: Final = 100

_MAX_WARNED_DOMAINS: Final = 100

Entries = list[tuple[str, str]]
SentLimit = tuple[int, int, int]
"""Requests, unit and unit multiplier of a limit that Envoy sends with a descriptor."""


class DomainLimits(Protocol):
    """Counts the descriptors of one domain."""

    async def parts(self, descriptors: list[tuple[Entries, int, SentLimit | None]]) -> list[Part]:
        """Find the limit of each descriptor of a request; yields to other requests in between.

        Args:
            descriptors: entries, cost and the limit that Envoy sent, if any, of each.
        """
        ...

    async def settle(self, gate: Gate, parts: list[Part]) -> list[ChargeResult]:
        """Decide and charge the parts of one request; returns one result for each part with a plan."""
        ...


class RateLimitService:
    """Answers `ShouldRateLimit`.

    Args:
        settings: how descriptors are read.
        observe: called for each request refused before the gate.
        paths: accepted path encodings.

    Attributes:
        domains: limits of the domains of `[envoy] config`; None while that has never been valid, when calls for other domains
            than the policy's end UNAVAILABLE. May be replaced at any time.
    """

    def __init__(
        self,
        gate: Gate,
        settings: EnvoySettings,
        observe: Callable[[Observation], None] | None = None,
        paths: PathRules = STRICT,
    ) -> None:
        self._gate = gate
        self._domain = settings.domain
        self._names: Final[Mapping[str, str]] = {
            settings.api_key_entry: "api_key",
            settings.method_entry: "method",
            settings.path_entry: "path",
            settings.ip_entry: "ip",
        }
        self._forced_entry = settings.forced_entry.encode()
        self._paths = paths
        self._observe = observe
        self._warned_domains: set[str] = set()
        self._domains: Mapping[str, DomainLimits] | None = {}
        self._requests = RequestCache()

    @property
    def domains(self) -> Mapping[str, DomainLimits] | None:
        """Limits of the domains of `[envoy] config`, see `RateLimitService`."""
        return self._domains

    @domains.setter
    def domains(self, domains: Mapping[str, DomainLimits] | None) -> None:
        self._domains = domains
        self._requests.clear()

    def begin_turn(self) -> None:
        """Calls that arrived together are answered next; see `Gate.begin_turn`."""
        self._gate.begin_turn()

    def end_turn(self) -> None:
        """They were answered, or what answers them has begun."""
        self._gate.end_turn()

    async def answer(self, payload: bytes) -> bytes:
        """As `answer_now`, for a caller that can wait."""
        answer = self.answer_now(payload)
        return answer if isinstance(answer, bytes) else await answer

    def answer_now(self, payload: bytes) -> bytes | Coroutine[Any, Any, bytes]:
        """Answer one request; nothing is awaited for one descriptor with a path where the gate decides at once.

        Returns:
            A `RateLimitResponse`, or a coroutine that returns it; until it is awaited nothing is charged.

        Raises:
            CallRefused: if the request is invalid (the gateway is misconfigured), or the catalog is unavailable; also raised by
                the coroutine.
        """
        prepared = self._requests.find(payload)
        if prepared is None:
            if len(payload) > MAX_MESSAGE_BYTES:
                message = f"the request has {len(payload)} bytes; at most {MAX_MESSAGE_BYTES} are accepted"
                return denied(self._observed(RequestTooLarge(message)))
            request = self._parsed(payload)
            if adjusts(request, self._forced_entry):
                return self._answer_adjusting(request)
            if len(request.descriptors) != 1 or self._limits_of(request) is not None or not self._is_of_policy(request):
                return self._answer_parsed(payload, request)
            check, cost = self._check_of(request.descriptors[0], request)
            if not isinstance(check, Check):
                return self._answer_checks(payload, [(check, cost)])
            prepared = check
            self._requests.add(payload, check)
        if isinstance(prepared, Check):
            return self._answer_check(prepared)
        if isinstance(prepared, FileRequest):
            assert self._domains is not None, "the cache is cleared with the domains"
            return self._answer_parts(self._domains[prepared.domain], prepared.parts, prepared.entries)
        return self._answer_checks(None, prepared)

    def _answer_check(self, check: Check) -> bytes | Coroutine[Any, Any, bytes]:
        """Answer a request for the policy's domain with one descriptor that has a path."""
        if CURRENT.get() is not None:
            note(check)
        shadow_outcomes: list[ChargeOutcome] = []
        try:
            decision = self._gate.check_now(check, shadow_outcomes)
        except TidegateError as error:
            return self._answer_error(error, check.cost)
        if isinstance(decision, Decision):
            return reply_to_one(decision, check.cost, shadow_outcomes)
        return self._answer_check_later(check, decision, shadow_outcomes)

    async def _answer_check_later(
        self, check: Check, decision: Awaitable[Decision], shadow_outcomes: Sequence[ChargeOutcome]
    ) -> bytes:
        try:
            decided = await decision
        except TidegateError as error:
            return self._answer_error(error, check.cost)
        return reply_to_one(decided, check.cost, shadow_outcomes)

    def _answer_error(self, error: TidegateError, cost: int) -> bytes:
        """Answer a check that the gate refused, and reported to telemetry."""
        if isinstance(error, CatalogUnavailable):
            raise CallRefused(Status.UNAVAILABLE, outward(error)[0])
        return reply([Part(error, cost)], [ChargeResult(error)])

    def _parsed(self, payload: bytes) -> Any:
        """The request, with a domain and an accepted number of descriptors."""
        try:
            request = RateLimitRequest.FromString(payload)
        except DecodeError:
            raise self._refused("the message is not a valid envoy.service.ratelimit.v3.RateLimitRequest") from None
        if not request.domain:
            raise self._refused("the request has no domain; set the domain of Envoy's filter to the value of [envoy] domain")
        if not 1 <= len(request.descriptors) <= MAX_DESCRIPTORS:
            raise self._refused(f"the request has {len(request.descriptors)} descriptors; send 1 to {MAX_DESCRIPTORS}")
        return request

    def _is_of_policy(self, request: Any) -> bool:
        return _domain(request) == self._domain

    def _limits_of(self, request: Any) -> DomainLimits | None:
        """The limits of the request's domain from `[envoy] config`; None if it is not defined there."""
        if self._domains is None:
            if not self._is_of_policy(request):
                raise CallRefused(Status.UNAVAILABLE, "[envoy] config is invalid, so no limits are loaded; see the log")
            return None
        return self._domains.get(_domain(request))

    async def _answer_parsed(self, payload: bytes, request: Any) -> bytes:
        """Answer any request."""
        limits = self._limits_of(request)
        if limits is not None:
            entries = [(*self._entries(each, request), _override(each)) for each in request.descriptors]
            parts = await limits.parts(entries)
            sent = [each for each, _, _ in entries]
            if self._limits_of(request) is limits:
                self._requests.add(payload, FileRequest(_domain(request), parts, sent))
            return await self._answer_parts(limits, parts, sent)
        if not self._is_of_policy(request):
            self._warn_unlimited(_domain(request))
            return reply([Part(None, 0)] * len(request.descriptors), [])
        checks = []
        slice_ = TimeSlice()
        for each in request.descriptors:
            if slice_.over:
                await slice_.pause()
            checks.append(self._check_of(each, request))
        return await self._answer_checks(payload, checks)

    async def _answer_adjusting(self, request: Any) -> bytes:
        """Answer a request with descriptors that record hits; all others are decided first, together."""
        signs = [take_sign(each, self._forced_entry) for each in request.descriptors]
        limits = self._limits_of(request)
        sent: list[Entries] = []
        if limits is not None:
            entries = [(*self._entries(each, request), _override(each)) for each in request.descriptors]
            sent = [each for each, _, _ in entries]
            parts = await limits.parts(entries)
            denial = await self._list_denial(sent)
            if denial is not None:
                return denial
        elif self._is_of_policy(request):
            parts = await self._parts([self._check_of(each, request) for each in request.descriptors])
        else:
            self._warn_unlimited(_domain(request))
            return reply([Part(None, 0)] * len(request.descriptors), [])
        deciding = [part for part, sign in zip(parts, signs, strict=True) if not sign or not part.cost]
        if limits is not None:
            decided = iter(await limits.settle(self._gate, deciding))
        else:
            decided = iter(await self._gate.decide([part.plan for part in deciding if part.plan is not None]))
        recorded = [(part.plan, sign) for part, sign in zip(parts, signs, strict=True) if sign and part.cost and part.plan]
        adjusted = iter(await self._gate.adjust(recorded))
        return reply(
            parts,
            [
                next(adjusted if sign and part.cost else decided)
                for part, sign in zip(parts, signs, strict=True)
                if part.plan is not None
            ],
        )

    async def _answer_parts(self, limits: DomainLimits, parts: list[Part], sent: list[Entries]) -> bytes:
        denial = await self._list_denial(sent)
        return denial or reply(parts, await limits.settle(self._gate, parts))

    async def _list_denial(self, sent: list[Entries]) -> bytes | None:
        """The answer to a request for a file's domain that the allow and deny lists refuse; None if they do not."""
        if self._gate.access.lists.active:
            # One blocked descriptor denies the request; an allowed one is counted as the file says.
            checks = [self._descriptor_check(entries, 0) for entries in sent]
            for admitted in await self._gate.access.admit_all(checks):
                if isinstance(admitted, CatalogUnavailable):
                    self._observed(admitted)
                    raise CallRefused(Status.UNAVAILABLE, outward(admitted)[0])
                if isinstance(admitted, TidegateError):
                    return denied(self._observed(admitted))
        return None

    async def _answer_checks(
        self, payload: bytes | None, checks: Sequence[tuple[Check | DescriptorCheck | TidegateError, int]]
    ) -> bytes:
        """Answer a request for the policy's domain; `payload` if it is to be kept."""
        if payload is not None and not any(isinstance(check, TidegateError) for check, _ in checks):
            self._requests.add(payload, checks)  # type: ignore[arg-type]
        parts = await self._parts(checks)
        return reply(parts, await self._gate.decide([part.plan for part in parts if part.plan is not None]))

    async def _parts(self, checks: Sequence[tuple[Check | DescriptorCheck | TidegateError, int]]) -> list[Part]:
        """The plan of each check; their callers are looked up concurrently."""
        plans = iter(await self._gate.plan_many([check for check, _ in checks if not isinstance(check, TidegateError)]))
        parts = [Part(check if isinstance(check, TidegateError) else next(plans), cost) for check, cost in checks]
        for part in parts:
            if isinstance(part.plan, CatalogUnavailable):
                self._observed(part.plan)
                raise CallRefused(Status.UNAVAILABLE, outward(part.plan)[0])
        return parts

    def _check_of(self, descriptor: Any, request: Any) -> tuple[Check | DescriptorCheck | TidegateError, int]:
        """The check of a descriptor of the policy's domain, or its error, and its cost."""
        if descriptor.HasField("limit"):
            raise self._refused(
                f"a descriptor of domain {self._domain!r} has a limit, but limits of this domain come from the policy; "
                "remove the limit, or use a domain of [envoy] config"
            )
        cost = 0
        try:
            entries, cost = self._entries(descriptor, request)
            named: dict[str, Any] = {"cost": cost}
            for key, value in entries:
                field = self._names.get(key)
                if field is None:
                    continue
                if field in named:
                    # With two values, the gateway and the backend may use different ones.
                    raise BadRequest(f"the entry {key!r} appears twice in one descriptor; send it once", field=field)
                named[field] = value
            if "path" not in named:
                return self._descriptor_check(entries, cost), cost
            check = Check.of(**named, paths=self._paths, strict_ip=False)
            attributes = self._attributes(entries)
            return (msgspec.structs.replace(check, attributes=attributes) if attributes else check), cost
        except TidegateError as error:
            return error, cost

    def _descriptor_check(self, entries: Entries, cost: int) -> DescriptorCheck:
        """The check of a descriptor without a path; of two entries with one key the first is used."""
        by_key = dict(reversed(entries))
        named = {self._names[key]: value for key, value in by_key.items() if key in self._names}
        return DescriptorCheck(by_key, named.get("api_key") or None, cost, _address(named.get("ip")))

    def _attributes(self, entries: Entries) -> Mapping[str, str]:
        """The entries that may be attributes: those with the name of one, but for what is read as a part of the check.

        Values of any length: some entries are there for other programs, and the gate bounds those that a rule reads. The first of
        two entries with one key is used, as in descriptors without a path.
        """
        found: dict[str, str] = {}
        for key, value in entries:
            if value and key not in self._names and is_name(key) and key not in RESERVED:
                found.setdefault(key, value)
        return found

    def _entries(self, descriptor: Any, request: Any) -> tuple[Entries, int]:
        """The entries of a descriptor as text, and its cost."""
        if len(descriptor.entries) > MAX_ENTRIES:
            raise self._refused(f"a descriptor has {len(descriptor.entries)} entries; at most {MAX_ENTRIES} are accepted")
        # By the protocol, hits_addend 0 of a request means 1; that of a descriptor may be 0.
        cost = descriptor.hits_addend.value if descriptor.HasField("hits_addend") else max(request.hits_addend, 1)
        # Invalid UTF-8 becomes lone surrogates, which stay distinct and are refused where valid text is required.
        return [
            (entry.key.decode(errors="surrogateescape"), entry.value.decode(errors="surrogateescape"))
            for entry in descriptor.entries
        ], cost

    def _warn_unlimited(self, domain: str) -> None:
        if domain not in self._warned_domains and len(self._warned_domains) < _MAX_WARNED_DOMAINS:
            self._warned_domains.add(domain)
            logger.warning(
                "descriptors of domain %s are not limited: it is neither [envoy] domain (%r) nor in [envoy] config",
                clip(domain),
                self._domain,
            )

    def _refused(self, message: str) -> CallRefused:
        self._observed(BadRequest(message))
        return CallRefused(Status.INVALID_ARGUMENT, message)

    def _observed(self, error: TidegateError) -> TidegateError:
        """Report an error that does not reach the gate to telemetry."""
        if self._observe is not None:
            self._observe(Observation(None, error.code, 0))
        return error


def _address(ip: object) -> str | None:
    """The client address if the entry contains one, else None: rules for descriptors accept any text there."""
    try:
        return None if ip is None else canonical_ip(ip)
    except BadRequest:
        return None


def _domain(request: Any) -> str:
    domain: bytes = request.domain
    return domain.decode(errors="replace")


def _override(descriptor: Any) -> SentLimit | None:
    if not descriptor.HasField("limit"):
        return None
    limit = descriptor.limit
    multiplier = limit.unit_multiplier.value if limit.HasField("unit_multiplier") else 1
    return limit.requests_per_unit, limit.unit, multiplier
