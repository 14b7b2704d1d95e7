"""The command line: `tidegate`.

A command that fails prints the reason in one sentence on stderr and exits with 2. Commands are imported on use: those that
open no database do not load SQLAlchemy.
"""

from __future__ import annotations

import functools
import gc
import sys
from importlib import import_module
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from tidegate._version import __version__
from tidegate.errors import TidegateError
from tidegate.tools.terminal import OutputError, say, tolerant_output

COMMANDS: Final = {
    "serve": "tidegate.cli.serve:serve",
    "check": "tidegate.cli.serve:check",
    "doctor": "tidegate.cli.doctor:doctor",
    "simulate": "tidegate.tools.simulate.command:simulate",
    "plan": "tidegate.cli.plan:plan",
    "tiers": "tidegate.cli.policy:tiers",
    "rules": "tidegate.cli.policy:rules",
    "namespaces": "tidegate.cli.policy:namespaces",
    "callers": "tidegate.cli.policy:callers",
    "policy": "tidegate.cli.policy:app",
    "keys": "tidegate.cli.keys:app",
    "customers": "tidegate.cli.customers:app",
    "overrides": "tidegate.cli.overrides:app",
    "blocks": "tidegate.cli.blocks:app",
    "caller-tokens": "tidegate.cli.caller_tokens:app",
    "usage": "tidegate.cli.usage:app",
    "counters": "tidegate.cli.counters:app",
    "db": "tidegate.cli.database:app",
    "envoy": "tidegate.cli.envoy:app",
}
"""Import path of each command: a function, or a group of commands."""


@functools.cache
def _command(name: str) -> Any:
    """Import a command and read its parameters, once in a process: that takes longer than most commands."""
    module, _, attribute = COMMANDS[name].partition(":")
    # Nothing that is imported is garbage; to look for it takes a tenth of the time of a short command.
    gc.disable()
    try:
        command = getattr(import_module(module), attribute)
    finally:
        gc.enable()
    wrapper = typer.Typer(add_completion=False, rich_markup_mode=None)
    if isinstance(command, typer.Typer):
        wrapper.add_typer(command, name=name)
    else:
        wrapper.command(name)(command)
    return typer.main.get_group(wrapper).commands[name]


class _Commands(TyperGroup):
    """The commands, each imported on first use."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - signature of the base class
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            self.commands[cmd_name] = _command(cmd_name)
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in COMMANDS:
            for name in COMMANDS:  # the base class suggests the most similar name among the imported commands
                self.get_command(ctx, name)
        return super().resolve_command(ctx, args)


def _exit_with(status: object, **_: object) -> None:
    """Use the return value of a command as the exit code."""
    if isinstance(status, int) and status:
        raise typer.Exit(status)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"tidegate {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="tidegate",
    cls=_Commands,
    help="Rate limiter for HTTP APIs. Start with: tidegate serve --demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    result_callback=_exit_with,
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; the entry point of the package."""
    try:
        with tolerant_output():
            try:
                app()
            except OutputError:
                raise  # reported after the original streams are restored
            except TidegateError as error:
                say(f"tidegate: {error.message}", err=True)
                sys.exit(2)
    except OutputError as error:
        say(f"tidegate: {error.message}", err=True)
        sys.exit(2)
