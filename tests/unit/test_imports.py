"""What is imported, and what is left until it is needed: a library that only counts does not wait for a database's client."""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files

import pytest
from typer.testing import CliRunner

from tidegate.cli import app

HEAVY = {"alembic", "fastapi", "granian", "grpc", "opentelemetry", "prometheus_client", "rich", "sqlalchemy", "typer"}
COMMANDS = ["serve", "check", "doctor", "simulate", "plan", "tiers", "rules", "policy", "keys", "db", "envoy"]


def _imported_by(program: str) -> set[str]:
    code = f"import sys\n{program}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_library_needs_none_of_the_servers_parts() -> None:
    assert _imported_by("import tidegate").isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "arguments", [["--version"], ["simulate", "--help"], ["plan", "--dau", "1M"], ["policy", "check", "--help"]]
)
def test_a_command_without_a_database_does_not_wait_for_one(arguments: list[str]) -> None:
    program = f"from typer.testing import CliRunner\nimport tidegate.cli\nran = CliRunner().invoke(tidegate.cli.app, {arguments})"
    imported = _imported_by(f"{program}\nassert ran.exit_code == 0, ran.output\nassert ran.output")
    assert imported.isdisjoint({"alembic", "fastapi", "granian", "sqlalchemy"})


def test_help_lists_every_command_with_what_it_does() -> None:
    ran = CliRunner().invoke(app, ["--help"])
    assert ran.exit_code == 0
    listed = ran.output.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == COMMANDS
    assert all(len(line.split()) > 3 for line in listed)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    ran = CliRunner().invoke(app, [command, "--help"])
    assert ran.exit_code == 0
    assert f"Usage: tidegate {command} " in ran.output
    assert "--help" in ran.output


def test_a_slip_of_the_pen_is_answered_with_the_nearest_command() -> None:
    ran = CliRunner().invoke(app, ["simulat"])
    assert ran.exit_code == 2
    assert "Did you mean 'simulate'?" in ran.output


def test_types_are_shipped() -> None:
    """Without the marker (PEP 561) type checkers ignore the annotations of an installed package."""
    assert files("tidegate").joinpath("py.typed").is_file()
