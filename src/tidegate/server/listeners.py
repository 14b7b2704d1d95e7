"""The listeners of one instance: data plane, control plane, gRPC and probes, with their addresses and certificates."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from tidegate.doors.http import DataPlane
from tidegate.doors.probes import ProbePages
from tidegate.doors.tls import ServerTls
from tidegate.listen_address import join_address, parse_address
from tidegate.server.addresses import Address, Addresses, free_address
from tidegate.server.certificates import Certificates
from tidegate.server.handover import listening_sockets, shared_address
from tidegate.server.listener import Listener
from tidegate.server.resources import Resources
from tidegate.settings import Settings, unix_mode
from tidegate.telemetry.collectors import collect_connections, collect_tls
from tidegate.telemetry.health import Health
from tidegate.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from tidegate.doors.grpc.listener import GrpcListener
    from tidegate.doors.grpc.tls_listener import GrpcTlsListener
    from tidegate.server.grpc_door import GrpcDoor

logger = logging.getLogger(__name__)

_CLOSE_S: Final = 1.0
MAX_ADMIN_CONNECTIONS: Final = 512
"""Maximum number of open connections to the control plane; beyond it the longest idle one is closed."""
MAX_PROBE_CONNECTIONS: Final = 256
"""Maximum number of open connections to the listener for probes."""


class Listeners:
    """The listeners, each None until it is started.

    Args:
        shares_port: whether other processes listen on the same ports.
        unix_sockets: descriptors of the unix sockets that the supervisor bound, by address.

    Attributes:
        certificates: of `[tls]`; None without TLS.
    """

    def __init__(self, settings: Settings, *, shares_port: bool, unix_sockets: Mapping[str, int]) -> None:
        self.http: Listener | None = None
        self.admin: Listener | None = None
        self.grpc: GrpcListener | GrpcTlsListener | None = None
        self.probes: Listener | None = None
        self.certificates: Certificates | None = None
        self._settings = settings
        self._shares_port = shares_port
        self._unix_sockets = unix_sockets

    def find_addresses(self) -> Addresses:
        """Where to listen.

        Raises:
            SettingsError: if an address cannot be used.
        """
        return Addresses.of(self._settings, self._find_address)

    def _find_address(self, text: str, name: str) -> Address:
        if text in self._unix_sockets:  # the supervisor listens there
            return parse_address(text, name)
        return shared_address(text, name) if self._shares_port else free_address(text, name)

    def open_certificates(self, resources: Resources, health: Health, metrics: Metrics) -> None:
        """Load the certificates of `[tls]`, and follow their files.

        Raises:
            SettingsError: if a file cannot be used.
        """
        certificates = self.certificates = Certificates(self._settings.tls) if self._settings.tls.cert else None
        collect_tls(metrics, certificates, self._refused_handshakes)
        if certificates is None:
            return
        health.add("tls", certificates.ping)
        resources.spawn("certificate_watcher", partial(certificates.watch, resources.reload_event()))

    def _refused_handshakes(self) -> dict[str, int]:
        servers = [listener.server.handshakes_refused for listener in (self.http, self.admin) if listener is not None]
        return {reason: sum(each[reason] for each in servers) for reason in ("client_name", "dropped", "failed")}

    def _tls_of(self, door: str) -> ServerTls | None:
        return None if self.certificates is None else self.certificates.tls_of(door)

    def _listener(self, app: Any, address: Address, max_connections: int, **options: Any) -> Listener:
        return Listener(
            app,
            *address,
            max_connections=max_connections,
            unix_mode=unix_mode(self._settings.server),
            inherited=self._unix_sockets,
            **options,
        )

    def open_http(self, data_plane: DataPlane, address: Address, metrics: Metrics) -> Listener:
        """The listener of the data plane, to be started."""
        server = self._settings.server
        self.http = self._listener(
            data_plane, address, server.max_connections, idle_timeout_s=server.idle_timeout_s, tls=self._tls_of("http")
        )
        collect_connections(metrics, self.http.server)
        return self.http

    async def start_admin(self, app: Any, address: Address) -> None:
        """Listen for the control plane."""
        self.admin = self._listener(app, address, MAX_ADMIN_CONNECTIONS, tls=self._tls_of("admin"))
        await self.admin.start()

    async def start_probes(self, pages: ProbePages, address: Address) -> None:
        """Listen for probes and scrapers."""
        self.probes = self._listener(pages, address, MAX_PROBE_CONNECTIONS)
        await self.probes.start()

    async def start_grpc(self, door: GrpcDoor, address: Address, **options: Any) -> None:
        """Listen for gRPC; for the options see `GrpcDoor.listen`."""
        await door.listen(*address, shares_port=self._shares_port, certificates=self.certificates, **options)
        self.grpc = door.listener
        logger.info("gRPC listening on %s%s", join_address(*address), " with TLS" if self._settings.uses_tls("grpc") else "")

    def has_successor(self, address: str) -> bool:
        """Whether processes that are not ours listen on the address of the data plane, as `[server] reuse_port` permits."""
        server = self._settings.server
        return server.reuse_port and listening_sockets(*parse_address(address, "server.http")) > server.workers

    async def stop_accepting(self) -> None:
        """Accept no more connections; those that are open are served as before."""
        await asyncio.gather(*(each.stop_accepting() for each in (self.http, self.admin) if each is not None))

    async def drain(self, timeout_s: float) -> None:
        """Stop all of them, waiting for the requests in flight.

        Args:
            timeout_s: how long to wait.
        """
        listeners = [each for each in (self.http, self.grpc, self.admin, self.probes) if each is not None]
        await asyncio.gather(*(listener.stop(timeout_s) for listener in listeners))

    async def close(self) -> None:
        """Stop all but gRPC, whose calls end after the background tasks."""
        for listener in (self.http, self.admin, self.probes):
            if listener is not None:
                await listener.stop(_CLOSE_S)
