"""`[keys] hash = "hmac-sha256"`: the server and the commands agree, and a catalog that was hashed otherwise is refused."""

from __future__ import annotations

import hmac
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import Serve
from tests.integration.cli_ways import FILE_KEY, POLICY, TOKEN, Runner, over_api, with_catalog
from tests.moments import PATIENCE_S
from tidegate.policy.key_format import hash_api_key
from tidegate.policy.key_hash import key_hash_as_set, use_key_hash
from tidegate.policy.toml_reader import parse_policy

PEPPER = "pepper-of-these-tests-0123456789abcdef"
TIERS = '[[tiers]]\nname = "free"\n'
PEPPERED = {"TIDEGATE_KEYS__HASH": "hmac-sha256", "TIDEGATE_KEYS__PEPPER": PEPPER}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = key_hash_as_set()
    yield
    use_key_hash(before)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(tmp_path, monkeypatch, capsys)


def digest(key: str) -> str:
    return hmac.digest(PEPPER.encode(), key.encode(), "sha256").hex()


def status(server: Serve, key: str) -> int:
    headers = {"X-API-Key": key, "X-Original-URI": "/api/a"}
    return httpx.get(f"{server.url}/v1/authorize", headers=headers, timeout=PATIENCE_S).status_code


def test_server_commands_and_doctor(run: Runner, tmp_path: Path, serve: Callable[..., Serve]) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    server = serve(TIDEGATE_ADMIN__TOKEN=TOKEN, **PEPPERED)
    database = run.way(**PEPPERED)
    api = over_api(run, server, tmp_path / "elsewhere")
    api.environment |= PEPPERED
    keys = [FILE_KEY, "sk_by_key", "sk_by_digest"]
    for way, name in ((database, "database"), (api, "api")):
        made = way.told("create", "--tier", "free", "--name", name)
        rotated = way.told("rotate", made["id"])
        assert way.told("show", made["api_key"])["id"] == made["id"] == digest(made["api_key"])[:24]
        keys.append(rotated["api_key"])
    file = tmp_path / "keys.jsonl"
    rows = [{"key": "sk_by_key"}, {"hmac_sha256": digest("sk_by_digest")}, {"sha256": hash_api_key("sk_plain")}]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    for way, new in ((api, 2), (database, 0)):
        ran = way.keys("import", str(file), "--tier", "free")
        assert (ran.code, ran.out) == (1, f"{new} imported, {2 - new} unchanged, 1 with problems\n")
        assert "keys.hash is 'hmac-sha256'" in ran.err
    # A machine without the pepper cannot hash keys for this server.
    bare = over_api(run, server, tmp_path / "bare").keys("import", str(file), "--tier", "free")
    assert (bare.out, bare.err.count("give hmac_sha256")) == ("0 imported, 1 unchanged, 2 with problems\n", 2)
    assert {key: status(server, key) for key in keys} == dict.fromkeys(keys, 204)
    assert status(server, "sk_plain") == 401
    with sqlite3.connect(tmp_path / "tidegate.db") as catalog:
        stored = {row[0] for row in catalog.execute("SELECT sha256 FROM api_keys")}
        assert {digest(key) for key in keys} <= stored
        assert not any(PEPPER in line for line in catalog.iterdump())
    # Another way or another pepper: nothing is changed, and it is said.
    for environment, words in (
        ({}, "hashed with hmac-sha256, and keys.hash is sha256"),
        ({**PEPPERED, "TIDEGATE_KEYS__PEPPER": PEPPER[::-1]}, "another keys.pepper"),
    ):
        ran = run.way(**environment).keys("list")
        assert (ran.code, words in ran.err) == (2, True), ran.err
        found = json.loads(run.way("--json", **environment)("doctor").out)
        assert [each["ok"] for each in found if words in each["finding"]] == [False]
    assert PEPPER not in str(found)


def test_keys_of_before_are_not_lost_by_a_change_of_the_setting(run: Runner, tmp_path: Path) -> None:
    with_catalog(f"sqlite:///{tmp_path}/tidegate.db", lambda catalog: catalog.apply_policy(parse_policy(TIERS), "1"))
    first = run
    made = first.told("create", "--tier", "free")
    changed = first.way(**PEPPERED)
    refused = changed.keys("create", "--tier", "free")
    assert (refused.code, "hashed with sha256, and keys.hash is hmac-sha256" in refused.err) == (2, True), refused.err
    assert [each["id"] for each in first.told("list")] == [made["id"]]
    first.keys("revoke", made["id"], "--reason", "a new way to hash")
    assert first.keys("delete", made["id"]).code == 0
    # Without keys it may change, there and back.
    again = changed.told("create", "--tier", "free")
    assert again["id"] == digest(again["api_key"])[:24]
