"""What is imported, and what is left until it is needed: a library that only counts does not wait for a database's client."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tidegate.cli import app

HEAVY = {"alembic", "fastapi", "granian", "grpc", "opentelemetry", "prometheus_client", "rich", "sqlalchemy", "typer"}
COMMANDS = [
    "serve",
    "check",
    "doctor",
    "simulate",
    "plan",
    "tiers",
    "rules",
    "namespaces",
    "callers",
    "policy",
    "keys",
    "customers",
    "overrides",
    "blocks",
    "caller-tokens",
    "usage",
    "counters",
    "db",
    "envoy",
]


def _imported_by(program: str) -> set[str]:
    code = f"import sys\n{program}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_library_needs_none_of_the_servers_parts() -> None:
    assert _imported_by("import tidegate").isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["simulate", "--help"], ["plan", "--dau", "1M"], ["policy", "check", "--help"], ["check", "--help"]],
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


RUN_PACKAGES = Path(__file__).parents[2] / "locks" / "run.txt"
WITHOUT_THE_OTHERS = """
import re, sys
from importlib.metadata import packages_distributions
from pathlib import Path

def name_of(text):
    return re.sub(r"[-_.]+", "-", text).lower()

pinned = re.findall(r"^([\\w.-]+)==", Path(sys.argv.pop(1)).read_text(), re.MULTILINE)
locked = {"tidegate", *map(name_of, pinned)}

class OnlyLocked:
    absent = {top for top, owners in packages_distributions().items() if not locked & {name_of(each) for each in owners}}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, OnlyLocked())
"""
"""Hides what `make run` does not install: the extras, and what only tests need."""
EVERY_HELP = """
from typer.testing import CliRunner
from tidegate.cli import app

for command in sys.argv[1:]:
    ran = CliRunner().invoke(app, [command, "--help"], catch_exceptions=False)
    print(command, ran.output.split()[0])
"""
SERVE = """
import asyncio
from tidegate.server.run import running
from tidegate.settings import CatalogSettings, ServerSettings, Settings

async def serve():
    server = ServerSettings(http="127.0.0.1:0", admin="127.0.0.1:0", drain_s=0)
    async with running(Settings(server=server, catalog=CatalogSettings(url=f"sqlite:///{sys.argv[1]}"))) as instance:
        print(instance.address, instance.admin_address)

asyncio.run(serve())
"""


def _with_what_run_installs(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_THE_OTHERS + program, str(RUN_PACKAGES), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_run_does_not_install_is_hidden() -> None:
    hidden = _with_what_run_installs("import httpcore")
    assert "No module named 'httpcore'" in hidden.stderr


def test_every_command_needs_no_more_than_run_installs() -> None:
    ran = _with_what_run_installs(EVERY_HELP, *COMMANDS)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines() == [f"{command} Usage:" for command in COMMANDS]


LIBRARY = """
import asyncio, sys
import tidegate
from tidegate import Gate, Limiter, MissingApiKey, RateLimitMiddleware, SyncLimiter, limit

@limit("1/minute")
def work():
    return True

async def count():
    async with Limiter("1/minute", counters="redis://127.0.0.1:1", on_failure="allow") as limiter:
        return (await limiter.check("u")).degraded

assert work() and SyncLimiter("1/minute").check("u").allowed and asyncio.run(count())
RateLimitMiddleware(None, policy="examples/app.policy.toml")
for name in tidegate.__all__:
    getattr(tidegate, name)
sys.argv[1:] = ["serve"]
from tidegate.__main__ import main
main()
"""


def test_the_library_needs_its_own_dependencies_alone(tmp_path: Path) -> None:
    """And the command says what is missing."""
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[<>=;]", each)[0] for each in project["dependencies"]]
    assert names == ["msgspec", "hiredis", "uvloop"]
    (tmp_path / "library.txt").write_text("".join(f"{name}==0\n" for name in names))
    command = [sys.executable, "-c", WITHOUT_THE_OTHERS + LIBRARY, str(tmp_path / "library.txt")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1:] == ["the command tidegate needs typer: pip install 'tidegate[server]'"]


def test_a_server_needs_no_more_than_run_installs(tmp_path: Path) -> None:
    ran = _with_what_run_installs(SERVE, str(tmp_path / "tidegate.db"))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("127.0.0.1:") == 2
