"""Base classes and field types of the models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Generic, Literal, Self, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

MAX_LIMITS = 16

JsonObject: TypeAlias = dict[str, Any]
Row: TypeAlias = Mapping[Any, Any]

_CONTROL = re.compile(r"[\x00-\x1f\x7f]").search
_KEY_ID = re.compile(r"[0-9a-f]{24}", re.ASCII)
_Item = TypeVar("_Item")


def _plain(text: str) -> str:
    # PostgreSQL rejects NUL, and names should have no other control characters either.
    if _CONTROL(text) is not None:
        raise ValueError("must not have control characters")
    return text


def is_key_id(text: str) -> bool:
    """Whether a text has the format of an API key's id: 24 hex digits."""
    return _KEY_ID.fullmatch(text) is not None


def _key_id(text: str) -> str:
    # The command line inserts it into a path.
    if not is_key_id(text):
        raise ValueError("must have 24 hex digits")
    return text


Plain = AfterValidator(_plain)
KeyId = Annotated[str, AfterValidator(_key_id)]
Name = Annotated[str, Field(max_length=200), Plain]
Reason = Annotated[str, Field(min_length=1, max_length=1000), Plain]
TierName = Annotated[str, Field(min_length=1, max_length=64), Plain]
RuleName = Annotated[str, Field(min_length=1, max_length=256), Plain]
LimitText = Annotated[str, Field(max_length=80, examples=["100/minute"]), Plain]
Limits = Annotated[list[LimitText], Field(max_length=MAX_LIMITS)]
RuleLimits = Annotated[list[LimitText], Field(min_length=1, max_length=MAX_LIMITS)]
Quotas = Annotated[
    list[Annotated[str, Field(max_length=80, examples=["100000/month"]), Plain]],
    Field(max_length=MAX_LIMITS, description="fixed periods of the calendar, one quota for each of them at most"),
]
Timestamp = Annotated[
    str, Field(max_length=40, examples=["2030-01-31T00:00:00Z"], description="ISO 8601 with a UTC offset"), Plain
]
Algorithm = Literal["fixed_window", "sliding_window", "sliding_log", "token_bucket", "leaky_bucket"]
SubjectName = Annotated[str, Field(max_length=32, pattern="^[a-z][a-z0-9_]*$")]
Subject = Annotated[
    SubjectName | list[SubjectName],
    Field(
        examples=["user"],
        description='api_key, ip, tier or an attribute; a list counts each combination, such as ["org", "user"]',
    ),
]
Match = Annotated[
    dict[SubjectName, Annotated[str, Field(min_length=1, max_length=256)]],
    Field(max_length=16, examples=[{"plan": "pro"}], description="attributes and their patterns, all of which must match"),
]
OnMissing = Literal["ip", "skip", "deny"]
Mode = Literal["enforce", "shadow", "soft"]
OnFailure = Literal["default", "local", "allow", "deny"]
Role = Literal["viewer", "operator"]


class RequestModel(BaseModel):
    """A request body: exact types, no unknown fields. Null counts as omitted if the default is not null."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        """Some clients send every field of the schema."""
        if not isinstance(body, dict):
            return body
        optional = cls._defaulted()
        return {name: value for name, value in body.items() if value is not None or name not in optional}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The same in the OpenAPI description: these fields accept null."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name in cls._defaulted() & properties.keys():
            described = dict(properties[name])
            outside = {key: described.pop(key) for key in ("default", "title") if key in described}
            properties[name] = {"anyOf": [described, {"type": "null"}], **outside}
        return schema

    @classmethod
    def _defaulted(cls) -> frozenset[str]:
        return frozenset(
            name for name, field in cls.model_fields.items() if not field.is_required() and field.default is not None
        )


class OverageUpTo(RequestModel):
    """So much passes above a quota, reported as over."""

    up_to: Annotated[str, Field(max_length=16, pattern="^[0-9]{1,6} *%$", examples=["20%"])]


OverageField = Annotated[
    OverageUpTo | bool,
    Field(description='whether requests above the quotas pass, reported as over; {"up_to": "20%"} up to there'),
]


class ResponseModel(BaseModel):
    """A response of the control plane. The command line reads the same models and ignores fields of later versions."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"additionalProperties": False})

    @classmethod
    def _from_columns(cls, row: Row, **computed: Any) -> Self:
        """Of a row with a column for every field that is not computed; `warnings` keeps its default."""
        columns = {name: row[name] for name in cls.model_fields if name not in computed and name != "warnings"}
        return cls(**columns, **computed)


class Resource(ResponseModel):
    """A row of the catalog, as responses and the audit log contain it, without keys, tokens or digests."""

    def audited(self) -> JsonObject:
        """The fields written to the audit log: all except the warnings of a response."""
        return self.model_dump(exclude={"warnings"})


class PageModel(ResponseModel, Generic[_Item]):
    """A page of a list; send `next` as `after` for the next page; null on the last page."""

    items: list[_Item]
    next: str | None
