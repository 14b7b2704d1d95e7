"""The edge cache of the nginx gateway: denials are repeated without asking Tidegate, allowances never, and not for others."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import pytest

from tests.conftest import Serve
from tests.moments import PATIENCE_S
from tests.servers.api import Api
from tests.servers.deployed import gateway
from tests.servers.nginx import Nginx

KEY, OTHER, LATE = "demo-edge-key-00001", "demo-edge-key-00002", "demo-edge-key-00003"
POLICY = f"""
[[tiers]]
name = "edge"
  [[tiers.rules]]
  endpoint = "/few/*"
  algorithm = "fixed_window"
  limits = ["2/hour"]
  [[tiers.rules]]
  endpoint = "/slow/*"
  algorithm = "token_bucket"
  limits = ["30/minute burst 1"]
  [[tiers.rules]]
  endpoint = "/seldom"
  algorithm = "token_bucket"
  limits = ["6/minute burst 1"]
  [[tiers.rules]]
  endpoint = "/quick"
  algorithm = "leaky_bucket"
  limits = ["3/second"]
  [[tiers.rules]]
  endpoint = "/by-ip"
  limits = ["1/hour"]
  subject = "ip"
  [[tiers.rules]]
  endpoint = "/open"
  limits = ["100000/hour"]
[[api_keys]]
key = "{KEY}"
tier = "edge"
[[api_keys]]
key = "{OTHER}"
tier = "edge"
[[api_keys]]
key = "{LATE}"
tier = "edge"
status = "revoked"
"""


class House:
    """Tidegate, the gateway in front of it, and a client."""

    def __init__(self, server: Serve, nginx: Nginx, api: Api) -> None:
        self.server, self.nginx, self.api = server, nginx, api

    def get(self, path: str, key: str = KEY, method: str = "GET", ip: str = "203.0.113.7") -> httpx.Response:
        return httpx.request(method, self.nginx.url + path, headers={"X-API-Key": key, "X-Forwarded-For": ip}, timeout=PATIENCE_S)

    def asked(self) -> int:
        """How many checks Tidegate has answered or refused."""
        said = httpx.get(f"{self.server.url}/metrics", timeout=PATIENCE_S).text
        return sum(
            int(float(each)) for each in re.findall(r"^rate_limiter_(?:requests|errors)_total{[^}]*} (\S+)$", said, re.MULTILINE)
        )

    def denied(self, path: str, key: str = KEY) -> httpx.Response:
        """Ask until it is denied; gives the first denial."""
        for _ in range(10):
            if (answer := self.get(path, key)).status_code != 200:
                return answer
        raise AssertionError(f"{path} was not denied within 10 requests")


@pytest.fixture
def house(serve: Callable[..., Serve], tmp_path: Path) -> Iterator[House]:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    server = serve()
    with Api() as api:
        nginx = gateway([server.port], api.port, edge=True)
        nginx.add("set_real_ip_from 127.0.0.1; real_ip_header X-Forwarded-For;")
        with nginx:
            yield House(server, nginx, api)


def test_a_denied_key_does_not_reach_tidegate_again(house: House) -> None:
    first = house.denied("/few/1")
    asked, reached = house.asked(), len(house.api.received)
    again = [house.get(f"/few/1?page={number}") for number in range(50)]
    assert {answer.status_code for answer in again} == {429}
    assert house.asked() == asked
    assert len(house.api.received) == reached
    for answer in again:
        assert answer.json() == first.json()
        for name in ("ratelimit-policy", "x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset", "x-tidegate-error"):
            assert answer.headers[name] == first.headers[name]
        assert answer.headers["cache-control"] == "no-store"
        # What counts from now is not repeated: the same moment is told as a date.
        assert "ratelimit" not in answer.headers
        retry = parsedate_to_datetime(answer.headers["retry-after"]).timestamp()
        told = parsedate_to_datetime(first.headers["date"]).timestamp() + int(first.headers["retry-after"])
        assert abs(retry - told) <= 2


def test_a_denial_is_for_its_key_path_method_and_address_alone(house: House) -> None:
    house.denied("/few/1")
    assert house.get("/few/1").status_code == 429
    assert house.get("/open").status_code == 200
    assert house.get("/few/1", OTHER).status_code == 200
    house.denied("/by-ip")
    assert house.get("/by-ip").status_code == 429
    assert house.get("/by-ip", ip="198.51.100.1").status_code == 200
    # Another path and method of the same rule are asked about anew, and denied by Tidegate.
    asked = house.asked()
    assert [house.get("/few/2").status_code, house.get("/few/1", method="POST").status_code] == [429, 429]
    assert house.asked() == asked + 2


def test_allowances_are_counted_one_by_one(house: House) -> None:
    answers = [house.get("/open") for _ in range(20)]
    assert [int(answer.headers["x-ratelimit-remaining"]) for answer in answers] == list(range(99_999, 99_979, -1))
    assert house.asked() == 20


def test_other_refusals_are_not_kept(house: House) -> None:
    asked = house.asked()
    for _ in range(2):
        assert house.get("/open", LATE).status_code == 403
        assert house.get("/open", "nobody-knows-this-key").status_code == 401
        assert house.get("/open;x").status_code == 400
    assert house.asked() == asked + 6


def test_a_denial_ends_at_its_deadline(house: House) -> None:
    for _ in range(3):
        answer = house.denied("/slow/1")
        began, told_s = time.monotonic(), int(answer.headers["retry-after"])
        while time.monotonic() < began + told_s + 0.01:
            time.sleep(0.05)
        assert house.get("/slow/1").status_code == 200


def test_a_denial_of_less_than_a_second_is_not_kept(house: House) -> None:
    with ThreadPoolExecutor(8) as pool:
        statuses = [answer.status_code for answer in pool.map(house.get, ["/quick"] * 40)]
    assert set(statuses) == {200, 429}
    assert house.asked() == 40


def test_a_raised_limit_is_seen_when_the_denial_ends_at_the_latest(house: House) -> None:
    denial = house.denied("/seldom")
    began, told_s = time.monotonic(), int(denial.headers["retry-after"])
    assert 3 <= told_s <= 10
    policy = house.server.directory / "tidegate.policy.toml"
    policy.write_text(POLICY.replace("6/minute burst 1", "600/minute burst 100"))
    statuses = []
    # Asking on and on does not prolong what is kept.
    while time.monotonic() < began + told_s + 0.01:
        statuses.append(house.get("/seldom").status_code)
        time.sleep(0.2)
    answer = house.get("/seldom")
    assert (answer.status_code, answer.headers["x-ratelimit-limit"]) == (200, "100")
    assert 429 in statuses


def test_what_is_kept_is_for_nginx_alone(house: House) -> None:
    house.denied("/few/1")
    house.get("/few/1")
    folder = house.nginx.directory / "denials"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 1
    # nginx writes the key of the cache in clear: why the folder is in memory and closed to others.
    assert KEY.encode() in files[0].read_bytes()
    for path in (folder, *folder.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path
        assert path.stat().st_uid != 0 or os.geteuid() != 0
    assert KEY not in house.nginx.access_log.read_text() + house.nginx.tail()


def test_denials_are_repeated_while_tidegate_is_unavailable(house: House) -> None:
    house.denied("/few/1")
    house.server.stop()
    assert house.get("/few/1").status_code == 429
    assert house.get("/open").status_code == 503
