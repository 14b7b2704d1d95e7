"""The messages of the two services: only the fields that are used, in the wire format of Envoy 1.40.

Defined here because the packages of all Envoy interfaces take 24 MB and 0.12 s to import, and occupy the module name `envoy`.
Text from end clients is declared as bytes, because protobuf refuses a whole message for one byte that is not UTF-8, and Envoy in
fail-open mode would let that request pass. Enumerations are plain integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2

OK: Final = 1
OVER_LIMIT: Final = 2

SERVING: Final = 1
NOT_SERVING: Final = 2
SERVICE_UNKNOWN: Final = 3

_Field = descriptor_pb2.FieldDescriptorProto
_PACKAGE: Final = "tidegate"
_KINDS: Final = {
    "bool": _Field.TYPE_BOOL,
    "bytes": _Field.TYPE_BYTES,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "uint32": _Field.TYPE_UINT32,
    "uint64": _Field.TYPE_UINT64,
    "string": _Field.TYPE_STRING,
}
_STRUCT: Final = ".google.protobuf.Struct"
# Name, number and type of each field; * means repeated, and names that are not in _KINDS are messages.
_MESSAGES: Final[Mapping[str, tuple[tuple[str, int, str], ...]]] = {
    "Duration": (("seconds", 1, "int64"), ("nanos", 2, "int32")),
    "UInt32Value": (("value", 1, "uint32"),),
    "UInt64Value": (("value", 1, "uint64"),),
    "HeaderValue": (("key", 1, "string"), ("value", 2, "string")),
    "Entry": (("key", 1, "bytes"), ("value", 2, "bytes")),
    "LimitOverride": (("requests_per_unit", 1, "uint32"), ("unit", 2, "int32"), ("unit_multiplier", 3, "UInt32Value")),
    "RateLimitDescriptor": (
        ("entries", 1, "*Entry"),
        ("limit", 2, "LimitOverride"),
        ("hits_addend", 3, "UInt64Value"),
        ("is_negative_hits", 4, "bool"),
    ),
    "RateLimitRequest": (("domain", 1, "bytes"), ("descriptors", 2, "*RateLimitDescriptor"), ("hits_addend", 3, "uint32")),
    "RateLimit": (
        ("requests_per_unit", 1, "uint32"),
        ("unit", 2, "int32"),
        ("name", 3, "string"),
        ("unit_multiplier", 4, "UInt32Value"),
    ),
    "DescriptorStatus": (
        ("code", 1, "int32"),
        ("current_limit", 2, "RateLimit"),
        ("limit_remaining", 3, "uint32"),
        ("duration_until_reset", 4, "Duration"),
    ),
    "RateLimitResponse": (
        ("overall_code", 1, "int32"),
        ("statuses", 2, "*DescriptorStatus"),
        ("response_headers_to_add", 3, "*HeaderValue"),
        ("request_headers_to_add", 4, "*HeaderValue"),
        ("raw_body", 5, "bytes"),
        ("dynamic_metadata", 6, _STRUCT),
    ),
    "HealthCheckRequest": (("service", 1, "string"),),
    "HealthCheckResponse": (("status", 1, "int32"),),
}


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="tidegate/envoy.proto", package=_PACKAGE, syntax="proto3")
    file.dependency.append(struct_pb2.DESCRIPTOR.name)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, number, kind in fields:
            bare = kind.removeprefix("*")
            field = message.field.add(
                name=field_name,
                number=number,
                label=_Field.LABEL_REPEATED if kind.startswith("*") else _Field.LABEL_OPTIONAL,
                type=_KINDS.get(bare, _Field.TYPE_MESSAGE),
            )
            if bare not in _KINDS:
                field.type_name = bare if bare == _STRUCT else f".{_PACKAGE}.{bare}"
    return file


def _messages() -> dict[str, Any]:
    # A separate pool: a program that imports Tidegate may have the Envoy interfaces in the default one.
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(struct_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(_file())
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES}


_CLASSES: Final = _messages()
RateLimitRequest: Any = _CLASSES["RateLimitRequest"]
RateLimitResponse: Any = _CLASSES["RateLimitResponse"]
HealthCheckRequest: Any = _CLASSES["HealthCheckRequest"]
HealthCheckResponse: Any = _CLASSES["HealthCheckResponse"]
