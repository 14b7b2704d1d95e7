"""The command line: `tidegate`.

Every command that fails says why in one sentence on stderr and ends with exit code 2. A command is imported when it is run: one
that opens no database does not wait for SQLAlchemy.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from tidegate._version import __version__
from tidegate.errors import TidegateError
from tidegate.tools.terminal import OutputError, say, tolerant_output

_COMMANDS: Final = {
    "serve": "tidegate.cli.serve:serve",
    "check": "tidegate.cli.serve:check",
    "doctor": "tidegate.cli.doctor:doctor",
    "simulate": "tidegate.tools.simulate.command:simulate",
    "plan": "tidegate.cli.plan:plan",
    "tiers": "tidegate.cli.policy:tiers",
    "rules": "tidegate.cli.policy:rules",
    "policy": "tidegate.cli.policy:app",
    "keys": "tidegate.cli.keys:app",
    "db": "tidegate.cli.database:app",
    "envoy": "tidegate.cli.envoy:app",
}
"""Where each lies: a function, or a group of commands."""


class _Commands(TyperGroup):
    """The commands, each imported when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - as the base class has it
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        if cmd_name in _COMMANDS and cmd_name not in self.commands:
            module, _, attribute = _COMMANDS[cmd_name].partition(":")
            found = getattr(import_module(module), attribute)
            holder = typer.Typer(add_completion=False, rich_markup_mode=None)
            if isinstance(found, typer.Typer):
                holder.add_typer(found, name=cmd_name)
            else:
                holder.command(cmd_name)(found)
            self.commands[cmd_name] = typer.main.get_group(holder).commands[cmd_name]
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in _COMMANDS:
            for name in _COMMANDS:  # the base class looks for the nearest among those that it has
                self.get_command(ctx, name)
        return super().resolve_command(ctx, args)


def _end(status: object, **_: object) -> None:
    """What a command returns is the exit code."""
    if isinstance(status, int) and status:
        raise typer.Exit(status)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tidegate {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="tidegate",
    cls=_Commands,
    help="Decide for every request to an API whether it may pass. Start with: tidegate serve --demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    result_callback=_end,
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", callback=_print_version, is_eager=True)
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
                raise  # said once the streams are the process's own again
            except TidegateError as error:
                say(f"tidegate: {error.message}", err=True)
                sys.exit(2)
    except OutputError as error:
        say(f"tidegate: {error.message}", err=True)
        sys.exit(2)
