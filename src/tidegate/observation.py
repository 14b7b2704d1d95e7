"""What the gate saw while answering checks (`Observation`): telemetry, the ledger and violations read it."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from tidegate.decision import Decision
from tidegate.policy.limits import LimitSet


class ShadowDenial(msgspec.Struct, frozen=True, gc=False):
    """A check that a shadow rule would have denied.

    Args:
        at_us: the counter store's clock, µs since the epoch.
    """

    tier: str
    rule: str
    subject: str
    at_us: int


class UsageMemo:
    """What a caller's checks have used since the last write, under the rule and subject that it was counted for first.

    Kept by the cached caller, so that such a check is counted without a look-up, and without reading any memory that the check
    has not read already. Written and read by `tidegate.ledger.aggregate` alone.

    Attributes:
        key_id: id of the caller's API key; empty without one.
        customer: name of the customer that it belongs to; empty without one.
        usage_minute: `tidegate.ledger.aggregate.Minute` that the units belong to; None while there are none.
        usage_answer: what answered, as in the key of an entry.
        usage_subject: whom it counted.
        usage_admitted: units admitted.
        usage_blocked: units blocked.
        usage_over: of the admitted units, those above a quota or a soft limit.
        usage_others: entries of the same minute by what answered, where that was something else; None without any.
    """

    __slots__ = (
        "customer",
        "key_id",
        "usage_admitted",
        "usage_answer",
        "usage_blocked",
        "usage_minute",
        "usage_others",
        "usage_over",
        "usage_subject",
    )

    def __init__(self, key_id: str = "", customer: str = "") -> None:
        self.key_id = key_id
        self.customer = customer
        self.usage_minute: Any = None
        self.usage_answer: Any = None
        self.usage_subject: str | None = None
        self.usage_admitted = self.usage_blocked = self.usage_over = 0
        self.usage_others: dict[Any, Any] | None = None


class Observation(msgspec.Struct, frozen=True, gc=False):
    """What the gate saw while answering one check; telemetry reads it, nothing else does.

    Args:
        decision: the answer, or None where the check was refused.
        error: code of the error where it was refused, else None.
        latency_ns: time spent in the gate, ns; for a batch, its share.
        shadow_denied: names of the shadow rules that would have denied.
        subject: whom the rule counted, or whom the tier's own limits did, where these denied; None where nothing limits it.
        denied_by: the limits that denied: the rule's or the tier's own; None where the check passed.
        cost: units of the check.
        key_id: id of the caller's API key; empty without one.
        customer: name of the customer that the caller belongs to; empty without one.
        shadow_denials: what the shadow rules of `shadow_denied` would have denied, and to whom.
        memo: of the caller with this API key and customer; None where it is not cached.
        held: whether the cost is reserved by a hold, whose settlement reports what was charged.
    """

    decision: Decision | None
    error: str | None
    latency_ns: int
    shadow_denied: tuple[str, ...] = ()
    subject: str | None = None
    denied_by: LimitSet | None = None
    cost: int = 1
    key_id: str = ""
    customer: str = ""
    shadow_denials: tuple[ShadowDenial, ...] = ()
    memo: UsageMemo | None = None
    held: bool = False


PassedCheck: TypeAlias = tuple[Decision, int, int, str, UsageMemo]
"""What telemetry reads of a check that its limits let pass, without shadow rules: the decision, the time spent in the gate in ns,
the cost, whom the rule counted, and the memo of the caller. Made at a tenth of the cost of an `Observation`."""
