"""The URL of a Tidegate server, as whoever asks one is given it."""

from __future__ import annotations

from urllib.parse import urlsplit

import msgspec

from tidegate.errors import SettingsError
from tidegate.settings import is_host
from tidegate.url_parts import masked


class Server(msgspec.Struct, frozen=True):
    """Where a server is. Make it with `at`.

    Args:
        url: as messages show it, without a slash at its end.
        tls: whether it is asked over TLS.
        host: name or address.
        port: 0 to 65,535.
        path: what stands before every path, without a slash at its end; mostly empty.
    """

    url: str
    tls: bool
    host: str
    port: int
    path: str

    @classmethod
    def at(cls, url: str) -> Server:
        """Read a URL.

        Args:
            url: `http://127.0.0.1:8080`, or `https://name/where/a/proxy/puts/it`.

        Returns:
            The server.

        Raises:
            SettingsError: if it names none.
        """
        if "@" in url:
            # Not repeated: what stands before the @ is mostly a password.
            raise SettingsError("a URL of a server takes no user and no password: write http://127.0.0.1:8080")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise _no_url(url) from None
        if (
            parts.scheme not in ("http", "https")
            or not is_host(parts.hostname or "")
            or parts.query
            or parts.fragment
            or any(not "!" <= character <= "~" for character in url)
        ):
            raise _no_url(url)
        tls = parts.scheme == "https"
        # The port is always said: without one, http.client looks for it in the host, and takes an IPv6 address apart.
        port = (443 if tls else 80) if port is None else port
        return cls(url.rstrip("/"), tls, parts.hostname or "", port, parts.path.rstrip("/"))


def _no_url(url: str) -> SettingsError:
    return SettingsError(f"{masked(url)!r} is no URL of a server: write http://127.0.0.1:8080")
