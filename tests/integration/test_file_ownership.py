"""Whose a row is: the policy file's while there is one, the operators' when it is gone; and demo keys stay in the demo."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Serve
from tests.integration.catalog_keys import editor_of, listed_keys, make_key, revoke_key
from tests.moments import PATIENCE_S, wait_until
from tests.servers import forked
from tidegate.admin import api_keys, lists
from tidegate.admin.import_export import import_policy
from tidegate.admin.transaction import ManagedByFile
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.errors import CatalogError
from tidegate.policy.key_format import hash_api_key
from tidegate.policy.toml_reader import parse_policy

KEY = "demo-file-key-0001"
ID = hash_api_key(KEY)[:24]
DEMO = "demo-free-key-0001"
FREE = """
[[tiers]]
name = "free"
limits = ["20000/day"]
  [[tiers.rules]]
  endpoint = "/a"
  limits = ["5/day"]
"""
WHOLE = f'{FREE}\n[[api_keys]]\nkey = "{KEY}"\ntier = "free"\n'
OTHER = '[[tiers]]\nname = "other"\n'


@pytest.fixture
async def catalog(catalog_url: str) -> AsyncIterator[SqlCatalog]:
    opened = await SqlCatalog.open(catalog_url)
    yield opened
    await opened.close()


async def audited(catalog: SqlCatalog) -> list[tuple[str, str, str]]:
    """Action, kind and target of each row of the audit log, the first one first."""
    rows = (await lists.list_audit(editor_of(catalog), 100, None)).items
    return [(row.action, row.kind, row.target) for row in reversed(rows)]


async def test_what_a_file_made_can_be_changed_once_it_is_released(catalog: SqlCatalog) -> None:
    assert await catalog.release_policy() is None, "there never was a file"
    await catalog.apply_policy(parse_policy(WHOLE), "digest of 1")
    editor = editor_of(catalog)
    with pytest.raises(ManagedByFile, match="restart 'tidegate serve' without it"):
        await revoke_key(catalog, ID, "leaked")
    released = await catalog.release_policy()
    assert released is not None
    assert (released.tiers, released.api_keys) == (1, 1)
    assert await catalog.release_policy() is None
    assert await audited(catalog) == [("release", "policy_file", "digest of 1")]
    rules = (await lists.list_rules(editor, 10, None)).items
    assert (await editor.edit_tier("test", "free", ["10000/day"], None)).limits == ["10000/day"]
    rule = await editor.edit_rule("test", rules[0].id, {"limits": ["7/day"]}, None)
    assert (rule.limits, rule.managed_by_file) == (["7/day"], False)
    made = await api_keys.rotate_key(editor, "test", ID, 0)
    assert (made.replaces.status, made.managed_by_file) == ("revoked", False)
    await api_keys.delete_key(editor, "test", ID, None)
    assert [form["id"] for form in await listed_keys(catalog)] == [made.id]
    tier = (await catalog.tier("free"))[1]
    assert tier is not None
    assert not tier.managed_by_file
    assert (await catalog.api_key(hash_api_key(made.api_key)))[1] is not None


async def test_a_restored_file_owns_the_rows_that_were_not_changed(catalog: SqlCatalog) -> None:
    policy = parse_policy(WHOLE)
    await catalog.apply_policy(policy, "1")
    await catalog.release_policy()
    assert await catalog.apply_policy(policy, "1") is True
    with pytest.raises(ManagedByFile):
        await revoke_key(catalog, ID, "leaked")
    assert await catalog.apply_policy(parse_policy(WHOLE.replace("20000", "30000")), "2") is True


async def test_a_file_does_not_bring_a_key_back_that_was_revoked_meanwhile(catalog: SqlCatalog) -> None:
    policy = parse_policy(WHOLE)
    await catalog.apply_policy(policy, "1")
    await catalog.release_policy()
    await revoke_key(catalog, ID, "leaked")
    with pytest.raises(CatalogError, match=f"API key {ID} of the policy file belongs to the catalog"):
        await catalog.apply_policy(policy, "1")
    api_key = (await catalog.api_key(hash_api_key(KEY)))[1]
    assert api_key is not None
    assert api_key.status == "revoked"
    await catalog.apply_policy(parse_policy(FREE), "2")


async def test_a_policy_can_be_imported_over_what_was_released(catalog: SqlCatalog) -> None:
    await catalog.apply_policy(parse_policy(WHOLE), "1")
    changed = parse_policy(FREE.replace("20000", "10000"))
    with pytest.raises(ManagedByFile):
        await import_policy(editor_of(catalog), "test", changed)
    await catalog.release_policy()
    changes = await import_policy(editor_of(catalog), "test", changed, prune=True)
    assert [(each["action"], each["kind"]) for each in changes] == [("update", "tier"), ("delete", "api_key")]


async def test_a_tier_of_the_file_does_not_take_rules_of_operators_with_it(catalog: SqlCatalog) -> None:
    await catalog.apply_policy(parse_policy(FREE), "1")
    editor = editor_of(catalog)
    rule = await editor.create_rule("test", "free", {"endpoint": "/own", "limits": ["1/day"]})
    before = await audited(catalog), await catalog.version()
    with pytest.raises(CatalogError, match=f"'/own' with id {rule.id}: keep the tier, or delete those rules first"):
        await catalog.apply_policy(parse_policy(OTHER), "2")
    assert (await audited(catalog), await catalog.version()) == before
    assert [each.name for each in (await lists.list_rules(editor, 10, None)).items] == ["/a", "/own"]
    # Its own rules go with it.
    await editor.delete_rule("test", rule.id, None)
    assert await catalog.apply_policy(parse_policy(OTHER), "2") is True
    assert (await lists.list_rules(editor, 10, None)).items == []


async def test_a_key_of_an_operator_keeps_its_tier(catalog: SqlCatalog) -> None:
    await catalog.apply_policy(parse_policy(FREE), "1")
    await make_key(catalog, "free")
    with pytest.raises(CatalogError, match="other API keys still use it"):
        await catalog.apply_policy(parse_policy(OTHER), "2")


def tidegate(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command without any setting but those given."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}
    return forked.run(arguments, PATIENCE_S, cwd=directory, env={**plain, **environment})


def check(server: Serve, key: str) -> int:
    return httpx.post(f"{server.url}/v1/check", json={"path": "/a", "api_key": key}).status_code


def test_a_demo_leaves_nothing_behind(serve: Callable[..., Serve], tmp_path: Path) -> None:
    demo = serve("--demo")
    assert check(demo, DEMO) == 200
    code, said, _ = demo.stop()
    assert code == 0
    assert "a temporary catalog that is deleted when it\nstops" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == []
    assert check(serve(), DEMO) == 401


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A directory whose path is short enough for the workers' sockets."""
    with tempfile.TemporaryDirectory(prefix="tg") as directory:
        yield Path(directory)


def test_a_demo_with_workers_has_one_catalog(
    serve: Callable[..., Serve], new_redis: Any, tmp_path: Path, temporary: Path
) -> None:
    options = {"TIDEGATE_COUNTERS__URL": new_redis().url, "TIDEGATE_SERVER__WORKERS": "2", "TMPDIR": str(temporary)}
    demo = serve("--demo", TIDEGATE_ADMIN__TOKEN="t" * 16, **options)
    admin = {"base_url": f"http://127.0.0.1:{demo.admin_port}", "headers": {"Authorization": "Bearer " + "t" * 16}}
    with httpx.Client(**admin) as client:
        made = client.post("/admin/v1/api-keys", json={"tier": "free"}).json()["api_key"]
    wait_until(lambda: {check(demo, made) for _ in range(20)} == {200})
    demo.stop()
    assert list(tmp_path.iterdir()) == []
    assert list(temporary.iterdir()) == []


def test_a_deleted_file_releases_its_rows_and_doctor_reports_it(serve: Callable[..., Serve], tmp_path: Path) -> None:
    file = tmp_path / "tidegate.policy.toml"
    file.write_text(f'{FREE}\n[[api_keys]]\nkey = "{DEMO}"\ntier = "free"\n')
    serve().stop()

    def doctor() -> dict[str, tuple[bool | None, str]]:
        found = json.loads(tidegate(tmp_path, "doctor", "--json", TIDEGATE_SERVER__ADMIN="").stdout)
        return {each["what"]: (each["ok"], each["finding"]) for each in found}

    assert "rows of a policy file" not in doctor()
    file.unlink()
    assert doctor()["rows of a policy file"] == (
        None,
        "1 tiers and 1 API keys come from a policy file that is no longer configured, and stay active: 'tidegate serve' releases "
        "them to operators when it starts, see 'tidegate keys list'",
    )
    key_id = hash_api_key(DEMO)[:24]
    revoke = ("keys", "revoke", key_id, "--reason", "public")
    assert "restart 'tidegate serve' without it" in tidegate(tmp_path, *revoke).stderr
    server = serve()
    assert check(server, DEMO) == 200
    ok, said = doctor()["API keys"]
    assert ok is False
    assert said.startswith("the catalog accepts 1 API keys of the example policy, which are public")
    assert said.endswith(key_id)
    assert tidegate(tmp_path, *revoke).returncode == 0
    wait_until(lambda: check(server, DEMO) == 403)
    found = doctor()
    assert "they are released to operators" in found["rows of a policy file"][1]
    assert "API keys" not in found
    _, _, said = server.stop()
    assert "no policy file is configured, but 1 tiers and 1 API keys" in said
