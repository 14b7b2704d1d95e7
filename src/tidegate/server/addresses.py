"""Addresses to listen on: from the settings to a host and a free port."""

from __future__ import annotations

import errno
import importlib.util
import logging
import socket
from collections.abc import Callable, Mapping

from tidegate.errors import SettingsError
from tidegate.listen_address import parse_address
from tidegate.settings import Settings

logger = logging.getLogger(__name__)


def free_address(text: str, name: str) -> tuple[str, int]:
    """Check that an address is free to listen on.

    The server itself shares ports (SO_REUSEPORT): a second instance on a used port would start, and receive half of the
    connections.

    Args:
        text: `host:port`; port 0 for any free one.
        name: of the setting, for the error.

    Returns:
        Host and port.

    Raises:
        SettingsError: naming the setting, the address and the remedy.
    """
    host, port = parse_address(text, name)
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


def admin_address(
    settings: Settings, http_port: int, find: Callable[[str, str], tuple[str, int]] = free_address
) -> tuple[str, int] | None:
    """The address of the control plane.

    Args:
        settings: all of them.
        http_port: that of the data plane.
        find: returns host and port for a setting's text and name.

    Returns:
        Host and port; None if the control plane is disabled.

    Raises:
        SettingsError: if the address is not free, or has the data plane's port.
    """
    return _side_address(settings.server.admin, "admin", "control plane", {http_port: "server.http"}, find)


def grpc_address(
    settings: Settings,
    http_port: int,
    admin: tuple[str, int] | None,
    find: Callable[[str, str], tuple[str, int]] = free_address,
) -> tuple[str, int] | None:
    """The address of the gRPC listener.

    Args:
        settings: all of them.
        http_port: that of the data plane.
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
    taken = {http_port: "server.http"}
    if admin is not None:
        taken[admin[1]] = "server.admin"
    return _side_address(settings.server.grpc, "grpc", "gRPC listener", taken, find)


def missing_for_grpc() -> list[str]:
    """Names of the modules of `tidegate[envoy]` that are not installed."""
    return [name for name in ("pygrpc_native", "google.protobuf", "yaml") if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def _side_address(
    text: str, key: str, what: str, taken: Mapping[int, str], find: Callable[[str, str], tuple[str, int]]
) -> tuple[str, int] | None:
    if not text:
        return None
    name = f"server.{key}"
    port = parse_address(text, name)[1]
    if port and port in taken:
        raise SettingsError(
            f'{name} = {text!r} has the port of {taken[port]}: set another port for the {what}, or disable it with {key} = ""'
        )
    try:
        return find(text, name)
    except SettingsError as error:
        raise SettingsError(f'{error.message}; {key} = "" disables the {what}') from None
