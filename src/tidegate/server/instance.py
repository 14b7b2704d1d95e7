"""One running instance: its resources, its listeners and its shutdown.

Resources are opened in order and closed in reverse order.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
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
from tidegate.counters.redis.instances import InstanceStates
from tidegate.doors.callers_auth import CallersAuth
from tidegate.doors.client_address import TrustedProxies
from tidegate.doors.http import DataPlane, Response
from tidegate.doors.key_sources import KeySources
from tidegate.doors.probes import ProbePages
from tidegate.doors.tls import ServerTls
from tidegate.gate.gate import Gate, Observer
from tidegate.gate.holds import HoldFigures
from tidegate.listen_address import join_address, parse_address
from tidegate.notifications.notifier import Notifier
from tidegate.policy.paths import STRICT, PathRules
from tidegate.server.addresses import admin_address, free_address, grpc_address, probes_address
from tidegate.server.certificates import Certificates
from tidegate.server.handover import listening_sockets, shared_address
from tidegate.server.listener import Listener
from tidegate.server.observers import CheckRecorders, observe_all
from tidegate.server.pages import probe_pages
from tidegate.server.policy_file import PolicyFile
from tidegate.server.system import state_of, system_report
from tidegate.server.wiring import (
    drop_leases_on_change,
    open_blocks,
    open_callers_auth,
    open_catalog,
    open_channel,
    open_notifier,
    require_shared_counters,
    share_catalog,
)
from tidegate.settings import Settings, unix_mode
from tidegate.telemetry.access import AccessLog
from tidegate.telemetry.collectors import (
    collect_access,
    collect_background,
    collect_cache,
    collect_connections,
    collect_counters,
    collect_log_lines,
    collect_notifications,
    collect_tls,
)
from tidegate.telemetry.health import Health
from tidegate.telemetry.holds import collect_holds
from tidegate.telemetry.metrics import Metrics
from tidegate.timestamps import format_timestamp, now_us

if TYPE_CHECKING:
    from tidegate.doors.grpc.listener import GrpcListener
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
        self.started_at = str(format_timestamp(now_us()))
        self.states: InstanceStates | None = None
        self.holds = HoldFigures()
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
        policy_file = None
        if policy_path is not None:
            policy_file = PolicyFile(policy_path, self.catalog, self.metrics)
            self.health.add("policy", policy_file.ping)
            await policy_file.apply_first()
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
        if store is not None:
            self.states = InstanceStates(store, partial(state_of, self))
            self._spawn("instance_states", self.states.run)
            self._stack.push_async_callback(self.states.leave)
        self._callers = await open_callers_auth(settings, self.catalog, self.cached)
        if self.cached.caller_tokens is not None:
            self._spawn("caller_tokens", self.cached.caller_tokens.run)
        blocks = await open_blocks(settings, self.catalog, self.cached)
        self._spawn("blocks", blocks.run)
        await self._notify()
        access = AccessLog(settings.server.access_log_sample) if settings.server.access_log_sample else None
        recorders = CheckRecorders(settings, self.metrics, self.catalog.database)
        counted = self._counted()  # before the observer: it starts tracing, which observes checks too
        observer = self._observer(recorders, access)
        gate = Gate(self.cached, counted, observer, lookup_timeout_s=2 * settings.catalog.timeout_s)
        self.holds = gate.holds.figures
        if recorders.usage is not None:
            gate.holds.on_settled = recorders.usage.counts.count_settled
        self._stack.push_async_callback(gate.tokens.close)
        gate.tokens.when_needed = lambda: self.health.add("jwks", gate.tokens.ping)
        pages = probe_pages(self.health, self._is_draining, self._exposition, settings.callers_auth)
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
        guard = guard_of(self.counters)
        collect_holds(self.metrics, gate.holds.figures, self.counters, None if guard is None else guard.store.holds.ends)
        collect_background(self.metrics, SUPERVISOR)
        self.metrics.add_gauge("rate_limiter_policy_version", "Active version of the catalog.", lambda: self.cached.version)
        self.metrics.add_gauge("rate_limiter_in_flight", "Requests in flight.", lambda: self.in_flight)
        collect_log_lines(self.metrics)
        self.cached.changed(await source.changes(0))
        self.follower = CatalogFollower(source, self.cached, settings.catalog.poll_s, channel)
        self._spawn("catalog_follower", self.follower.run)
        if isinstance(self.counters, MemoryCounters):
            self._spawn("memory_sweep", partial(_sweep, self.counters))
        if policy_file is not None:
            follow = partial(policy_file.watch, self.cached, self.follower.poll, self._reload_event())
            self._spawn("policy_file_watcher", follow)
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
        collect_connections(self.metrics, self._listener.server)
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

    def _is_draining(self) -> bool:
        return self.data_plane.draining

    async def _exposition(self) -> bytes:
        return await self.exposition()  # workers replace it

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

    def _observer(self, recorders: CheckRecorders, access: AccessLog | None) -> Observer:
        """Called for every check: metrics; violations, usage, the access log and traces if enabled."""
        observers: list[Observer] = [self.metrics.observe, *recorders.observers]
        for name, work in recorders.tasks.items():
            self._spawn(name, work)
        if recorders.tasks:
            self._flush_at_end(recorders.flush)
        if recorders.usage is not None:
            self.health.add("ledger", recorders.usage.ping)
        if access is not None:
            observers.append(access.observe)
        if self._tracing is not None:
            observers.append(self._tracing.observe)
        return observe_all(observers)

    async def _notify(self) -> None:
        def needed(notifier: Notifier) -> None:
            self.health.add("notifications", notifier.ping)

        notifier = await open_notifier(self.settings, self.catalog, self.cached, self.counters, needed)
        collect_notifications(self.metrics, notifier)
        self._spawn("notifications_writer", notifier.write)
        self._spawn("notifications_delivery", notifier.deliver)
        self._flush_at_end(notifier.flush_at_end)

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
        # Imported here: gRPC costs time and memory, and the listener can be disabled.
        from tidegate.doors.grpc.service import RateLimitService
        from tidegate.server.grpc_door import GrpcDoor

        door = GrpcDoor(
            self.settings, RateLimitService(gate, self.settings.envoy, self.metrics.observe, self._paths), self.metrics
        )
        if self.settings.envoy.config:
            self.health.add("envoy_config", door.ping)
        follow = door.load_config()
        if follow is not None:
            self._spawn("envoy_config_watcher", partial(follow, self._reload_event()))
        await door.listen(
            host,
            port,
            shares_port=self._shares_port,
            callers=self._callers,
            certificates=self._certificates,
            access=access,
            reads_metadata=self._tracing is not None,
        )
        self._grpc = door.listener
        self.grpc_address = join_address(host, port)
        logger.info("gRPC listening on %s%s", self.grpc_address, " with TLS" if self.settings.uses_tls("grpc") else "")

    async def _start_admin(self, gate: Gate, host: str, port: int) -> None:
        # Imported here: the framework costs time and memory, and the control plane can be disabled.
        from tidegate.server.control_plane import control_plane

        editor = CatalogEditor(self.catalog, self.cached.touched)
        if not self.settings.admin.token:
            self.first_token = await first_token(editor)
        what_if = WhatIfRuns(editor)
        self._stack.push_async_callback(what_if.close)
        if self._demo and not self._shares_port:
            from tidegate.server.demo_traffic import create_callers, generate_traffic

            self._spawn("demo_traffic", partial(generate_traffic, gate, await create_callers(editor)))
        demo_token = (self.settings.admin.token or self.first_token) if self._demo else None
        self._admin = Listener(
            control_plane(self.settings, editor, gate, self._paths, what_if, system_report(self), demo_token),
            host,
            port,
            max_connections=MAX_ADMIN_CONNECTIONS,
            tls=self._tls_of("admin"),
            unix_mode=unix_mode(self.settings.server),
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


def _left(deadline: float) -> float:
    return deadline - asyncio.get_running_loop().time()


async def _sweep(counters: MemoryCounters) -> None:
    """Remove expired counters in the background, a few at a time."""
    while True:
        await asyncio.sleep(0.01 if counters.sweep(_SWEEP_STEPS) == _SWEEP_STEPS else 0.5)
