"""Models of the overrides of API keys and customers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from tidegate.admin.models.base import Limits, Quotas, RequestModel, RuleName, Timestamp
from tidegate.timestamps import format_timestamp, now_us


class LimitOverride(RequestModel):
    """Limits or quotas that replace those of a rule, or without a rule the tier's own, for one API key or customer."""

    rule: RuleName | None = None
    limits: Annotated[Limits, Field(description="limits, quotas or both")] = []
    quotas: Quotas = []
    until: Annotated[
        Timestamp | None, Field(description="when it ends by itself; null for never; it takes precedence over a permanent one")
    ] = None

    @model_validator(mode="after")
    def _require_one(self) -> Self:
        if not self.limits and not self.quotas:
            raise ValueError("limits and quotas are both empty: send one of them, or leave the override out")
        return self

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As versions before `until` and `quotas` wrote it, where it has none: they read no unknown fields."""
        return {name: value for name, value in serialize(self).items() if value is not None and (name != "quotas" or value != [])}


Overrides = Annotated[list[LimitOverride], Field(max_length=1000)]


def base_limits(stored: Iterable[Mapping[str, Any]]) -> list[str] | None:
    """The permanent limits that replace the tier's own, of a column `overrides`; None if there are none."""
    return next((each["limits"] for each in stored if _is_base(each)), None)


def listed_overrides(stored: Iterable[Mapping[str, Any]]) -> list[LimitOverride]:
    """All other overrides of a column `overrides`, without those that have ended."""
    now = now_us()
    # Not validated again: the catalog's rows were validated when they were written.
    return [
        LimitOverride.model_construct(
            rule=each["rule"] or None,
            limits=list(each["limits"]),
            quotas=list(each.get("quotas", ())),
            until=format_timestamp(each.get("until_us")),
        )
        for each in stored
        if not _is_base(each) and each.get("until_us", now + 1) > now
    ]


def _is_base(stored: Mapping[str, Any]) -> bool:
    """Whether an override is the permanent one of the tier's own limits, which has a field of its own."""
    return not stored["rule"] and stored.get("until_us") is None and not stored.get("quotas")
