"""Holds of a counter store: what `open_hold` gives out, what `settle_hold` answers, and what can be wrong with an id.

A hold reserves its cost under all counters of a check in one atomic step, until it is settled or expires by the store's clock.
Its id says where the store finds it, so that any instance can settle it: nothing about open holds is kept in the process, except
by counters in memory. The store remembers a settled hold for two minutes at least, and an expired one for an hour.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, Protocol, cast, runtime_checkable

import msgspec

from tidegate.counters import Counters
from tidegate.counters.handle_text import ID, TO_STANDARD, handle_of, is_counter, text_of
from tidegate.counters.watched import WatchedSet
from tidegate.decision import Decision
from tidegate.errors import BadRequest, HoldEnded, HoldNotFound, TooManyHolds, clip
from tidegate.policy.limits import MAX_AMOUNT

MIN_TTL_S: Final = 1
MAX_TTL_S: Final = 3600
DEFAULT_TTL_S: Final = 60
MAX_HOLDS: Final = 100_000
"""Most open holds of one counter, unless the store is made with another number."""
ID_BYTES: Final = 12
MAX_NAME: Final = 1024
"""Most characters of a name or subject in an id."""
SETTLED_KNOWN_US: Final = 120_000_000
"""How long a settled hold is known at least, µs; the same number is in the Lua."""
EXPIRED_KNOWN_US: Final = 3_600_000_000
"""How long an expired hold is known, µs; the same number is in the Lua."""


class HeldCounter(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A counter that a hold charged.

    Args:
        tag: hash tag of its subject.
        name: the rest of its key.
        parameters: of its limits, as the scripts take them.
        record: what was charged; empty where nothing was.
        watched: its limits, where any of their thresholds was watched when the hold was opened.
        subject: that it counts; empty where it is not watched.
    """

    tag: bytes
    name: bytes
    parameters: bytes
    record: bytes
    watched: WatchedSet | None = None
    subject: str = ""


class HoldAccount(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where the ledger counts what a hold is charged in the end. Empty texts for none.

    Args:
        tier: of the rule.
        subject: that the rule counted.
        key_id: public id of the API key.
        customer: name of the customer.
        overage: units of the reservation above a quota or a soft limit.
        whole: whether the reserved cost is charged whatever the settlement says: of a rule that counts failures.
    """

    tier: str
    subject: str
    key_id: str = ""
    customer: str = ""
    overage: int = 0
    whole: bool = False

    def units_of(self, cost: int, used: int) -> tuple[int, int]:
        """Units that count as admitted, and those of them above a quota or a soft limit.

        Args:
            cost: units that the hold reserved.
            used: units that its settlement charged.
        """
        units = cost if self.whole else used
        # What goes back is taken from the units above the limit first; what was used beyond them is above it too.
        return units, max(self.overage + units - cost, 0) if self.overage else 0


class HoldHandle(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the id of a hold says.

    Args:
        id: 16 characters, drawn at random.
        cost: units reserved.
        rule: name of the rule that answered; None for none.
        parts: its counters in Redis, those of one server together; none where the store finds it by its id alone.
        counted: whether the store knows the hold. One that nothing limits, or that was opened while the store was unavailable,
            ends without effect: what the fallback admitted stays charged.
        account: where the ledger counts it; None where it counts nothing more.
    """

    id: str
    cost: int
    rule: str | None = None
    parts: tuple[tuple[HeldCounter, ...], ...] = ()
    counted: bool = True
    account: HoldAccount | None = None

    @property
    def text(self) -> str:
        """The id as callers have it: letters, digits, `-` and `_`."""
        return text_of(self)

    @classmethod
    def of(cls, text: object) -> HoldHandle:
        """Read an id.

        Args:
            text: as a caller sent it.

        Returns:
            The handle.

        Raises:
            BadRequest: if it is no id of a hold.
        """
        handle = handle_of(text, _DECODER)
        if handle is not None and _is_plausible(handle):
            return handle
        raise BadRequest(
            f"hold {clip(text)} is not an id: send the value of 'hold' in the answer of POST /v1/holds", field="hold"
        )


_DRAWN: Final[list[str]] = []
_DRAWN_AT_ONCE: Final = 64
# A process that is forked must not give out the same ids.
os.register_at_fork(after_in_child=_DRAWN.clear)
_DECODER: Final = msgspec.msgpack.Decoder(HoldHandle)


def _is_plausible(handle: HoldHandle) -> bool:
    """Whether a handle could have been made here: what it names is looked up in the store."""
    for part in handle.parts:
        if not part or not all(map(is_counter, part)):
            return False
        for counter in part:
            if counter.subject and (len(counter.subject) > MAX_NAME or not counter.subject.isprintable()):
                return False
    return (
        ID.fullmatch(handle.id) is not None
        and 0 <= handle.cost <= MAX_AMOUNT
        and len(handle.rule or "") <= MAX_NAME
        and (handle.account is None or _is_plausible_account(handle.account))
    )


def _is_plausible_account(account: HoldAccount) -> bool:
    for text in (account.tier, account.subject, account.key_id, account.customer):
        if len(text) > MAX_NAME or not text.isprintable():
            return False
    return 0 <= account.overage <= MAX_AMOUNT


def new_id() -> str:
    """An id that cannot be guessed: 96 bits in base64. Random numbers are drawn for many at once: a system call each costs more
    than the rest of a hold in memory.
    """
    while True:
        try:
            return _DRAWN.pop()
        except IndexError:
            text = base64.urlsafe_b64encode(os.urandom(ID_BYTES * _DRAWN_AT_ONCE)).decode()
            _DRAWN.extend(text[start : start + 16] for start in range(0, len(text), 16))


def raw_id(text: str) -> bytes:
    """The 12 bytes of an id."""
    return binascii.a2b_base64(text.encode().translate(TO_STANDARD))


class HoldSettlement(msgspec.Struct, frozen=True, gc=False):
    """What became of a hold.

    Args:
        cost: units charged.
        late: whether it had expired, so that they were charged only now.
        limit: the most that can be had at once under the limit with the least left; None where nothing limits it.
        remaining: what is left of it.
        reset_after_us: µs until it is fully replenished.
        repeated: whether it had been settled before.
    """

    cost: int
    late: bool = False
    limit: int | None = None
    remaining: int | None = None
    reset_after_us: int | None = None
    repeated: bool = False


@runtime_checkable
class HoldingCounterStore(Protocol):
    """A counter store that keeps holds."""

    async def open_hold(
        self, counters: Counters, cost: int, ttl_us: int, rule: str | None = None
    ) -> tuple[Decision, HoldHandle | None]:
        """Decide several counters and reserve a cost under all of them or none.

        Args:
            counters: as those of a `Charge`.
            cost: units, 0 or more.
            ttl_us: after how many µs the hold expires.
            rule: for the handle.

        Returns:
            The decision, and the hold; None where it was denied.

        Raises:
            StoreUnavailable: if the store does not answer.
            TooManyHolds: if a counter has too many open holds.
        """
        ...

    async def settle_hold(self, handle: HoldHandle, cost: int, success: bool = False) -> HoldSettlement:
        """End a hold and charge exactly what was used, also above the limits; nothing more happens the second time.

        Args:
            handle: the hold.
            cost: units used, 0 or more. Where a counter of the hold counts failures, above 0 for a failure; then all others are
                charged what the hold reserved.
            success: whether the request succeeded, which may clear a counter of failures.

        Returns:
            What became of it.

        Raises:
            StoreUnavailable: if the store does not answer; it is safe to try again.
            HoldNotFound: if the store does not know the hold.
        """
        ...

    async def renew_hold(self, handle: HoldHandle, ttl_us: int) -> None:
        """Move the moment at which an open hold expires.

        Args:
            handle: the hold.
            ttl_us: after how many µs from now it expires.

        Raises:
            StoreUnavailable: if the store does not answer.
            HoldNotFound: if the store does not know the hold.
            HoldEnded: if it was settled or has expired.
        """
        ...


@runtime_checkable
class HoldCountingStore(Protocol):
    """A counter store that says how many holds are open."""

    async def count_holds(self, counters: Counters) -> Sequence[int]:
        """How many holds of each counter are open.

        Args:
            counters: any number, also of different subjects.

        Raises:
            StoreUnavailable: if the store does not answer.
        """
        ...


@runtime_checkable
class BlockingHoldingStore(Protocol):
    """`HoldingCounterStore` for threads."""

    def open_hold_now(
        self, counters: Counters, cost: int, ttl_us: int, rule: str | None = None
    ) -> tuple[Decision, HoldHandle | None]:
        """See `HoldingCounterStore.open_hold`."""
        ...

    def settle_hold_now(self, handle: HoldHandle, cost: int) -> HoldSettlement:
        """See `HoldingCounterStore.settle_hold`."""
        ...

    def renew_hold_now(self, handle: HoldHandle, ttl_us: int) -> None:
        """See `HoldingCounterStore.renew_hold`."""
        ...


def not_found() -> HoldNotFound:
    """The error of an id that a store does not know."""
    return HoldNotFound(
        "the hold is not known: it was opened on another counter store, was settled more than two minutes ago, or expired more "
        "than an hour ago; charge what was used with POST /v1/check"
    )


def has_ended() -> HoldEnded:
    """The error of a renewal that comes too late."""
    return HoldEnded("the hold was settled or has expired, so it cannot be renewed: open another one with POST /v1/holds")


def too_many(most: int) -> TooManyHolds:
    """The error of a subject that has as many open holds as it may have."""
    return TooManyHolds(
        f"{most} holds are open for one subject, as many as counters.max_holds: settle holds when their requests end"
    )


@lru_cache(maxsize=64)
def _keeps_holds(kind: type[Any]) -> bool:
    """Whether stores of a class keep holds: to find out takes 20 µs, as much as a hold in memory."""
    return issubclass(kind, HoldingCounterStore)


@lru_cache(maxsize=64)
def _keeps_holds_for_threads(kind: type[Any]) -> bool:
    return issubclass(kind, BlockingHoldingStore)


def holding(store: object) -> HoldingCounterStore:
    """A counter store that keeps holds.

    Raises:
        BadRequest: if the store, which is not one of Tidegate's, keeps none.
    """
    if _keeps_holds(type(store)):  # type: ignore[arg-type]  # mypy: classes are not hashable
        return cast("HoldingCounterStore", store)
    raise BadRequest(f"the counter store {type(store).__name__} keeps no holds: use memory:// or Redis")


def counting_holds(store: object) -> HoldCountingStore:
    """As `holding`, for a store that counts holds."""
    if isinstance(store, HoldCountingStore):
        return store
    raise BadRequest(f"the counter store {type(store).__name__} keeps no holds: use memory:// or Redis")


def blocking_holding(store: object) -> BlockingHoldingStore:
    """As `holding`, for a store for threads."""
    if _keeps_holds_for_threads(type(store)):  # type: ignore[arg-type]  # as above
        return cast("BlockingHoldingStore", store)
    raise BadRequest(f"the counter store {type(store).__name__} keeps no holds: use memory:// or Redis")
