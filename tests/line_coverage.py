"""Which lines and branches of Tidegate the tests run, printed at the end: on where `TESTS_COVERAGE` is set, as `make test` does.

SlipCover counts by changing the bytecode of what is imported, and takes its marks out again where they were hit. Measured on
Python 3.11 with ten files of tests that compute, 43 s of CPU: 1 to 15 % more; coverage.py takes 130 % more. To mark all of
Tidegate takes 8 s more, which `worker_server` does once for all processes. Counted is what runs in the processes of the tests.
What runs only in a `tidegate` process of its own is not, though tests cover it: the supervisor, its workers, the start of a
server.

This module is imported before Tidegate: only what is imported later is counted.
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any, Final

import pytest

VARIABLE: Final = "TESTS_COVERAGE"
SOURCE: Final = str(Path(__file__).parents[1] / "src" / "tidegate")
DISTRIBUTED: Final = ("-n", "--numprocesses", "--tx")
"""The options of pytest-xdist that make this process distribute the tests."""


class Counter:
    """Counts in this process; with xdist, the process that distributes the tests adds what its workers counted."""

    def __init__(self) -> None:
        import slipcover  # type: ignore[import-untyped]

        self._counted = slipcover.Slipcover(branch=True)
        # The process that distributes the tests runs none, and waits the less for what it imports.
        if not any(argument.startswith(DISTRIBUTED) for argument in sys.argv[1:]):
            slipcover.ImportManager(self._counted, slipcover.FileMatcher(sources=[SOURCE])).__enter__()
        self._of_workers: list[dict[str, Any]] = []

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        counted = getattr(node, "workeroutput", {}).get(VARIABLE)
        if counted is not None:  # of one that crashed there is none
            self._of_workers.append(json.loads(counted))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output[VARIABLE] = json.dumps(self._counted.get_coverage())

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        # Files that no process imported are missing too: here alone they are looked for.
        for counted in self._of_workers:
            for path in counted["files"]:
                self._counted.code_lines.setdefault(str(Path.cwd() / path), set())
        self._counted.source = [SOURCE]
        terminalreporter.section("coverage: what no test ran")
        terminalreporter.write(report([self._counted.get_coverage(), *self._of_workers]))


def report(counts: list[dict[str, Any]]) -> str:
    """Describe what several processes ran together.

    Args:
        counts: as SlipCover gives them, one or more.

    Returns:
        A table of the files with lines or branches that none ran (`12->15`: the step from line 12 to line 15), and one line of
        totals.
    """
    import slipcover

    together = counts[0]
    for each in counts[1:]:
        slipcover.merge_coverage(together, each)
    table = io.StringIO()
    slipcover.print_coverage(together, outfile=table, skip_covered=True, missing_width=70)
    total = together["summary"]
    lines, branches = (
        f"{100 * total[f'covered_{what}'] / max(total[f'covered_{what}'] + total[f'missing_{what}'], 1):.1f} % of {what}"
        for what in ("lines", "branches")
    )
    return f"{table.getvalue()}\ncoverage: {lines}, {branches}\n"


counter: Final = Counter() if os.environ.get(VARIABLE, "0") != "0" else None
