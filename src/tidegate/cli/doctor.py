"""`tidegate doctor`: read-only checks of settings, policy, catalog, counters and servers."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from importlib import resources
from pathlib import Path

from sqlalchemy import func, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tidegate._version import __version__
from tidegate.catalog.sql.engine import is_postgres, open_engine, reason_of, redacted_url
from tidegate.catalog.sql.key_hash import key_hash_fault
from tidegate.catalog.sql.schema import inspect_schema
from tidegate.catalog.sql.tables import api_keys, policy_state, tiers
from tidegate.cli.client_tls import NO_FILES, own_data_plane
from tidegate.cli.common import ConfigOption, JsonOption, print_json, read_settings
from tidegate.cli.data_plane import request_data_plane
from tidegate.counters.factory import open_counters
from tidegate.counters.guarded import GuardedCounters
from tidegate.errors import SettingsError, TidegateError
from tidegate.listen_address import UNIX_PREFIX, is_unix, listener_url, parse_address
from tidegate.policy.key_hash import key_hash_of
from tidegate.policy.model import KeyStatus
from tidegate.policy.toml_reader import load_policy, policy_warnings
from tidegate.server.addresses import admin_address, free_address, grpc_address, missing_for_grpc
from tidegate.server.certificates import load, utc_date
from tidegate.server.open_listeners import open_listeners
from tidegate.server.wiring import require_shared_counters
from tidegate.settings import Settings
from tidegate.tools.charts import clean
from tidegate.tools.terminal import say
from tidegate.url_parts import scheme_of

Finding = tuple[str, bool | None, str]
"""What was checked, whether it is correct (None for a note), and the result as text."""

_CONNECT_TIMEOUT_S = 2.0
_PLAIN_NAME = re.compile(r"[a-z_][a-z0-9_]*", re.ASCII)
_PRIVILEGES = text(
    "SELECT current_user::text AS role, current_schema()::text AS schema, "
    "has_schema_privilege(current_schema(), 'CREATE') AS may_create"
)


def doctor(config: ConfigOption = None, as_json: JsonOption = False) -> int:
    """Check the settings, the policy, the catalog, the counters and the servers, and report problems.

    Changes nothing. Exit code 0: no problems; 1: at least one problem.
    """
    findings = list(_examine(config))
    wrong = sum(1 for _, ok, _ in findings if ok is False)
    if as_json:
        print_json([{"what": what, "ok": ok, "finding": text} for what, ok, text in findings])
    else:
        for what, ok, text in findings:
            mark = {True: "ok   ", False: "WRONG", None: "note "}[ok]
            say(f"{mark} {clean(what)}: {clean(text)}")
        say(f"{wrong} wrong" if wrong else "nothing is wrong", err=True)
    return 1 if wrong else 0


def _examine(config: Path | None) -> Iterator[Finding]:
    yield "tidegate", True, f"{__version__} on Python {sys.version.split()[0]}"
    try:
        settings = read_settings(config)
    except SettingsError as error:
        yield "settings", False, error.message
        return
    yield "settings", True, "valid"
    if settings.tls.cert:
        yield _finding_of("tls", lambda: _check_certificates(settings))
    yield from _examine_policy(settings)
    yield from _examine_catalog(settings)
    yield _finding_of("counters", lambda: (True, asyncio.run(_check_counters(settings))))
    runs = yield from _examine_data_plane(settings)
    yield from (("callers", None, warning) for warning in open_listeners(settings))
    yield from _examine_side_listeners(settings, runs)
    for url in settings.catalog.replicas:
        yield _finding_of("replica", lambda url=url: (True, asyncio.run(_check_replica(url))))  # type: ignore[misc]
    if settings.server.workers > 1:
        yield _finding_of("workers", lambda: (True, _check_workers(settings)))


def _examine_policy(settings: Settings) -> Iterator[Finding]:
    path = settings.policy_path
    if path is None:
        yield "policy", None, "no policy file: rules come from the catalog alone ('tidegate policy example' prints one)"
        return
    try:
        policy = load_policy(path)
    except TidegateError as error:
        yield "policy", False, error.message
        return
    yield "policy", True, f"{path}: {len(policy.tiers)} tiers, {len(policy.api_keys)} API keys"
    for warning in policy_warnings(policy):
        yield "policy", None, warning


def _examine_data_plane(settings: Settings) -> Generator[Finding, None, bool]:
    """Check the data plane; return whether Tidegate runs there."""
    try:
        free_address(settings.server.http, "server.http")
        yield "server", None, f"nothing listens at {settings.server.http}: start it with 'tidegate serve'"
        return False
    except SettingsError as error:
        problem = error.message
    if settings.server.probes:
        url, tls = listener_url(settings.server.probes, False), NO_FILES
    else:
        url, tls = own_data_plane(settings)
        if settings.tls.client_ca and url.startswith("https:"):
            text = "its health cannot be read without a client certificate: set server.probes to a plain port on loopback"
            yield "server", None, f"something listens at {settings.server.http}; {text}"
            return True
    try:
        status, answer = request_data_plane(url, "/health", tls=tls)
    except TidegateError:
        yield "server", False, problem
        return False
    if "components" not in answer:
        yield "server", False, f"something that is not Tidegate listens at {settings.server.http}: set another server.http"
        return False
    for name, component in answer["components"].items():
        healthy = component["status"] == "healthy"
        yield f"server {name}", healthy, component.get("reason", component["status"])
    if status != 200 and all(component["status"] == "healthy" for component in answer["components"].values()):
        yield "server", False, f"/health answers {status}"
    return True


def _examine_side_listeners(settings: Settings, runs: bool) -> Iterator[Finding]:
    """Check the addresses of the control plane and of gRPC: free, or in use by the running Tidegate."""
    resolve = parse_address if runs else free_address
    http = parse_address(settings.server.http, "server.http")
    admin = None
    try:
        admin = admin_address(settings, http, resolve)
        yield from _examine_address("control plane", settings.server.admin, admin, runs)
    except SettingsError as error:
        yield "control plane", False, error.message
    missing = missing_for_grpc()
    try:
        address = grpc_address(settings, http, admin, resolve)
        if settings.server.grpc and missing:
            yield "gRPC listener", None, f"off: {', '.join(missing)} not installed; for Envoy, pip install 'tidegate[envoy]'"
            return
        yield from _examine_address("gRPC listener", settings.server.grpc, address, runs)
    except SettingsError as error:
        yield "gRPC listener", False, error.message


def _examine_address(what: str, text: str, address: tuple[str, int] | None, runs: bool) -> Iterator[Finding]:
    if address is None:
        yield what, None, "off"
    elif not runs:
        yield what, True, f"{text} is free"
    elif _accepts_connections(*address):
        yield what, True, f"something listens at {text}"
    else:
        yield what, False, f"nothing listens at {text} although Tidegate runs: it was started with different settings"


def _accepts_connections(host: str, port: int) -> bool:
    try:
        if is_unix(host):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as unix:
                unix.settimeout(_CONNECT_TIMEOUT_S)
                unix.connect(host.removeprefix(UNIX_PREFIX))
            return True
        with socket.create_connection((host, port), _CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


def _examine_catalog(settings: Settings) -> Iterator[Finding]:
    owned: list[Finding] = []
    yield _finding_of("catalog", lambda: _check_catalog(settings, owned))
    yield from owned


def _check_catalog(settings: Settings, owned: list[Finding]) -> tuple[bool | None, str]:
    url = settings.catalog.url
    if url.startswith("sqlite:///"):
        file = Path(url.removeprefix("sqlite:///"))
        try:
            # 'serve' creates the file; here only the directory is checked. In WAL mode SQLite creates further files beside it.
            with tempfile.TemporaryFile(dir=file.resolve().parent):
                pass
        except OSError as error:
            raise SettingsError(
                f"{url} is not writable: {error.strerror}: set catalog.url to a file in a writable directory"
            ) from None
        if not file.exists():
            return True, f"{url} does not exist yet; 'tidegate serve' creates it"
        if not os.access(file, os.W_OK):
            raise SettingsError(f"{url} is not writable by this user: change its owner to the user that runs 'tidegate serve'")
        mode = stat.S_IMODE(file.stat().st_mode)
        if mode & 0o077:
            _, found = asyncio.run(_read_catalog(settings, owned))
            return None, f"{found}; readable by other users (mode {mode:04o}): chmod 600 {file}*"
    return asyncio.run(_read_catalog(settings, owned))


async def _read_catalog(settings: Settings, owned: list[Finding]) -> tuple[bool | None, str]:
    """Check the catalog; findings about rows of a policy file are appended to `owned`."""
    url = settings.catalog.url
    engine = open_engine(url, reads_only=True, inspect_only=True)
    try:
        schema = await inspect_schema(url, engine)
        await _require_privileges(url, engine)
        if schema.revision is None:
            return True, f"{redacted_url(url)} is empty; 'tidegate serve' or 'tidegate db upgrade' creates its tables"
        if not schema.usable:
            return None, (
                f"{redacted_url(url)} has schema {schema.revision} of an older version: 'tidegate serve' upgrades it to "
                f"{schema.head} when it starts; to upgrade beforehand, run 'tidegate db upgrade'"
            )
        async with engine.connect() as connection:
            version = (await connection.execute(select(policy_state.c.version))).scalar_one()
            count = (await connection.execute(select(func.count()).select_from(tiers))).scalar_one()
            owned += await _check_owned(connection, settings)
            fault = await key_hash_fault(connection, key_hash_of(settings.keys.hash, settings.keys.pepper))
            if fault is not None:
                owned.append(("API keys", False, fault))
        return True, f"{redacted_url(url)}: version {version}, {count} tiers"
    except (SQLAlchemyError, OSError) as error:
        raise SettingsError(f"{redacted_url(url)} cannot be read as a catalog: {reason_of(error)}") from None
    finally:
        await engine.dispose()


async def _require_privileges(url: str, engine: AsyncEngine) -> None:
    """Require that the PostgreSQL user may create tables: for migrations, and for each day's violations."""
    if not is_postgres(url):
        return
    async with engine.connect() as connection:
        row = (await connection.execute(_PRIVILEGES)).one()
    if row.schema is None:
        raise SettingsError(
            f"{redacted_url(url)}: the user {row.role!r} has no schema in its search_path, or no USAGE privilege on it: "
            f"GRANT USAGE, CREATE ON SCHEMA public TO {_quoted(row.role)}"
        )
    if not row.may_create:
        raise SettingsError(
            f"{redacted_url(url)}: the user {row.role!r} has no CREATE privilege on schema {row.schema!r} (since PostgreSQL 15 "
            "only the database owner has it by default): "
            f"GRANT CREATE ON SCHEMA {_quoted(row.schema)} TO {_quoted(row.role)}"
        )


def _quoted(name: str) -> str:
    return name if _PLAIN_NAME.fullmatch(name) else '"' + name.replace('"', '""') + '"'


async def _check_owned(connection: AsyncConnection, settings: Settings) -> list[Finding]:
    """Rows of a policy file that is no longer configured, and API keys that are public."""
    found: list[Finding] = []
    if settings.policy_path is None:
        active = (await connection.execute(select(policy_state.c.file_digest))).scalar() is not None
        tier_count, key_count = [
            (await connection.execute(select(func.count()).select_from(table).where(table.c.managed_by_file))).scalar_one()
            for table in (tiers, api_keys)
        ]
        if tier_count or key_count:
            release = "'tidegate serve' releases them to operators when it starts" if active else "they are released to operators"
            text = (
                f"{tier_count} tiers and {key_count} API keys come from a policy file that is no longer configured, "
                "and stay active"
            )
            found.append(("rows of a policy file", None, f"{text}: {release}, see 'tidegate keys list'"))
    with resources.as_file(resources.files("tidegate").joinpath("example.policy.toml")) as example:
        public = [api_key.id for api_key in load_policy(example).api_keys]
    accepted = select(api_keys.c.id).where(api_keys.c.id.in_(public), api_keys.c.status == KeyStatus.ACTIVE.value)
    ids = (await connection.execute(accepted.order_by(api_keys.c.id))).scalars().all()
    if ids:
        found.append(
            (
                "API keys",
                False,
                f"the catalog accepts {len(ids)} API keys of the example policy, which are public: "
                f"run 'tidegate keys revoke' or remove them from the policy file: {', '.join(ids)}",
            )
        )
    return found


def _check_certificates(settings: Settings) -> tuple[bool | None, str]:
    loaded = load(settings.tls)
    problem = loaded.invalid_now(settings.tls)
    if problem is not None:
        return False, problem
    key = Path(settings.tls.key or settings.tls.cert)
    mode = stat.S_IMODE(key.stat().st_mode)
    until = f"{settings.tls.cert} is valid until {utc_date(loaded.expires['cert'])}"
    if mode & 0o007:
        return None, f"{until}; its key is readable by all users (mode {mode:04o}): chmod 640 {key}"
    return True, until


def _check_workers(settings: Settings) -> str:
    require_shared_counters(settings)
    return f"{settings.server.workers} processes share {settings.server.http}"


async def _check_counters(settings: Settings) -> str:
    store = open_counters(settings.counters, settings.breaker)
    scheme = scheme_of(settings.counters.url)
    if not isinstance(store, GuardedCounters):
        return f"{scheme}://: counters in the memory of the process"
    try:
        await store.store.start()
        await store.ping()
        shards = ", ".join(str(connection.endpoint) for connection in store.store.connections())
        return f"{scheme}:// responds: {shards}"
    finally:
        await store.store.close()


async def _check_replica(url: str) -> str:
    engine = open_engine(url, setting="catalog.replicas", writes=False, reads_only=True)
    try:
        async with engine.connect() as connection:
            version = (await connection.execute(select(policy_state.c.version))).scalar_one()
        return f"{redacted_url(url)}: version {version}"
    except (SQLAlchemyError, OSError) as error:
        raise SettingsError(f"{redacted_url(url)} cannot be read as a replica of the catalog: {reason_of(error)}") from None
    finally:
        await engine.dispose()


def _finding_of(what: str, check: Callable[[], tuple[bool | None, str]]) -> Finding:
    try:
        return (what, *check())
    except TidegateError as error:
        return what, False, error.message
