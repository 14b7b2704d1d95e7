"""`tidegate serve`, `tidegate check`, `tidegate doctor`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
import typer
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from tidegate._version import __version__
from tidegate.catalog.engines import open_engine, reason_of, shown
from tidegate.catalog.policy_file import load_policy, policy_warnings
from tidegate.catalog.sql import SqlCatalog
from tidegate.catalog.tables import policy_state
from tidegate.cli.asking import NoAnswer, ask
from tidegate.cli.common import ConfigOption, JsonOption, print_json, read_settings
from tidegate.counters.factory import open_counters
from tidegate.counters.guarded import GuardedCounters
from tidegate.errors import SettingsError, TidegateError
from tidegate.instance import Instance, require_shared_counters
from tidegate.listening import free_address
from tidegate.server import run
from tidegate.server_url import Server
from tidegate.settings import Settings
from tidegate.telemetry.logs import configure_logging
from tidegate.workers import Seat, supervise, work

_ASK_TIMEOUT_S = 5.0

_TOUR = r"""
Tidegate is deciding at http://{address} (metrics at /metrics, health at /health). Try it from another terminal:

  # a free key may ask 100 times a minute
  curl -s http://{address}/v1/check -d '{{"api_key":"demo-free-key-0001","path":"/api/v1/items"}}'

  # what a gateway asks: 204 with the limit headers
  curl -si http://{address}/v1/authorize -H 'X-API-Key: demo-premium-key-0001' -H 'X-Original-URI: /api/v1/items'

  # six log-ins from one address: the last is answered 429
  for i in 1 2 3 4 5 6; do curl -sw '%{{http_code}}\n' -o /dev/null http://{address}/v1/check \
    -d '{{"method":"POST","path":"/login","ip":"203.0.113.7"}}'; done

Ctrl-C ends it."""


def serve(
    config: ConfigOption = None,
    demo: Annotated[bool, typer.Option("--demo", help="Serve the example policy and print requests to try.")] = False,
) -> int:
    """Run the server: the data plane at [server] http, until SIGTERM or Ctrl-C.

    Without any setting it listens at 127.0.0.1:8080, counts in memory, keeps its catalog in tidegate.db and takes
    tidegate.policy.toml into force if it is there. On SIGTERM it finishes what is in flight and exits 0 within [server]
    drain_s. With [server] workers above 1 it keeps so many processes behind the one address; they need counters on Redis.
    """
    seat = Seat.taken(os.environ)
    settings = read_settings(config)
    configure_logging(settings.server.log_level, settings.server.log_format, None if seat is None else seat.number)

    def tell_token(instance: Instance) -> None:
        if instance.first_token is not None:
            typer.echo(
                f"control plane at http://{instance.admin_address}, token of the first operator, shown this once: "
                f"{instance.first_token}"
            )
            sys.stdout.flush()

    def tell(address: str) -> None:
        if demo:
            typer.echo(_TOUR.format(address=address))
        else:
            policy = settings.policy_path
            typer.echo(
                f"tidegate {__version__} decides at http://{address} "
                f"({'policy file ' + str(policy) if policy else 'no policy file'}, catalog {shown(settings.catalog.url)}, "
                f"counters {urlsplit(settings.counters.url).scheme}://)"
            )
        sys.stdout.flush()

    def tell_all(instance: Instance) -> None:
        tell_token(instance)
        tell(instance.address)

    with resources.as_file(resources.files("tidegate").joinpath("example.policy.toml")) as example:
        if demo:
            settings = msgspec.structs.replace(settings, policy=msgspec.structs.replace(settings.policy, file=str(example)))
        if seat is not None:
            work(settings, seat, tell_token)
        elif settings.server.workers > 1:
            return supervise(settings, _worker_arguments(config, demo), tell)
        else:
            run(settings, tell_all)
    return 0


def _worker_arguments(config: Path | None, demo: bool) -> list[str]:
    return ["serve", *([] if config is None else ["--config", str(config)]), *(["--demo"] if demo else [])]


def check(
    key: Annotated[str, typer.Argument(help="The API key, or - for a caller without one.")],
    method: Annotated[str, typer.Argument(help="HTTP method.")],
    path: Annotated[str, typer.Argument(help="Path of the request.")],
    ip: Annotated[str | None, typer.Option("--ip", help="Client address.")] = None,
    cost: Annotated[int, typer.Option("--cost", help="Units; 0 only looks.")] = 1,
    url: Annotated[str | None, typer.Option("--url", help="The server to ask; [server] http where not given.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> int:
    """Ask the running server about one request, and charge it as a real one.

    Exit code 0: it may pass. 1: it may not. 2: it could not be decided.
    """
    address = url or f"http://{read_settings(config).server.http}"
    body: dict[str, Any] = {"method": method, "path": path, "cost": cost}
    if key != "-":
        body["api_key"] = key
    if ip is not None:
        body["ip"] = ip
    status, answer = _ask(address, "/v1/check", body)
    if as_json:
        print_json(answer)
    elif status in (200, 429):
        verdict = "allowed" if answer["allowed"] else "denied"
        if answer["rule"] is None and answer["limit"] is None:
            typer.echo(f"{verdict}: no limit of tier {answer['tier']} applies")
        else:
            typer.echo(
                f"{verdict}: rule {answer['rule'] or '(tier)'} of tier {answer['tier']}: "
                f"{answer['remaining']} of {answer['limit']} left, whole again in {answer['reset_after']:.3f} s"
                + ("" if answer["allowed"] else f", retry after {_seconds(answer['retry_after'])}")
            )
    if status in (200, 429):
        return 0 if answer["allowed"] else 1
    if not as_json:
        error = answer.get("error", {})
        typer.echo(f"tidegate: {error.get('code', status)}: {error.get('message', 'no Tidegate answers there')}", err=True)
    return 2


def doctor(config: ConfigOption = None, as_json: JsonOption = False) -> int:
    """Tell what is configured, what is reachable, and what is wrong.

    Exit code 0 if nothing is wrong, 1 if something is.
    """
    findings = list(_examine(config))
    wrong = sum(1 for _, ok, _ in findings if ok is False)
    if as_json:
        print_json([{"what": what, "ok": ok, "finding": text} for what, ok, text in findings])
    else:
        for what, ok, text in findings:
            mark = {True: "ok   ", False: "WRONG", None: "note "}[ok]
            typer.echo(f"{mark} {what}: {text}")
        typer.echo(f"{wrong} wrong" if wrong else "nothing is wrong", err=True)
    return 1 if wrong else 0


def _examine(config: Path | None) -> Iterator[tuple[str, bool | None, str]]:
    yield "tidegate", True, f"{__version__} on Python {sys.version.split()[0]}"
    try:
        settings = read_settings(config)
    except SettingsError as error:
        yield "settings", False, error.message
        return
    yield "settings", True, "understood"
    yield from _examine_policy(settings)
    yield _try("catalog", lambda: _look_at_catalog(settings.catalog.url))
    yield _try("counters", lambda: asyncio.run(_look_at_counters(settings)))
    yield from _examine_listener(settings)
    for url in settings.catalog.replicas:
        yield _try("replica", lambda url=url: asyncio.run(_look_at_replica(url)))  # type: ignore[misc]
    if settings.server.workers > 1:
        yield _try("workers", lambda: _look_at_workers(settings))


def _examine_policy(settings: Settings) -> Iterator[tuple[str, bool | None, str]]:
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


def _examine_listener(settings: Settings) -> Iterator[tuple[str, bool | None, str]]:
    try:
        free_address(settings.server.http, "server.http")
        yield "server", None, f"nothing listens at {settings.server.http}: start it with 'tidegate serve'"
        return
    except SettingsError as error:
        refused = error.message
    try:
        status, answer = _ask(f"http://{settings.server.http}", "/health", None)
    except TidegateError:
        yield "server", False, refused
        return
    if "components" not in answer:
        yield "server", False, f"something that is not Tidegate listens at {settings.server.http}: set another server.http"
        return
    for name, component in answer["components"].items():
        healthy = component["status"] == "healthy"
        yield f"server {name}", healthy, component.get("reason", component["status"])
    if status != 200 and all(component["status"] == "healthy" for component in answer["components"].values()):
        yield "server", False, f"/health answers {status}"


def _look_at_catalog(url: str) -> str:
    file = Path(url.removeprefix("sqlite:///"))
    if url.startswith("sqlite:///") and not file.exists():
        # A doctor looks and does not treat: the file is made by 'serve', here only a place for it is looked for.
        try:
            with tempfile.TemporaryFile(dir=file.resolve().parent):
                return f"{url} is not there yet; 'tidegate serve' makes it"
        except OSError as error:
            raise SettingsError(
                f"{url} cannot be made: {error.strerror}: set catalog.url to a place that can be written"
            ) from None
    return asyncio.run(_read_catalog(url))


def _look_at_workers(settings: Settings) -> str:
    require_shared_counters(settings)
    return f"{settings.server.workers} processes share {settings.server.http}"


async def _look_at_counters(settings: Settings) -> str:
    store = open_counters(settings.counters, settings.breaker)
    scheme = urlsplit(settings.counters.url).scheme
    if not isinstance(store, GuardedCounters):
        return f"{scheme}://: counted in this process's memory"
    try:
        await store.store.start()
        await store.ping()
        shards = ", ".join(str(connection.endpoint) for connection in store.store.connections())
        return f"{scheme}:// answers: {shards}"
    finally:
        await store.store.close()


async def _look_at_replica(url: str) -> str:
    engine = open_engine(url, setting="catalog.replicas", writes=False, reads_only=True)
    try:
        async with engine.connect() as connection:
            version = (await connection.execute(select(policy_state.c.version))).scalar_one()
        return f"{shown(url)}: version {version}"
    except (SQLAlchemyError, OSError) as error:
        raise SettingsError(f"{shown(url)} does not answer as a replica of the catalog: {reason_of(error)}") from None
    finally:
        await engine.dispose()


async def _read_catalog(url: str) -> str:
    catalog = await SqlCatalog.open(url)
    try:
        tiers = await catalog.list_tiers()
        return f"{shown(url)}: version {await catalog.version()}, {len(tiers)} tiers"
    finally:
        await catalog.close()


def _try(what: str, look: Callable[[], str]) -> tuple[str, bool | None, str]:
    try:
        return what, True, look()
    except TidegateError as error:
        return what, False, error.message


def _ask(address: str, path: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
    """Ask the data plane; a body makes it a POST."""
    method, content = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
    try:
        answer = ask(Server.at(address), method, path, timeout_s=_ASK_TIMEOUT_S, body=content)
    except NoAnswer as error:
        remedy = error.remedy or "start it with 'tidegate serve', or give --url"
        raise SettingsError(f"no Tidegate answers at {address} ({error.reason}): {remedy}") from None
    told = answer.json_object()
    if told is None:
        raise SettingsError(f"what answers at {address} is not Tidegate: give --url")
    return answer.status, told


def _seconds(value: float | None) -> str:
    return "never at this cost" if value is None else f"{value:.3f} s"
