"""Two balancers that share an address: the active one dies or loses its link under load, and what a client saw of it.

    python -m drills.balancer [--smoke]

HAProxy and keepalived with the files of deploy/, in network namespaces; needs root. A client asks the shared address 100 times a
second over 4 connections and gives each request half a second. Goal: never longer than 3.5 s without an answer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import pytest
from tests.moments import wait_until
from tests.servers.balancer_pair import BALANCERS, VIRTUAL, BalancerPair

from drills.http_load import POLICY

RATE: Final = 100
GOAL_S: Final = 3.5
_BEFORE_S: Final = 1.0
_AFTER_S: Final = 7.0
_NOTICED_S: Final = 4.0
"""keepalived asks twice, a second apart, before it takes a balancer for well again."""


def asked_meanwhile(pair: BalancerPair, event: Callable[[], None]) -> dict[str, Any]:
    """Let something happen while a client asks the shared address.

    Args:
        pair: the balancers.
        event: what happens, a second after the client has begun.

    Returns:
        What the client saw: `asked`, `failures` by reason, `longest_gap_s`; and `moved_to`, who has the address at the end.
    """
    client = subprocess.Popen(
        ["ip", "netns", "exec", pair.network["client"].name, sys.executable, "-m", "drills.http_load", f"http://{VIRTUAL}:8080",
         str(_BEFORE_S + _AFTER_S), str(RATE)],
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    with client:
        assert client.stdout is not None
        # Says so when it has had its first answer.
        if not client.stdout.readline():
            raise RuntimeError("the client ended before it was answered")
        try:
            client.wait(_BEFORE_S)
        except subprocess.TimeoutExpired:
            event()
        seen: dict[str, Any] = json.loads(client.stdout.readline())
    return seen | {"moved_to": pair.active}


def settled(pair: BalancerPair) -> str:
    """Wait until both balancers are well and one alone has the address.

    Args:
        pair: the balancers.

    Returns:
        Its name.
    """
    wait_until(lambda: [pair.alive(name) for name in BALANCERS] == [200, 200], 60, "both balancers have instances")
    time.sleep(_NOTICED_S)
    wait_until(lambda: pair.active is not None, 30, "one balancer alone has the address")
    assert pair.active is not None
    return pair.active


def other(name: str) -> str:
    """The other balancer."""
    return BALANCERS[1 - BALANCERS.index(name)]


def _report(name: str, seen: dict[str, Any]) -> bool:
    gap_s = seen["longest_gap_s"]
    print(f"\n{name}")
    print(f"  {'requests':<44} {seen['asked']:>8,}")
    print(f"  {'failed':<44} {sum(seen['failures'].values()):>8,}  {seen['failures'] or ''}")
    print(f"  {f'longest time without an answer, s (goal < {GOAL_S})':<44} {gap_s:>8.2f}", flush=True)
    return bool(gap_s < GOAL_S)


def main() -> None:
    """Run the drill; the exit code is 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="each failure once, not three times; no goal is judged")
    smoke = parser.parse_args().smoke
    good = True
    try:
        made = BalancerPair(POLICY)
    except pytest.skip.Exception as reason:
        print(f"left out: {reason}")
        return
    with made as pair:
        for _ in range(1 if smoke else 3):
            active = settled(pair)
            good &= _report(
                f"HAProxy of {active}, which is active, is killed", asked_meanwhile(pair, partial(pair.kill_balancer, active))
            )
            pair.start_balancer(active)
            active = settled(pair)
            good &= _report(f"the link of {active}, which is active, is cut", asked_meanwhile(pair, pair.network[active].cut))
            pair.network[active].mend()
    sys.exit(0 if good or smoke else 1)


if __name__ == "__main__":
    main()
