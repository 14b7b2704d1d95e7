"""Models of the overrides of API keys and customers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from tidegate.admin.models.base import LimitText, RequestModel, RuleLimits, RuleName, Timestamp
from tidegate.timestamps import format_timestamp, now_us


class LimitOverride(RequestModel):
    """Limits of one API key or customer in place of a rule's, or without a rule of the tier's own limits, or of its quotas."""

    rule: RuleName | None = None
    limits: RuleLimits | None = None
    quotas: Annotated[list[LimitText] | None, Field(min_length=1, max_length=16, examples=[["150000/month"]])] = None
    until: Annotated[
        Timestamp | None, Field(description="when it ends by itself; null for never; it takes precedence over a permanent one")
    ] = None

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As versions before `until` wrote it, where it has none: they read no unknown fields."""
        return {name: value for name, value in serialize(self).items() if value is not None}


Overrides = Annotated[list[LimitOverride], Field(max_length=1000)]


def base_limits(stored: Iterable[Mapping[str, Any]]) -> list[str] | None:
    """The permanent limits that replace the tier's own, of a column `overrides`; None if there are none."""
    base = (each for each in stored if not each["rule"] and not each.get("quotas") and each.get("until_us") is None)
    return next((each["limits"] for each in base), None)


def listed_overrides(stored: Iterable[Mapping[str, Any]]) -> list[LimitOverride]:
    """All other overrides of a column `overrides`, without those that have ended."""
    now = now_us()
    # Not validated again: the catalog's rows were validated when they were written.
    return [
        LimitOverride.model_construct(
            rule=each["rule"] or None,
            limits=list(each["limits"]) or None,
            quotas=list(each["quotas"]) if each.get("quotas") else None,
            until=format_timestamp(each.get("until_us")),
        )
        for each in stored
        if (each["rule"] or each.get("quotas") or each.get("until_us") is not None) and each.get("until_us", now + 1) > now
    ]
