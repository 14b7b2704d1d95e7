"""Parsing of a Tidegate server's URL."""

from __future__ import annotations

from urllib.parse import urlsplit

import msgspec

from tidegate.errors import SettingsError
from tidegate.listen_address import UNIX_PREFIX, is_host, is_unix
from tidegate.url_parts import masked


class Server(msgspec.Struct, frozen=True):
    """Location of a server. Create it with `at`.

    Args:
        url: for messages, without a slash at its end.
        tls: whether it is reached over TLS.
        host: name or address.
        port: 0 to 65,535.
        path: prefix of every path, without a slash at its end; usually empty.
        unix_path: of the unix socket that is connected to, in place of host and port; empty for none.
    """

    url: str
    tls: bool
    host: str
    port: int
    path: str
    unix_path: str = ""

    @classmethod
    def at(cls, url: str) -> Server:
        """Parse a URL such as `http://127.0.0.1:8080`, `https://name/prefix/of/a/proxy` or `unix:/run/tidegate/http.sock`.

        Raises:
            SettingsError: if it is not the URL of a server.
        """
        if is_unix(url):
            path = url.removeprefix(UNIX_PREFIX)
            if not path.startswith("/") or not path.isprintable():
                raise _invalid_url(url)
            return cls(url, False, "localhost", 80, "", path)
        if "@" in url:
            # The URL is not repeated: it usually contains a password.
            raise SettingsError(
                "the URL of a server must not contain a user or a password; expected for example http://127.0.0.1:8080"
            )
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise _invalid_url(url) from None
        if (
            parts.scheme not in ("http", "https")
            or not is_host(parts.hostname or "")
            or parts.query
            or parts.fragment
            or any(not "!" <= character <= "~" for character in url)
        ):
            raise _invalid_url(url)
        tls = parts.scheme == "https"
        # Always with a port: without one, http.client looks for it in the host and splits an IPv6 address.
        port = (443 if tls else 80) if port is None else port
        return cls(url.rstrip("/"), tls, parts.hostname or "", port, parts.path.rstrip("/"))


def _invalid_url(url: str) -> SettingsError:
    return SettingsError(f"{masked(url)!r} is not a valid URL of a server; expected for example http://127.0.0.1:8080")
