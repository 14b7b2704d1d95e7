"""Redis URLs: every form, and clear refusals that never show a password."""

from __future__ import annotations

import pytest

from tidegate.counters.redis.url import Credentials, Endpoint, RedisUrl, Topology, parse_redis_url
from tidegate.errors import SettingsError

A, B = Endpoint("a", 26379), Endpoint("b", 1)
UNDERSTOOD = {
    "redis://localhost": RedisUrl(Topology.STANDALONE, (Endpoint("localhost", 6379),)),
    "redis://:s%40cret@10.0.0.1:7000/3": RedisUrl(
        Topology.STANDALONE, (Endpoint("10.0.0.1", 7000),), Credentials("", "s@cret"), db=3
    ),
    "redis://[::1]:7000": RedisUrl(Topology.STANDALONE, (Endpoint("::1", 7000),)),
    "rediss://u:p@h?ca=/ca.pem&cert=/c.pem&key=/k.pem": RedisUrl(
        Topology.STANDALONE,
        (Endpoint("h", 6379),),
        Credentials("u", "p"),
        tls=True,
        ca="/ca.pem",
        cert="/c.pem",
        key="/k.pem",
    ),
    "redis+unix:///run/redis.sock?db=2": RedisUrl(Topology.STANDALONE, (Endpoint(path="/run/redis.sock"),), db=2),
    "redis+sentinel://:p@a,b:1/mymaster/4?sentinel_password=q": RedisUrl(
        Topology.SENTINEL, (A, B), Credentials("", "p"), Credentials("", "q"), db=4, master="mymaster"
    ),
    "redis://user:@h": RedisUrl(Topology.STANDALONE, (Endpoint("h", 6379),), Credentials("user", "")),
    "redis://:s@c[ret@h": RedisUrl(Topology.STANDALONE, (Endpoint("h", 6379),), Credentials("", "s@c[ret")),
    "redis+sentinel://a/m?sentinel_password=q@r": RedisUrl(
        Topology.SENTINEL, (A,), sentinel_credentials=Credentials("", "q@r"), master="m"
    ),
    "redis+cluster://a:26379,b:1": RedisUrl(Topology.CLUSTER, (A, B)),
    "rediss+cluster://u:p@a:26379": RedisUrl(Topology.CLUSTER, (A,), Credentials("u", "p"), tls=True),
}
REFUSED = {
    "redis+ring://a": "redis+ring",
    "rediss+unix:///x": "rediss+unix",
    "redis://a,b": "redis+cluster",
    "redis+sentinel://a": "mymaster",
    "redis+cluster://a/1": "database 1",
    "redis+unix://host/x": "three slashes",
    "redis://:hunter2@h:port": "'h:port'",
    "redis://:hunter2@h:70000": "'h:70000'",
    "redis://:hunter2@": "address",
    "redis://:hunter2@a..b": "'a..b' is not a valid address",
    f"redis://{'a' * 64}": "is not a valid address",
    "redis+cluster://a,.b": "'.b'",
    "redis+cluster://a,": "''",
    "redis://a b": "'a b'",
    "redis://:hunter2@[::1": "IPv6 in brackets",
    f"redis://h:{'9' * 5000}": "is not a valid address",
    "redis+unix:///a%00b": "%00",
    "redis://h/one": "'one'",
    "redis://h?tls=1": "'tls'",
    "redis://h?ca=/x": "rediss://",
    # A password with characters that end it, or without its '@': nothing of it is repeated.
    "redis://:hunter2/hunter2@h": "%2F",
    "redis://:hunter2?hunter2@h": "%2F",
    "redis://:hunter2?hunter2=1@h": "%2F",
    "redis://:hunter2?db=1@h": "%2F",
    "redis://:hunter2#hunter2@h:6379": "%23",
    "redis://:hunter2\t@h": "control character",
    "redis://u:hunter2/1@h:6379/0": "%2F",
    "redis+cluster://u:hunter2/hunter2@a,b": "%2F",
    "redis+sentinel://:hunter2?hunter2@a,b/m": "%2F",
    "redis://:hunter2": "':…'",
    "redis://u:hunter2": "'u:…'",
    "redis://hunter2@h": "redis://:password@host",
    "redis+cluster://hunter2@a,b": "redis://:password@host",
    "hunter2@h:6379": "''",
    "u:hunter2@h": "''",
    # Brackets without their other half.
    "redis://[::1": "'[::1'",
    "redis://::1]": "not a valid address",
    "redis://[::1]x:1": "not a valid address",
    "rediss://[::1]:port": "'[::1]:port'",
}


@pytest.mark.parametrize("url", UNDERSTOOD)
def test_it_is_understood(url: str) -> None:
    assert parse_redis_url(url) == UNDERSTOOD[url]


@pytest.mark.parametrize("url", REFUSED)
def test_it_is_rejected_with_the_reason(url: str) -> None:
    with pytest.raises(SettingsError) as refused:
        parse_redis_url(url)
    assert REFUSED[url] in refused.value.message
    assert "hunter2" not in refused.value.message


def test_pem_files_that_are_not_there_are_named() -> None:
    with pytest.raises(SettingsError, match=r"/nowhere/ca\.pem"):
        parse_redis_url("rediss://h?ca=/nowhere/ca.pem").tls_context()
