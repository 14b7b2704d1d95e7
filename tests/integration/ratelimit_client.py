"""A client of the rate limit service, and requests as Envoy sends them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from tidegate.doors.grpc.messages import HealthCheckRequest, HealthCheckResponse, RateLimitRequest, RateLimitResponse

TIMEOUT_S = 10
SHOULD_RATE_LIMIT = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit"

Descriptor = Sequence[tuple[str | bytes, str | bytes]]


def request(*descriptors: Descriptor, domain: str = "tidegate", hits: int = 0, own_hits: Sequence[int | None] = ()) -> Any:
    """A request.

    Args:
        descriptors: pairs of key and value of each.
        domain: as Envoy's filter has it.
        hits: of the request; 0 as where it is not given.
        own_hits: of the descriptors, where they have some.
    """
    message = RateLimitRequest(domain=domain.encode(), hits_addend=hits)
    for number, entries in enumerate(descriptors):
        descriptor = message.descriptors.add()
        for key, value in entries:
            descriptor.entries.add(key=_bytes(key), value=_bytes(value))
        own = own_hits[number] if number < len(own_hits) else None
        if own is not None:
            descriptor.hits_addend.value = own
            descriptor.hits_addend.SetInParent()
    return message


def ask(address: str, message: Any, **metadata: str) -> Any:
    """Ask `ShouldRateLimit` once, over a connection of its own; `_` in a name of metadata stands for `-`."""
    with grpc.insecure_channel(address) as channel:
        sent = [(name.replace("_", "-"), value) for name, value in metadata.items()]
        return caller(channel)(message, timeout=TIMEOUT_S, wait_for_ready=True, metadata=sent)


def caller(channel: grpc.Channel) -> Any:
    """`ShouldRateLimit` over a channel; bytes go as they are."""
    return channel.unary_unary(
        SHOULD_RATE_LIMIT,
        request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
        response_deserializer=RateLimitResponse.FromString,
    )


def health(channel: grpc.Channel, service: str = "") -> int:
    """`grpc.health.v1.Health/Check`."""
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check", lambda message: message.SerializeToString(), HealthCheckResponse.FromString
    )
    return int(check(HealthCheckRequest(service=service), timeout=TIMEOUT_S, wait_for_ready=True).status)


def watch(channel: grpc.Channel, service: str = "") -> Any:
    """`grpc.health.v1.Health/Watch`: an iterator of responses."""
    begin = channel.unary_stream(
        "/grpc.health.v1.Health/Watch", lambda message: message.SerializeToString(), HealthCheckResponse.FromString
    )
    return begin(HealthCheckRequest(service=service), timeout=60, wait_for_ready=True)


def headers(response: Any) -> dict[str, str]:
    """The headers of a response."""
    return {header.key: header.value for header in response.response_headers_to_add}


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()
