"""`tidegate serve` and `tidegate check`."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import typer

from tidegate._version import __version__
from tidegate.cli.client_tls import CaOption, CertKeyOption, CertOption, ClientTls, own_data_plane
from tidegate.cli.common import ConfigOption, JsonOption, print_json, read_settings
from tidegate.cli.control_plane import one_line, read_token, require_sendable
from tidegate.cli.data_plane import request_data_plane
from tidegate.errors import SettingsError
from tidegate.listen_address import listener_url
from tidegate.tools.terminal import say
from tidegate.wire import DecisionBody

if TYPE_CHECKING:
    from tidegate.server.instance import Instance
    from tidegate.settings import Settings

logger = logging.getLogger(__name__)

TOKEN_VARIABLE: Final = "TIDEGATE_TOKEN"
"""The environment variable with the token of a caller of the data plane; the Python client reads it too."""

_TOUR = r"""
Tidegate listens at http://{address} (metrics at /metrics, health at /health), with a temporary catalog that is deleted when it
stops; your own catalog is not used.
{console}
Try it from another terminal:

  # a free key has 100 requests a minute
  curl -s http://{address}/v1/check -d '{{"api_key":"demo-free-key-0001","path":"/api/v1/items"}}'

  # the request of a gateway: 204 with the limit headers
  curl -si http://{address}/v1/authorize -H 'X-API-Key: demo-premium-key-0001' -H 'X-Original-URI: /api/v1/items'

  # six log-ins from one address: the last one gets 429
  for i in 1 2 3 4 5 6; do curl -sw '%{{http_code}}\n' -o /dev/null http://{address}/v1/check \
    -d '{{"method":"POST","path":"/login","ip":"203.0.113.7"}}'; done

Press Ctrl-C to stop."""


def serve(
    config: ConfigOption = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Serve the example policy from a temporary catalog and print requests to try.")
    ] = False,
) -> int:
    """Run the server: the data plane at [server] http, until SIGTERM or Ctrl-C.

    By default it listens at 127.0.0.1:8080, counts in memory, stores its catalog in tidegate.db and applies
    tidegate.policy.toml if it exists. On SIGTERM it completes requests in flight and exits with 0 within [server]
    drain_s. On SIGHUP it reloads the policy file, [envoy] config and certificates. With --demo the catalog is temporary
    and is deleted when the server stops. With [server] workers above 1 it runs that many processes on one
    address; they need counters in Redis.
    """
    # Nothing that is imported is garbage; to look for it takes a sixth of the time.
    gc.disable()
    from tidegate.server.run import ignore_signals, run
    from tidegate.server.supervisor import supervise
    from tidegate.server.worker import WorkerSlot, work
    from tidegate.telemetry.logs import configure_logging

    gc.enable()
    ignore_signals()
    slot = WorkerSlot.from_environment(os.environ)
    settings = read_settings(config)
    configure_logging(settings.server.log_level, settings.server.log_format, None if slot is None else slot.number)

    with contextlib.ExitStack() as stack:
        if demo:
            settings = _demo_settings(settings, stack, is_worker=slot is not None)
        messages = _StartMessages(settings, demo)
        if slot is not None:
            work(settings, slot, messages.print_token)
        elif settings.server.workers > 1:
            return supervise(settings, _worker_arguments(config, demo), messages.print_started)
        else:
            run(settings, messages.print_all, demo=demo)
    return 0


class _StartMessages:
    """What a server prints once it listens."""

    def __init__(self, settings: Settings, demo: bool) -> None:
        self._settings = settings
        self._demo = demo

    def print_token(self, instance: Instance) -> None:
        if instance.first_token is not None:
            typer.echo(
                f"control plane at {instance.admin_url}, token of the first operator, not shown again: {instance.first_token}"
            )
            sys.stdout.flush()

    def print_started(self, address: str, console: str = "") -> None:
        from tidegate.catalog.sql.engine import redacted_url
        from tidegate.server.open_listeners import open_listeners
        from tidegate.url_parts import scheme_of

        settings = self._settings
        for warning in open_listeners(settings):
            logger.warning("%s", warning)
        url = listener_url(address, settings.uses_tls("http"))
        if self._demo and url.startswith("http://"):
            typer.echo(_TOUR.format(address=address, console=console))
        else:
            policy = settings.policy_path
            typer.echo(
                f"tidegate {__version__} listens at {url} "
                f"({'policy file ' + str(policy) if policy else 'no policy file'}, catalog {redacted_url(settings.catalog.url)}, "
                f"counters {scheme_of(settings.counters.url)}://)"
            )
        sys.stdout.flush()

    def print_all(self, instance: Instance) -> None:
        url = instance.admin_url if self._settings.admin.console and instance.admin_url.startswith("http") else ""
        self.print_token(instance)
        if self._demo:
            console = f"\nThe console with example traffic, signed in on this machine: {url}/\n" if url else ""
            self.print_started(instance.address, console)
            return
        self.print_started(instance.address)
        if url:
            typer.echo(f"console at {url}/, sign in with a token of the control plane")
            sys.stdout.flush()


def _demo_settings(settings: Settings, stack: contextlib.ExitStack, *, is_worker: bool) -> Settings:
    """The settings with the example policy and a temporary catalog: the example's API keys are public and must not get into a
    catalog that is used later. Workers get the catalog of their supervisor from the environment.
    """
    example = stack.enter_context(resources.as_file(resources.files("tidegate").joinpath("example.policy.toml")))
    policy = msgspec.structs.replace(settings.policy, file=str(example))
    if is_worker:
        return msgspec.structs.replace(settings, policy=policy)
    try:
        directory = tempfile.TemporaryDirectory(prefix="tidegate-demo-", ignore_cleanup_errors=True)
    except OSError as error:
        raise SettingsError(
            f"--demo cannot create a temporary directory: {error.strerror}: set TMPDIR to a writable directory"
        ) from None
    url = f"sqlite:///{stack.enter_context(directory)}/tidegate.db"
    os.environ |= {"TIDEGATE_CATALOG__URL": url, "TIDEGATE_CATALOG__REPLICAS": ""}
    return msgspec.structs.replace(
        settings, policy=policy, catalog=msgspec.structs.replace(settings.catalog, url=url, replicas=())
    )


def _worker_arguments(config: Path | None, demo: bool) -> list[str]:
    return ["serve", *([] if config is None else ["--config", str(config)]), *(["--demo"] if demo else [])]


def check(
    key: Annotated[str, typer.Argument(help="API key, or - for a caller without one.")],
    method: Annotated[str, typer.Argument(help="HTTP method.")],
    path: Annotated[str, typer.Argument(help="Path of the request.")],
    ip: Annotated[str | None, typer.Option("--ip", help="Client address.")] = None,
    attribute: Annotated[
        list[str] | None, typer.Option("--attribute", help="Attribute of the caller, such as user=42; may be repeated.")
    ] = None,
    tier: Annotated[str | None, typer.Option("--tier", help="Tier of a caller without an API key.")] = None,
    bearer_file: Annotated[
        Path | None, typer.Option("--bearer-file", help="File with the caller's JSON Web Token, verified by [jwt] of the policy.")
    ] = None,
    cost: Annotated[int, typer.Option("--cost", help="Units; 0 reads without charging.")] = 1,
    url: Annotated[str | None, typer.Option("--url", help="URL of the server, also unix:/path; default: [server] http.")] = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            help="File with the caller's token, if the server needs one ([callers_auth]); default: TIDEGATE_TOKEN.",
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Charge nothing, and print which rule answers and why. --url and --token-file are then those of the control "
            "plane; default: [server] admin and [admin] token.",
        ),
    ] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> int:
    """Check one request at the running server, and charge it like a real one.

    Exit code 0: allowed. 1: denied. 2: no decision.
    """
    tls = ClientTls(ca, cert, cert_key)
    if explain:
        from tidegate.cli.explain import explain_check

        query = {"method": method.upper(), "path": path, "ip": ip, "tier": tier, "cost": cost}
        named = _attributes(attribute or [])
        return explain_check(key, query, named, url=url, token_file=token_file, tls=tls, config=config, as_json=as_json)
    address, tls = own_data_plane(read_settings(config), tls) if url is None else (url, tls)
    body: dict[str, Any] = {"method": method, "path": path, "cost": cost}
    given = {
        "api_key": None if key == "-" else key,
        "ip": ip,
        "attributes": _attributes(attribute) if attribute else None,
        "tier": tier,
        "bearer": None if bearer_file is None else read_token(bearer_file),
    }
    body |= {name: value for name, value in given.items() if value is not None}
    status, answer = request_data_plane(address, "/v1/check", body, tls, _caller_token(token_file, config))
    return _print_answer(status, answer, address, as_json=as_json)


def _print_answer(status: int, answer: dict[str, Any], address: str, *, as_json: bool) -> int:
    """Print the answer of a server; returns the exit code."""
    if as_json:
        print_json(answer)
    if status in (200, 429):
        try:
            decision = msgspec.convert(answer, DecisionBody)
        except msgspec.ValidationError:
            raise SettingsError(f"the server at {address} is not Tidegate: give another address with --url") from None
        if not as_json:
            say(_sentence(decision))
        return 0 if decision.allowed else 1
    if not as_json:
        found = answer.get("error")
        error = found if isinstance(found, dict) else {}
        code, message = error.get("code", status), error.get("message", f"the server at {address} is not Tidegate")
        say(f"tidegate: {one_line(str(code))}: {one_line(str(message))}", err=True)
    return 2


def _attributes(given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals or not name:
            raise SettingsError(f"--attribute {each[:60]!r} is not NAME=VALUE: write --attribute user=42")
        if name in found:
            raise SettingsError(f"--attribute {name!r} is given twice: give it once")
        found[name] = value
    return found


def _caller_token(token_file: Path | None, config: Path | None) -> dict[str, str]:
    """The header with which this command calls the data plane; none without a token."""
    token = os.environ.get(TOKEN_VARIABLE) if token_file is None else read_token(token_file)
    if not token:
        return {}
    require_sendable(token, TOKEN_VARIABLE if token_file is None else str(token_file))
    return {read_settings(config).callers_auth.header: token}


def _sentence(decision: DecisionBody) -> str:
    verdict = "allowed" if decision.allowed else "denied"
    # Texts from a server must not contain control characters.
    tier = one_line(str(decision.tier))
    if decision.limit is None or decision.reset_after is None:
        if decision.rule is None:
            return f"{verdict}: no limit of tier {tier} applies"
        return f"{verdict}: rule {one_line(decision.rule)} of tier {tier}, not counted"
    return (
        f"{verdict}: rule {one_line(decision.rule or '(tier)')} of tier {tier}: "
        f"{decision.remaining} of {decision.limit} left, fully replenished in {decision.reset_after:.3f} s"
        + (f", {decision.overage} above it" if decision.overage else "")
        + ("" if decision.allowed else f", retry after {_seconds(decision.retry_after)}")
    )


def _seconds(value: float | None) -> str:
    return "never at this cost" if value is None else f"{value:.3f} s"
