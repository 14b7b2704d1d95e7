"""Addresses of listeners: `host:port`, or `unix:/path`."""

from __future__ import annotations

from typing import Final

from tidegate.errors import SettingsError

UNIX_PREFIX: Final = "unix:"
MAX_UNIX_PATH_BYTES: Final = 103
"""The path of a unix socket may have 104 bytes, with the zero at its end, on every system."""


def parse_address(text: str, name: str) -> tuple[str, int]:
    """Read a listener's address.

    Args:
        text: `host:port`, with an IPv6 host in brackets, or `unix:/path`.
        name: name of the setting, for the error.

    Returns:
        Host and port, 0 to 65535 (0: any free one); the whole text and 0 for a unix socket.

    Raises:
        SettingsError: naming the setting and its value.
    """
    if is_unix(text):
        path = text.removeprefix(UNIX_PREFIX)
        if not path.startswith("/") or path.endswith("/") or not path.isprintable():
            raise SettingsError(f"setting {name} = {text[:200]!r} needs an absolute path, e.g. 'unix:/run/tidegate/http.sock'")
        if len(path.encode()) > MAX_UNIX_PATH_BYTES:
            raise SettingsError(
                f"setting {name} = {text[:200]!r} is too long: the path of a unix socket has at most {MAX_UNIX_PATH_BYTES} bytes"
            )
        return text, 0
    host, colon, port = text.rpartition(":")
    host = host.strip("[]")
    if not colon or not is_host(host) or not port.isascii() or not port.isdecimal() or int(port[:6]) > 65_535:
        raise SettingsError(
            f"setting {name} = {text[:200]!r} is not a valid address; expected host:port, e.g. '127.0.0.1:8080' or '[::1]:8080'"
        )
    return host, int(port)


def is_unix(address: str) -> bool:
    """Whether an address, or its host as `parse_address` returns it, is that of a unix socket."""
    return address.startswith(UNIX_PREFIX)


def is_host(text: str) -> bool:
    """Whether a text can be resolved as a host: for others the resolver raises `UnicodeError`, long after the start.

    Args:
        text: a name or an address, without brackets.

    Returns:
        False for an empty text, one with control characters or spaces, and one with a label that is empty or has over 63 bytes.
    """
    if not text or not text.isprintable() or " " in text:
        return False
    try:
        text.encode("idna")
    except UnicodeError:
        return False
    return True


def join_address(host: str, port: int) -> str:
    """`host:port`, with an IPv6 host in brackets; for a unix socket the address is the host alone."""
    if is_unix(host):
        return host
    return f"{f'[{host}]' if ':' in host else host}:{port}"


def listener_url(address: str, uses_tls: bool) -> str:
    """The URL of an HTTP listener: `http://host:port`, `https://host:port`, or `unix:/path`, where TLS is not used.

    Args:
        address: `host:port` or `unix:/path`.
        uses_tls: whether it uses TLS.
    """
    return address if is_unix(address) else f"{'https' if uses_tls else 'http'}://{address}"
