"""An issuer's public keys (JWKS, RFC 7517), from a file or a URL, refreshed in the background.

A set that cannot be fetched or read is reported and the last one stays in use. A token with an unknown `kid` asks for a refresh,
at most once in `UNKNOWN_KID_S`, so tokens with random `kid` cannot make this process flood the issuer.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from tidegate.errors import SettingsError
from tidegate.policy.jwt_policy import ALGORITHMS, JwtPolicy

logger = logging.getLogger(__name__)

MAX_BYTES: Final = 1_000_000
MAX_KEYS: Final = 100
MIN_RSA_BITS: Final = 2048
FETCH_S: Final = 10.0
"""How long one fetch may take in all, s."""
REFRESH_S: Final = 600.0
"""How often a URL is fetched without a reason, s: a key that the issuer withdrew is refused after that."""
UNKNOWN_KID_S: Final = 60.0
RETRY_S: Final = 5.0
"""Pause after a fetch that failed while there are no keys at all, s."""
FILE_POLL_S: Final = 1.0


class PublicKey(msgspec.Struct, frozen=True):
    """One key of a set.

    Args:
        key: what PyJWT verifies with.
        algorithms: those that it may be used for.
    """

    key: Any
    algorithms: frozenset[str]


class KeySetUnreadable(ValueError):
    """What a file or URL holds is not a usable key set; the message says why."""


class KeySet:
    """The keys of one issuer.

    Args:
        policy: where they are.
        clock: monotonic seconds.
        refresh_s: see `REFRESH_S`.
        unknown_kid_s: see `UNKNOWN_KID_S`.

    Attributes:
        keys: by `kid`; those without one under "".
        loaded: whether a set was ever read.
        generation: counts the sets that differed from the one before.
        failure: why the last refresh failed; empty if it did not.
    """

    def __init__(
        self,
        policy: JwtPolicy,
        clock: Callable[[], float] = time.monotonic,
        *,
        refresh_s: float = REFRESH_S,
        unknown_kid_s: float = UNKNOWN_KID_S,
    ) -> None:
        self.keys: dict[str, list[PublicKey]] = {}
        self.loaded = False
        self.generation = 0
        self.failure = ""
        self._policy = policy
        self._clock = clock
        self._refresh_s = refresh_s
        self._unknown_kid_s = unknown_kid_s
        self._body = b""
        self._flight: asyncio.Task[None] | None = None
        self._last_unknown_kid = -float("inf")

    async def follow(self) -> None:
        """Load the keys and refresh them until cancelled; runs under the supervisor."""
        while True:
            await self.load()
            if not self._policy.is_url:
                await asyncio.sleep(FILE_POLL_S)
            else:
                await asyncio.sleep(self._refresh_s if not self.failure else min(RETRY_S, self._refresh_s))

    async def load(self) -> None:
        """Fetch or read the set once; calls at the same time share one fetch.

        A failure is kept in `failure`, logged once for each text, and changes no key.
        """
        if self._flight is None or self._flight.done():
            self._flight = asyncio.get_running_loop().create_task(self._load(), name="jwks")
        # Shielded: the others that wait for the same fetch must get its result.
        await asyncio.shield(self._flight)

    async def first_load(self) -> None:
        """Wait for the first fetch to end, if none has; at most `FETCH_S`."""
        if not self.loaded and not self.failure:
            await self.load()

    async def load_for_unknown_kid(self) -> None:
        """Fetch the set again, unless a token with an unknown `kid` caused that less than `UNKNOWN_KID_S` ago."""
        if self._flight is None or self._flight.done():
            now = self._clock()
            if not self._policy.is_url or now - self._last_unknown_kid < self._unknown_kid_s:
                return
            self._last_unknown_kid = now
        await self.load()

    async def _load(self) -> None:
        failure = ""
        try:
            body = await asyncio.to_thread(self._fetch if self._policy.is_url else self._read)
            if body != self._body:
                self.keys = await asyncio.to_thread(parse_key_set, body)
                self._body = body
                self.loaded = True
                self.generation += 1
                logger.info("JSON Web Key Set loaded", extra={"ecs": {"tidegate.jwks.keys": sum(map(len, self.keys.values()))}})
        except KeySetUnreadable as error:
            failure = str(error)
        if failure and failure != self.failure:
            logger.warning(
                "JSON Web Key Set %s cannot be used (%s): %s",
                self._policy.jwks,
                failure,
                "the last keys stay in use" if self.loaded else "tokens cannot be verified",
            )
        self.failure = failure

    def _read(self) -> bytes:
        """The file's content."""
        try:
            with Path(self._policy.jwks).open("rb") as file:
                return file.read(MAX_BYTES + 1)
        except OSError as error:
            raise KeySetUnreadable(f"the file cannot be read: {error.strerror or error}") from None

    def _fetch(self) -> bytes:
        """The URL's content, within `FETCH_S`; redirections are refused."""
        ends = time.monotonic() + FETCH_S
        opener = urllib.request.build_opener(_NoRedirection())
        request = urllib.request.Request(self._policy.jwks, headers={"Accept": "application/json"})
        chunks: list[bytes] = []
        size = 0
        try:
            with opener.open(request, timeout=FETCH_S) as response:
                while chunk := response.read1(65_536):
                    chunks.append(chunk)
                    size += len(chunk)
                    if size > MAX_BYTES:
                        raise KeySetUnreadable(f"it is larger than {MAX_BYTES} bytes")
                    if time.monotonic() > ends:
                        raise KeySetUnreadable(f"it was not complete within {FETCH_S:g} s")
        except urllib.error.HTTPError as error:
            error.close()  # it has the connection of the response
            raise KeySetUnreadable(f"the server answered {error.code}") from None
        except (OSError, ValueError, urllib.error.URLError) as error:
            if isinstance(error, KeySetUnreadable):
                raise
            raise KeySetUnreadable(f"it cannot be fetched: {type(error).__name__}") from None
        return b"".join(chunks)


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """Redirections could leave https or reach internal addresses: the URL has to be the final one."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


def parse_key_set(body: bytes) -> dict[str, list[PublicKey]]:
    """Read a JWKS. Keys that cannot verify (symmetric, for encryption, unknown types, short RSA) are left out.

    Returns:
        Keys by `kid`; those without one under "".

    Raises:
        KeySetUnreadable: if it is not a JWKS or has no usable key.
    """
    if len(body) > MAX_BYTES:
        raise KeySetUnreadable(f"it is larger than {MAX_BYTES} bytes")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise KeySetUnreadable("it is not JSON") from None
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise KeySetUnreadable("it has no list 'keys'")
    if len(entries) > MAX_KEYS:
        raise KeySetUnreadable(f"it has {len(entries)} keys; at most {MAX_KEYS} are read")
    keys: dict[str, list[PublicKey]] = {}
    for entry in entries:
        key = _public_key(entry) if isinstance(entry, dict) else None
        if key is not None:
            kid = entry.get("kid", "")
            keys.setdefault(kid if isinstance(kid, str) else "", []).append(key)
    if not keys:
        raise KeySetUnreadable("it has no public key for signatures (RSA of 2048 bits or more, EC, Ed25519)")
    return keys


def _public_key(entry: dict[str, Any]) -> PublicKey | None:
    """One key; None where it is not for verifying signatures."""
    jwt = load_pyjwt()
    algorithms = _algorithms_of(entry)
    if not algorithms or entry.get("use", "sig") != "sig":
        return None
    public = {name: value for name, value in entry.items() if name in ("kty", "n", "e", "crv", "x", "y")}
    try:
        key = jwt.PyJWK(public, algorithm=algorithms[0]).key
    except (jwt.exceptions.PyJWTError, ValueError, TypeError):
        return None
    if entry["kty"] == "RSA" and key.key_size < MIN_RSA_BITS:
        return None
    return PublicKey(key, frozenset(algorithms))


def _algorithms_of(entry: dict[str, Any]) -> list[str]:
    """The algorithms that a key fits, by its type and curve and its own `alg`."""
    kty, crv, alg = entry.get("kty"), entry.get("crv"), entry.get("alg")
    if kty == "RSA":
        fits = [name for name in ALGORITHMS if name[:2] in ("RS", "PS")]
    elif kty == "EC":
        fits = {"P-256": ["ES256"], "P-384": ["ES384"], "P-521": ["ES512"]}.get(crv if isinstance(crv, str) else "", [])
    elif kty == "OKP":
        fits = ["EdDSA"] if crv == "Ed25519" else []
    else:
        fits = []
    return fits if alg is None else [name for name in fits if name == alg]


def load_pyjwt() -> Any:
    """PyJWT, which is an extra.

    Raises:
        SettingsError: if it is not installed.
    """
    try:
        import jwt.algorithms

        import jwt
    except ImportError:
        raise SettingsError("the policy has [jwt], which needs PyJWT: pip install 'tidegate[jwt]'") from None
    return jwt
