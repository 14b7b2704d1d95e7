"""`[jwt]` of a policy: which bearer tokens of other issuers are accepted, and which keys verify them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import urlsplit

import msgspec

from tidegate.errors import PolicyError
from tidegate.policy.fields import short

ALGORITHMS: Final = (
    "RS256",
    "RS384",
    "RS512",
    "PS256",
    "PS384",
    "PS512",
    "ES256",
    "ES384",
    "ES512",
    "EdDSA",
)
"""Signatures with a public key (RFC 7518, RFC 8037). `none` and HMAC are never accepted: anyone who has the public key could
sign."""
DEFAULT_ALGORITHMS: Final = ("RS256", "ES256", "EdDSA")
DEFAULT_HEADER: Final = "Authorization"
DEFAULT_LEEWAY_S: Final = 30
MAX_AUDIENCES: Final = 16
MAX_LEEWAY_S: Final = 300
_HEADER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}", re.ASCII)
_MAX_TEXT: Final = 2048


class JwtPolicy(msgspec.Struct, frozen=True, gc=False):
    """What a JSON Web Token must fulfil.

    Args:
        jwks: where the issuer's public keys are (RFC 7517): an `https://` URL, an `http://` URL of this machine, or a path.
        issuer: required value of `iss`; empty accepts any.
        audience: one of these must be in `aud`; empty accepts only tokens without `aud`.
        header: the request header that carries `Bearer <token>`.
        algorithms: accepted signatures, a part of `ALGORITHMS`.
        leeway_s: tolerated difference of clocks for `exp`, `nbf` and `iat`, s; 0 to 300.
    """

    jwks: str
    issuer: str = ""
    audience: tuple[str, ...] = ()
    header: str = DEFAULT_HEADER
    algorithms: tuple[str, ...] = DEFAULT_ALGORITHMS
    leeway_s: int = DEFAULT_LEEWAY_S

    @classmethod
    def make(
        cls,
        jwks: object,
        issuer: object = "",
        audience: object = (),
        header: object = DEFAULT_HEADER,
        algorithms: object = DEFAULT_ALGORITHMS,
        leeway_s: object = DEFAULT_LEEWAY_S,
    ) -> JwtPolicy:
        """Validate the fields of `[jwt]`.

        Args:
            jwks: see the class; so are all others. `audience` may be one text.

        Raises:
            PolicyError: naming the field, its value and the remedy.
        """
        return cls(
            jwks=_jwks(jwks),
            issuer=_text("issuer", issuer) if issuer != "" else "",
            audience=_audience(audience),
            header=_header(header),
            algorithms=_algorithms(algorithms),
            leeway_s=_leeway(leeway_s),
        )

    @property
    def header_bytes(self) -> bytes:
        """The header's name as it is looked up: in lower case."""
        return self.header.lower().encode()

    @property
    def is_url(self) -> bool:
        """Whether the keys come from a URL, not from a file."""
        return self.jwks.startswith(("https://", "http://"))


def _jwks(value: object) -> str:
    text = _text("jwks", value)
    if "://" not in text:
        return text
    try:
        url = urlsplit(text)
        host = url.hostname
        url.port  # noqa: B018 - raises for a port that is none
    except ValueError as error:
        raise PolicyError(f"jwks {short(text)} is not a valid URL: {error}") from None
    if url.scheme not in ("https", "http") or not host:
        raise PolicyError(f"jwks {short(text)} must be an https:// URL or the path of a file")
    if url.username is not None or url.password is not None:
        raise PolicyError("jwks must not contain a user name or password: public keys need none")
    if url.scheme == "http" and host not in ("localhost", "127.0.0.1", "::1"):
        raise PolicyError(
            f"jwks {short(text)} must use https://: whoever can change the keys on their way can sign tokens; "
            "http:// is accepted only for this machine"
        )
    return text


def _audience(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else _texts("audience", value)
    if len(texts) > MAX_AUDIENCES:
        raise PolicyError(f"audience has {len(texts)} entries; at most {MAX_AUDIENCES} are possible")
    return tuple(_text("audience", text) for text in texts)


def _header(value: object) -> str:
    if not isinstance(value, str) or not _HEADER.fullmatch(value):
        raise PolicyError(f"header {short(value)} is not the name of an HTTP header, e.g. Authorization")
    return value


def _algorithms(value: object) -> tuple[str, ...]:
    names = _texts("algorithms", value)
    if not names:
        raise PolicyError(f"algorithms is empty: choose from {', '.join(ALGORITHMS)}")
    for name in names:
        if name not in ALGORITHMS:
            raise PolicyError(
                f"algorithms has {short(name)}, which is not accepted: choose from {', '.join(ALGORITHMS)}; "
                "'none' and HMAC (HS256 …) do not prove who signed"
            )
    return tuple(dict.fromkeys(names))


def _leeway(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_LEEWAY_S:
        raise PolicyError(f"leeway_s {short(value)} must be a whole number from 0 to {MAX_LEEWAY_S}")
    return value


def _texts(field: str, value: object) -> list[str]:
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
        raise PolicyError(f"{field} {short(value)} must be a list of texts")
    entries = list(value)
    if not all(isinstance(entry, str) for entry in entries):
        raise PolicyError(f"{field} must be a list of texts, not {short(entries)}")
    return entries


def _text(field: str, value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT or not value.isprintable():
        raise PolicyError(f"{field} {short(value)} must be a text of 1 to {_MAX_TEXT} printable characters")
    return value
