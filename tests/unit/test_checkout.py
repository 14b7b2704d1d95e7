"""What a contributor gets from a checkout: commands with help, and the checks as a git hook that needs no network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import line_coverage

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
HOOKS: list[dict[str, Any]] = [
    hook for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"] for hook in repo["hooks"]
]


def recipe(target: str) -> list[str]:
    found = re.search(rf"^{target}:[^\n]*\n((?:\t[^\n]*\n)*)", MAKEFILE, re.MULTILINE)
    assert found is not None, target
    return [line.strip() for line in found[1].splitlines()]


def test_every_command_has_help() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert phony is not None
    helped = re.findall(r"^([a-z-]+):[^\n]*## \S", MAKEFILE, re.MULTILINE)
    assert sorted(phony[1].split()) == sorted(helped)
    assert {"setup", "unit", "check", "test"} <= set(helped)


def test_hooks_come_from_the_environment_and_are_what_make_check_runs() -> None:
    for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]:
        assert repo["repo"] == "local", "a hook of another repository would be fetched from the network"
    assert {hook["language"] for hook in HOOKS} == {"system"}
    checked = {tuple(line.removeprefix("$(BIN)/").split()[:2]) for line in recipe("check")}
    hooked = {tuple(hook["entry"].removeprefix(".venv/bin/").split()[:2]) for hook in HOOKS}
    assert {words[0] for words in checked} == {words[0] for words in hooked}
    assert {words[0] for words in checked} == {"ruff", "codespell", "mypy", "lint-imports", "python"}
    assert {words for words in checked if words[0] == "python"} == {("python", "scripts/pin_images.py")}
    assert {words for words in checked if words[0] == "ruff"} == {words for words in hooked if words[0] == "ruff"}


def test_a_commit_with_faults_is_stopped(tmp_path: Path) -> None:
    """In a repository of its own, with the two hooks that look at the whole program left out."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    repository, store = tmp_path / "repository", tmp_path / "store"
    repository.mkdir()
    (repository / ".venv").symlink_to(Path(sys.executable).parents[1])
    for name in (".pre-commit-config.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, repository)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "PRE_COMMIT", "SKIP"))}
    environment = {**clean, "PRE_COMMIT_HOME": str(store), "SKIP": "mypy,lint-imports", "HOME": str(tmp_path)}

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=120, check=False)

    def hooks() -> tuple[int, dict[str, str]]:
        assert run("git", "add", "module.py").returncode == 0
        ran = run(repository / ".venv" / "bin" / "pre-commit", "run", "--color", "never")
        return ran.returncode, dict(re.findall(r"^([a-z -]+?)\.{3,}.*?(Passed|Failed|Skipped)$", ran.stdout, re.MULTILINE))

    assert run("git", "init", "--quiet").returncode == 0
    module = repository / "module.py"
    misspelt = "reciev" + "ed"
    module.write_text(f'"""A module."""\nimport os\nX = [ "{misspelt}" ]\n')
    code, said = hooks()
    assert code == 1
    assert said == {
        "ruff format": "Failed",
        "ruff check": "Failed",
        "codespell": "Failed",
        "mypy": "Skipped",
        "lint-imports": "Skipped",
        "digests of images": "Skipped",
    }
    # What tools can fix, they have fixed: the space in the brackets, and the import that nothing uses.
    assert "import os" not in module.read_text()
    module.write_text(module.read_text().replace(misspelt, "received"))
    code, said = hooks()
    assert (code, set(said.values())) == (0, {"Passed", "Skipped"})
    assert not [each for each in store.iterdir() if each.is_dir()], "nothing was fetched"


def test_lines_and_branches_of_several_processes_are_counted_together() -> None:
    def counted(lines: list[int], branches: list[list[int]]) -> dict[str, Any]:
        all_lines, all_branches = [1, 2, 3, 4], [[2, 3], [2, 4]]
        return {
            "meta": {"software": "slipcover", "branch_coverage": True, "show_contexts": False},
            "files": {
                "gate.py": {
                    "executed_lines": lines,
                    "missing_lines": [line for line in all_lines if line not in lines],
                    "executed_branches": branches,
                    "missing_branches": [branch for branch in all_branches if branch not in branches],
                    "summary": {},
                }
            },
            "summary": {},
        }

    text = line_coverage.report([counted([1, 2], []), counted([1, 2, 3], [[2, 3]])])
    assert text.endswith("\ncoverage: 75.0 % of lines, 50.0 % of branches\n")
    (row,) = [line for line in text.splitlines() if line.startswith("gate.py")]
    assert row.split()[1:5] == ["4", "1", "2", "1"]
    assert row.split()[-1] == "4"
