"""Commands as Redis reads them."""

from __future__ import annotations

from typing import Final

_LENGTHS: Final = tuple(b"$%d\r\n" % length for length in range(256))
"""How a part of so many bytes begins. Looked up and joined, a command costs half of what formatting it costs."""


def encode_command(*parts: str | bytes) -> bytes:
    """One command in RESP.

    Args:
        parts: the command and its arguments.

    Returns:
        The bytes to write.
    """
    out = [b"*%d\r\n" % len(parts)]
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        length = len(raw)
        out += (_LENGTHS[length] if length < 256 else b"$%d\r\n" % length, raw, b"\r\n")
    return b"".join(out)


def with_source(command: bytes, sha: str, source: bytes) -> bytes:
    """An EVALSHA command as the EVAL of the same script.

    Args:
        command: as `encode_command` made it.
        sha: of the script.
        source: of the script.

    Returns:
        The bytes to write.
    """
    by_name = b"$7\r\nEVALSHA\r\n$40\r\n%b\r\n" % sha.encode()
    return command.replace(by_name, b"$4\r\nEVAL\r\n$%d\r\n%b\r\n" % (len(source), source), 1)
