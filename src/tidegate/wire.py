"""Requests and responses of the data plane as JSON, shared by the server and the client."""

from __future__ import annotations

from typing import Final

import msgspec

from tidegate.policy.rules import Mode

MAX_BATCH: Final = 1000
"""Checks of one batch."""
MAX_BATCH_BYTES: Final = 1024 * 1024


class DecisionBody(msgspec.Struct, frozen=True, gc=False):
    """A decision as JSON; times in seconds.

    Args:
        allowed: whether the request may pass.
        limit: the most that can be had at once under the limit with the least left; null where no rule applies.
        remaining: what is left of it.
        reset_after: seconds until it is fully replenished.
        retry_after: seconds until the same cost passes without other requests; 0 when allowed, null when it never will.
        rule: name of the rule; null where none applies.
        degraded: whether the counter store was unavailable.
        overage: units of the check that pass above a quota or a soft limit; 0 where none do.
        customer: name of the caller's customer; null without one.
    """

    allowed: bool
    limit: int | None
    remaining: int | None
    reset_after: float | None
    retry_after: float | None
    rule: str | None
    tier: str | None
    degraded: bool
    overage: int = 0
    customer: str | None = None


class WindowUsageBody(msgspec.Struct, frozen=True, gc=False):
    """What is left of one limit, as JSON.

    Args:
        limit: the most that can be had at once.
        window: seconds that the limit is about; 2678400, the longest, for a calendar month; 0 for requests in progress.
        used: what is consumed of it now; more than `limit` where units above a quota pass.
        remaining: what is left of it.
        resets_at: when it is fully replenished if nothing more is consumed, ISO 8601 in UTC; null where nothing is consumed. Of a
            quota, when its next period begins.
        period: second, minute, hour, day, week, month or year of a quota; null for a limit.
    """

    limit: int
    window: int
    used: int
    remaining: int
    resets_at: str | None
    period: str | None = None


class RuleUsageBody(msgspec.Struct, frozen=True, gc=False):
    """What is left under one rule, as JSON; of its limits the one with the least left.

    Args:
        rule: name of the rule; null for the tier's own limits.
        endpoint: its pattern; null for the tier's own limits, which hold everywhere.
        mode: whether it blocks or only watches.
        subject: whom it counts, several names joined by commas; ip for a caller without an API key or attribute that would be
            counted.
        limit: the most that can be had at once; null if the counter store is unavailable and nothing is counted.
        remaining: what is left of it.
        reset_after: seconds until it is fully replenished.
        window: seconds that the limit is about; 2678400 for a calendar month, 31622400 for a year, the longest ones.
        degraded: whether the counter store was unavailable.
        windows: each limit of the rule, the shortest window first; none if the counter store was unavailable.
    """

    rule: str | None
    endpoint: str | None
    mode: Mode
    subject: str
    limit: int | None
    remaining: int | None
    reset_after: float | None
    window: int | None
    degraded: bool
    windows: tuple[WindowUsageBody, ...] = ()


class UsageBody(msgspec.Struct, frozen=True, gc=False):
    """What is left to a caller, as JSON.

    Args:
        tier: name of the caller's tier.
        rules: the tier's own limits first, then the rules, the highest priority first.
        not_counted: rules that count by ip, where none is known; null is the tier's own limits.
        truncated: whether the tier has more rules than are listed.
    """

    tier: str
    rules: tuple[RuleUsageBody, ...]
    not_counted: tuple[str | None, ...]
    truncated: bool


class CheckRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """The body of `POST /v1/check`. Null counts as left out, for writers that fill in every field.

    Args:
        path: path of the request to decide.
        method: its HTTP method; GET where not given.
        api_key: the caller's key; may come as `X-API-Key` instead.
        ip: the client's address.
        cost: units, 0 (peek) or more, also written as 1.0; 1 where not given.
        attributes: what else is known of the caller, such as `{"user": "42"}`; at most 16, each of at most 256 characters.
        tier: the caller's tier, for a check without an API key; the policy decides where not given.
        bearer: the caller's JSON Web Token, with or without `Bearer` before it; its verified claims are attributes.
    """

    path: str
    method: str | None = "GET"
    api_key: str | None = None
    ip: str | None = None
    cost: int | float | None = 1
    attributes: dict[str, str | None] | None = None
    tier: str | None = None
    bearer: str | None = None


class BatchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /v1/check/batch`.

    Args:
        checks: 1 to 1000 of them.
    """

    checks: list[CheckRequest]


class LimitRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """The body of `POST /v1/limit`. Null counts as absent.

    Args:
        namespace: 1 to 64 of letters, digits, `_`, `.`, `-`.
        subject: whom to count, 1 to 256 characters.
        limits: such as `10/minute`; needed unless the policy has limits for this namespace and subject, which take precedence.
        algorithm: how the limits count; that of the namespace, else sliding_window, if absent.
        cost: units, 0 (peek) or more, also written as 1.0; 1 if absent.
    """

    namespace: str
    subject: str
    limits: tuple[str, ...] | None = ()
    algorithm: str | None = None
    cost: int | float | None = 1


class LimitBatchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /v1/limit/batch`.

    Args:
        checks: 1 to 1000 of them.
    """

    checks: list[LimitRequest]


class HoldRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """The body of `POST /v1/holds`: the fields of a check, or those of a check with its own limits. Null counts as absent.

    Args:
        path: path of the request to decide; needed unless `namespace` is given.
        method: as for `POST /v1/check`.
        cost: the most that the request may cost, units, also written as 1.0; 1 if absent.
        ttl_s: after how many seconds the hold expires unless it is settled, 1 to 3600; 60 if absent.
        clamp: whether a cost above the most that the limits ever admit is lowered to that; refused otherwise.
        namespace: as for `POST /v1/limit`, instead of a check.
    """

    path: str | None = None
    method: str | None = "GET"
    api_key: str | None = None
    ip: str | None = None
    cost: int | float | None = 1
    attributes: dict[str, str | None] | None = None
    tier: str | None = None
    bearer: str | None = None
    ttl_s: int | float | None = 60
    clamp: bool | None = False
    namespace: str | None = None
    subject: str | None = None
    limits: tuple[str, ...] | None = ()
    algorithm: str | None = None


class HoldAnswer(DecisionBody, frozen=True, gc=False):
    """The answer to `POST /v1/holds`: the decision, and the hold.

    Args:
        hold: its id; null where it was denied.
        reserved: units reserved.
        expires_after: seconds until it expires; null where it was denied.
    """

    hold: str | None = None
    reserved: int = 0
    expires_after: int | None = None


class SettleRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """The body of `POST /v1/holds/{id}/settle`.

    Args:
        cost: units that were used, also written as 1.0; 0 cancels the hold. Where the rule counts failures: 1 for a failure, else
            0.
        success: whether the request succeeded; where the rule has `clear_on_success`, the failures before it are forgotten.
    """

    cost: int | float
    success: bool | None = None


class HoldSettledBody(msgspec.Struct, frozen=True, gc=False):
    """The answer to a settlement.

    Args:
        hold: id of the hold.
        cost: units charged; those of the first settlement where it is repeated.
        late: whether the hold had expired, so that they were charged only now.
        limit: the most that can be had at once under the limit with the least left; null where no limit applies.
        remaining: what is left of it; 0 as long as more was used than the limit admits.
        reset_after: seconds until it is fully replenished.
    """

    hold: str
    cost: int
    late: bool
    limit: int | None
    remaining: int | None
    reset_after: float | None


class RenewRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """The body of `POST /v1/holds/{id}/renew`.

    Args:
        ttl_s: after how many seconds from now the hold expires, 1 to 3600.
    """

    ttl_s: int | float


class HoldRenewedBody(msgspec.Struct, frozen=True, gc=False):
    """The answer to a renewal.

    Args:
        hold: id of the hold.
        expires_after: seconds until it expires.
    """

    hold: str
    expires_after: int


class ReserveRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """The body of `POST /v1/reserve`: the fields of a check, or those of a check with its own limits. Null counts as absent.

    Args:
        at_most_s: how far ahead the moment may be, s, 0 to 3600.
        path: path of the request to decide; needed unless `namespace` is given.
        method: as for `POST /v1/check`.
        cost: units, 0 (reads the moment) or more, also written as 1.0; 1 if absent.
        namespace: as for `POST /v1/limit`, instead of a check.
    """

    at_most_s: int | float
    path: str | None = None
    method: str | None = "GET"
    api_key: str | None = None
    ip: str | None = None
    cost: int | float | None = 1
    attributes: dict[str, str | None] | None = None
    tier: str | None = None
    bearer: str | None = None
    namespace: str | None = None
    subject: str | None = None
    limits: tuple[str, ...] | None = ()
    algorithm: str | None = None


class ReserveAnswer(DecisionBody, frozen=True, gc=False):
    """The answer to `POST /v1/reserve`: the decision, and the place.

    Args:
        wait_s: seconds until the caller may go; 0 where it may go now, or was denied.
        reservation: id, to give the place back before its moment; null where there is nothing to give back.
    """

    wait_s: float = 0.0
    reservation: str | None = None


class ReservationCancelledBody(msgspec.Struct, frozen=True, gc=False):
    """The answer to `POST /v1/reserve/{id}/cancel`.

    Args:
        reservation: id of the reservation.
        given_back: whether all its units are available again.
    """

    reservation: str
    given_back: bool


def whole_cost(cost: float | None) -> float:
    """The cost of a request: 1 if absent; a JSON number such as 1.0 is the whole number that it equals.

    Args:
        cost: as it came.

    Returns:
        An int, or the float that is not whole.
    """
    if type(cost) is int:
        return cost
    if cost is None:
        return 1
    return int(cost) if float(cost).is_integer() else cost
