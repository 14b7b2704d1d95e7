"""Addresses to listen on: from the settings to a host and a free port."""

from __future__ import annotations

import errno
import importlib.util
import logging
import socket
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from tidegate.errors import SettingsError
from tidegate.listen_address import is_unix, parse_address
from tidegate.server.listener import require_free_path
from tidegate.settings import Settings

logger = logging.getLogger(__name__)

Address: TypeAlias = tuple[str, int]
"""Host and port; the port of a unix socket is 0."""


class Addresses(NamedTuple):
    """Where an instance listens; None for a listener that is disabled."""

    http: Address
    admin: Address | None
    grpc: Address | None
    probes: Address | None

    @classmethod
    def of(cls, settings: Settings, find: Callable[[str, str], Address]) -> Addresses:
        """The addresses of the settings.

        Args:
            find: returns host and port for a setting's text and name.

        Raises:
            SettingsError: if an address is not free, or two listeners have the same one.
        """
        http = find(settings.server.http, "server.http")
        admin = admin_address(settings, http, find)
        grpc = grpc_address(settings, http, admin, find)
        others = {"server.http": http, "server.admin": admin, "server.grpc": grpc}
        return cls(http, admin, grpc, probes_address(settings, others, find))


def free_address(text: str, name: str) -> Address:
    """Check that an address is free to listen on.

    The server itself shares ports (SO_REUSEPORT): a second instance on a used port would start, and receive half of the
    connections.

    Args:
        text: `host:port`, port 0 for any free one; or `unix:/path`.
        name: of the setting, for the error.

    Returns:
        Host and port.

    Raises:
        SettingsError: naming the setting, the address and the remedy.
    """
    host, port = parse_address(text, name)
    if is_unix(host):
        try:
            require_free_path(host)
        except SettingsError as error:
            raise SettingsError(f"{name} = {text!r}: {error.message}") from None
        return host, port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            bound = probe.getsockname()
            return bound[0], bound[1]
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SettingsError(
                f"{name} = {text!r}: the port is in use; stop the process that listens there or set another port"
            ) from None
        raise SettingsError(f"{name} = {text!r}: cannot listen on it: {error.strerror or error}") from None


def admin_address(settings: Settings, http: Address, find: Callable[[str, str], Address] = free_address) -> Address | None:
    """The address of the control plane.

    Args:
        http: host and port of the data plane.
        find: returns host and port for a setting's text and name.

    Returns:
        Host and port; None if the control plane is disabled.

    Raises:
        SettingsError: if the address is not free, or has the data plane's port.
    """
    return _side_address(settings.server.admin, "admin", "control plane", {"server.http": http}, find)


def grpc_address(
    settings: Settings,
    http: Address,
    admin: Address | None,
    find: Callable[[str, str], Address] = free_address,
) -> Address | None:
    """The address of the gRPC listener.

    Args:
        http: host and port of the data plane.
        admin: host and port of the control plane; None where it is off.
        find: returns host and port for a setting's text and name.

    Returns:
        Host and port; None if gRPC is disabled, or its packages are not installed.

    Raises:
        SettingsError: if the address is not free, or `[envoy] config` needs packages that are not installed.
    """
    missing = missing_for_grpc()
    if settings.server.grpc and missing:
        if settings.envoy.config:
            raise SettingsError(f"envoy.config needs {', '.join(missing)}: pip install 'tidegate[envoy]'")
        logger.info("gRPC is disabled: to use it with Envoy, pip install 'tidegate[envoy]'")
        return None
    if settings.server.grpc and settings.uses_tls("grpc") and not _is_installed("grpc"):
        raise SettingsError(
            "[tls] for server.grpc needs the module grpc: pip install 'tidegate[envoy-tls]', remove grpc from tls.doors, or "
            'disable the gRPC listener with grpc = ""'
        )
    return _side_address(settings.server.grpc, "grpc", "gRPC listener", {"server.http": http, "server.admin": admin}, find)


def probes_address(
    settings: Settings,
    others: Mapping[str, Address | None],
    find: Callable[[str, str], Address] = free_address,
) -> Address | None:
    """The address of the listener for probes and metrics.

    Args:
        others: host and port of the other listeners, by setting.
        find: returns host and port for a setting's text and name.

    Returns:
        Host and port; None if it is disabled.

    Raises:
        SettingsError: if the address is not free, or that of another listener.
    """
    return _side_address(settings.server.probes, "probes", "listener for probes", others, find)


def missing_for_grpc() -> list[str]:
    """Names of the modules of `tidegate[envoy]` that are not installed."""
    return [name for name in ("pygrpc_native", "google.protobuf", "yaml") if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def _side_address(
    text: str, key: str, what: str, taken: Mapping[str, Address | None], find: Callable[[str, str], Address]
) -> Address | None:
    if not text:
        return None
    name = f"server.{key}"
    host, port = parse_address(text, name)
    for other, address in taken.items():
        if address is not None and ((port and port == address[1]) or (is_unix(host) and host == address[0])):
            what_of_it = "path" if is_unix(host) else "port"
            raise SettingsError(
                f"{name} = {text!r} has the {what_of_it} of {other}: set another {what_of_it} for the {what}, or disable it with "
                f'{key} = ""'
            )
    try:
        return find(text, name)
    except SettingsError as error:
        raise SettingsError(f'{error.message}; {key} = "" disables the {what}') from None
