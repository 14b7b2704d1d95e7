"""Callers that wait in several processes: the order in which they asked, one call each, and what becomes of a place."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.moments import PATIENCE_S
from tests.servers.redis_server import RedisServer
from tidegate import SyncLimiter
from tidegate.doors.stores import TIMEOUT_VARIABLE

EARLY_S = 0.01


class Waiting:
    """One process."""

    def __init__(self, url: str, name: str, limit: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.waiting_process", url, name, limit],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.read: list[list[str]] = []
        assert self.line() == ["ready"]

    def line(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def ask(self) -> float:
        """Let a caller wait; returns the moment of its place."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        while (line := self.line())[0] != "place":
            self.read.append(line)
        return float(line[1])

    def rest(self) -> tuple[list[float], int]:
        """Let the callers pass; returns when each did, and the calls of Redis."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        lines = [*self.read, *(line.split() for line in self.process.stdout)]
        assert self.process.wait(PATIENCE_S) == 0
        assert {line[0] for line in lines[:-1]} <= {"passed"}
        assert lines[-1][0] == "calls"
        return [float(line[1]) for line in lines[:-1]], int(lines[-1][1])


@pytest.fixture
def three(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[list[Waiting]]:
    """Three processes, of one limit; the test's name is the limit's."""
    monkeypatch.setenv(TIMEOUT_VARIABLE, "20000")
    name, limit = request.param, "4/second burst 1" if request.param == "order" else "1/minute burst 1"
    redis_server.must("FLUSHALL")
    with ExitStack() as stack:
        started = []
        for _ in range(3):
            one = Waiting(redis_server.url, name, limit)
            stack.enter_context(one.process)
            stack.callback(one.process.kill)
            started.append(one)
        yield started


@pytest.mark.parametrize("three", ["order"], indirect=True)
def test_processes_keep_the_order_of_asking_with_one_call_each(three: list[Waiting]) -> None:
    asked = [(which, three[which].ask()) for which in (0, 1, 2, 2, 1, 0, 1, 0, 2)]
    moments = [moment for _, moment in asked]
    assert all(later - earlier >= 0.25 - EARLY_S for earlier, later in itertools.pairwise(moments))
    calls = 0
    for which, one in enumerate(three):
        passed, own = one.rest()
        calls += own
        mine = [moment for whose, moment in asked if whose == which]
        assert len(passed) == len(mine)
        # None before its moment, so none before anybody who asked earlier.
        assert all(at >= moment - EARLY_S for at, moment in zip(passed, mine, strict=True))
    assert calls <= 1.1 * len(asked)


@pytest.mark.parametrize("three", ["ended"], indirect=True)
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_what_becomes_of_the_place_of_a_process_that_ends(
    three: list[Waiting], redis_server: RedisServer, ending: signal.Signals
) -> None:
    """Ctrl-C gives it back; a process that is ended at once cannot: its place lapses, and nobody else's moves."""
    now, first, last = (one.ask() for one in three)
    assert [round((moment - now) / 60) for moment in (first, last)] == [1, 2]
    three[2].process.send_signal(ending)
    three[2].process.wait(PATIENCE_S)
    with SyncLimiter("1/minute burst 1", algorithm="token_bucket", name="ended", counters=redis_server.url) as limiter:
        place = limiter.reserve("job", at_most_s=3600)
    assert place.at is not None
    assert round((place.at.timestamp() - now) / 60) == (2 if ending is signal.SIGINT else 3)
