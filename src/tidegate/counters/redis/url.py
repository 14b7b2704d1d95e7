"""Parsing of Redis URLs.

    redis://[user:password@]host[:6379][/db]                    one server
    redis+unix:///path/to.sock[?db=1]                           one server on a socket of this machine
    redis+sentinel://[user:password@]h:26379,h:26379/name[/db]  the master that sentinels name
    redis+cluster://[user:password@]h:7000,h:7001               a cluster; any of its nodes will do
    rediss://, rediss+sentinel://, rediss+cluster://            the same over TLS

Options after `?`: `ca`, `cert`, `key` (PEM files for TLS), `sentinel_password`, `sentinel_user`, `db` (unix sockets).
"""

from __future__ import annotations

import enum
import re
import ssl
from typing import Final
from urllib.parse import parse_qsl, unquote

import msgspec

from tidegate.errors import SettingsError
from tidegate.listen_address import is_host
from tidegate.url_parts import scheme_of, split_url

DEFAULT_PORT: Final = 6379
DEFAULT_SENTINEL_PORT: Final = 26379
MAX_PORT: Final = 65_535
_UNIX_FORM: Final = "counters.url for a unix socket needs three slashes: redis+unix:///run/redis/redis.sock"
_OPTIONS: Final = frozenset(("ca", "cert", "key", "sentinel_user", "sentinel_password", "db"))


_ENDPOINT: Final = re.compile(r"(?:\[([^\[\]]+)\]|([^:\[\]]+))(?::([0-9]{0,5}))?", re.ASCII)


class Topology(enum.Enum):
    """How the servers of a URL belong together."""

    STANDALONE = "standalone"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


class Endpoint(msgspec.Struct, frozen=True):
    """One server's address.

    Args:
        host: name or address; empty for a unix socket.
        port: TCP port; 0 for a unix socket.
        path: of the unix socket, else empty.
    """

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Credentials(msgspec.Struct, frozen=True):
    """Who we are for a server.

    Args:
        username: of the ACL user; empty for the default one.
        password: empty for none.
    """

    username: str = ""
    password: str = ""


class RedisUrl(msgspec.Struct, frozen=True):
    """A parsed URL.

    Args:
        topology: how the servers belong together.
        endpoints: one or more: the server, the sentinels, or nodes of the cluster.
        credentials: for the servers that count.
        db: number of the database, 0 or more; always 0 in a cluster.
        master: the name that sentinels know the master by.
        tls: whether to speak TLS.
        ca: PEM file of the authority to trust; the system's where empty.
        cert: PEM file of our certificate, empty for none.
        key: PEM file of its key; in `cert` where empty.
    """

    topology: Topology
    endpoints: tuple[Endpoint, ...]
    credentials: Credentials = Credentials()
    sentinel_credentials: Credentials = Credentials()
    db: int = 0
    master: str = ""
    tls: bool = False
    ca: str = ""
    cert: str = ""
    key: str = ""

    def tls_context(self) -> ssl.SSLContext | None:
        """What TLS connections are made with.

        Returns:
            The context; None without TLS.

        Raises:
            SettingsError: if a PEM file cannot be read.
        """
        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
        except (OSError, ssl.SSLError) as error:
            raise self._unusable(error) from None
        self.load_certificates(context)
        return context

    def load_certificates(self, context: ssl.SSLContext) -> None:
        """Read the PEM files into a context, also into one that is in use: connections made from then on have them.

        Args:
            context: made by `tls_context`. An authority that it trusts already stays trusted.

        Raises:
            SettingsError: if a PEM file cannot be read.
        """
        try:
            if self.ca:
                context.load_verify_locations(cafile=self.ca)
            if self.cert:
                context.load_cert_chain(self.cert, self.key or None)
        except (OSError, ssl.SSLError) as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> SettingsError:
        files = ", ".join(name for name in (self.ca, self.cert, self.key) if name)
        return SettingsError(f"counters.url: the PEM files {files} cannot be used for TLS: {error}")


def parse_redis_url(url: str) -> RedisUrl:
    """Read a Redis URL.

    Raises:
        SettingsError: naming the part that is not valid; never the password.
    """
    scheme = scheme_of(url)
    base, _, kind = scheme.partition("+")
    if base not in ("redis", "rediss") or kind not in ("", "unix", "sentinel", "cluster") or (kind == "unix" and base != "redis"):
        raise SettingsError(
            f"counters.url with the scheme {scheme!r} is not supported: use redis://, rediss://, redis+unix://, "
            "redis+sentinel:// or redis+cluster:// (rediss+… for TLS)"
        )
    parts = split_url(url.partition("://")[2])
    if parts is None:
        raise SettingsError(
            "counters.url has '#', a control character, or a password with '/' or '?': percent-encode them in user and password "
            "(%2F, %3F, %23), e.g. redis://:pass%2Fword@127.0.0.1:6379"
        )
    credentials = _credentials(parts.user)
    default_port = DEFAULT_SENTINEL_PORT if kind == "sentinel" else DEFAULT_PORT
    # Checked first: text that is not a host may be a password whose '@' is missing, and must not be repeated.
    endpoints = (
        () if kind == "unix" else tuple(_endpoint(text, default_port, parts.user is None) for text in parts.hosts.split(","))
    )
    tls = base == "rediss"
    options = _options(parts.query, tls)
    segments = [unquote(segment) for segment in parts.path.split("/") if segment]
    if kind == "unix":
        if parts.hosts:
            raise SettingsError(_UNIX_FORM)
        return RedisUrl(Topology.STANDALONE, (_unix_endpoint(parts.path),), credentials, db=_db(options.get("db", "0")))
    master = ""
    if kind == "sentinel":
        if not segments:
            raise SettingsError("counters.url for sentinels needs the master's name: redis+sentinel://host:26379/mymaster")
        master = segments.pop(0)
    if kind == "" and len(endpoints) > 1:
        raise SettingsError(
            "counters.url names several servers: write redis+cluster:// or redis+sentinel://, depending on what they are"
        )
    db = _db(segments[0] if segments else options.get("db", "0"))
    if kind == "cluster" and db:
        raise SettingsError(f"counters.url names database {db}, but a cluster has only database 0: remove it")
    return RedisUrl(
        {"": Topology.STANDALONE, "sentinel": Topology.SENTINEL, "cluster": Topology.CLUSTER}[kind],
        endpoints,
        credentials,
        Credentials(options.get("sentinel_user", ""), options.get("sentinel_password", "")),
        db,
        master,
        tls,
        options.get("ca", ""),
        options.get("cert", ""),
        options.get("key", ""),
    )


def _options(query: str, tls: bool) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        shown = "an unknown option" if "@" in query else f"the unknown option {unknown[0][:40]!r}"
        raise SettingsError(f"counters.url has {shown}: known are {', '.join(sorted(_OPTIONS))}")
    if not tls and any(name in options for name in ("ca", "cert", "key")):
        raise SettingsError("counters.url has PEM files but no TLS: write rediss:// for redis://")
    return options


def _unix_endpoint(path: str) -> Endpoint:
    if not path:
        raise SettingsError(_UNIX_FORM)
    if "\0" in unquote(path):
        raise SettingsError(f"counters.url: {path[:60]!r} is not a valid path: remove %00")
    return Endpoint(path=unquote(path))


def _credentials(user: str | None) -> Credentials:
    if user is None:
        return Credentials()
    username, colon, password = user.partition(":")
    if not colon:
        # Redis has users since version 6, other programs take this for the password.
        raise SettingsError(
            "counters.url has a user without a password: write redis://:password@host for a password alone, "
            "redis://user:password@host for an ACL user, or redis://user:@host for one without a password"
        )
    return Credentials(unquote(username), unquote(password))


def _endpoint(text: str, default_port: int, may_be_secret: bool) -> Endpoint:
    match = _ENDPOINT.fullmatch(text)
    if match is not None:
        host, port = match[1] or match[2], match[3]
        if is_host(host) and (not port or 0 < int(port) <= MAX_PORT):
            return Endpoint(host, int(port) if port else default_port)
    shown = text.partition(":")[0][:60] + ":…" if may_be_secret and ":" in text and not text.startswith("[") else text[:60]
    raise SettingsError(f"counters.url: {shown!r} is not a valid address; expected host or host:{default_port}, IPv6 in brackets")


def _db(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 6):
        raise SettingsError(f"counters.url: {text[:20]!r} is not a valid database number; expected 0, 1, …")
    return int(text)
