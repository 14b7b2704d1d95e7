"""Events, and the rows that they become: one for each URL, with an id that all instances compute alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from tidegate.algorithms.calendar import bounds_of
from tidegate.catalog.sql.column_text import shorten
from tidegate.counters.crossings import Crossing
from tidegate.policy.limits import Limit
from tidegate.policy.notify import EventType, NotifyTarget
from tidegate.policy.quotas import QuotaLimit
from tidegate.timestamps import format_timestamp

MAX_SUBJECT: Final = 400
PENDING: Final = "pending"
DELIVERED: Final = "delivered"
FAILED: Final = "failed"

_KINDS: Final = {"k": "api_key", "i": "ip", "t": "tier", "c": "customer", "a": "attributes"}


class Event(msgspec.Struct, frozen=True):
    """Something that a URL may be notified of.

    Args:
        type: what happened.
        key: what distinguishes it from other events of its type, the same on every instance.
        subject: whom it is about: `k:` and a key's id, `c:` and a customer, `i:` and an address, `t:` and a tier, `a:` and
            attributes, `b:` and a block's id.
        at_us: when, µs since the epoch.
        data: the content of `data` in the body.
        tier: name of the tier that it is about; None for none.
    """

    type: EventType
    key: tuple[str | int, ...]
    subject: str
    at_us: int
    data: dict[str, Any]
    tier: str | None = None

    @property
    def body(self) -> bytes:
        """What is sent: JSON as Standard Webhooks recommends it."""
        return msgspec.json.encode({"type": self.type.value, "timestamp": format_timestamp(self.at_us), "data": self.data})

    def rows(self, targets: Iterable[NotifyTarget], now_us: int, give_up_us: int) -> list[dict[str, Any]]:
        """The rows of `notifications` for this event, at most one for each URL.

        Args:
            targets: those that want it.
            now_us: µs since the epoch.
            give_up_us: for how long delivery is attempted, µs.
        """
        body = self.body.decode()
        return [
            {
                "id": message_id(url, self),
                "event": self.type.value,
                "subject": shorten(self.subject, MAX_SUBJECT),
                "url": url,
                "body": body,
                "status": PENDING,
                "attempts": 0,
                "created_at_us": now_us,
                "next_at_us": now_us,
                "give_up_at_us": now_us + give_up_us,
            }
            for url in dict.fromkeys(target.url for target in targets)
        ]


def message_id(url: str, event: Event) -> str:
    """The id of an event at a URL: `webhook-id`, and the key of its row."""
    digest = hashlib.sha256(msgspec.json.encode((url, event.type.value, *event.key)))
    return f"msg_{digest.hexdigest()[:32]}"


def crossing_key(crossing: Crossing) -> tuple[str | int, ...]:
    """What distinguishes a crossing from others: counter, subject, limit, the window it is in, and the percentage.

    A limit that was changed is another limit: its thresholds are reported again.
    """
    limit = crossing.limit
    window_us, _ = window_of(limit, crossing.at_us)
    return crossing.limits.name, crossing.subject, limit.text, window_us, crossing.percent


def threshold_event(crossing: Crossing) -> Event:
    """The event of a crossed threshold."""
    limits, limit, subject = crossing.limits, crossing.limit, crossing.subject
    starts_us, ends_us = window_of(limit, crossing.at_us)
    data = {
        "subject": subject,
        "subject_kind": _KINDS.get(subject[:1], "other"),
        "tier": limits.tier,
        "rule": limits.rule,
        "kind": "quota" if isinstance(limit, QuotaLimit) else "limit",
        "limit": limit.text,
        "amount": limit.capacity,
        "percent": crossing.percent,
        "used": crossing.used,
        "window_start": format_timestamp(starts_us),
        "window_end": format_timestamp(ends_us),
    }
    return Event(EventType.THRESHOLD, crossing_key(crossing), subject, crossing.at_us, data, limits.tier)


def window_of(limit: Limit, at_us: int) -> tuple[int, int]:
    """The window of a limit in which a threshold is reported once: the period of a quota, or the window aligned to the epoch.

    Args:
        at_us: a moment in it, µs since the epoch.

    Returns:
        Start (inside) and end (outside), µs since the epoch.
    """
    if isinstance(limit, QuotaLimit):
        return limit.clock.bounds(at_us)
    if limit.is_calendar:
        return bounds_of(limit, at_us)
    starts_us = at_us - at_us % limit.window_us
    return starts_us, starts_us + limit.window_us
