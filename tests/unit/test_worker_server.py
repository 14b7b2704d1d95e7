"""Workers of pytest-xdist that are forked from a process which has imported the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.moments import PATIENCE_S

CODE = """
import os, sys
import pytest

IMPORTED_BY = os.getpid()

@pytest.mark.parametrize("number", range(4))
def test_in_a_fork(number):
    print({{"imported": IMPORTED_BY, "runs": os.getpid(), "worker": os.environ["PYTEST_XDIST_WORKER"], "argv": sys.argv}})
    assert {condition}
"""


def run_pytest(folder: Path, condition: str, *options: str) -> tuple[int, str]:
    """A run of two workers, with the hook of `tests.conftest`."""
    (folder / "conftest.py").write_text(
        "from tests import worker_server\n"
        "def pytest_xdist_setupnodes(config, specs):\n    worker_server.start_workers_from_here(config, specs)\n"
    )
    (folder / "test_forks.py").write_text(CODE.format(condition=condition))
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "2", "--dist", "load", "-rA", "-p", "no:schemathesis", *options, str(folder)],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S * 2,
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.timeout(300)
def test_modules_are_imported_once_for_all_workers(tmp_path: Path) -> None:
    code, printed = run_pytest(tmp_path, "True")
    assert code == 0, printed
    said = [json.loads(line.replace("'", '"')) for line in printed.splitlines() if line.startswith("{'imported'")]
    assert len(said) == 4, printed
    assert len({each["imported"] for each in said}) == 1
    assert {each["worker"] for each in said} == {"gw0", "gw1"}
    assert len({each["runs"] for each in said}) == 2
    assert {each["imported"] for each in said}.isdisjoint(each["runs"] for each in said)


@pytest.mark.timeout(300)
def test_a_worker_that_dies_is_reported_and_replaced(tmp_path: Path) -> None:
    code, printed = run_pytest(tmp_path, "number != 1 or os.kill(os.getpid(), 9)")
    assert code == 1, printed
    assert "crashed while running" in printed
    assert "1 failed, 3 passed" in printed


@pytest.mark.timeout(300)
def test_a_module_that_cannot_be_imported_is_an_error_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import nothing_of_that_name\n")
    code, printed = run_pytest(tmp_path, "True")
    assert code != 0
    assert "No module named 'nothing_of_that_name'" in printed
