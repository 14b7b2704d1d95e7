"""Where the commands of operators work: in the database, or at a control plane over the admin API, with the same errors."""

from __future__ import annotations

import contextlib
import getpass
import os
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.cli.client_tls import ClientTls
from tidegate.cli.common import with_catalog
from tidegate.cli.control_plane import ControlPlane
from tidegate.errors import BadRequest, CatalogError, CatalogUnavailable, PolicyError, SettingsError, TidegateError
from tidegate.policy.labels import CLI_ACTOR

_MAX_ACTOR: Final = 200

_T = TypeVar("_T")


class OperationRefused(TidegateError):
    """The catalog rejected an operation; the message starts with its code, like errors of the admin API."""

    code = "OPERATION_REFUSED"


class ServerOptions(msgspec.Struct, frozen=True):
    """The options of a command that say where it works.

    Args:
        config: settings file.
        url: URL of the control plane; None for the database.
        token_file: file with the control plane's token; None for the token of the settings.
        tls: certificates for an https URL.
    """

    config: Path | None
    url: str | None
    token_file: Path | None
    tls: ClientTls


def with_either(
    options: ServerOptions,
    command: str,
    at_control_plane: Callable[[ControlPlane], Coroutine[Any, Any, _T]],
    in_catalog: Callable[[SqlCatalog], Coroutine[Any, Any, _T]],
) -> _T:
    """Run an operation in the database or over the admin API.

    Args:
        command: the group of commands, for errors.
        at_control_plane: the operation over the admin API; it awaits no event loop.
        in_catalog: the operation in the database.

    Raises:
        TidegateError: if the operation was rejected, or the server or the database does not answer.
    """
    if options.url is not None:
        plane = ControlPlane.at(options.url, options.token_file, options.config, options.tls, command)
        return run_at_once(at_control_plane(plane))
    if options.token_file is not None:
        raise SettingsError("--token-file is only used with --url: set both, or neither")
    if options.tls != ClientTls():
        raise SettingsError("--ca, --cert and --key are only used with --url: add --url")

    async def run(catalog: SqlCatalog) -> _T:
        with refusals_as_over_the_api():
            return await in_catalog(catalog)

    return with_catalog(options.config, run)


def run_at_once(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine that awaits no event loop without one: within a loop, Ctrl-C would wait for the pending response."""
    try:
        work.send(None)
    except StopIteration as done:
        result: _T = done.value
        return result
    raise AssertionError("the operation awaits an event loop")


@contextlib.contextmanager
def refusals_as_over_the_api() -> Iterator[None]:
    """Raise what the catalog refuses with the code that the admin API sends."""
    try:
        yield
    except (CatalogError, BadRequest, PolicyError, CatalogUnavailable) as error:
        raise OperationRefused(f"{error.code}: {error.message}") from error


def cli_actor() -> str:
    """The name of the user who runs this command, for the audit log."""
    return f"{CLI_ACTOR}{_user()}"[:_MAX_ACTOR]


def _user() -> str:
    if sys.platform == "win32":
        return getpass.getuser()
    import pwd

    # The account of the process, not LOGNAME or USER, which anyone can set: it is written to the audit log.
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # the user of a container may have no name
        return str(os.geteuid())
