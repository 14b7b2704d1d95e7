"""Tokens of the gateways and back ends that may call the data plane, in the memory of one process.

All tokens that work are loaded at once: there are few, so an unknown token costs no query, and guesses cannot keep the database
busy. A change of the catalog that touches tokens loads them again; a token that was touched is not accepted as it was before.
While the database does not answer, the last known tokens stay valid for `stale_after_s`, and a token that was touched gets
503, because its present state is not known. One event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Final, Protocol

import msgspec

from tidegate.catalog.changes import ALL, CALLER_TOKEN, Item
from tidegate.errors import CatalogUnavailable
from tidegate.policy.key_format import BASE62
from tidegate.timestamps import now_us

logger = logging.getLogger(__name__)

CALLER_TOKEN_PREFIX: Final = "tgc_"
CHECK: Final = "check"
SCOPES: Final = (CHECK, "limit", "hold", "lease")
"""What a token permits: `check` is for checks, batches, gateways' requests, usage, and `ShouldRateLimit`."""
MAX_LIVE: Final = 1_000
"""Most tokens that work at the same time."""
RETRY_S: Final = 1.0
"""Pause between attempts to load tokens while the catalog does not answer."""
WAIT_S: Final = 2.0
"""Longest wait of a request for tokens that are being loaded."""

_FORM: Final = re.compile(rb"(?:[Bb][Ee][Aa][Rr][Ee][Rr] {1,8})?(tgc_[0-9A-Za-z]{40})").fullmatch
_NEVER_NS: Final = (1 << 63) - 1
_MAX_VALUES: Final = 4 * MAX_LIVE


class CallerToken(msgspec.Struct, frozen=True):
    """One token.

    Args:
        sha256: lower-case hex digest of the token.
        name: of the caller, as operators see it.
        scopes: some of `SCOPES`.
        expires_at_us: µs since the epoch; None for a token that does not expire.
    """

    sha256: str
    name: str
    scopes: frozenset[str]
    expires_at_us: int | None = None

    @property
    def expired(self) -> bool:
        """Whether its time has passed."""
        return self.expires_at_us is not None and self.expires_at_us <= now_us()


class CallerTokenSource(Protocol):
    """Where the tokens are stored."""

    async def caller_tokens(self) -> list[CallerToken]:
        """All tokens that are neither revoked nor expired.

        Raises:
            CatalogUnavailable: if the catalog does not answer.
        """
        ...


class CallerTokens:
    """The tokens that work.

    Args:
        source: where they are stored.
        ttl_s: interval of loading them without a known change, s.
        stale_after_s: how long they work without being loaded again while the catalog does not answer, s.
        clock: monotonic seconds.

    Attributes:
        by_value: the token by the bytes of the header that carried it, for headers that were read before.
        check_until_ns: when each of those that permit checks expires, ns since the epoch: the hot path needs nothing else.
    """

    def __init__(
        self,
        source: CallerTokenSource,
        ttl_s: float = 60.0,
        stale_after_s: float = 3660.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.by_value: dict[bytes, CallerToken] = {}
        self.check_until_ns: dict[bytes | None, int] = {}
        self._source = source
        self._ttl_s = ttl_s
        self._stale_after_s = stale_after_s
        self._clock = clock
        self._by_sha256: dict[str, CallerToken] = {}
        self._touched: set[str] = set()
        self._changes = 0
        self._loaded_at: float | None = None
        self._failing = False
        self._wake = asyncio.Event()
        self._attempt: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        """Tokens that work."""
        return len(self._by_sha256)

    async def find(self, value: bytes) -> CallerToken | None:
        """The token in the value of a header, with or without `Bearer` before it.

        Args:
            value: of the header, as received.

        Returns:
            The token, which may have expired; None if it is unknown or revoked.

        Raises:
            CatalogUnavailable: if it may work, and the catalog does not answer.
        """
        match = _FORM(value)
        if match is None:
            return None
        sha256 = hash_caller_token(match[1])
        if sha256 in self._touched and self._attempt is not None:
            await asyncio.wait((self._attempt,), timeout=WAIT_S)
        token = self._by_sha256.get(sha256)
        if token is None:
            if sha256 in self._touched or self._loaded_at is None:
                raise CatalogUnavailable("the catalog does not answer, so the caller's token cannot be verified: try again")
            return None
        if len(self.by_value) >= _MAX_VALUES:
            self._forget_values()
        self.by_value[value] = token
        if CHECK in token.scopes:
            self.check_until_ns[value] = _NEVER_NS if token.expires_at_us is None else token.expires_at_us * 1000
        return token

    def changed(self, items: Iterable[Item], *, everything: bool = False) -> None:
        """Load the tokens again if a change of the catalog touched them.

        Args:
            items: what was touched.
            everything: whether anything may have been touched.
        """
        digests = {name for kind, name in items if kind == CALLER_TOKEN}
        if not digests and not everything and all(kind != ALL for kind, _ in items):
            return
        for sha256 in digests:
            self._by_sha256.pop(sha256, None)
        self._forget_values()
        self._touched |= digests
        self._changes += 1
        self._wake.set()
        if self._attempt is None:
            self._attempt = asyncio.get_running_loop().create_future()

    async def load(self) -> None:
        """Load all tokens.

        Raises:
            CatalogUnavailable: if the catalog does not answer; then the last known ones stay valid.
        """
        try:
            while True:
                changes = self._changes
                tokens = await self._source.caller_tokens()
                if changes == self._changes:
                    break
            self._by_sha256 = {token.sha256: token for token in tokens}
            self._touched.clear()
            self._loaded_at = self._clock()
        except CatalogUnavailable:
            self._forget_old()
            raise
        finally:
            self._forget_values()
            # Also one that was made while this attempt ran: it ends with the changes that were announced until now.
            attempt, self._attempt = self._attempt, None
            if attempt is not None and not attempt.done():
                attempt.set_result(None)

    async def run(self) -> None:
        """Keep the tokens up to date until cancelled."""
        while True:
            try:
                await asyncio.wait_for(self._wake.wait(), RETRY_S if self._failing else self._ttl_s)
            except TimeoutError:
                pass  # nothing was announced: loaded again all the same
            self._wake.clear()
            try:
                await self.load()
            except CatalogUnavailable as error:
                if not self._failing:
                    logger.warning("caller tokens cannot be loaded, the last known ones stay valid: %s", error)
                self._failing = True
            else:
                if self._failing:
                    logger.info("caller tokens loaded again")
                self._failing = False

    def _forget_values(self) -> None:
        self.by_value.clear()
        self.check_until_ns.clear()

    def _forget_old(self) -> None:
        if self._loaded_at is not None and self._clock() - self._loaded_at >= self._stale_after_s:
            self._by_sha256 = {}
            self._loaded_at = None


def make_caller_token() -> str:
    """Make a new token: `tgc_` and 40 random base62 characters (238 bits)."""
    return CALLER_TOKEN_PREFIX + "".join(secrets.choice(BASE62) for _ in range(40))


def hash_caller_token(token: bytes) -> str:
    """The digest under which a token is stored. Tokens are random, so a plain SHA-256 needs no salt."""
    return hashlib.sha256(token).hexdigest()
