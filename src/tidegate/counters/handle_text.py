"""Ids of holds and reservations as callers have them: a handle in msgpack and base64, so that any instance can read it."""

from __future__ import annotations

import binascii
import re
from typing import Any, Final, TypeVar

import msgspec

MAX_ID: Final = 8192
"""Most characters of an id: one that names 64 limits with the names of their counters is shorter."""
ID: Final = re.compile(r"[A-Za-z0-9_-]{16}", re.ASCII)
"""The random part of an id."""
TO_STANDARD: Final = bytes.maketrans(b"-_", b"+/")
TO_URL: Final = bytes.maketrans(b"+/", b"-_")
"""Between base64 and that of ids: the functions of `base64` take twice as long."""
_PADDING: Final = (b"", b"===", b"==", b"=")
_TAG: Final = re.compile(rb"[^{}]{1,64}", re.DOTALL)
_NAME: Final = re.compile(rb"[A-Za-z0-9+/]{8}")
_ENCODER: Final = msgspec.msgpack.Encoder()
_Handle = TypeVar("_Handle")


def text_of(handle: object) -> str:
    """A handle as text: letters, digits, `-` and `_`."""
    return binascii.b2a_base64(_ENCODER.encode(handle), newline=False).translate(TO_URL).rstrip(b"=").decode()


def handle_of(text: object, decoder: msgspec.msgpack.Decoder[_Handle]) -> _Handle | None:
    """Read a handle.

    Args:
        text: as a caller sent it.
        decoder: for the type of the handle.

    Returns:
        The handle; None where the text is not what `text_of` makes of one.
    """
    if type(text) is not str or not 0 < len(text) <= MAX_ID:
        return None
    try:
        # Characters that do not belong there are skipped: then the text is not that of the handle.
        handle = decoder.decode(binascii.a2b_base64(text.encode().translate(TO_STANDARD) + _PADDING[len(text) % 4]))
    except (binascii.Error, ValueError, msgspec.MsgspecError):
        return None
    return handle if text_of(handle) == text else None


def is_counter(counter: Any) -> bool:
    """Whether a counter with `tag` and `name` could be one of ours: it is looked up in Redis."""
    return _TAG.fullmatch(counter.tag) is not None and _NAME.fullmatch(counter.name) is not None
