"""Bearer tokens of requests: the verifier follows the active policy, and its keys follow the issuer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Final

from tidegate.background import SUPERVISOR, stop
from tidegate.errors import TokenKeysUnavailable
from tidegate.jwt.key_set import KeySet
from tidegate.jwt.verifier import JwtVerifier
from tidegate.policy.attributes import CallerPolicy, SourceKind

TASK: Final = "jwks"
_SCHEME: Final = b"bearer "


class Tokens:
    """Verifies the tokens of one process. One event loop.

    Args:
        wall_clock_s: s since the epoch.

    Attributes:
        when_needed: callback run once, when a policy with `[jwt]` is first used.
    """

    def __init__(self, wall_clock_s: Callable[[], float] = time.time) -> None:
        self.when_needed: Callable[[], None] | None = None
        self._wall_clock_s = wall_clock_s
        self._policy: CallerPolicy | None = None
        self._verifier: JwtVerifier | None = None
        self._keys: KeySet | None = None
        self._task: asyncio.Task[None] | None = None

    def verifier(self, policy: CallerPolicy) -> JwtVerifier | None:
        """The verifier of a policy; made anew only if its `[jwt]` or the claims that it reads changed.

        Returns:
            None where the policy has no `[jwt]`.
        """
        if policy is not self._policy:
            if self._policy is None or (policy.jwt, _claims(policy)) != (self._policy.jwt, _claims(self._policy)):
                self._replace(policy)
            self._policy = policy
        return self._verifier

    def recall(self, policy: CallerPolicy, value: bytes) -> Mapping[str, str] | None:
        """The attributes that a token carries, where it was verified before. Costs 0.9 µs.

        Args:
            policy: the active one, with `[jwt]`.
            value: of its header, such as `Bearer eyJ…`.

        Returns:
            Values by attribute; None where the token has to be verified, or is none.
        """
        verifier = self.verifier(policy)
        if verifier is None or value[:7].lower() != _SCHEME:
            return None
        known = verifier.remembered(value[7:])
        return None if known is None else known.attributes

    def recall_text(self, policy: CallerPolicy, token: str) -> Mapping[str, str] | None:
        """As `recall`, for a token in the body of a check, which has no `Bearer ` before it. Costs 1 µs."""
        verifier = self.verifier(policy)
        if verifier is None or not token.isascii():
            return None
        known = verifier.remembered(token.encode())
        return None if known is None else known.attributes

    async def ping(self) -> None:
        """Check that the issuer's keys were refreshed.

        Raises:
            TokenKeysUnavailable: if they could not be.
        """
        if self._keys is not None and self._keys.failure:
            kept = "the last keys stay in use" if self._keys.loaded else "tokens cannot be verified"
            raise TokenKeysUnavailable(f"the issuer's public keys cannot be refreshed: {kept}")

    @property
    def counts(self) -> tuple[int, int]:
        """Signatures verified and tokens refused since the verifier was made."""
        return (0, 0) if self._verifier is None else (self._verifier.verified, self._verifier.refused)

    async def close(self) -> None:
        """Stop following the issuer's keys."""
        await stop(self._task)
        self._task = self._policy = self._verifier = self._keys = None

    def _replace(self, policy: CallerPolicy) -> None:
        if self._task is not None:
            self._task.cancel()
        self._task = self._keys = self._verifier = None
        if policy.jwt is not None:
            self._keys = KeySet(policy.jwt)
            self._verifier = JwtVerifier(policy.jwt, _claims(policy), self._keys, self._wall_clock_s)
            self._task = SUPERVISOR.start(TASK, self._keys.follow)
            if self.when_needed is not None:
                self.when_needed()
                self.when_needed = None


def _claims(policy: CallerPolicy) -> dict[str, str]:
    """Claims by the attribute that they are the value of."""
    return {source.name: source.key for source in policy.attributes if source.kind is SourceKind.JWT}
