"""deploy/keepalived with two HAProxy on a network of its own: who has the shared address, and what clients see when it moves."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator

import pytest
from drills.balancer import asked_meanwhile, other, settled
from drills.http_load import POLICY

from tests.moments import PATIENCE_S, wait_until
from tests.servers.balancer_pair import BALANCERS, VIRTUAL, BalancerPair
from tests.servers.deployed import DEPLOY
from tests.servers.prometheus import need

CHECK = DEPLOY / "keepalived/check-balancer"


@pytest.fixture(scope="module")
def pair() -> Iterator[BalancerPair]:
    with BalancerPair(POLICY) as pair:
        yield pair


@pytest.mark.parametrize("name", BALANCERS)
def test_keepalived_reads_the_configuration(name: str) -> None:
    keepalived = need("keepalived")
    text = (DEPLOY / "keepalived/keepalived.conf").read_text()
    done = subprocess.run(
        [keepalived, "--config-test", "--config-id", name, "--use-file", "/dev/stdin"],
        input=text.replace("interface eth0", "interface lo").replace("/etc/keepalived/check-balancer", "/bin/true"),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_address_moves_when_the_balancer_dies_and_stays_when_it_is_back(pair: BalancerPair) -> None:
    before = settled(pair)
    seen = asked_meanwhile(pair, lambda: pair.kill_balancer(before))
    assert seen["moved_to"] == other(before)
    assert seen["asked"] > sum(seen["failures"].values()) > 0
    pair.start_balancer(before)
    assert settled(pair) == other(before)


def test_the_address_moves_when_the_link_is_cut(pair: BalancerPair) -> None:
    before = settled(pair)
    seen = asked_meanwhile(pair, pair.network[before].cut)
    # The one that is cut off does not know, and has it too.
    assert other(before) in pair.holders
    assert seen["asked"] > sum(seen["failures"].values())
    pair.network[before].mend()
    settled(pair)


def test_without_any_instance_the_address_stays_and_the_answer_reports_it(pair: BalancerPair) -> None:
    before = settled(pair)
    pair.tidegate.kill()
    wait_until(lambda: [pair.alive(name) for name in BALANCERS] == [503, 503], 60, "both know that they have no instance left")
    time.sleep(4)
    assert pair.active is not None
    for name in BALANCERS:
        peer = {"balancer1": "10.0.0.3", "balancer2": "10.0.0.2"}[name]
        assert pair.network[name].run(str(CHECK), peer).returncode == 0
    said = pair.network["client"].run("curl", "-s", f"http://{VIRTUAL}:8080/v1/usage").stdout
    assert json.loads(said)["error"]["code"] == "LIMITER_UNAVAILABLE"
    # A balancer that is not there at all is not one to ask.
    pair.kill_balancer(before)
    assert pair.network[before].run(str(CHECK), "10.0.0.1").returncode != 0
