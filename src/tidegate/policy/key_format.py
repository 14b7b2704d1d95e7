"""The form of API keys: made, told from mistyped ones, hashed. Never stored."""

from __future__ import annotations

import hashlib
import re
import secrets
import zlib
from typing import Final

FORM: Final = re.compile(r"[A-Za-z0-9_-]{16,128}", re.ASCII)
"""What any key may look like; keys of a policy file need no more than this."""
BASE62: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
KEY_PREFIX: Final = "tg_"
_MADE_KEY: Final = re.compile(r"tg_[0-9A-Za-z]{38}", re.ASCII)


def make_api_key() -> str:
    """Make a new API key: `tg_`, 32 random base62 characters (190 bits), 6 check characters.

    Returns:
        The key, to be shown once.
    """
    body = "".join(secrets.choice(BASE62) for _ in range(32))
    return KEY_PREFIX + body + _check_characters(body)


def is_mistyped(api_key: str) -> bool:
    """Whether a key has our prefix but cannot be one of ours: refused without a look-up.

    Args:
        api_key: as it came.

    Returns:
        True if it begins with `tg_` and its form or its check characters are wrong.
    """
    if not api_key.startswith(KEY_PREFIX):
        return False
    return _MADE_KEY.fullmatch(api_key) is None or _check_characters(api_key[3:35]) != api_key[35:]


def is_possible_key(api_key: str) -> bool:
    """Whether a key has a form that any key of ours can have: 16 to 128 of `[A-Za-z0-9_-]`, not mistyped."""
    return FORM.fullmatch(api_key) is not None and not is_mistyped(api_key)


def why_impossible(api_key: str) -> str:
    """Why no key of ours can be this one, for whoever sent it.

    Args:
        api_key: a key that `is_possible_key` refuses; it is not repeated.

    Returns:
        What is wrong, and the remedy.
    """
    if is_mistyped(api_key):
        return "the API key is mistyped: copy it again"
    return (
        "the API key is mistyped, or made by another service: keys have 16 to 128 of letters, digits, '_' and '-'; one that was "
        "imported by its digest must have this form as well"
    )


def hash_api_key(api_key: str) -> str:
    """The digest under which a key is stored. Keys are random, so a plain SHA-256 needs no salt.

    Args:
        api_key: the key itself, ASCII.

    Returns:
        64 lower-case hex digits.
    """
    return hashlib.sha256(api_key.encode()).hexdigest()


def _check_characters(body: str) -> str:
    value = zlib.crc32(body.encode())
    characters = []
    for _ in range(6):
        value, digit = divmod(value, 62)
        characters.append(BASE62[digit])
    return "".join(reversed(characters))
