"""Commands as Redis reads them."""

from __future__ import annotations


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
        out.append(b"$%d\r\n%b\r\n" % (len(raw), raw))
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
