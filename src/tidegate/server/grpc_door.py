"""The gRPC listener of an instance, plain or with TLS, and the file of `[envoy] config` that it serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from tidegate.doors.callers_auth import CallersAuth
from tidegate.doors.client_address import TrustedProxies
from tidegate.doors.grpc.listener import GrpcListener
from tidegate.doors.grpc.service import RateLimitService
from tidegate.doors.grpc.tls_listener import GrpcTlsListener
from tidegate.errors import PolicyError
from tidegate.server.certificates import Certificates
from tidegate.settings import Settings
from tidegate.telemetry.access import AccessLog
from tidegate.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)


class GrpcDoor:
    """Opens the listener and follows `[envoy] config`.

    Args:
        service: answers the calls.
        metrics: count the configurations that were refused, and observe checks of rejected callers.

    Attributes:
        listener: None until `listen`.
    """

    def __init__(self, settings: Settings, service: RateLimitService, metrics: Metrics) -> None:
        self.service = service
        self.listener: GrpcListener | GrpcTlsListener | None = None
        self._settings = settings
        self._metrics = metrics
        self._error: str | None = None

    def load_config(self) -> Callable[[asyncio.Event], Awaitable[None]] | None:
        """Read the file of `[envoy] config`, if one is configured.

        Returns:
            What follows its changes, given an event that is set to read it even if it looks unchanged; None without a file.

        Raises:
            PolicyError: if it does not exist.
        """
        envoy = self._settings.envoy
        if not envoy.config:
            return None
        from tidegate.doors.grpc.config_watcher import load_domains, watch_domains

        path = Path(envoy.config)
        try:
            self.service.domains = load_domains(path, envoy.domain)
        except PolicyError as error:
            if not path.exists():
                raise
            # The other doors still work. Calls for these domains fail until the file is valid, and gRPC health reports
            # NOT_SERVING, so that Envoy uses another instance.
            self.service.domains = None
            self._refused(error)
        return partial(watch_domains, path, envoy.domain, self.service, self._refused, self._applied)

    async def listen(
        self,
        host: str,
        port: int,
        *,
        shares_port: bool,
        callers: CallersAuth | None,
        certificates: Certificates | None,
        access: AccessLog | None,
        reads_metadata: bool,
    ) -> None:
        """Open the listener.

        Args:
            host: where it listens.
            port: where it listens.
            shares_port: whether other processes listen there too.
            callers: authenticates callers; None for everybody.
            certificates: of the instance; None without TLS.
            access: logs a sample of the calls; None for none.
            reads_metadata: whether traces need what callers send beside their requests.
        """
        from tidegate.doors.grpc.callers import GrpcCallers

        authenticated = None if callers is None else GrpcCallers(callers, self._metrics.observe)
        trusted = TrustedProxies(self._settings.server.trusted_proxies)
        with_tls = certificates is not None and self._settings.uses_tls("grpc")
        if certificates is not None and with_tls:
            secured = GrpcTlsListener(
                self.service,
                host,
                port,
                lambda: certificates.loaded.files,
                certificates.client_names,
                shares_port,
                access,
                reads_metadata=reads_metadata,
                trusted=trusted,
                callers=authenticated,
            )
            await secured.start()
            self.listener = secured
        else:
            plain = GrpcListener(
                self.service,
                host,
                port,
                shares_port,
                access,
                reads_metadata=reads_metadata,
                trusted=trusted,
                callers=authenticated,
            )
            plain.start()
            self.listener = plain
        self.listener.configured(self.service.domains is not None)

    def _refused(self, error: PolicyError) -> None:
        known, self._error = self._error, str(error)
        if known == self._error:
            return  # the watcher reads the file refused at start again
        self._metrics.policy_reload_errors += 1
        remains = "calls for its domains are answered UNAVAILABLE" if self.listener is None else "the last valid one stays active"
        logger.error("[envoy] config refused, %s: %s", remains, error)

    def _applied(self) -> None:
        self._error = None
        if self.listener is not None:
            self.listener.configured(True)

    async def ping(self) -> None:
        """For `/health`.

        Raises:
            PolicyError: if the file is refused as it is now.
        """
        if self._error is not None:
            raise PolicyError(f"[envoy] config refused: {self._error}")
