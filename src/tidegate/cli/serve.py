"""`tidegate serve` and `tidegate check`."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from tidegate._version import __version__
from tidegate.cli.common import ConfigOption, JsonOption, print_json, read_settings
from tidegate.cli.control_plane import one_line
from tidegate.cli.data_plane import ask_data_plane
from tidegate.errors import SettingsError
from tidegate.tools.terminal import say
from tidegate.wire import DecisionBody

if TYPE_CHECKING:
    from tidegate.server.instance import Instance
    from tidegate.settings import Settings

_TOUR = r"""
Tidegate is deciding at http://{address} (metrics at /metrics, health at /health), with a catalog that is deleted when it
ends: none of this touches yours. Try it from another terminal:

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
    demo: Annotated[
        bool, typer.Option("--demo", help="Serve the example policy from a throw-away catalog and print requests to try.")
    ] = False,
) -> int:
    """Run the server: the data plane at [server] http, until SIGTERM or Ctrl-C.

    Without any setting it listens at 127.0.0.1:8080, counts in memory, keeps its catalog in tidegate.db and takes
    tidegate.policy.toml into force if it is there. On SIGTERM it finishes what is in flight and exits 0 within [server]
    drain_s. On SIGHUP it reloads the policy file, [envoy] config and certificates. With --demo the catalog is a throw-away one:
    what it holds is gone when the server ends. With [server] workers above 1 it keeps so many processes behind the one
    address; they need counters on Redis.
    """
    from tidegate.catalog.sql.engine import shown
    from tidegate.server.run import ignore_signals, run
    from tidegate.server.supervisor import supervise
    from tidegate.server.worker import WorkerSlot, work
    from tidegate.telemetry.logs import configure_logging
    from tidegate.url_parts import scheme_of

    ignore_signals()
    slot = WorkerSlot.from_environment(os.environ)
    settings = read_settings(config)
    configure_logging(settings.server.log_level, settings.server.log_format, None if slot is None else slot.number)

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
                f"counters {scheme_of(settings.counters.url)}://)"
            )
        sys.stdout.flush()

    def tell_all(instance: Instance) -> None:
        tell_token(instance)
        tell(instance.address)

    with contextlib.ExitStack() as stack:
        if demo:
            settings = _demo_settings(settings, stack, is_worker=slot is not None)
        if slot is not None:
            work(settings, slot, tell_token)
        elif settings.server.workers > 1:
            return supervise(settings, _worker_arguments(config, demo), tell)
        else:
            run(settings, tell_all)
    return 0


def _demo_settings(settings: Settings, stack: contextlib.ExitStack, *, is_worker: bool) -> Settings:
    """The settings with the example policy and a catalog of its own: the example's API keys are public, so they must not get into
    a catalog that goes on being used. Workers find the catalog of their supervisor in the environment.
    """
    example = stack.enter_context(resources.as_file(resources.files("tidegate").joinpath("example.policy.toml")))
    policy = msgspec.structs.replace(settings.policy, file=str(example))
    if is_worker:
        return msgspec.structs.replace(settings, policy=policy)
    try:
        made = tempfile.TemporaryDirectory(prefix="tidegate-demo-", ignore_cleanup_errors=True)
    except OSError as error:
        raise SettingsError(f"--demo needs a directory for temporary files: {error.strerror}: set TMPDIR to one") from None
    url = f"sqlite:///{stack.enter_context(made)}/tidegate.db"
    os.environ |= {"TIDEGATE_CATALOG__URL": url, "TIDEGATE_CATALOG__REPLICAS": ""}
    return msgspec.structs.replace(
        settings, policy=policy, catalog=msgspec.structs.replace(settings.catalog, url=url, replicas=())
    )


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
    status, answer = ask_data_plane(address, "/v1/check", body)
    if as_json:
        print_json(answer)
    if status in (200, 429):
        try:
            decision = msgspec.convert(answer, DecisionBody)
        except msgspec.ValidationError:
            raise SettingsError(f"what answers at {address} is not Tidegate: give --url") from None
        if not as_json:
            say(_sentence(decision))
        return 0 if decision.allowed else 1
    if not as_json:
        told = answer.get("error")
        error = told if isinstance(told, dict) else {}
        code, message = error.get("code", status), error.get("message", "no Tidegate answers there")
        say(f"tidegate: {one_line(str(code))}: {one_line(str(message))}", err=True)
    return 2


def _sentence(decision: DecisionBody) -> str:
    verdict = "allowed" if decision.allowed else "denied"
    # A server's texts: they must not move the cursor.
    tier = one_line(str(decision.tier))
    if decision.limit is None or decision.reset_after is None:
        if decision.rule is None:
            return f"{verdict}: no limit of tier {tier} applies"
        return f"{verdict}: rule {one_line(decision.rule)} of tier {tier}, without counting"
    return (
        f"{verdict}: rule {one_line(decision.rule or '(tier)')} of tier {tier}: "
        f"{decision.remaining} of {decision.limit} left, fully replenished in {decision.reset_after:.3f} s"
        + ("" if decision.allowed else f", retry after {_seconds(decision.retry_after)}")
    )


def _seconds(value: float | None) -> str:
    return "never at this cost" if value is None else f"{value:.3f} s"
