"""The command line: `tidegate`.

Every command that fails says why in one sentence on stderr and ends with exit code 2.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tidegate._version import __version__
from tidegate.cli import database, envoy, keys, planning, policy, serving
from tidegate.cli.doctor import doctor
from tidegate.errors import TidegateError
from tidegate.simulate.command import simulate


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


app.command()(serving.serve)
app.command()(serving.check)
app.command()(doctor)
app.command()(simulate)
app.command()(planning.plan)
app.command("tiers")(policy.tiers)
app.command("rules")(policy.rules)
app.add_typer(policy.app, name="policy")
app.add_typer(keys.app, name="keys")
app.add_typer(database.app, name="db")
app.add_typer(envoy.app, name="envoy")


def main() -> None:
    """Run the command line; the entry point of the package."""
    try:
        app()
    except TidegateError as error:
        typer.echo(f"tidegate: {error.message}", err=True)
        sys.exit(2)
    except BrokenPipeError:
        # Whoever read our output has gone (`tidegate rules | head`): nothing is left to say, not even at interpreter exit.
        sys.stderr.close()
        sys.exit(0)
