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
from tidegate.background import SUPERVISOR
from tidegate.catalog import Catalog
from tidegate.catalog.blocks import Blocks
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.follower import CatalogFollower
from tidegate.catalog.shared import SharedCatalog
from tidegate.catalog.unknown_keys import UnknownKeyLimit
from tidegate.counters import CounterStore
from tidegate.counters.factory import guard_of, open_counters
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.redis.instances import InstanceStates
from tidegate.counters.redis.store import RedisCounters
from tidegate.doors.callers_auth import CallersAuth
from tidegate.doors.client_address import TrustedProxies
from tidegate.doors.http import DataPlane
from tidegate.doors.key_sources import KeySources
from tidegate.doors.probes import ProbePages
from tidegate.gate.gate import Gate, Observer, PassedObserver
from tidegate.gate.holds import HoldFigures
from tidegate.listen_address import join_address, listener_url
from tidegate.notifications.notifier import Notifier
from tidegate.policy.paths import STRICT, PathRules
from tidegate.server.addresses import Address, Addresses
from tidegate.server.listeners import Listeners
from tidegate.server.observers import CheckRecorders, observe_all, observe_all_passed
from tidegate.server.pages import Pages, probe_pages
from tidegate.server.policy_file import PolicyFile
from tidegate.server.resources import Resources
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
from tidegate.settings import Settings
from tidegate.telemetry.access import AccessLog
from tidegate.telemetry.collectors import (
    collect_access,
    collect_background,
    collect_cache,
    collect_counters,
    collect_log_lines,
    collect_notifications,
)
from tidegate.telemetry.health import Health
from tidegate.telemetry.holds import collect_holds
from tidegate.telemetry.metrics import Metrics
from tidegate.timestamps import format_timestamp, now_us

if TYPE_CHECKING:
    from tidegate.telemetry.tracing import Tracing

logger = logging.getLogger(__name__)

_QUIET_S: Final = 0.2
_SWEEP_STEPS: Final = 500


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
        self.listeners = Listeners(settings, shares_port=self._shares_port, unix_sockets=unix_sockets or {})
        self._resources = Resources(self.health)
        self._tracing: Tracing | None = None
        self._paths = STRICT
        self._callers: CallersAuth | None = None

    async def start(self) -> None:
        """Open everything and listen.

        Raises:
            SettingsError: if a setting cannot be used: a port in use, a database that cannot be opened.
            PolicyError: if the policy file is refused and the catalog holds no tier, or `[envoy] config` does not
                exist.
        """
        settings, resources = self.settings, self._resources
        require_shared_counters(settings)
        self._paths = PathRules.of(settings.paths.encoded_slashes, settings.paths.decode_unreserved)
        addresses = self.listeners.find_addresses()
        self.listeners.open_certificates(resources, self.health, self.metrics)
        store = await self._open_counters()
        channel = open_channel(settings, store)
        self.catalog = await open_catalog(settings, channel)
        resources.own("database", self.catalog.ping, self.catalog.close)
        shared = await share_catalog(settings, self.catalog, store)
        if shared is not None:
            resources.on_close(shared.settle)
        source = self.catalog if shared is None else shared
        policy_file = await self._apply_policy_file()
        self._open_cache(source)
        if store is not None:
            self.states = InstanceStates(store, partial(state_of, self))
            resources.spawn("instance_states", self.states.run)
            resources.on_close(self.states.leave)
        self._callers = await open_callers_auth(settings, self.catalog, self.cached)
        if self.cached.caller_tokens is not None:
            resources.spawn("caller_tokens", self.cached.caller_tokens.run)
        blocks = await open_blocks(settings, self.catalog, self.cached)
        resources.spawn("blocks", blocks.run)
        await self._notify()
        access = AccessLog(settings.server.access_log_sample) if settings.server.access_log_sample else None
        gate = self._open_gate(access)
        pages = probe_pages(self.health, self._is_draining, self._exposition, settings.callers_auth)
        self._open_data_plane(gate, pages, access)
        self._collect(gate, shared, blocks)
        self.cached.changed(await source.changes(0))
        self.follower = CatalogFollower(source, self.cached, settings.catalog.poll_s, channel)
        resources.spawn("catalog_follower", self.follower.run)
        if isinstance(self.counters, MemoryCounters):
            resources.spawn("memory_sweep", partial(_sweep, self.counters))
        if policy_file is not None:
            follow = partial(policy_file.watch, self.cached, self.follower.poll, resources.reload_event())
            resources.spawn("policy_file_watcher", follow)
        await self._listen(gate, access, pages, addresses)

    async def _open_counters(self) -> RedisCounters | None:
        """Open the counter store; returns that of Redis, None where counters are in memory."""
        settings = self.settings
        self.counters = open_counters(settings.counters, settings.breaker, leases=settings.leases)
        guard = guard_of(self.counters)
        self._resources.own(None if guard is None else "redis", self.counters.ping, self.counters.close)
        if guard is None:
            return None
        await guard.start()
        self._resources.on_reload(guard.store.reload_certificates)
        return guard.store

    async def _apply_policy_file(self) -> PolicyFile | None:
        """Apply the policy file; None where none is configured."""
        path = self.settings.policy_path
        if path is not None:
            policy_file = PolicyFile(path, self.catalog, self.metrics)
            self.health.add("policy", policy_file.ping)
            await policy_file.apply_first()
            return policy_file
        if (released := await self.catalog.release_policy()) is not None:
            logger.warning(
                "no policy file is configured, but %d tiers and %d API keys of this catalog came from one: they stay active, and "
                "operators can now change and revoke them; see 'tidegate keys list'",
                released.tiers,
                released.api_keys,
            )
        return None

    def _open_cache(self, source: Catalog) -> None:
        settings = self.settings
        self.cached = CachedCatalog(
            source,
            l1_ttl_s=settings.cache.l1_ttl_s,
            stale_if_error_s=settings.cache.stale_if_error_s,
            max_keys=settings.cache.max_keys,
            unknown_keys=UnknownKeyLimit(bound) if (bound := settings.catalog.unknown_keys_per_minute) else None,
        )
        drop_leases_on_change(self.cached, self.counters)

    def _open_gate(self, access: AccessLog | None) -> Gate:
        """The gate, with what observes its checks."""
        recorders = CheckRecorders(self.settings, self.metrics, self.catalog.database)
        counted = self._counted()  # before the observer: it starts tracing, which observes checks too
        observer, passed = self._observers(recorders, access)
        gate = Gate(
            self.cached,
            counted,
            observer,
            lookup_timeout_s=2 * self.settings.catalog.timeout_s,
            observe_passed=passed,
            all_windows=self.settings.server.window_headers,
        )
        self.holds = gate.holds.figures
        if recorders.usage is not None:
            gate.holds.on_settled = recorders.usage.counts.count_settled
        self._resources.on_close(gate.tokens.close)
        gate.tokens.when_needed = lambda: self.health.add("jwks", gate.tokens.ping)
        return gate

    def _open_data_plane(self, gate: Gate, pages: Pages, access: AccessLog | None) -> None:
        settings = self.settings
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

    def _collect(self, gate: Gate, shared: SharedCatalog | None, blocks: Blocks) -> None:
        """Register the metrics of the components."""
        metrics = self.metrics
        collect_cache(metrics, self.cached, shared, self.catalog.database)
        collect_counters(metrics, self.counters)
        collect_access(metrics, gate.access, blocks)
        guard = guard_of(self.counters)
        collect_holds(metrics, gate.holds.figures, self.counters, None if guard is None else guard.store.holds.ends)
        collect_background(metrics, SUPERVISOR)
        metrics.add_gauge("rate_limiter_policy_version", "Active version of the catalog.", lambda: self.cached.version)
        metrics.add_gauge("rate_limiter_in_flight", "Requests in flight.", lambda: self.in_flight)
        collect_log_lines(metrics)

    async def _listen(self, gate: Gate, access: AccessLog | None, pages: Pages, addresses: Addresses) -> None:
        if addresses.grpc is not None:
            await self._start_grpc(gate, access, addresses.grpc)
        if addresses.admin is not None:
            await self._start_admin(gate, addresses.admin)
        # Exclude long-lived objects from garbage collection: a full collection over a million counters would stop every check for
        # milliseconds.
        gc.collect()
        gc.freeze()
        # The data plane last: once it is ready, everything is.
        listener = self.listeners.open_http(self.data_plane, addresses.http, self.metrics)
        self.address = join_address(*addresses.http)
        await listener.start()
        logger.info("listening on %s", listener.url)
        if addresses.probes is not None:
            await self.listeners.start_probes(ProbePages(pages), addresses.probes)
            self.probes_address = join_address(*addresses.probes)
            logger.info("probes and metrics listening on %s", listener_url(self.probes_address, uses_tls=False))

    def _is_draining(self) -> bool:
        return self.data_plane.draining

    async def _exposition(self) -> bytes:
        return await self.exposition()  # workers replace it

    @property
    def in_flight(self) -> int:
        """Requests and calls being answered."""
        return self.data_plane.in_flight + (0 if self.listeners.grpc is None else self.listeners.grpc.in_flight)

    @property
    def _answered(self) -> int:
        return self.data_plane.answered + (0 if self.listeners.grpc is None else self.listeners.grpc.answered)

    @property
    def connections(self) -> int:
        """Open connections of the data plane."""
        return 0 if self.listeners.http is None else self.listeners.http.server.connections

    def _observers(self, recorders: CheckRecorders, access: AccessLog | None) -> tuple[Observer, PassedObserver | None]:
        """Called for every check: metrics; violations, usage, the access log and traces if enabled.

        Returns:
            What is called for one check, and for those of a turn that passed; None where each is observed by itself.
        """
        observers: list[Observer] = [self.metrics.observe, *recorders.observers]
        for name, work in recorders.tasks.items():
            self._resources.spawn(name, work)
        if recorders.tasks:
            self._resources.flush_at_end(recorders.flush)
        if recorders.usage is not None:
            self.health.add("ledger", recorders.usage.ping)
        if access is not None:
            observers.append(access.observe)
        if self._tracing is not None:
            observers.append(self._tracing.observe)
        # The access log and traces read the request that a check is of.
        alone = access is not None or self._tracing is not None
        return observe_all(observers), None if alone else observe_all_passed([self.metrics.observe_passed, *recorders.passed])

    async def _notify(self) -> None:
        def needed(notifier: Notifier) -> None:
            self.health.add("notifications", notifier.ping)

        notifier = await open_notifier(self.settings, self.catalog, self.cached, self.counters, needed)
        collect_notifications(self.metrics, notifier)
        self._resources.spawn("notifications_writer", notifier.write)
        self._resources.spawn("notifications_delivery", notifier.deliver)
        self._resources.flush_at_end(notifier.flush_at_end)

    def _counted(self) -> CounterStore:
        """The counter store for the gate, wrapped to record its calls if tracing is enabled."""
        if not self.settings.tracing.endpoint:
            return self.counters
        # Imported here: OpenTelemetry is optional, and costs time and memory.
        from tidegate.telemetry.tracing import Tracing

        self._tracing = Tracing(self.settings.tracing.endpoint, self.settings.tracing.sample)
        self._resources.on_close(self._tracing.close)
        return self._tracing.counters(self.counters)

    @property
    def url(self) -> str:
        """Where the data plane listens: `http://host:port`, `https://host:port` or `unix:/path`."""
        return "" if self.listeners.http is None else self.listeners.http.url

    @property
    def admin_url(self) -> str:
        """Where the control plane listens, in the same forms; empty if it is disabled."""
        return "" if self.listeners.admin is None else self.listeners.admin.url

    async def _start_grpc(self, gate: Gate, access: AccessLog | None, address: Address) -> None:
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
            self._resources.spawn("envoy_config_watcher", partial(follow, self._resources.reload_event()))
        await self.listeners.start_grpc(
            door, address, callers=self._callers, access=access, reads_metadata=self._tracing is not None
        )
        self.grpc_address = join_address(*address)

    async def _start_admin(self, gate: Gate, address: Address) -> None:
        # Imported here: the framework costs time and memory, and the control plane can be disabled.
        from tidegate.server.control_plane import control_plane

        editor = CatalogEditor(self.catalog, self.cached.touched)
        if not self.settings.admin.token:
            self.first_token = await first_token(editor)
        what_if = WhatIfRuns(editor)
        self._resources.on_close(what_if.close)
        if self._demo and not self._shares_port:
            from tidegate.server.demo_traffic import create_callers, generate_traffic

            self._resources.spawn("demo_traffic", partial(generate_traffic, gate, await create_callers(editor)))
        demo_token = (self.settings.admin.token or self.first_token) if self._demo else None
        plane = control_plane(self.settings, editor, gate, self._paths, what_if, system_report(self), demo_token)
        await self.listeners.start_admin(plane, address)
        self.admin_address = join_address(*address)
        logger.info("control plane listening on %s", self.admin_url)

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
        if self.listeners.grpc is not None:
            self.listeners.grpc.drain()
        logger.info("draining: %d requests in flight", self.in_flight)
        hands_over = self.listeners.has_successor(self.address)
        if hands_over:
            logger.info("another process listens on %s: no more connections are accepted here", self.address)
            await self.listeners.stop_accepting()
        answered = -1
        while (
            not skip_drain.is_set()
            and _left(deadline) > 0
            and (self.in_flight or self._answered != answered or (hands_over and self.connections))
        ):
            answered = self._answered
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(skip_drain.wait(), min(_QUIET_S, max(_left(deadline), 0.001)))
        await self.listeners.drain(0.05 if skip_drain.is_set() else max(_left(deadline), 0.05))
        await self.close()
        logger.info("stopped")

    async def close(self) -> None:
        """Close all resources in reverse order, including those of an instance that failed to start."""
        await self.listeners.close()
        await self._resources.stop_tasks()
        if self.listeners.grpc is not None:
            await self.listeners.grpc.stop(0)
        await self._resources.close()

    def reload(self) -> None:
        """Read the policy file, `[envoy] config` and the PEM files of Redis and `[tls]` again, even if they look unchanged."""
        logger.info("reloading the policy file, [envoy] config and certificates")
        self._resources.reload()


def _left(deadline: float) -> float:
    return deadline - asyncio.get_running_loop().time()


async def _sweep(counters: MemoryCounters) -> None:
    """Remove expired counters in the background, a few at a time."""
    while True:
        await asyncio.sleep(0.01 if counters.sweep(_SWEEP_STEPS) == _SWEEP_STEPS else 0.5)
