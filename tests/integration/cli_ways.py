"""The command line for tests, run in this process, on whichever way it reaches API keys."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tidegate import cli
from tidegate.catalog.sql.catalog import SqlCatalog

TOKEN = "a-token-of-these-tests"
FILE_KEY = "demo-free-key-0001"
HEX_KEY = "0123456789abcdef"
POLICY = f"""\
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/api/*"
  limits = ["100/day"]
[[tiers]]
name = "premium"
[[api_keys]]
key = "{FILE_KEY}"
tier = "free"
name = "of the file"
[[api_keys]]
key = "{HEX_KEY}"
tier = "premium"
name = "all hex digits"
"""
KEY = r"tg_[0-9A-Za-z]{38}"


class Ran(msgspec.Struct, frozen=True):
    """What a command did."""

    code: int
    out: str
    err: str


class Runner:
    """Runs commands through the entry point, in this process: hundreds of them would take minutes as processes."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch, captured: pytest.CaptureFixture[str]) -> None:
        self.directory = directory
        self.options: tuple[str, ...] = ()
        self.environment: dict[str, str] = {}
        self._patch = patch
        self._captured = captured

    def way(self, *options: str, directory: Path | None = None, **environment: str) -> Runner:
        """The same with other options behind each command, another directory, and an environment."""
        other = Runner(directory or self.directory, self._patch, self._captured)
        other.options, other.environment = options, environment
        return other

    def __call__(self, *arguments: str) -> Ran:
        self._captured.readouterr()
        with self._patch.context() as patch:
            for name in os.environ:
                if name.startswith("TIDEGATE_"):
                    patch.delenv(name)
            for name, value in {"COLUMNS": "300", **self.environment}.items():
                patch.setenv(name, value)
            patch.chdir(self.directory)
            patch.setattr(sys, "argv", ["tidegate", *arguments, *self.options])
            try:
                cli.main()
                code: Any = 0
            except SystemExit as end:
                code = end.code or 0
        said = self._captured.readouterr()
        return Ran(code, said.out, said.err)

    def keys(self, *arguments: str) -> Ran:
        return self("keys", *arguments)

    def told(self, *arguments: str) -> Any:
        """What a command tells with --json; it must succeed."""
        ran = self.keys(*arguments, "--json")
        assert ran.code == 0, ran.err
        return json.loads(ran.out)

    def refused(self, *arguments: str) -> str:
        """The one sentence that a command fails with."""
        ran = self.keys(*arguments)
        assert (ran.code, ran.out) == (2, ""), ran
        assert ran.err.startswith("tidegate: "), ran.err
        assert ran.err.count("\n") == 1, ran.err
        for secret in (TOKEN, FILE_KEY, HEX_KEY):
            assert secret not in ran.err
        return ran.err.removeprefix("tidegate: ").removesuffix("\n")


def over_api(runner: Runner, server: Any, directory: Path) -> Runner:
    """The way over the admin API of a server.

    Args:
        server: a `tidegate serve` whose operator's token is `TOKEN`.
        directory: where the commands run; made if it is not there.

    Returns:
        The way.
    """
    directory.mkdir(exist_ok=True)
    return runner.way("--url", f"http://127.0.0.1:{server.admin_port}", directory=directory, TIDEGATE_ADMIN__TOKEN=TOKEN)


def with_catalog(url: str, work: Callable[[SqlCatalog], Any]) -> Any:
    async def worked() -> Any:
        catalog = await SqlCatalog.open(url)
        try:
            return await work(catalog)
        finally:
            await catalog.close()

    return asyncio.run(worked())
