"""`tidegate keys import`: in both ways, repeatable, and every problem named without the key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from tests.integration.catalog_keys import editor_of
from tests.integration.cli_ways import POLICY, TOKEN, Runner, over_api, with_catalog
from tidegate.admin.customers import create_customer
from tidegate.admin.import_export import import_policy
from tidegate.admin.key_import import KeyImport, KeyImportRequest, import_keys
from tidegate.admin.lists import list_keys
from tidegate.admin.models.customers import CustomerCreate
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.tables import audit_log
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check
from tidegate.gate.gate import Gate
from tidegate.policy.key_format import hash_api_key
from tidegate.policy.toml_reader import parse_policy

CSV = """\
key,tier,name,expires_at
sk_live_51H,free,Åsa,
old.key/with+signs=,premium,,2099-01-31T00:00:00Z
tg_1234567890123456789012345678901234567x,free,mistyped,
,free,no key,
sk_3,none,unknown tier,
sk_4,free,past,2001-01-01T00:00:00Z
sk_live_51H,free,again,
"""
SECRETS = ("sk_live_51H", "old.key/with+signs=", "tg_1234567890123456789012345678901234567x", "sk_3", "sk_4")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(tmp_path, monkeypatch, capsys)


@pytest.fixture(params=["database", "api"])
def way(request: pytest.FixtureRequest, run: Runner, tmp_path: Path, serve: Callable[..., Any]) -> Runner:
    if request.param == "database":
        with_catalog(f"sqlite:///{tmp_path}/tidegate.db", lambda catalog: catalog.apply_policy(parse_policy(POLICY), "1"))
        return run
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    return over_api(run, serve(TIDEGATE_ADMIN__TOKEN=TOKEN), tmp_path / "elsewhere")


def test_a_file_is_imported_once_and_its_problems_are_named(way: Runner, tmp_path: Path) -> None:
    file = tmp_path / "keys.csv"
    file.write_text(CSV)
    dry = way.keys("import", str(file), "--dry-run")
    assert (dry.code, dry.out) == (1, "2 would be imported, 0 unchanged, 5 with problems\n")
    assert json.loads(way.keys("list", "--name", "Åsa", "--json").out) == []
    first = way.keys("import", str(file))
    assert (first.code, first.out) == (1, "2 imported, 0 unchanged, 5 with problems\n")
    assert first.err.count("line ") == 5
    for words in (
        "line 4: ",
        "mistyped",
        "line 5: ",
        "line 6: ",
        "'none'",
        "line 7: ",
        "in the past",
        "line 8: ",
        "earlier row",
    ):
        assert words in first.err
    assert not any(secret in first.err + first.out for secret in SECRETS)
    again = json.loads(way.keys("import", str(file), "--json").out)
    assert (again["imported"], again["unchanged"], again["refused"]) == (0, 2, 5)
    (listed,) = json.loads(way.keys("list", "--name", "Åsa", "--json").out)
    assert (listed["id"], listed["tier"], listed["from"]) == (hash_api_key("sk_live_51H")[:24], "free", "api")


def test_json_lines_with_digests_and_a_tier_for_all(way: Runner, tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    rows = [
        {"sha256": hash_api_key("sk_1")},
        {"key": "sk_2", "tier": "premium", "name": None},
        {"sha256": "beef"},
        {"key": "sk_3", "plan": "x"},
        {"key": "sk_4", "name": 7},
        [],
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\nnot json\n\n")
    ran = json.loads(way.keys("import", str(file), "--tier", "free", "--json").out)
    assert (ran["imported"], ran["refused"], ran["dry_run"]) == (2, 5, False)
    assert [problem["line"] for problem in ran["problems"]] == [3, 4, 5, 6, 7]
    assert "sk_" not in json.dumps(ran["problems"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("keys.csv", b"sk_live_51H,free\n", "must name the columns"),
        ("keys.csv", b"tier,name\n", "must name the columns"),
        ("keys.csv", b"", "must name the columns"),
        ("keys.csv", b"key,tier\n\xff\xfe,free\n", "not UTF-8"),
        ("keys.csv", b"key,tier\n" + b"x" * 20_000 + b",free\n", "not CSV in line"),
        ("keys.jsonl", b'{"key": "' + b"x" * 20_000, "line 1 is longer"),
        ("absent.csv", None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(
    run: Runner, tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    ran = run.keys("import", str(tmp_path / name))
    assert ran.code == 2
    assert words in ran.err
    assert "sk_live" not in ran.err
    assert "Traceback" not in ran.err


async def test_conflicts_are_reported_and_imported_keys_decide(catalog_url: str) -> None:
    catalog = await SqlCatalog.open(catalog_url)
    try:
        cached = CachedCatalog(catalog)
        editor = editor_of(catalog, cached)
        await import_policy(editor, "test", parse_policy(POLICY))
        keys = [KeyImport(sha256=hash_api_key(f"old-{number}"), tier="free") for number in range(600)]
        made = await import_keys(editor, "test", KeyImportRequest(keys=keys))
        assert (made.imported, made.problems) == (600, [])
        other = [
            KeyImport(sha256=hash_api_key("old-7"), tier="premium"),
            keys[8],
            KeyImport(sha256=hash_api_key("old-600"), tier="free"),
        ]
        made = await import_keys(editor, "test", KeyImportRequest(keys=other))
        assert (made.imported, made.unchanged, [problem.row for problem in made.problems]) == (1, 1, [0])
        assert hash_api_key("old-7")[:24] in made.problems[0].message
        decision = await Gate(cached, MemoryCounters()).check(Check.of("/api/a", api_key="old-599"))
        assert (decision.tier, decision.limit) == ("free", 100)
        assert len((await list_keys(editor, 500, None)).items) == 500
    finally:
        await catalog.close()


async def test_the_audit_log_has_each_key_as_it_is_read(catalog_url: str) -> None:
    catalog = await SqlCatalog.open(catalog_url)
    try:
        editor = editor_of(catalog, CachedCatalog(catalog))
        await import_policy(editor, "test", parse_policy(POLICY))
        await create_customer(editor, "test", CustomerCreate(name="acme", tier="premium"))
        keys = [
            KeyImport(sha256=hash_api_key("plain"), tier="free"),
            KeyImport(sha256=hash_api_key("named"), tier="premium", name="Åsa", expires_at="2099-01-31T00:00:00Z"),
            KeyImport(sha256=hash_api_key("of a customer"), customer="acme"),
            KeyImport(sha256=hash_api_key("of both"), customer="acme", tier="free"),
        ]
        assert (await import_keys(editor, "test", KeyImportRequest(keys=keys))).imported == 4
        read = {key.id: key.audited() for key in (await list_keys(editor, 500, None)).items}
        async with catalog.database.reading() as connection:
            rows = (await connection.execute(select(audit_log).where(audit_log.c.action == "import"))).mappings().all()
        logged = {row["target"]: row["after"] for row in rows if row["kind"] == "api_key" and row["target"] in read}
        imported = {hash_api_key(text)[:24] for text in ("plain", "named", "of a customer", "of both")}
        assert {key: logged[key] for key in imported} == {key: read[key] for key in imported}
    finally:
        await catalog.close()
