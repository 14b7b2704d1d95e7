"""From a bearer token to the claims that count: verified once, then remembered by digest until it expires.

Order of the checks: size, form, `alg`, `kid`, `exp`, `nbf`, `iss`, `aud` (all without cryptography), then the signature, then all
claims again by PyJWT, which has the last word. So only a token that looks right costs a signature. Those that failed are
remembered too, and a client whose signatures keep failing is refused before it costs more.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import msgspec

from tidegate.catalog.unknown_keys import UnknownKeyLimit
from tidegate.errors import InvalidToken, TokenKeysUnavailable, TooManyTokens
from tidegate.jwt.key_set import KeySet, PublicKey, load_pyjwt
from tidegate.jwt.verification_queue import VerificationQueue
from tidegate.policy.jwt_policy import JwtPolicy

MAX_TOKEN_BYTES: Final = 8192
MAX_REMEMBERED: Final = 100_000
MAX_REFUSED: Final = 20_000
REFUSED_S: Final = 30.0
"""How long a failed token is refused without another verification, s."""
FAILURES_PER_MINUTE: Final = 300
"""Failed signatures and unknown keys of one client per minute, after which it is refused."""
MAX_CLAIM_CHARS: Final = 256
_TAIL: Final = 32

Digest: TypeAlias = tuple[int, bytes]


class VerifiedToken(msgspec.Struct, frozen=True, gc=False):
    """What a valid token says.

    Args:
        attributes: texts by attribute; one whose claim is absent, null, a list or an object is left out.
        expires_at_s: `exp` plus the leeway, s since the epoch.
    """

    attributes: dict[str, str]
    expires_at_s: float


class JwtVerifier:
    """Verifies tokens of one issuer. One event loop.

    Args:
        policy: what a token must fulfil.
        claims: name of the claim by the attribute that it is the value of.
        keys: the issuer's keys.
        wall_clock_s: s since the epoch.
        failures: counts failed tokens by client.
        max_remembered: valid tokens kept, 1 or more; beyond it the oldest are verified again. About 350 bytes each.

    Attributes:
        verified: signatures verified.
        refused: tokens that failed.
    """

    def __init__(
        self,
        policy: JwtPolicy,
        claims: Mapping[str, str],
        keys: KeySet,
        wall_clock_s: Callable[[], float] = time.time,
        failures: UnknownKeyLimit | None = None,
        max_remembered: int = MAX_REMEMBERED,
    ) -> None:
        self.verified = 0
        self.refused = 0
        self._jwt = load_pyjwt()
        self._policy = policy
        self._claims = dict(claims)
        self._keys = keys
        self._wall_clock_s = wall_clock_s
        self._failures = UnknownKeyLimit(FAILURES_PER_MINUTE) if failures is None else failures
        self._max_remembered = max_remembered
        self._generation = keys.generation
        self._valid: OrderedDict[Digest, VerifiedToken] = OrderedDict()
        self._failed: OrderedDict[Digest, tuple[float, InvalidToken]] = OrderedDict()
        self._queue = VerificationQueue()

    def remembered(self, token: bytes) -> VerifiedToken | None:
        """A token that was verified before. Costs 0.6 µs, most of it the digest.

        Args:
            token: as it came, without `Bearer `.

        Returns:
            What it says; None where it has to be verified.
        """
        if self._generation != self._keys.generation:
            self._forget()
        known = self._valid.get(_digest(token))
        if known is None or known.expires_at_s <= self._wall_clock_s():
            return None
        return known

    async def verify(self, token: bytes, client: str | None = None) -> VerifiedToken:
        """Verify a token, or recall that it was verified.

        Args:
            token: as it came, without `Bearer `.
            client: address of who sent it, as `client_of` gives it.

        Returns:
            What it says.

        Raises:
            InvalidToken: naming the check that failed.
            TooManyTokens: the client sent too many that failed, or too many wait.
            TokenKeysUnavailable: no keys could be loaded yet.
        """
        if len(token) > MAX_TOKEN_BYTES:
            raise self._refusal("size", f"the token has {len(token)} bytes; at most {MAX_TOKEN_BYTES} are accepted")
        known = self.remembered(token)
        if known is not None:
            return known
        digest = _digest(token)
        self._raise_remembered_failure(digest)
        sender = client or ""
        wait_s = self._failures.wait_s(sender)
        if wait_s > 0:
            raise TooManyTokens(
                f"too many tokens of this client failed: wait {math.ceil(wait_s)} s", retry_after=math.ceil(wait_s)
            )
        if not self._keys.loaded:
            await self._keys.first_load()
        if not self._keys.loaded:
            raise TokenKeysUnavailable("the issuer's public keys are not available: try again")
        try:
            key, algorithm = await self._key_of(token)
            generation = self._keys.generation
            valid = await self._queue.run(sender, lambda: self._verify(token, key, algorithm))
        except InvalidToken as error:
            if error.details["check"] in ("signature", "kid"):
                self._failures.count(sender)
            self._failed[digest] = (self._wall_clock_s() + REFUSED_S, error)
            if len(self._failed) > MAX_REFUSED:
                self._failed.popitem(last=False)
            raise
        if generation != self._keys.generation:
            return await self.verify(token, client)  # the keys changed while it waited: its key may be withdrawn
        if generation != self._generation:
            self._forget()  # before this token is remembered: it was verified with the new keys
        self._valid[digest] = valid
        if len(self._valid) > self._max_remembered:
            self._valid.popitem(last=False)
        return valid

    def _forget(self) -> None:
        """The keys changed: what was verified or refused with the old ones is to be verified again."""
        self._generation = self._keys.generation
        self._valid.clear()
        self._failed.clear()

    def _raise_remembered_failure(self, digest: Digest) -> None:
        failed = self._failed.get(digest)
        if failed is None:
            return
        until, error = failed
        if until > self._wall_clock_s():
            raise InvalidToken(error.message, **error.details)
        del self._failed[digest]

    async def _key_of(self, token: bytes) -> tuple[PublicKey, str]:
        """The key and algorithm of a token that looks right; no cryptography yet."""
        header, claims = self._parse(token)
        algorithm = header.get("alg")
        if algorithm not in self._policy.algorithms:
            raise self._refusal("alg", f"the token's 'alg' is not one of {', '.join(self._policy.algorithms)}")
        if "crit" in header:
            raise self._refusal("crit", "the token's header has 'crit' extensions, of which none is supported")
        self._check_early(claims)
        kid = header.get("kid", "")
        if not isinstance(kid, str):
            raise self._refusal("kid", "the token's 'kid' is not a text")
        key = self._find_key(kid, algorithm)
        if key is None:
            await self._keys.load_for_unknown_kid()
            key = self._find_key(kid, algorithm)
        if key is None:
            raise self._refusal("kid", "the token's 'kid' and 'alg' fit none of the issuer's keys")
        return key, algorithm

    def _find_key(self, kid: str, algorithm: str) -> PublicKey | None:
        """The key for a `kid`; without a `kid`, the only key that fits the algorithm."""
        candidates = self._keys.keys.get(kid, []) if kid else [key for keys in self._keys.keys.values() for key in keys]
        fitting = [key for key in candidates if algorithm in key.algorithms]
        return fitting[0] if len(fitting) == 1 or (kid and fitting) else None

    def _parse(self, token: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
        parts = token.split(b".")
        if len(parts) != 3:
            raise self._refusal("form", "the token is not a signed JSON Web Token: it must have three parts")
        header, claims = (_json_object(part) for part in parts[:2])
        if header is None or claims is None:
            raise self._refusal("form", "the token's header or payload is not a JSON object in base64url")
        return header, claims

    def _check_early(self, claims: dict[str, Any]) -> None:
        """Refuse what PyJWT would refuse after the signature, where that is certain without it."""
        now, leeway_s = self._wall_clock_s(), self._policy.leeway_s
        expires, not_before = claims.get("exp"), claims.get("nbf")
        if not isinstance(expires, (int, float)) or isinstance(expires, bool) or not math.isfinite(expires):
            raise self._refusal("exp", "the token has no valid 'exp': tokens must expire")
        if expires <= now - leeway_s:
            raise self._refusal("exp", "the token has expired: get a new one")
        if isinstance(not_before, (int, float)) and not_before > now + leeway_s:
            raise self._refusal("nbf", "the token is not valid yet ('nbf')")
        if self._policy.issuer and claims.get("iss") != self._policy.issuer:
            raise self._refusal("iss", "the token's issuer ('iss') is not the expected one")
        audience = claims.get("aud")
        audiences = audience if isinstance(audience, list) else [] if audience is None else [audience]
        if not any(expected in audiences for expected in self._policy.audience) and (self._policy.audience or audiences):
            raise self._refusal("aud", "the token is for another audience ('aud')")

    def _verify(self, token: bytes, key: PublicKey, algorithm: str) -> VerifiedToken:
        """Verify signature and claims with PyJWT. Costs 50 to 150 µs."""
        errors = self._jwt.exceptions
        self.verified += 1
        try:
            claims = self._jwt.decode(
                token.decode("ascii"),
                key=key.key,
                algorithms=[algorithm],
                audience=list(self._policy.audience) or None,
                issuer=self._policy.issuer or None,
                leeway=self._policy.leeway_s,
                options={"require": ["exp"], "verify_sub": False, "verify_jti": False},
            )
        except errors.InvalidSignatureError:
            raise self._refusal("signature", "the token's signature is wrong") from None
        except errors.ExpiredSignatureError:
            raise self._refusal("exp", "the token has expired: get a new one") from None
        except errors.ImmatureSignatureError:
            raise self._refusal("nbf", "the token is not valid yet ('nbf' or 'iat')") from None
        except errors.InvalidAudienceError:
            raise self._refusal("aud", "the token is for another audience ('aud')") from None
        except errors.InvalidIssuerError:
            raise self._refusal("iss", "the token's issuer ('iss') is not the expected one") from None
        except (errors.PyJWTError, ValueError, TypeError):
            raise self._refusal("form", "the token is not a valid JSON Web Token") from None
        return VerifiedToken(self._texts(claims), float(claims["exp"]) + self._policy.leeway_s)

    def _texts(self, claims: dict[str, Any]) -> dict[str, str]:
        texts = {}
        for name, claim in self._claims.items():
            value = claims.get(claim)
            if isinstance(value, bool):
                texts[name] = "true" if value else "false"
            elif isinstance(value, (int, str)):
                texts[name] = str(value)
                if len(texts[name]) > MAX_CLAIM_CHARS:
                    raise self._refusal("claim", f"the token's claim {claim!r} has more than {MAX_CLAIM_CHARS} characters")
        return texts

    def _refusal(self, check: str, message: str) -> InvalidToken:
        self.refused += 1
        return InvalidToken(message, check=check)


def _digest(token: bytes) -> Digest:
    """The digest that a token is remembered by: Python's hash of it, and the last characters of its signature.

    The hash is SipHash with a key of this process (PEP 456) and takes a third of the time of a cryptographic digest. To be taken
    for another token, a forged one needs the same signature and the same hash, without the key; it would get the attributes of
    that other token, which its sender must have seen to copy the signature.
    """
    return hash(token), token[-_TAIL:]


def _json_object(part: bytes) -> dict[str, Any] | None:
    """A part of a token; None where it is not a JSON object in base64url without padding."""
    try:
        if b"=" in part or b"+" in part or b"/" in part:
            return None
        value = json.loads(base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4)))
    except (ValueError, RecursionError, binascii.Error):
        return None
    return value if isinstance(value, dict) else None
