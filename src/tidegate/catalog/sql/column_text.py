"""Texts of clients that fit the columns of their table."""

from __future__ import annotations

import hashlib


def shorten(value: str, max_length: int) -> str:
    """A text that fits its column. A changed text ends in a digest, so that different texts stay different."""
    if value.isascii() and len(value) <= max_length and "\0" not in value:
        return value
    clean = value.encode(errors="replace").decode().replace("\0", "?")
    if clean == value and len(value) <= max_length:
        return value
    digest = hashlib.blake2b(value.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    return f"{clean[: max_length - 17]}~{digest}"
