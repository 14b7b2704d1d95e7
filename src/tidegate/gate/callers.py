"""Who sent a check: from an API key to the caller whose limits hold, or to the reason why it is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from hashlib import sha256 as _sha256
from typing import Final, TypeAlias

from tidegate.catalog.cache_level import Caller
from tidegate.catalog.cached import CachedCatalog
from tidegate.errors import ApiKeyExpired, ApiKeyRevoked, CatalogUnavailable, InvalidApiKey, MissingApiKey, TidegateError
from tidegate.policy.key_format import is_possible_key, why_impossible
from tidegate.policy.model import KeyStatus

LOOKUP_TIMEOUT_S: Final = 4.0
"""Twice what a database may take to answer by default: where a replica does not, the primary is queried."""

Sender: TypeAlias = tuple[str | None, str | None]
"""An API key, or None, and the client that sent it, where both are known."""


class CallerLookup:
    """Finds callers.

    Args:
        catalog: who may do what.
        wall_clock_ns: gives ns since the epoch; the expiry of API keys is held against it.
        timeout_s: how long the callers of one request may take to be looked up together, s.
    """

    def __init__(self, catalog: CachedCatalog, wall_clock_ns: Callable[[], int], timeout_s: float = LOOKUP_TIMEOUT_S) -> None:
        self._catalog = catalog
        self._cached_caller = catalog.cached_caller
        self._wall_clock_ns = wall_clock_ns
        self._timeout_s = timeout_s

    async def find(self, api_key: str | None, client: str | None, *, refused_too: bool = False) -> Caller:
        """The caller that a key belongs to.

        Args:
            api_key: the key; None for a caller without one.
            client: address that it came from, as `client_of` gives it; None where it is not known.
            refused_too: whether revoked and expired keys are given as well.

        Returns:
            The caller.

        Raises:
            MissingApiKey: no key came and there is no anonymous tier.
            InvalidApiKey: the key is mistyped or unknown.
            TooManyUnknownKeys: the key is not cached, and the client has sent too many unknown ones.
            ApiKeyRevoked: the key was revoked.
            ApiKeyExpired: the key's time is over.
            CatalogUnavailable: the catalog fails and nothing cached can stand in.
        """
        if api_key is None:
            anonymous = await self._catalog.anonymous()
            if anonymous is None:
                raise MissingApiKey("no API key came: send it as the X-API-Key header")
            return anonymous
        if not is_possible_key(api_key):
            raise InvalidApiKey(why_impossible(api_key))
        caller = await self._catalog.caller(_digest(api_key), client)
        if caller is None:
            raise InvalidApiKey("the API key is unknown: check that it belongs to this service")
        caller.form_checked = True
        if not refused_too:
            self._refuse_ended(caller)
        return caller

    def find_cached(self, api_key: str | None) -> Caller | None:
        """The caller that a key belongs to, where memory alone knows it. Costs 1 µs.

        Args:
            api_key: as for `find`.

        Returns:
            The caller; None where `find` has more to do, if only to say what is wrong with the key.

        Raises:
            ApiKeyRevoked: the key was revoked.
            ApiKeyExpired: the key's time is over.
        """
        if api_key is None:
            return self._catalog.cached_anonymous()
        if not api_key.isascii():
            return None
        caller = self._cached_caller(_sha256(api_key.encode()).hexdigest())
        if caller is None or not caller.form_checked:
            return None
        if not caller.never_ends:
            self._refuse_ended(caller)
        return caller

    def _refuse_ended(self, caller: Caller) -> None:
        """Raise for a key that was revoked or has expired."""
        record = caller.api_key
        if record is not None:
            if record.status is not KeyStatus.ACTIVE:
                raise ApiKeyRevoked("the API key was revoked: ask for a new one", key_id=record.id)
            if record.expires_at_us is not None and record.expires_at_us * 1000 <= self._wall_clock_ns():
                raise ApiKeyExpired("the API key has expired: ask for a new one", key_id=record.id)

    async def find_all(self, senders: Iterable[Sender]) -> dict[Sender, Caller | TidegateError]:
        """The callers of one request: those that are not cached are looked up side by side, within `timeout_s` for all.

        Args:
            senders: any number, repeated ones too.

        Returns:
            For each its caller, or the error that `find` would have raised.
        """
        distinct = list(dict.fromkeys(senders))
        if len(distinct) == 1:
            return {distinct[0]: await self._found(*distinct[0])}
        found: dict[Sender, Caller | TidegateError] = {}
        under_way: dict[asyncio.Task[Caller | TidegateError], Sender] = {}
        for sender in distinct:
            if self._is_at_hand(sender[0]):
                found[sender] = await self._found(*sender)
            else:
                under_way[asyncio.ensure_future(self._found(*sender))] = sender
        if under_way:
            try:
                done, _ = await asyncio.wait(under_way, timeout=self._timeout_s)
                for task, sender in under_way.items():
                    found[sender] = task.result() if task in done else self._too_slow()
            finally:
                for task in under_way:
                    task.cancel()
        return found

    def _is_at_hand(self, api_key: str | None) -> bool:
        """Whether `find` answers from memory alone."""
        if api_key is None:
            return False
        return not is_possible_key(api_key) or self._catalog.is_at_hand(_digest(api_key))

    def _too_slow(self) -> CatalogUnavailable:
        return CatalogUnavailable(
            f"the catalog did not answer within {self._timeout_s:g} s for all API keys of this request: try again"
        )

    async def _found(self, api_key: str | None, client: str | None) -> Caller | TidegateError:
        try:
            return await self.find(api_key, client)
        except TidegateError as error:
            return error


def _digest(api_key: str) -> str:
    return _sha256(api_key.encode()).hexdigest()
