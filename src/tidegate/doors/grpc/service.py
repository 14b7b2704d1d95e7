"""`ShouldRateLimit`: converts requests to checks, and decisions to answers.

Descriptors of the domain `[envoy] domain` are checks under the policy: by path if they have one, else by the rules for
descriptors; all are charged or none. Descriptors of a domain from `[envoy] config` are counted by that file, each independently.
Those of any other domain are allowed, with a warning in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import msgspec
from google.protobuf.message import DecodeError

from tidegate.decision import Check, Observation, canonical_ip, clip
from tidegate.doors.grpc.messages import RateLimitRequest
from tidegate.doors.grpc.replies import Part, denied, reply
from tidegate.doors.grpc.status import CallRefused, Status
from tidegate.doors.outward import outward
from tidegate.errors import BadRequest, CatalogUnavailable, RequestTooLarge, TidegateError
from tidegate.gate.charging import ChargeResult
from tidegate.gate.gate import Gate
from tidegate.gate.subjects import DescriptorCheck
from tidegate.policy.attributes import RESERVED, is_name
from tidegate.policy.paths import STRICT, PathRules
from tidegate.settings import EnvoySettings
from tidegate.telemetry.requests import note
from tidegate.time_slice import TimeSlice

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES: Final = 1024 * 1024
"""Far more than the 60 KB of headers that Envoy accepts by default, so that no client request exceeds it."""

MAX_DESCRIPTORS: Final = 100
MAX_ENTRIES: Final = 64

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
        gate: the gate.
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
        self._path_entry = settings.path_entry
        self._paths = paths
        self._observe = observe
        self._warned_domains: set[str] = set()
        self.domains: Mapping[str, DomainLimits] | None = {}

    async def answer(self, payload: bytes) -> bytes:
        """Answer one request.

        Args:
            payload: a `RateLimitRequest`.

        Returns:
            A `RateLimitResponse`.

        Raises:
            CallRefused: if the request is invalid (the gateway is misconfigured), or the catalog is unavailable.
        """
        if len(payload) > MAX_MESSAGE_BYTES:
            return denied(
                self._observed(RequestTooLarge(f"the request has {len(payload)} bytes; at most {MAX_MESSAGE_BYTES} are accepted"))
            )
        try:
            request = RateLimitRequest.FromString(payload)
        except DecodeError:
            raise self._refused("the message is not a valid envoy.service.ratelimit.v3.RateLimitRequest") from None
        domain, descriptors = request.domain.decode(errors="replace"), request.descriptors
        if not domain:
            raise self._refused("the request has no domain; set the domain of Envoy's filter to the value of [envoy] domain")
        if not 1 <= len(descriptors) <= MAX_DESCRIPTORS:
            raise self._refused(f"the request has {len(descriptors)} descriptors; send 1 to {MAX_DESCRIPTORS}")
        domains = self.domains
        if domains is None:
            if domain != self._domain:
                raise CallRefused(Status.UNAVAILABLE, "[envoy] config is invalid, so no limits are loaded; see the log")
            domains = {}
        limits = domains.get(domain)
        if limits is not None:
            entries = [(*self._entries(each, request), _override(each)) for each in descriptors]
            parts = await limits.parts(entries)
            return reply(parts, await limits.settle(self._gate, parts))
        if domain != self._domain:
            self._warn_unlimited(domain)
            return reply([Part(None, 0)] * len(descriptors), [])
        checks = []
        slice_ = TimeSlice()
        for each in descriptors:
            if slice_.over:
                await slice_.pause()
            checks.append(self._check_of(each, request))
        parts = await self._parts(checks)
        return reply(parts, await self._gate.decide([part.plan for part in parts if part.plan is not None]))

    async def _parts(self, checks: list[tuple[Check | DescriptorCheck | TidegateError, int]]) -> list[Part]:
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
                api_key = named.get("api_key") or None
                # The first of two entries with one key is used.
                by_key = dict(reversed(entries))
                return DescriptorCheck(by_key, None if api_key is None else str(api_key), cost, _address(named.get("ip"))), cost
            check = Check.of(**named, paths=self._paths, strict_ip=False)
            attributes = self._attributes(entries)
            if attributes:
                check = msgspec.structs.replace(check, attributes=attributes)
            if len(request.descriptors) == 1:
                note(check)
            return check, cost
        except TidegateError as error:
            return error, cost

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
        if descriptor.is_negative_hits:
            raise CallRefused(Status.UNIMPLEMENTED, "negative hits are not supported; send hits_addend of 0 or more")
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


def _override(descriptor: Any) -> SentLimit | None:
    if not descriptor.HasField("limit"):
        return None
    limit = descriptor.limit
    multiplier = limit.unit_multiplier.value if limit.HasField("unit_multiplier") else 1
    return limit.requests_per_unit, limit.unit, multiplier
