"""What both clients do with reservations: take a place, wait for its moment, give it back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TypeVar

from tidegate.client.answer import Answer
from tidegate.client.bodies import limit_texts
from tidegate.client.core import ClientCore
from tidegate.client.reservations import AsyncWaiting, PlaceRequest, cancel_steps, wait_blocking
from tidegate.client.steps import Steps
from tidegate.decision import Check
from tidegate.policy.paths import DEFERRED
from tidegate.wire import LimitRequest

T = TypeVar("T")


class ReservingClient(ABC):
    """This part of `Client`."""

    _core: ClientCore

    @abstractmethod
    def _run(self, steps: Steps[T]) -> T:
        """Send the requests of steps; returns their result."""

    def wait(
        self,
        path: str,
        method: str = "GET",
        *,
        api_key: str | None = None,
        ip: str | None = None,
        cost: int = 1,
        attributes: Mapping[str, str] | None = None,
        tier: str | None = None,
        bearer: str | None = None,
        at_most_s: float = 30.0,
    ) -> Answer:
        """Take a place in the queue, and sleep until its moment: one request (`POST /v1/reserve`).

        An exception that ends the sleep, such as `KeyboardInterrupt`, gives the place back. Limits that cannot be reserved, such
        as those of `sliding_log` and quotas, are checked again after `retry_after` plus jitter instead, without an order.

        Args:
            path: this and the next seven as for `check`.
            method: HTTP method of the request.
            api_key: API key of the caller.
            ip: address of the caller.
            cost: units.
            attributes: what else is known of the caller.
            bearer: JSON Web Token of the caller.
            at_most_s: maximum total wait, s.

        Returns:
            The answer that allows the request; or a denial, without further waiting, if its `retry_after` exceeds the remaining
            time or is None because the cost exceeds the limit. A wait is counted as one allowed check, not as a blocked one.

        Raises:
            TidegateError: as for `check`.
        """
        check = Check.of(path, method, api_key, ip, cost, DEFERRED, attributes=attributes, tier=tier)
        return self._wait(PlaceRequest(check, bearer), at_most_s)

    def wait_limit(
        self,
        namespace: str,
        subject: str,
        limits: str | Sequence[str] = (),
        *,
        algorithm: str | None = None,
        cost: int = 1,
        at_most_s: float = 30.0,
    ) -> Answer:
        """As `wait`, by limits of this call, without a tier, an endpoint or an API key.

            client.wait_limit("partner-api", "orders", "10/second", algorithm="leaky_bucket")

        Args:
            namespace: this and the next four as for `limit`.
            subject: whom to count.
            limits: such as `10/second`.
            algorithm: how the limits count.
            cost: units.
            at_most_s: maximum total wait, s.

        Returns:
            As `wait`.

        Raises:
            TidegateError: as for `limit`.
        """
        return self._wait(PlaceRequest(LimitRequest(namespace, subject, limit_texts(limits), algorithm, cost)), at_most_s)

    def reserve(
        self,
        path: str,
        method: str = "GET",
        *,
        api_key: str | None = None,
        ip: str | None = None,
        cost: int = 1,
        attributes: Mapping[str, str] | None = None,
        tier: str | None = None,
        bearer: str | None = None,
        at_most_s: float,
    ) -> Answer:
        """Take a place in the queue, without waiting: for a worker that puts its job back until then.

        Args:
            path: this and the next seven as for `check`.
            method: HTTP method of the request.
            api_key: API key of the caller.
            ip: address of the caller.
            cost: units.
            attributes: what else is known of the caller.
            bearer: JSON Web Token of the caller.
            at_most_s: how far ahead the moment may be, s, 0 to 3600.

        Returns:
            A `ReservedAnswer`: `allowed` and `wait_s`; its `reservation` is for `cancel`. If no server was available an `Answer`
            that is `failed`, and `on_failure` decided whether the caller may go now.

        Raises:
            BadRequest: as for `check`, or if the time is out of range.
            TidegateError: as for `check`.
        """
        check = Check.of(path, method, api_key, ip, cost, DEFERRED, attributes=attributes, tier=tier)
        return self._run(PlaceRequest(check, bearer).steps(self._core, at_most_s))

    def reserve_limit(
        self,
        namespace: str,
        subject: str,
        limits: str | Sequence[str] = (),
        *,
        algorithm: str | None = None,
        cost: int = 1,
        at_most_s: float,
    ) -> Answer:
        """As `reserve`, by limits of this call, without a tier, an endpoint or an API key.

        Args:
            namespace: this and the next four as for `limit`.
            subject: whom to count.
            limits: such as `10/second`.
            algorithm: how the limits count.
            cost: units.
            at_most_s: how far ahead the moment may be, s, 0 to 3600.

        Returns:
            As `reserve`.

        Raises:
            TidegateError: as for `limit`.
        """
        request = PlaceRequest(LimitRequest(namespace, subject, limit_texts(limits), algorithm, cost))
        return self._run(request.steps(self._core, at_most_s))

    def cancel(self, reservation: str) -> bool:
        """Give a place back before its moment, from any process. Idempotent.

        Args:
            reservation: of a `ReservedAnswer`.

        Returns:
            Whether all its units are available again; not after the moment, nor, with buckets, where places behind depend on
            them.

        Raises:
            BadRequest: if the id is not valid.
            ReservationNotFound: if the servers do not know it.
            LimiterUnavailable: if no server was available.
        """
        return self._run(cancel_steps(self._core, reservation))

    def _wait(self, request: PlaceRequest, at_most_s: float) -> Answer:
        return wait_blocking(lambda ahead_s: self._run(request.steps(self._core, ahead_s)), self.cancel, at_most_s)


class AsyncReservingClient(ABC):
    """This part of `AsyncClient`."""

    _core: ClientCore

    def __init__(self) -> None:
        self._waiting = AsyncWaiting()

    @abstractmethod
    async def _run(self, steps: Steps[T]) -> T:
        """Send the requests of steps; returns their result."""

    async def wait(
        self,
        path: str,
        method: str = "GET",
        *,
        api_key: str | None = None,
        ip: str | None = None,
        cost: int = 1,
        attributes: Mapping[str, str] | None = None,
        tier: str | None = None,
        bearer: str | None = None,
        at_most_s: float = 30.0,
    ) -> Answer:
        """As `Client.wait`; the place is given back when the task is cancelled."""
        check = Check.of(path, method, api_key, ip, cost, DEFERRED, attributes=attributes, tier=tier)
        return await self._wait(PlaceRequest(check, bearer), at_most_s)

    async def wait_limit(
        self,
        namespace: str,
        subject: str,
        limits: str | Sequence[str] = (),
        *,
        algorithm: str | None = None,
        cost: int = 1,
        at_most_s: float = 30.0,
    ) -> Answer:
        """As `Client.wait_limit`."""
        return await self._wait(PlaceRequest(LimitRequest(namespace, subject, limit_texts(limits), algorithm, cost)), at_most_s)

    async def reserve(
        self,
        path: str,
        method: str = "GET",
        *,
        api_key: str | None = None,
        ip: str | None = None,
        cost: int = 1,
        attributes: Mapping[str, str] | None = None,
        tier: str | None = None,
        bearer: str | None = None,
        at_most_s: float,
    ) -> Answer:
        """As `Client.reserve`."""
        check = Check.of(path, method, api_key, ip, cost, DEFERRED, attributes=attributes, tier=tier)
        return await self._run(PlaceRequest(check, bearer).steps(self._core, at_most_s))

    async def reserve_limit(
        self,
        namespace: str,
        subject: str,
        limits: str | Sequence[str] = (),
        *,
        algorithm: str | None = None,
        cost: int = 1,
        at_most_s: float,
    ) -> Answer:
        """As `Client.reserve_limit`."""
        request = PlaceRequest(LimitRequest(namespace, subject, limit_texts(limits), algorithm, cost))
        return await self._run(request.steps(self._core, at_most_s))

    async def cancel(self, reservation: str) -> bool:
        """As `Client.cancel`."""
        return await self._run(cancel_steps(self._core, reservation))

    async def _wait(self, request: PlaceRequest, at_most_s: float) -> Answer:
        return await self._waiting.wait(lambda ahead_s: self._run(request.steps(self._core, ahead_s)), self.cancel, at_most_s)
