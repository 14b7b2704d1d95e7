"""Benches and drills of a smoke run, side by side."""

from __future__ import annotations

import sys

import pytest
from drills.side_by_side import run_all

MEETING = """
import os, pathlib, sys, time
place = os.environ["PYTEST_XDIST_WORKER"]
here = pathlib.Path(sys.argv[1])
(here / place).touch()
deadline = time.monotonic() + 60
while len(list(here.iterdir())) < 2 and time.monotonic() < deadline:
    time.sleep(0.01)
print(*sorted(each.name for each in here.iterdir()))
"""
"""Ends when another one runs at the same time, with another share of the ports."""


def test_two_run_at_the_same_time_with_ports_of_their_own(
    tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    here = str(tmp_path_factory.mktemp("meeting"))
    assert run_all({name: [sys.executable, "-c", MEETING, here] for name in ("a", "b")}, at_once=2) == []
    assert capfd.readouterr().out == "gw0 gw1\n" * 2


def test_all_run_and_those_that_fail_are_named(capfd: pytest.CaptureFixture[str]) -> None:
    def program(code: int) -> list[str]:
        return [sys.executable, "-c", f"import sys; print({code}, flush=True); print('why', file=sys.stderr); sys.exit({code})"]

    assert run_all({"a": program(0), "b": program(3), "c": program(0), "d": program(1)}, at_once=1) == ["b", "d"]
    assert capfd.readouterr().out == "0\nwhy\n3\nwhy\n0\nwhy\n1\nwhy\n"
