"""Every setting, its default and its unit. A TOML file, and each key as an environment variable over it."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from tidegate.errors import SettingsError

ENVIRONMENT_PREFIX: Final = "TIDEGATE_"
DEFAULT_FILE: Final = "tidegate.toml"
DEFAULT_POLICY_FILE: Final = "tidegate.policy.toml"
MIN_TOKEN_LENGTH: Final = 16


class ServerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[server]`: the listeners.

    Args:
        http: address of the data plane.
        admin: address of the control plane; empty switches it off.
        grpc: address of the gRPC door; empty switches it off.
        workers: processes.
        drain_s: how long SIGTERM waits for what is in flight, s.
        trusted_proxies: addresses and networks whose forwarding headers are believed; `unix` for peers on a unix socket.
        body_timeout_s: how long a request body may take, s.
        idle_timeout_s: how long a connection of the data plane may wait for its next request, s; keep it above that of gateways.
        max_connections: most open connections of the data plane; above it those that wait longest are closed.
        log_level: debug, info, warning or error.
        log_format: json (one line an event, Elastic Common Schema), text, or auto: text for a terminal, else json.
        access_log_sample: share of the requests to the data plane's /v1/ and of gRPC's calls that are logged, 0 to 1.
    """

    http: str = "127.0.0.1:8080"
    admin: str = "127.0.0.1:8082"
    grpc: str = "127.0.0.1:8081"
    workers: int = 1
    drain_s: float = 10.0
    trusted_proxies: tuple[str, ...] = ("127.0.0.0/8", "::1/128")
    body_timeout_s: float = 10.0
    idle_timeout_s: float = 75.0
    max_connections: int = 10_000
    log_level: str = "info"
    log_format: str = "auto"
    access_log_sample: float = 0.0


class PolicySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[policy]`: the policy file.

    Args:
        file: its path; where not given, `tidegate.policy.toml` is taken if it is there.
    """

    file: str | None = None


class PathSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[paths]`: spellings of paths that are refused unless an API needs them.

    Args:
        encoded_slashes: patterns with `*` for the paths that may have `%2F`.
        decode_unreserved: whether an escape of an unreserved character, such as `%7E`, is read as the character.
    """

    encoded_slashes: tuple[str, ...] = ()
    decode_unreserved: bool = False


class CatalogSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[catalog]`: where policy lives.

    Args:
        url: `sqlite:///file.db` (relative), `sqlite:////file.db` (absolute), or a PostgreSQL as libpq reads it:
            `postgresql://user@host1,host2/name`.
        replicas: URLs of read replicas of that PostgreSQL.
        max_replica_lag_s: a replica that lags more is left out, s.
        pool_size: most connections for reading to each database server; another 4 to the primary are for writing.
        timeout_s: how long a database may take to answer, s.
        poll_s: how often changes made by other processes are looked for where they are not announced, s.
        unknown_keys_per_minute: most look-ups of unknown API keys for one client address in one process; 0 for no bound.
    """

    url: str = "sqlite:///tidegate.db"
    replicas: tuple[str, ...] = ()
    max_replica_lag_s: float = 5.0
    pool_size: int = 8
    timeout_s: float = 2.0
    poll_s: float = 0.5
    unknown_keys_per_minute: int = 300


class CounterSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[counters]`: where counts live.

    Args:
        url: `memory://`, or a Redis: `redis://`, `redis+unix://`, `redis+sentinel://`, `redis+cluster://`, and `rediss…` for TLS.
        timeout_ms: deadline of a check at the store, ms.
        on_failure: local, allow or deny while the store is unwell, for rules that do not say.
        max_subjects: most counters held in memory; on Redis, while it is unwell.
        max_in_flight: most unanswered calls to one shard.
        min_instances: at least so many instances share the limits while the store is unwell, also where none was heard of.
    """

    url: str = "memory://"
    timeout_ms: int = 50
    on_failure: str = "local"
    max_subjects: int = 1_000_000
    max_in_flight: int = 10_000
    min_instances: int = 1


class BreakerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[breaker]`: when a counter store that fails is left alone.

    Args:
        failures: that open it, within the window.
        window_s: the window, s.
        open_s: how long it stays open before one probe, s.
    """

    failures: int = 5
    window_s: float = 10.0
    open_s: float = 30.0


class CacheSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[cache]`: the catalog in memory.

    Args:
        l1_ttl_s: how long an entry is fresh in this process, s.
        l2_ttl_s: how long it is fresh in the shared cache, s.
        stale_if_error_s: how long past that it serves while the catalog fails, s.
        max_keys: most API keys cached in this process.
        secret: seals the entries of the shared cache, 16 characters or more, the same for all instances of a catalog; where not
            given, one is made and kept in the catalog's database.
    """

    l1_ttl_s: float = 60.0
    l2_ttl_s: float = 300.0
    stale_if_error_s: float = 3600.0
    max_keys: int = 100_000
    secret: str | None = None


class AdminSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[admin]`: the control plane.

    Args:
        token: bearer token of an operator, 16 characters or more; without one, one is made and printed at the first start.
        trusted_proxies: networks whose forwarding headers the control plane believes when it counts wrong tokens by address.
    """

    token: str | None = None
    trusted_proxies: tuple[str, ...] = ()


class ViolationSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[violations]`: what is kept of blocked checks.

    Args:
        enabled: whether they are written to the catalog's database.
        flush_s: how often, s.
        keep_days: how long they are kept, days.
        max_entries: most subjects counted between two writes, each in its minute and rule.
    """

    enabled: bool = True
    flush_s: float = 5.0
    keep_days: int = 30
    max_entries: int = 10_000


class TracingSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[tracing]`: OpenTelemetry, with the extra `otel`.

    Args:
        endpoint: where spans go, OTLP over HTTP, such as `http://127.0.0.1:4318/v1/traces`; without one there is no tracing.
        sample: share of the checks that are traced where the caller's `traceparent` does not say.
    """

    endpoint: str | None = None
    sample: float = 0.01


class EnvoySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[envoy]`: what the gRPC door makes of Envoy's descriptors.

    Args:
        domain: whose descriptors are checks under the policy.
        api_key_entry: name of the entry that has the API key.
        method_entry: name of the entry that has the HTTP method; GET where there is none.
        path_entry: name of the entry that has the path; for a descriptor without one the rules for descriptors are asked.
        ip_entry: name of the entry that has the client's address.
        config: file or directory of limits in the form of envoyproxy/ratelimit, for domains of their own; none where empty.
    """

    domain: str = "tidegate"
    api_key_entry: str = "api_key"
    method_entry: str = "method"
    path_entry: str = "path"
    ip_entry: str = "remote_address"
    config: str = ""


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All settings; each section is a record above."""

    server: ServerSettings = ServerSettings()
    policy: PolicySettings = PolicySettings()
    paths: PathSettings = PathSettings()
    catalog: CatalogSettings = CatalogSettings()
    counters: CounterSettings = CounterSettings()
    breaker: BreakerSettings = BreakerSettings()
    cache: CacheSettings = CacheSettings()
    admin: AdminSettings = AdminSettings()
    violations: ViolationSettings = ViolationSettings()
    tracing: TracingSettings = TracingSettings()
    envoy: EnvoySettings = EnvoySettings()

    @property
    def policy_path(self) -> Path | None:
        """The policy file, None where there is none: neither given nor at its usual place."""
        if self.policy.file is not None:
            return Path(self.policy.file)
        usual = Path(DEFAULT_POLICY_FILE)
        return usual if usual.exists() else None


_RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "server.workers": (1, 1024),
    "server.drain_s": (0, 3600),
    "server.body_timeout_s": (0.1, 3600),
    "server.idle_timeout_s": (1, 86_400),
    "server.max_connections": (1, 1_000_000),
    "server.access_log_sample": (0, 1),
    "catalog.max_replica_lag_s": (0.1, 86_400),
    "catalog.pool_size": (1, 1000),
    "catalog.timeout_s": (0.05, 60),
    "catalog.poll_s": (0.05, 3600),
    "catalog.unknown_keys_per_minute": (0, 1_000_000_000),
    "counters.timeout_ms": (1, 60_000),
    "counters.max_subjects": (1, 1_000_000_000),
    "counters.max_in_flight": (1, 1_000_000),
    "counters.min_instances": (1, 10_000),
    "breaker.failures": (1, 1_000_000),
    "breaker.window_s": (0.1, 86_400),
    "breaker.open_s": (0.1, 86_400),
    "cache.l1_ttl_s": (0.1, 86_400),
    "cache.l2_ttl_s": (0.1, 86_400),
    "cache.stale_if_error_s": (0, 86_400 * 365),
    "cache.max_keys": (1, 100_000_000),
    "violations.flush_s": (0.1, 3600),
    "violations.keep_days": (1, 3650),
    "violations.max_entries": (100, 1_000_000),
    "tracing.sample": (0, 1),
}
_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "counters.on_failure": ("local", "allow", "deny"),
    "server.log_level": ("debug", "info", "warning", "error"),
    "server.log_format": ("auto", "json", "text"),
}


def load_settings(file: Path | None, environment: Mapping[str, str]) -> Settings:
    """Read the settings.

    Args:
        file: the TOML file; None for `tidegate.toml` if it is there.
        environment: variables; those named `TIDEGATE_SECTION__KEY` override the file.

    Returns:
        The settings.

    Raises:
        SettingsError: naming the setting, its value and the remedy.
    """
    if file is None and Path(DEFAULT_FILE).exists():
        file = Path(DEFAULT_FILE)
    raw: dict[str, Any] = {} if file is None else _read(file)
    source = "the environment" if file is None else str(file)
    for section, values in raw.items():
        _check_known(section, values, source)
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or "__" not in variable:
            continue  # Kubernetes makes TIDEGATE_PORT and the like of a service's name: those are no settings
        section, _, key = variable[len(ENVIRONMENT_PREFIX) :].lower().partition("__")
        _check_known(section, {key: text}, f"the environment variable {variable}")
        raw.setdefault(section, {})[key] = _from_text(section, key, text)
    try:
        settings = msgspec.convert(raw, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(f"invalid setting: {error} (in {source}, or in a TIDEGATE_ variable)") from None
    for name, (least, most) in _RANGES.items():
        value = _value(settings, name)
        if not least <= value <= most:
            raise SettingsError(f"setting {name} = {value} must be from {least:g} to {most:g}")
    for name, choices in _CHOICES.items():
        if _value(settings, name) not in choices:
            raise SettingsError(f"setting {name} = {_value(settings, name)!r} is not valid; use one of {', '.join(choices)}")
    for name in ("http", "admin", "grpc"):
        if name == "http" or getattr(settings.server, name):
            parse_address(getattr(settings.server, name), f"server.{name}")
    entries = [getattr(settings.envoy, f"{what}_entry") for what in ("api_key", "method", "path", "ip")]
    if not all(entries) or len(set(entries)) < len(entries):
        raise SettingsError(f"settings envoy.*_entry = {', '.join(entries)}: the names must be distinct and not empty")
    if not settings.envoy.domain:
        raise SettingsError("setting envoy.domain is empty; set it to the domain that Envoy sends")
    if settings.cache.secret and len(settings.cache.secret) < MIN_TOKEN_LENGTH:
        # The secret itself is not repeated.
        raise SettingsError(
            f"setting cache.secret has fewer than {MIN_TOKEN_LENGTH} characters; generate one with 'openssl rand -hex 32', "
            "or remove the setting to use one stored in the catalog's database"
        )
    if settings.admin.token and len(settings.admin.token) < MIN_TOKEN_LENGTH:
        # The token itself is not repeated.
        raise SettingsError(
            f"setting admin.token has fewer than {MIN_TOKEN_LENGTH} characters; generate one with 'openssl rand -hex 32'"
        )
    return settings


def parse_address(text: str, name: str) -> tuple[str, int]:
    """Read a listener's address.

    Args:
        text: `host:port`, with an IPv6 host in brackets.
        name: of the setting, for the error.

    Returns:
        Host and port, 0 to 65535 (0: any free one).

    Raises:
        SettingsError: naming the setting and its value.
    """
    host, colon, port = text.rpartition(":")
    host = host.strip("[]")
    if not colon or not is_host(host) or not port.isascii() or not port.isdecimal() or int(port[:6]) > 65_535:
        raise SettingsError(
            f"setting {name} = {text[:200]!r} is not a valid address; expected host:port, e.g. '127.0.0.1:8080' or '[::1]:8080'"
        )
    return host, int(port)


def is_host(text: str) -> bool:
    """Whether a text can be looked up as a host: of others the resolver raises `UnicodeError`, long after the start.

    Args:
        text: a name or an address, without brackets.

    Returns:
        False for an empty text, one with control characters or spaces, and one with a label that is empty or has over 63 bytes.
    """
    if not text or not text.isprintable() or " " in text:
        return False
    try:
        text.encode("idna")
    except UnicodeError:
        return False
    return True


def join_address(host: str, port: int) -> str:
    """Write an address as the settings have it.

    Args:
        host: a name or an address.
        port: 0 to 65535.

    Returns:
        `host:port`, with an IPv6 host in brackets.
    """
    return f"{f'[{host}]' if ':' in host else host}:{port}"


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise SettingsError(f"the settings file {file} does not exist; set its path with --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the settings file {file} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"the settings file {file} is not valid TOML: {error}") from None


def _check_known(section: str, values: object, source: str) -> None:
    sections = {field.name: field.type for field in msgspec.structs.fields(Settings)}
    if section not in sections:
        raise SettingsError(f"{source} has the unknown section {section!r}{_nearest(section, sections)}")
    if not isinstance(values, dict):
        raise SettingsError(f"{source}: {section!r} is a section; write [{section}]")
    keys = {field.name for field in msgspec.structs.fields(sections[section])}
    for key in values:
        if key not in keys:
            raise SettingsError(f"{source} has the unknown setting '{section}.{key}'{_nearest(key, keys)}")


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {close[0]!r}?" if close else f": known are {', '.join(sorted(known))}"


def _from_text(section: str, key: str, text: str) -> Any:
    default = getattr(getattr(Settings(), section), key)
    return [part.strip() for part in text.split(",") if part.strip()] if isinstance(default, tuple) else text


def _value(settings: Settings, name: str) -> Any:
    section, _, key = name.partition(".")
    return getattr(getattr(settings, section), key)
