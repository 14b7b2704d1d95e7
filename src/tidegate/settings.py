"""All settings with defaults, units and limits; `settings_loader` reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import msgspec

from tidegate.errors import SettingsError

ENVIRONMENT_PREFIX: Final = "TIDEGATE_"
DEFAULT_FILE: Final = "tidegate.toml"
DEFAULT_POLICY_FILE: Final = "tidegate.policy.toml"
MIN_TOKEN_LENGTH: Final = 16
SIDE_LISTENERS: Final = ("admin", "grpc", "probes")
"""The settings of `[server]` with the addresses of listeners that can be disabled."""
TLS_DOORS: Final = ("http", "grpc", "admin")


class Range(NamedTuple):
    """The smallest and the largest value of a setting.

    Not `msgspec.Meta(ge=…, le=…)`: that accepts NaN, and its error names neither the value nor the other bound.
    """

    min: float
    max: float


class Choice:
    """The values that a setting can have."""

    def __init__(self, *values: str) -> None:
        self.values: Final = values


class ServerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[server]`: the listeners.

    Args:
        http: address of the data plane: `host:port`, or `unix:/path` for a unix socket.
    admin: address of the control plane, in the same forms; empty disables it.
    grpc: address of the gRPC listener; empty disables it.
    probes: address of a further listener, without TLS, for /health, /readyz, /livez and /metrics alone, in the same forms;
        empty disables it.
    unix_mode: permissions of the unix sockets, octal.
        workers: number of processes.
        reuse_port: whether another process may listen on the same addresses: the one that this one replaces.
        drain_s: how long SIGTERM waits for requests in flight, s.
        trusted_proxies: addresses and networks whose forwarding headers are trusted; `unix` for peers on a unix socket.
        body_timeout_s: how long a request body may take, s.
        idle_timeout_s: how long a connection of the data plane may wait for its next request, s; keep it above that of gateways.
        max_connections: maximum number of open connections of the data plane; beyond it the longest idle ones are closed.
        log_level: debug, info, warning or error.
        log_format: json (one line per event, Elastic Common Schema), text, or auto: text for a terminal, else json.
        access_log_sample: share of the requests to /v1/ of the data plane and of the gRPC calls that are logged.
        window_headers: whether `RateLimit` has every limit and quota of a check, not the one with the least left alone.
    """

    http: str = "127.0.0.1:8080"
    admin: str = "127.0.0.1:8082"
    grpc: str = "127.0.0.1:8081"
    probes: str = ""
    unix_mode: str = "0660"
    workers: Annotated[int, Range(1, 1024)] = 1
    reuse_port: bool = False
    drain_s: Annotated[float, Range(0, 3600)] = 10.0
    trusted_proxies: tuple[str, ...] = ("127.0.0.0/8", "::1/128")
    body_timeout_s: Annotated[float, Range(0.1, 3600)] = 10.0
    idle_timeout_s: Annotated[float, Range(1, 86_400)] = 75.0
    max_connections: Annotated[int, Range(1, 1_000_000)] = 10_000
    log_level: Annotated[str, Choice("debug", "info", "warning", "error")] = "info"
    log_format: Annotated[str, Choice("auto", "json", "text")] = "auto"
    access_log_sample: Annotated[float, Range(0, 1)] = 0.0
    window_headers: bool = False


class TlsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[tls]`: TLS of the listeners.

    Args:
        cert: PEM file with the certificate of this server and its chain; TLS is disabled if empty.
        key: PEM file with its private key; if empty, the key is in the file of `cert`.
        client_ca: PEM file with the authorities of client certificates; clients need a certificate if this is set.
        client_names: DNS names, URIs and addresses; clients need a certificate with at least one of them if this is set.
        doors: listeners that use TLS.
    """

    cert: str = ""
    key: str = ""
    client_ca: str = ""
    client_names: tuple[str, ...] = ()
    doors: tuple[str, ...] = ("http", "grpc", "admin")


class CallersAuthSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[callers_auth]`: who may call the data plane, over HTTP and gRPC. Probes and /metrics need nothing.

    Args:
        mode: open, token (gateways and back ends send a token of the catalog), or mtls (their certificate has one of `names`).
        header: HTTP header, or gRPC metadata, that carries the token; with or without `Bearer` before it.
        names: DNS names, URIs and addresses of certificates that may call with mtls; `*.example.com` for any name of one more
            label, `*` for every certificate that `tls.client_ca` signed.
    """

    mode: Annotated[str, Choice("open", "token", "mtls")] = "open"
    header: str = "X-Tidegate-Token"
    names: tuple[str, ...] = ()


class PolicySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[policy]`: the policy file.

    Args:
        file: its path; by default `tidegate.policy.toml` if that exists.
    """

    file: str | None = None


class PathSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[paths]`: path encodings that are refused by default.

    Args:
        encoded_slashes: patterns with `*` of the paths that may contain `%2F`.
        decode_unreserved: whether an escape of an unreserved character, such as `%7E`, is decoded.
    """

    encoded_slashes: tuple[str, ...] = ()
    decode_unreserved: bool = False


class KeySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[keys]`: API keys of requests.

    Args:
        sources: where requests to `/v1/authorize` carry them: `header:NAME`, `bearer`, `query:NAME`; the first that a request has
            decides.
        hash: sha256, or hmac-sha256 with a pepper; how the catalog and the policy file have digests of keys.
        pepper: secret of hmac-sha256, 32 to 512 visible ASCII characters; not in the database, and the same for all instances.
    """

    sources: tuple[str, ...] = ("header:X-API-Key",)
    hash: Annotated[str, Choice("sha256", "hmac-sha256")] = "sha256"
    pepper: str = ""


class CatalogSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[catalog]`: the database of the policy.

    Args:
        url: `sqlite:///file.db` (relative), `sqlite:////file.db` (absolute), or a PostgreSQL URL as for libpq:
            `postgresql://user@host1,host2/name`.
        replicas: URLs of read replicas of that PostgreSQL.
        max_replica_lag_s: a replica that lags more is removed from rotation, s.
        pool_size: maximum number of read connections to each database server; the primary has another 4 for writing.
        timeout_s: deadline of a database query, s.
        poll_s: interval of polling for changes by other processes, if they are not announced, s.
        unknown_keys_per_minute: maximum look-ups of unknown API keys per client address and process; 0 disables the limit.
    """

    url: str = "sqlite:///tidegate.db"
    replicas: tuple[str, ...] = ()
    max_replica_lag_s: Annotated[float, Range(0.1, 86_400)] = 5.0
    pool_size: Annotated[int, Range(1, 1000)] = 8
    timeout_s: Annotated[float, Range(0.05, 60)] = 2.0
    poll_s: Annotated[float, Range(0.05, 3600)] = 0.5
    unknown_keys_per_minute: Annotated[int, Range(0, 1_000_000_000)] = 300


class CounterSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[counters]`: the counter store.

    Args:
        url: `memory://`, or Redis: `redis://`, `redis+unix://`, `redis+sentinel://`, `redis+cluster://`, and `rediss…` for TLS.
        timeout_ms: deadline of a check at the store, ms.
        on_failure: local, allow or deny while the store is unavailable, for rules without `on_failure`.
        max_subjects: maximum number of counters in memory; with Redis, while it is unavailable.
        max_in_flight: maximum number of unanswered calls to one shard.
        min_instances: minimum number of instances that share the limits while the store is unavailable, even if fewer are known.
        max_holds: maximum number of open holds of one counter.
    """

    url: str = "memory://"
    timeout_ms: Annotated[int, Range(1, 60_000)] = 50
    on_failure: Annotated[str, Choice("local", "allow", "deny")] = "local"
    max_subjects: Annotated[int, Range(1, 1_000_000_000)] = 1_000_000
    max_in_flight: Annotated[int, Range(1, 1_000_000)] = 10_000
    min_instances: Annotated[int, Range(1, 10_000)] = 1
    max_holds: Annotated[int, Range(1, 10_000_000)] = 100_000


class LeaseSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[leases]`: units of busy subjects charged in advance, so that most checks need no call to Redis; not with `memory://`.

    Args:
        enabled: whether instances lease.
        ttl_s: life of the leases of busy subjects, s; those of slow subjects live longer, a minute at most.
        max_subjects: maximum number of leases of this process.
    """

    enabled: bool = True
    ttl_s: Annotated[float, Range(0.2, 60)] = 5.0
    max_subjects: Annotated[int, Range(1, 100_000_000)] = 100_000


class BreakerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[breaker]`: the circuit breaker of the counter store.

    Args:
        failures: number of failures within `window_s` that open it.
        window_s: length of the window, s.
        open_s: how long it stays open before a probe, s.
    """

    failures: Annotated[int, Range(1, 1_000_000)] = 5
    window_s: Annotated[float, Range(0.1, 86_400)] = 10.0
    open_s: Annotated[float, Range(0.1, 86_400)] = 30.0


class CacheSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[cache]`: the caches of the catalog.

    Args:
        l1_ttl_s: how long an entry is fresh in this process, s.
        l2_ttl_s: how long it is fresh in the shared cache, s.
        stale_if_error_s: how long a stale entry is used while the catalog is unavailable, s.
        max_keys: maximum number of API keys cached in this process.
        secret: authenticates the entries of the shared cache, 16 characters or more, the same for all instances of a catalog; by
            default one is generated and stored in the catalog's database.
    """

    l1_ttl_s: Annotated[float, Range(0.1, 86_400)] = 60.0
    l2_ttl_s: Annotated[float, Range(0.1, 86_400)] = 300.0
    stale_if_error_s: Annotated[float, Range(0, 86_400 * 365)] = 3600.0
    max_keys: Annotated[int, Range(1, 100_000_000)] = 100_000
    secret: str | None = None


class AdminSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[admin]`: the control plane.

    Args:
        token: bearer token of an operator, 16 characters or more; by default one is generated and printed at the first start.
        trusted_proxies: networks whose forwarding headers are trusted when the control plane counts wrong tokens by address.
        console: whether the control plane serves the console at /.
        session_idle_s: how long a session of the console lasts without use, s.
        secure_cookie: whether browsers send the console's cookie over https only; set it if a proxy adds TLS.
    """

    token: str | None = None
    trusted_proxies: tuple[str, ...] = ()
    console: bool = True
    session_idle_s: Annotated[float, Range(60, 43_200)] = 1800.0
    secure_cookie: bool = False


class ViolationSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[violations]`: the record of blocked checks.

    Args:
        enabled: whether they are written to the database of the catalog.
        flush_s: interval of the writes, s.
        keep_days: how long they are kept, days.
        max_entries: maximum number of entries (subject, rule and minute) between two writes.
    """

    enabled: bool = True
    flush_s: Annotated[float, Range(0.1, 3600)] = 5.0
    keep_days: Annotated[int, Range(1, 3650)] = 30
    max_entries: Annotated[int, Range(100, 1_000_000)] = 10_000


class LedgerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[ledger]`: the usage ledger and the traffic history.

    Args:
        enabled: whether they are written to the database of the catalog.
        flush_s: interval of the writes, s.
        keep_days: how long the ledger is kept, days.
        traffic_days: how long the traffic history is kept, days.
        minutes_days: how long it is kept by minute, days; before that by hour.
        max_callers: number of callers of an hour that are kept, each in its rule: those with the most units.
    """

    enabled: bool = True
    flush_s: Annotated[float, Range(0.1, 3600)] = 5.0
    keep_days: Annotated[int, Range(1, 3650)] = 400
    traffic_days: Annotated[int, Range(1, 3650)] = 30
    minutes_days: Annotated[int, Range(1, 3650)] = 2
    max_callers: Annotated[int, Range(10, 100_000)] = 1_000


class NotificationSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[notifications]`: delivery to the URLs of `[[notify]]` in the policy.

    Args:
        retry_s: pause before the second attempt, s; it doubles from attempt to attempt, up to an hour.
        give_up_s: how long delivery is attempted, s.
        timeout_s: time limit of connecting, and of each read and write, s.
        max_pending: number of notifications that may wait for delivery, in the whole catalog; further ones are dropped.
        keep_days: how long delivered and failed notifications are kept, days.
    """

    retry_s: Annotated[float, Range(0.1, 3600)] = 5.0
    give_up_s: Annotated[float, Range(60, 2_592_000)] = 86_400.0
    timeout_s: Annotated[float, Range(0.1, 60)] = 10.0
    max_pending: Annotated[int, Range(100, 10_000_000)] = 100_000
    keep_days: Annotated[int, Range(1, 3650)] = 30


class TracingSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[tracing]`: OpenTelemetry, with the extra `otel`.

    Args:
        endpoint: URL that receives spans, OTLP over HTTP, such as `http://127.0.0.1:4318/v1/traces`; tracing is off by default.
        sample: share of the checks without a trusted `traceparent` that are traced.
    """

    endpoint: str | None = None
    sample: Annotated[float, Range(0, 1)] = 0.01


class EnvoySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[envoy]`: how the gRPC listener reads Envoy's descriptors.

    Args:
        domain: domain whose descriptors are checks under the policy.
        method_entry: name of the entry with the HTTP method; GET without one.
        path_entry: name of the entry with the path; a descriptor without one is matched against the rules for descriptors.
        ip_entry: name of the entry with the client's address.
        forced_entry: name of the entry that marks hits to be charged whatever the limits say.
        config: file or directory of limits in the format of envoyproxy/ratelimit, for other domains; none if empty.
    """

    domain: str = "tidegate"
    api_key_entry: str = "api_key"
    method_entry: str = "method"
    path_entry: str = "path"
    ip_entry: str = "remote_address"
    forced_entry: str = "tidegate_forced"
    config: str = ""


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All settings; each section is a class above."""

    server: ServerSettings = ServerSettings()
    tls: TlsSettings = TlsSettings()
    callers_auth: CallersAuthSettings = CallersAuthSettings()
    policy: PolicySettings = PolicySettings()
    paths: PathSettings = PathSettings()
    keys: KeySettings = KeySettings()
    catalog: CatalogSettings = CatalogSettings()
    counters: CounterSettings = CounterSettings()
    leases: LeaseSettings = LeaseSettings()
    breaker: BreakerSettings = BreakerSettings()
    cache: CacheSettings = CacheSettings()
    admin: AdminSettings = AdminSettings()
    violations: ViolationSettings = ViolationSettings()
    ledger: LedgerSettings = LedgerSettings()
    notifications: NotificationSettings = NotificationSettings()
    tracing: TracingSettings = TracingSettings()
    envoy: EnvoySettings = EnvoySettings()

    def uses_tls(self, door: str) -> bool:
        """Whether a listener of `TLS_DOORS` uses TLS; on a unix socket it does not, whatever the settings say."""
        return bool(self.tls.cert) and door in self.tls.doors

    @property
    def policy_path(self) -> Path | None:
        """The configured policy file, else `tidegate.policy.toml` if that exists, else None."""
        if self.policy.file is not None:
            return Path(self.policy.file)
        default = Path(DEFAULT_POLICY_FILE)
        return default if default.exists() else None


def unix_mode(server: ServerSettings) -> int:
    """The permissions of the unix sockets.

    Raises:
        SettingsError: if the setting is not an octal number from 0 to 0777.
    """
    if not re.fullmatch(r"0?[0-7]{3}", server.unix_mode, re.ASCII):
        raise SettingsError(f"setting server.unix_mode = {server.unix_mode[:20]!r} must be octal, e.g. '0660'")
    return int(server.unix_mode, 8)
