"""One running instance: its resources, its listeners and its shutdown.

Resources are opened in order and closed in reverse order.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tidegate._version import __version__
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.tokens import first_token
from tidegate.admin.what_if import WhatIfRuns
from tidegate.background import SUPERVISOR, stop
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.follower import CatalogFollower
from tidegate.catalog.unknown_keys import UnknownKeyLimit
from tidegate.counters import CounterStore
from tidegate.counters.factory import guard_of, open_counters
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Observation
from tidegate.doors.callers_auth import CallersAuth
from tidegate.doors.client_address import TrustedProxies
from tidegate.doors.http import DataPlane, Response
from tidegate.doors.key_sources import KeySources
from tidegate.doors.openapi import data_plane_openapi
from tidegate.doors.probes import ProbePages
from tidegate.doors.responses import encode
from tidegate.doors.tls import ServerTls
from tidegate.errors import CatalogError, PolicyError, SettingsError
from tidegate.gate.gate import Gate, Observer
from tidegate.ledger.aggregate import UsageCounts
from tidegate.ledger.maintenance import Retention
from tidegate.ledger.writer import UsageWriter
from tidegate.listen_address import join_address, parse_address
from tidegate.policy.file_watcher import watch_policy
from tidegate.policy.model import Policy
from tidegate.policy.paths import STRICT, PathRules
from tidegate.policy.toml_reader import load_policy
from tidegate.server.addresses import admin_address, free_address, grpc_address, probes_address
from tidegate.server.certificates import Certificates
from tidegate.server.handover import listening_sockets, shared_address
from tidegate.server.listener import Listener
from tidegate.server.system import system_report
from tidegate.server.wiring import (
    drop_leases_on_change,
    open_blocks,
    open_callers_auth,
    open_catalog,
    open_channel,
    share_catalog,
)
from tidegate.settings import Settings, unix_mode
from tidegate.telemetry.access import AccessLog
from tidegate.telemetry.collectors import (
    collect_access,
    collect_background,
    collect_cache,
    collect_counters,
    collect_tls,
    collect_usage,
    collect_violations,
)
from tidegate.telemetry.health import Health
from tidegate.telemetry.holds import collect_holds
from tidegate.telemetry.logs import lines_dropped, lines_suppressed
from tidegate.telemetry.metrics import Metrics
from tidegate.violations.recorder import Violations, ViolationWriter

if TYPE_CHECKING:
    from tidegate.doors.grpc.listener import GrpcListener
    from tidegate.doors.grpc.service import RateLimitService
    from tidegate.doors.grpc.tls_listener import GrpcTlsListener
    from tidegate.telemetry.tracing import Tracing

logger = logging.getLogger(__name__)

_QUIET_S: Final = 0.2
_CLOSE_S: Final = 1.0
_SWEEP_STEPS: Final = 500
MAX_ADMIN_CONNECTIONS: Final = 512
"""Maximum number of open connections to the control plane; beyond it the longest idle one is closed."""
MAX_PROBE_CONNECTIONS: Final = 256
"""Maximum number of open connections to the listener for probes."""
_METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Instance:
    """Everything that one process runs.

    Once started, `address`, `admin_address`, `grpc_address` and `probes_address` are the listening addresses (all but the first
    are empty if disabled), and `first_token` is the token of the first operator if this start generated it.

    Args:
        settings: all settings; an instance is one process, regardless of `[server] workers`.
        shares_port: share the ports with other processes, as workers do.
        unix_sockets: descriptors of the unix sockets that the supervisor bound, by address.
        demo: whether the console signs in browsers on this machine without a token.

    Attributes:
        exposition: returns the content of `/metrics`; by default the metrics of this process.
    """

    def __init__(
        self,
        settings: Settings,
        shares_port: bool = False,
        unix_sockets: Mapping[str, int] | None = None,
        *,
        demo: bool = False,
    ) -> None:
        self.settings = settings
        self._demo = demo
        self._shares_port = shares_port or settings.server.reuse_port
        self._unix_sockets = unix_sockets or {}
        self.metrics = Metrics(__version__)
        self.exposition: Callable[[], Awaitable[bytes]] = self.metrics.exposition
        self.health = Health(SUPERVISOR.failing)
        self.address = ""
        self.admin_address = ""
        self.grpc_address = ""
        self.probes_address = ""
        self.first_token: str | None = None
        self._listener: Listener | None = None
        self._admin: Listener | None = None
        self._grpc: GrpcListener | GrpcTlsListener | None = None
        self._probes: Listener | None = None
        self._certificates: Certificates | None = None
        self._tracing: Tracing | None = None
        self._paths = STRICT
        self._callers: CallersAuth | None = None
        self._stack = contextlib.AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._reloads: list[Callable[[], None]] = []
        self._flushes: list[Callable[[], Awaitable[None]]] = []
        self._policy_error: str | None = None
        self._domains_error: str | None = None
        self._refused_at_start: str | None = None

    async def start(self) -> None:
        """Open everything and listen.

        Raises:
            SettingsError: if a setting cannot be used: a port in use, a database that cannot be opened.
            PolicyError: if the policy file is refused and the catalog holds no tier, or `[envoy] config` does not
                exist.
        """
        settings = self.settings
        require_shared_counters(settings)
        self._paths = PathRules.of(settings.paths.encoded_slashes, settings.paths.decode_unreserved)
        find = self._find_address
        http = find(settings.server.http, "server.http")
        admin = admin_address(settings, http, find)
        grpc = grpc_address(settings, http, admin, find)
        probes = probes_address(settings, {"server.http": http, "server.admin": admin, "server.grpc": grpc}, find)
        self._open_certificates()
        policy_path = settings.policy_path
        self.counters = open_counters(settings.counters, settings.breaker, leases=settings.leases)
        guard = guard_of(self.counters)
        self._own(None if guard is None else "redis", self.counters.ping, self.counters.close)
        store = None
        if guard is not None:
            await guard.start()
            store = guard.store
            self._reloads.append(store.reload_certificates)
        channel = open_channel(settings, store)
        self.catalog = await open_catalog(settings, channel)
        self._own("database", self.catalog.ping, self.catalog.close)
        shared = await share_catalog(settings, self.catalog, store)
        if shared is not None:
            self._stack.push_async_callback(shared.settle)
        source = self.catalog if shared is None else shared
        if policy_path is not None:
            await self._first_policy(policy_path)
        elif (released := await self.catalog.release_policy()) is not None:
            logger.warning(
                "no policy file is configured, but %d tiers and %d API keys of this catalog came from one: they stay active, and "
                "operators can now change and revoke them; see 'tidegate keys list'",
                released.tiers,
                released.api_keys,
            )
        self.cached = CachedCatalog(
            source,
            l1_ttl_s=settings.cache.l1_ttl_s,
            stale_if_error_s=settings.cache.stale_if_error_s,
            max_keys=settings.cache.max_keys,
            unknown_keys=UnknownKeyLimit(bound) if (bound := settings.catalog.unknown_keys_per_minute) else None,
        )
        drop_leases_on_change(self.cached, self.counters)
        self._callers = await open_callers_auth(settings, self.catalog, self.cached)
        if self.cached.caller_tokens is not None:
            self._spawn("caller_tokens", self.cached.caller_tokens.run)
        blocks = await open_blocks(settings, self.catalog, self.cached)
        self._spawn("blocks", blocks.run)
        access = AccessLog(settings.server.access_log_sample) if settings.server.access_log_sample else None
        gate = Gate(self.cached, self._counted(), self._observer(access), lookup_timeout_s=2 * settings.catalog.timeout_s)
        self._stack.push_async_callback(gate.tokens.close)
        gate.tokens.when_needed = lambda: self.health.add("jwks", gate.tokens.ping)
        pages = {
            "/health": self._health_page,
            "/readyz": self._ready_page,
            "/livez": self._live_page,
            "/metrics": self._metrics_page,
            "/openapi.json": self._openapi_page,
        }
        self.data_plane = DataPlane(
            gate,
            pages,
            self.metrics.observe,
            TrustedProxies(settings.server.trusted_proxies),
            settings.server.body_timeout_s,
            access,
            self._paths,
            self._callers,
            KeySources(settings.keys.sources),
        )
        collect_cache(self.metrics, self.cached, shared, self.catalog.database)
        collect_counters(self.metrics, self.counters)
        collect_access(self.metrics, gate.access, blocks)
        collect_holds(self.metrics, gate.holds.figures, self.counters)
        collect_background(self.metrics, SUPERVISOR)
        self.metrics.add_gauge("rate_limiter_policy_version", "Active version of the catalog.", lambda: self.cached.version)
        self.metrics.add_gauge("rate_limiter_in_flight", "Requests in flight.", lambda: self.in_flight)
        self.metrics.add_counter(
            "rate_limiter_log_lines_dropped", "Log lines dropped because the output was blocked or closed.", lines_dropped
        )
        self.metrics.add_counter("rate_limiter_log_lines_suppressed", "Repeated log lines suppressed.", lines_suppressed)
        self.cached.changed(await source.changes(0))
        self.follower = CatalogFollower(source, self.cached, settings.catalog.poll_s, channel)
        self._spawn("catalog_follower", self.follower.run)
        if isinstance(self.counters, MemoryCounters):
            self._spawn("memory_sweep", partial(_sweep, self.counters))
        if policy_path is not None:
            reload = self._reload_event()
            self._spawn(
                "policy_file_watcher",
                partial(watch_policy, policy_path, self._apply_policy, self._policy_refused, again=reload),
            )
        if grpc is not None:
            await self._start_grpc(gate, access, *grpc)
        if admin is not None:
            await self._start_admin(gate, *admin)
        # Exclude long-lived objects from garbage collection: a full collection over a million counters would stop every check for
        # milliseconds.
        gc.collect()
        gc.freeze()
        # The data plane last: once it is ready, everything is.
        self._listener = Listener(
            self.data_plane,
            *http,
            idle_timeout_s=settings.server.idle_timeout_s,
            max_connections=settings.server.max_connections,
            tls=self._tls_of("http"),
            unix_mode=unix_mode(settings.server),
            inherited=self._unix_sockets,
        )
        server = self._listener.server
        self.metrics.add_gauge("rate_limiter_connections", "Open connections of the data plane.", lambda: server.connections)
        self.metrics.add_labelled_counter(
            "rate_limiter_connections_closed",
            "Connections closed at max_connections: idle ones evicted, or new ones refused.",
            "reason",
            lambda: {"evicted": server.evicted, "refused": server.refused},
        )
        self.address = join_address(*http)
        await self._listener.start()
        logger.info("listening on %s", self._listener.url)
        if probes is not None:
            await self._start_probes(pages, *probes)

    def _find_address(self, text: str, name: str) -> tuple[str, int]:
        """Host and port of a setting; see `shared_address` and `free_address`."""
        if text in self._unix_sockets:  # the supervisor listens there
            return parse_address(text, name)
        return shared_address(text, name) if self._shares_port else free_address(text, name)

    @property
    def in_flight(self) -> int:
        """Requests and calls being answered."""
        return self.data_plane.in_flight + (0 if self._grpc is None else self._grpc.in_flight)

    @property
    def _answered(self) -> int:
        return self.data_plane.answered + (0 if self._grpc is None else self._grpc.answered)

    @property
    def connections(self) -> int:
        """Open connections of the data plane."""
        return 0 if self._listener is None else self._listener.server.connections

    def _has_successor(self) -> bool:
        """Whether processes that are not ours listen on the address of the data plane, as `[server] reuse_port` permits."""
        server = self.settings.server
        return server.reuse_port and listening_sockets(*parse_address(self.address, "server.http")) > server.workers

    def _observer(self, access: AccessLog | None) -> Observer:
        """Called for every check: metrics; violations, usage, the access log and traces if enabled."""
        observers: list[Observer] = [self.metrics.observe]
        if self.settings.violations.enabled:
            observers.append(self._violations())
        if self.settings.ledger.enabled:
            observers.append(self._usage())
        if access is not None:
            observers.append(access.observe)
        if self._tracing is not None:
            observers.append(self._tracing.observe)
        if len(observers) == 1:
            return observers[0]
        if len(observers) == 2:
            count, note = observers

            def observe_two(observation: Observation) -> None:
                count(observation)
                note(observation)

            return observe_two
        if len(observers) == 3:
            one, two, three = observers

            def observe_three(observation: Observation) -> None:
                one(observation)
                two(observation)
                three(observation)

            return observe_three

        def observe(observation: Observation) -> None:
            for each in observers:
                each(observation)

        return observe

    def _violations(self) -> Observer:
        settings = self.settings.violations
        violations = Violations(settings.max_entries)
        writer = ViolationWriter(violations, self.catalog.database, settings.flush_s, settings.keep_days)
        collect_violations(self.metrics, writer)
        self._spawn("violations_writer", writer.run)
        self._flush_at_end(writer.flush)
        return violations.observe

    def _usage(self) -> Observer:
        settings = self.settings.ledger
        counts = UsageCounts(latency=self.metrics.latency)
        retention = Retention(settings.keep_days, settings.traffic_days, settings.minutes_days, settings.max_callers)
        writer = UsageWriter(counts, self.catalog.database, settings.flush_s, retention)
        collect_usage(self.metrics, writer)
        self.health.add("ledger", writer.ping)
        self._spawn("ledger_writer", writer.run)
        self._flush_at_end(writer.flush)
        return counts.observe

    def _flush_at_end(self, flush: Callable[[], Awaitable[None]]) -> None:
        if not self._flushes:
            # Opened after the catalog, so flushed before the catalog is closed.
            self._stack.push_async_callback(self._flush)
        self._flushes.append(flush)

    async def _flush(self) -> None:
        # At the same time: while the database does not answer, one after the other would take longer than a worker has to end.
        await asyncio.gather(*(flush() for flush in self._flushes))

    def _counted(self) -> CounterStore:
        """The counter store for the gate, wrapped to record its calls if tracing is enabled."""
        if not self.settings.tracing.endpoint:
            return self.counters
        # Imported here: OpenTelemetry is optional, and costs time and memory.
        from tidegate.telemetry.tracing import Tracing

        self._tracing = Tracing(self.settings.tracing.endpoint, self.settings.tracing.sample)
        self._stack.push_async_callback(self._tracing.close)
        return self._tracing.counters(self.counters)

    @property
    def url(self) -> str:
        """Where the data plane listens: `http://host:port`, `https://host:port` or `unix:/path`."""
        return "" if self._listener is None else self._listener.url

    @property
    def admin_url(self) -> str:
        """Where the control plane listens, in the same forms; empty if it is disabled."""
        return "" if self._admin is None else self._admin.url

    def _open_certificates(self) -> None:
        certificates = self._certificates = Certificates(self.settings.tls) if self.settings.tls.cert else None
        collect_tls(self.metrics, certificates, self._refused_handshakes)
        if certificates is None:
            return
        self.health.add("tls", certificates.ping)
        self._spawn("certificate_watcher", partial(certificates.watch, self._reload_event()))

    def _refused_handshakes(self) -> dict[str, int]:
        servers = [listener.server.handshakes_refused for listener in (self._listener, self._admin) if listener is not None]
        return {reason: sum(each[reason] for each in servers) for reason in ("client_name", "dropped", "failed")}

    def _tls_of(self, door: str) -> ServerTls | None:
        return None if self._certificates is None else self._certificates.tls_of(door)

    async def _start_probes(self, pages: Mapping[str, Callable[[], Awaitable[Response]]], host: str, port: int) -> None:
        self._probes = Listener(
            ProbePages(pages),
            host,
            port,
            max_connections=MAX_PROBE_CONNECTIONS,
            unix_mode=unix_mode(self.settings.server),
            inherited=self._unix_sockets,
        )
        await self._probes.start()
        self.probes_address = join_address(host, port)
        logger.info("probes and metrics listening on %s", self._probes.url)

    async def _start_grpc(self, gate: Gate, access: AccessLog | None, host: str, port: int) -> None:
        from tidegate.doors.grpc.service import RateLimitService

        envoy = self.settings.envoy
        service = RateLimitService(gate, envoy, self.metrics.observe, self._paths)
        if envoy.config:
            from tidegate.doors.grpc.config_watcher import load_domains, watch_domains

            path = Path(envoy.config)
            self.health.add("envoy_config", self._ping_domains)
            try:
                service.domains = load_domains(path, envoy.domain)
            except PolicyError as error:
                if not path.exists():  # noqa: ASYNC240 - once, at the start
                    raise
                # The other doors still work. Calls for these domains fail until the file is valid, and gRPC health reports
                # NOT_SERVING, so that Envoy uses another instance.
                service.domains = None
                self._domains_refused(error)
            again = self._reload_event()
            applied = self._domains_applied
            self._spawn(
                "envoy_config_watcher", partial(watch_domains, path, envoy.domain, service, self._domains_refused, applied, again)
            )
        self._grpc = await self._grpc_listener(service, access, host, port)
        self._grpc.configured(service.domains is not None)
        self.grpc_address = join_address(host, port)
        logger.info("gRPC listening on %s%s", self.grpc_address, " with TLS" if self.settings.uses_tls("grpc") else "")

    async def _grpc_listener(
        self, service: RateLimitService, access: AccessLog | None, host: str, port: int
    ) -> GrpcListener | GrpcTlsListener:
        from tidegate.doors.grpc.callers import GrpcCallers

        reads_metadata = self._tracing is not None
        callers = None if self._callers is None else GrpcCallers(self._callers, self.metrics.observe)
        trusted = TrustedProxies(self.settings.server.trusted_proxies)
        certificates = self._certificates
        if certificates is not None and self.settings.uses_tls("grpc"):
            from tidegate.doors.grpc.tls_listener import GrpcTlsListener

            secured = GrpcTlsListener(
                service,
                host,
                port,
                lambda: certificates.loaded.files,
                certificates.client_names,
                self._shares_port,
                access,
                reads_metadata=reads_metadata,
                trusted=trusted,
                callers=callers,
            )
            await secured.start()
            return secured
        from tidegate.doors.grpc.listener import GrpcListener

        plain = GrpcListener(
            service, host, port, self._shares_port, access, reads_metadata=reads_metadata, trusted=trusted, callers=callers
        )
        plain.start()
        return plain

    async def _start_admin(self, gate: Gate, host: str, port: int) -> None:
        # Imported here: the framework costs time and memory, and the control plane can be disabled.
        from tidegate.doors.admin.app import AdminDeps, ConsoleOptions, admin_app
        from tidegate.doors.http_asgi import AsgiAdapter

        settings = self.settings
        editor = CatalogEditor(self.catalog, self.cached.touched)
        if not settings.admin.token:
            self.first_token = await first_token(editor)
        what_if = WhatIfRuns(editor)
        self._stack.push_async_callback(what_if.close)
        console = None
        if settings.admin.console:
            demo_token = (settings.admin.token or self.first_token) if self._demo else None
            secure = settings.admin.secure_cookie or settings.uses_tls("admin")
            console = ConsoleOptions(settings.admin.session_idle_s, secure, demo_token)
        deps = AdminDeps(
            editor,
            gate,
            settings.admin.token or None,
            TrustedProxies(settings.admin.trusted_proxies, setting="admin.trusted_proxies"),
            body_timeout_s=settings.server.body_timeout_s,
            paths=self._paths,
            console=console,
            system=system_report(self),
            what_if=what_if,
        )
        if self._demo and not self._shares_port:
            from tidegate.server.demo_traffic import create_callers, generate_traffic

            self._spawn("demo_traffic", partial(generate_traffic, gate, await create_callers(editor)))
        self._admin = Listener(
            AsgiAdapter(admin_app(deps)),
            host,
            port,
            max_connections=MAX_ADMIN_CONNECTIONS,
            tls=self._tls_of("admin"),
            unix_mode=unix_mode(settings.server),
            inherited=self._unix_sockets,
        )
        await self._admin.start()
        self.admin_address = join_address(host, port)
        logger.info("control plane listening on %s", self._admin.url)

    async def drain(self, skip_drain: asyncio.Event) -> None:
        """Shut down in order: report not ready, finish requests in flight, close everything.

        Args:
            skip_drain: set to stop waiting for requests in flight.
        """
        deadline = asyncio.get_running_loop().time() + self.settings.server.drain_s
        data_plane = self.data_plane
        # First answer keep-alive connections with Connection: close: the server would close those that look idle although a
        # request may be on its way.
        data_plane.draining = True
        if self._grpc is not None:
            self._grpc.drain()
        logger.info("draining: %d requests in flight", self.in_flight)
        hands_over = self._has_successor()
        if hands_over:
            logger.info("another process listens on %s: no more connections are accepted here", self.address)
            await asyncio.gather(*(each.stop_accepting() for each in (self._listener, self._admin) if each is not None))
        answered = -1
        while (
            not skip_drain.is_set()
            and _left(deadline) > 0
            and (self.in_flight or self._answered != answered or (hands_over and self.connections))
        ):
            answered = self._answered
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(skip_drain.wait(), min(_QUIET_S, max(_left(deadline), 0.001)))
        listeners = [each for each in (self._listener, self._grpc, self._admin, self._probes) if each is not None]
        left_s = 0.05 if skip_drain.is_set() else max(_left(deadline), 0.05)
        await asyncio.gather(*(listener.stop(left_s) for listener in listeners))
        await self.close()
        logger.info("stopped")

    async def close(self) -> None:
        """Close all resources in reverse order, including those of an instance that failed to start."""
        for listener in (self._listener, self._admin, self._probes):
            if listener is not None:
                await listener.stop(_CLOSE_S)
        await stop(*self._tasks)
        if self._grpc is not None:
            await self._grpc.stop(0)
        await self._stack.aclose()

    def _own(self, name: str | None, ping: Callable[[], Awaitable[None]], close: Callable[[], Awaitable[None]]) -> None:
        """Register a resource for `/health` (if it has a name) and for closing."""
        if name is not None:
            self.health.add(name, ping)
        self._stack.push_async_callback(close)

    def _spawn(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        self._tasks.append(SUPERVISOR.start(name, work))

    def reload(self) -> None:
        """Read the policy file, `[envoy] config` and the PEM files of Redis and `[tls]` again, even if they look unchanged."""
        logger.info("reloading the policy file, [envoy] config and certificates")
        for again in self._reloads:
            again()

    def _reload_event(self) -> asyncio.Event:
        event = asyncio.Event()
        self._reloads.append(event.set)
        return event

    async def _first_policy(self, path: Path) -> None:
        """Apply the policy file; if it is invalid and the catalog has a policy, start with that instead of failing."""
        self.health.add("policy", self._ping_policy)
        try:
            policy = load_policy(path)
            await self.catalog.apply_policy(policy, _digest(policy))
        except (PolicyError, CatalogError) as error:
            if not await self.catalog.tier_names():
                raise
            refusal = error if isinstance(error, PolicyError) else PolicyError(error.message, str(path))
            self._policy_refused(refusal)
            self._refused_at_start = str(refusal)

    async def _apply_policy(self, policy: Policy) -> None:
        changed = await self.catalog.apply_policy(policy, _digest(policy))
        self.metrics.policy_valid = True
        self._policy_error = None
        if changed:
            await self.follower.poll()
            self.metrics.policy_reloads += 1
            logger.info("policy file applied, catalog version %d", self.cached.version)
        else:
            logger.info("policy file unchanged, catalog version %d", self.cached.version)

    def _policy_refused(self, error: PolicyError) -> None:
        self.metrics.policy_valid = False
        self._policy_error = str(error)
        refused_at_start, self._refused_at_start = self._refused_at_start, None
        # The watcher first reads the file that was already refused at start: do not report it twice.
        if self._policy_error != refused_at_start:
            self.metrics.policy_reload_errors += 1
            logger.error("policy file refused, the last valid policy in the catalog stays active: %s", error)

    async def _ping_policy(self) -> None:
        if self._policy_error is not None:
            raise PolicyError(f"file refused, the last valid policy in the catalog stays active: {self._policy_error}")

    def _domains_refused(self, error: PolicyError) -> None:
        known, self._domains_error = self._domains_error, str(error)
        if known == self._domains_error:
            return  # the watcher reads the file refused at start again
        self.metrics.policy_reload_errors += 1
        no_other = self._grpc is None
        remains = "calls for its domains are answered UNAVAILABLE" if no_other else "the last valid one stays active"
        logger.error("[envoy] config refused, %s: %s", remains, error)

    def _domains_applied(self) -> None:
        self._domains_error = None
        if self._grpc is not None:
            self._grpc.configured(True)

    async def _ping_domains(self) -> None:
        if self._domains_error is not None:
            raise PolicyError(f"[envoy] config refused: {self._domains_error}")

    async def _health_page(self) -> Response:
        report = await self.health.report()
        return Response(200 if report.status == "healthy" else 503, "application/json", encode(report))

    async def _ready_page(self) -> Response:
        ready = not self.data_plane.draining
        return Response(200 if ready else 503, "application/json", encode({"ready": ready, "draining": self.data_plane.draining}))

    async def _live_page(self) -> Response:
        return Response(200, "application/json", encode({"live": True}))

    async def _metrics_page(self) -> Response:
        return Response(200, _METRICS_TYPE, await self.exposition())

    async def _openapi_page(self) -> Response:
        return Response(200, "application/json", encode(data_plane_openapi()))


def require_shared_counters(settings: Settings) -> None:
    """Refuse several workers with `memory://`, where each would count separately.

    Raises:
        SettingsError: if so.
    """
    if settings.server.workers > 1 and settings.counters.url == "memory://":
        raise SettingsError(
            f"server.workers = {settings.server.workers} needs counters shared by all workers: with memory:// each "
            "worker would count separately and admit the whole limit; use server.workers = 1 or a Redis counters.url"
        )


def _digest(policy: Policy) -> str:
    return hashlib.sha256(encode(policy)).hexdigest()


def _left(deadline: float) -> float:
    return deadline - asyncio.get_running_loop().time()


async def _sweep(counters: MemoryCounters) -> None:
    """Remove expired counters in the background, a few at a time."""
    while True:
        await asyncio.sleep(0.01 if counters.sweep(_SWEEP_STEPS) == _SWEEP_STEPS else 0.5)
