"""`tidegate keys …` in both ways: in the database, and with --url at the control plane of a real `tidegate serve`."""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import insert, select

from tests.integration.cli_ways import FILE_KEY, HEX_KEY, KEY, POLICY, TOKEN, Ran, Runner, over_api, with_catalog
from tests.moments import PATIENCE_S, wait_until
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.rows import row_of_api_key
from tidegate.catalog.sql.tables import api_keys, tiers
from tidegate.policy.model import ApiKey
from tidegate.policy.toml_reader import parse_policy

QUOTED = "_.-and 100% of 'quotes' \"too\""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(tmp_path, monkeypatch, capsys)


@pytest.fixture
def server(serve: Callable[..., Any], tmp_path: Path) -> Any:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    return serve(TIDEGATE_ADMIN__TOKEN=TOKEN)


@pytest.fixture
def api(server: Any, run: Runner, tmp_path: Path) -> Runner:
    """The way over the admin API, from a directory where no database is."""
    return over_api(run, server, tmp_path / "elsewhere")


@pytest.fixture
def in_database(run: Runner, tmp_path: Path) -> Runner:
    """The way to a database of its own, with the same policy."""
    (tmp_path / "beside").mkdir()
    with_catalog(f"sqlite:///{tmp_path}/beside/tidegate.db", lambda catalog: catalog.apply_policy(parse_policy(POLICY), "1"))
    return run.way(directory=tmp_path / "beside")


def _put_keys(url: str, digests: list[str]) -> None:
    """Keys whose ids a test chooses, in the tier premium."""

    async def put(catalog: SqlCatalog) -> None:
        async with catalog.database.changing() as writing:
            tier_id = (await writing.connection.execute(select(tiers.c.id).where(tiers.c.name == "premium"))).scalar_one()
            rows = [row_of_api_key(ApiKey(digest, "premium", name=f"n{digest[:24]}"), tier_id, 1) for digest in digests]
            await writing.connection.execute(insert(api_keys), rows)

    with_catalog(url, put)


# Each step: the command, its exit code, and what it must say on stdout and stderr. {x} is the id of the key that the step `x`
# made and {x_key} the key itself; {x:.8} is the beginning of the id.
STEPS: tuple[tuple[str, str, int, str, str], ...] = (
    ("", "list --tier premium --status revoked", 0, r"", r"no keys\n"),
    ("a", "create --tier free --name Ada", 0, KEY + r"\n", r"id ID, tier free\. It is shown only once: store it now\.\n"),
    ("b", "create --tier free --name 'Bob the 2nd' --expires-in 90d --json", 0, r'.*"api_key": "KEY".*"from": "api".*', r""),
    ("c", "create --tier premium --expires-in 1s", 0, KEY + r"\n", r".*tier premium.*"),
    ("d", f"create --tier free --name {shlex.quote(QUOTED)}", 0, KEY + r"\n", r".*"),
    ("e", "create --tier free --name 'Åsa 𝕏' --json", 0, r'.*"name": "Åsa 𝕏".*', r""),
    ("", "create --tier none", 2, r"", r"tidegate: NOT_FOUND: there is no tier 'none': there are free, premium\n"),
    ("", "create --tier free --name " + "n" * 201, 2, r"", r".*201 characters: at most 200.*"),
    ("", "create --tier free --name 'a\tb'", 2, r"", r".*control characters.*"),
    ("", "create --tier free --name '\udcff'", 2, r"", r".*UTF-8.*"),
    ("", "create --tier ' '", 2, r"", r".*blank.*"),
    ("", "create --tier free --expires-in 3w", 2, r"", r".*'3w' is not a valid duration; expected e\.g\. 90d.*"),
    ("", "list", 0, r".*id +tier +name +status +created at +expires at +revoked reason +from.*", r""),
    ("", "list --name BOB", 0, r".*Bob the 2nd +active +TIME +TIME +- +api\n", r""),
    ("", "list --name b --json", 0, r'.*"Bob the 2nd".*', r""),
    ("", "list --name '100% OF'", 0, r".*'quotes'.*", r""),
    ("", "list --name file --json", 0, r'.*"of the file".*"from": "file".*', r""),
    ("", "list --tier premium", 0, r".*premium +expired +TIME +TIME .*", r""),
    ("", "list --tier none", 0, r"", r"no keys\n"),
    ("", "list --status expired --json", 0, r'.*"status": "expired".*', r""),
    ("", "list --status active", 0, r".*Ada.*", r""),
    ("", "list --status gone", 2, r"", r".*'gone'.*"),
    ("", "list --limit 10001", 2, r"", r".*10000.*"),
    ("", "list --limit 0", 2, r"", r".*"),
    ("", "list --after {a_key}", 2, r"", r".*not a valid id.*"),
    ("", "list --after ffffffffffffffffffffffff", 0, r"", r"no keys\n"),
    ("", "show {a}", 0, r"id +ID\ntier +free\nname +Ada\nstatus +active\n.*limits +-\nfrom +api\n", r""),
    ("", "show {a:.10}", 0, r".*Ada.*", r""),
    ("", "show {a_key} --json", 0, r'.*"name": "Ada".*"revision": 1.*', r""),
    ("", "show {c}", 0, r".*status +expired\n.*", r""),
    ("", f"show {FILE_KEY}", 0, r".*of the file\n.*from +file\n", r""),
    ("", f"show {HEX_KEY}", 0, r".*all hex digits\n.*", r""),
    ("", "show {a:.5}", 2, r"", r"tidegate: there is no such API key.*6 hex digits.*see 'tidegate keys list'\n"),
    ("", "show %", 2, r"", r"tidegate: there is no such API key.*6 hex digits.*\n"),
    ("", "show tg_mistyped", 2, r"", r"tidegate: that is neither an id.*mistyped.*\n"),
    ("", "show 000000000000000000000000", 2, r"", r"tidegate: there is no such API key.*'tidegate keys list'.*\n"),
    ("", "show a-key-that-nobody-knows", 2, r"", r"tidegate: there is no such API key.*\n"),
    ("", "delete {a}", 2, r"", r"tidegate: CATALOG_REFUSED: the API key ID still works: revoke it first, with a reason\n"),
    ("", "revoke {a} --reason ' '", 2, r"", r".*blank.*"),
    ("", "revoke {a} --reason " + "r" * 1001, 2, r"", r".*1001 characters.*"),
    ("", "revoke {a}", 2, r"", r".*--reason.*"),
    ("", "revoke {a:.12} --reason 'leaked, 𝕏'", 0, r"revoked ID of tier free\n", r""),
    ("", "revoke {a} --reason again", 2, r"", r"tidegate: CATALOG_REFUSED: the API key ID is revoked already\n"),
    ("", "revoke {b_key} --reason leaked --json", 0, r'.*"status": "revoked".*"revoked_reason": "leaked".*', r""),
    ("", f"revoke {FILE_KEY} --reason x", 2, r"", r"tidegate: MANAGED_BY_FILE: the API key ID is in the policy file.*\n"),
    ("", f"rotate {FILE_KEY}", 2, r"", r"tidegate: MANAGED_BY_FILE: .*\n"),
    ("", "list --status revoked", 0, r".*Ada +revoked +TIME +- +leaked, 𝕏 +api\n.*", r""),
    ("", "show {a}", 0, r".*revoked at +TIME\nrevoked reason +leaked, 𝕏\n.*", r""),
    ("", "rotate {a}", 2, r"", r"tidegate: CATALOG_REFUSED: the API key ID is revoked: create a new one instead\n"),
    ("", "rotate {c}", 2, r"", r"tidegate: CATALOG_REFUSED: the API key ID is expired: create a new one instead\n"),
    (
        "f",
        "rotate {d} --grace 1h",
        0,
        KEY + r"\n",
        r"id ID, tier free, in place of ID, which works until TIME\. It is shown .*\n",
    ),
    ("g", "rotate {f_key}", 0, KEY + r"\n", r"id ID, tier free, in place of ID, which is revoked\. It is shown .*\n"),
    ("h", "rotate {e:.16} --grace 365d --json", 0, r'.*"api_key": "KEY".*"replaces": \{.*"from": "api".*', r""),
    ("", "rotate {h} --grace 366d", 2, r"", r".*at most 365d.*"),
    ("", "rotate {h} --grace 0s", 2, r"", r".*'0s' is not a valid duration.*"),
    ("", "show {f}", 0, r".*revoked reason +replaced by ID\n.*", r""),
    ("", "show {d}", 0, r".*status +active\n.*expires at +TIME\n.*", r""),
    ("", "delete {a}", 0, r"deleted ID of tier free\n", r""),
    ("", "delete {b_key} --json", 0, r'.*"name": "Bob the 2nd".*', r""),
    ("", "delete {c:.9}", 0, r"deleted ID of tier premium\n", r""),
    ("", "delete {a}", 2, r"", r"tidegate: there is no such API key.*\n"),
    ("", "list --json", 0, r".*", r""),
)


def _alike(text: str) -> str:
    """A text without what differs from one key to another."""
    if text.startswith("["):
        text = json.dumps(
            sorted(json.loads(text), key=lambda each: (each["name"], each["status"], each["revision"])), ensure_ascii=False
        )
    text = re.sub(KEY, "KEY", re.sub(r" +\n", "\n", text))
    text = re.sub(r"\b[0-9a-f]{24}\b", "ID", text)
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", "TIME", text)


def _steps(way: Runner) -> list[Ran]:
    """Go through the steps; what they said is made alike."""
    made: dict[str, str] = {}
    said = []
    for name, command, code, out, err in STEPS:
        ran = way.keys(*shlex.split(command.format(**made)))
        assert ran.code == code, (command, ran)
        if name:
            key = re.search(KEY, ran.out)
            assert key, (command, ran)
            made[f"{name}_key"] = key[0]
            if name == "c":
                time.sleep(1.1)  # it lives for a second
            made[name] = json.loads(ran.out)["id"] if ran.out.startswith("{") else ran.err.split(",")[0].removeprefix("id ")
        elif code:
            assert not re.search(KEY, ran.out + ran.err), "a key is told once"
        told, errors = _alike(ran.out), _alike(ran.err)
        assert re.fullmatch(out.replace(KEY, "KEY"), told, re.DOTALL), (command, told)
        assert re.fullmatch(err, errors, re.DOTALL), (command, errors)
        # A table's rows stand in order of ids, which are made by chance.
        said.append(Ran(code, "".join(sorted(told.splitlines(keepends=True))) if command.startswith("list") else told, errors))
    return said


def test_database_and_admin_api_give_the_same_results(api: Runner, in_database: Runner, tmp_path: Path) -> None:
    asked, written = _steps(api), _steps(in_database)
    for (_, command, *_), one, other in zip(STEPS, asked, written, strict=True):
        assert one == other, command
    assert not (tmp_path / "elsewhere" / "tidegate.db").exists(), "over the API no database is opened"


def test_postgresql_gives_the_same_results(in_database: Runner, postgres_url: str, tmp_path: Path) -> None:
    with_catalog(postgres_url, lambda catalog: catalog.apply_policy(parse_policy(POLICY), "1"))
    for (_, command, *_), one, other in zip(
        STEPS, _steps(in_database), _steps(in_database.way(TIDEGATE_CATALOG__URL=postgres_url)), strict=True
    ):
        assert one == other, command


def test_the_audit_log_reports_the_command_line(server: Any, api: Runner, run: Runner, tmp_path: Path) -> None:
    beside = run.way(directory=tmp_path, LOGNAME="somebody-else")
    for way in (beside, api):
        made = way.told("create", "--tier", "free")
        way.told("delete", way.told("rotate", made["id"])["replaces"]["id"])
        way.told("revoke", way.told("create", "--tier", "free")["id"], "--reason", "over")
    headers = {"Authorization": f"Bearer {TOKEN}"}
    log = httpx.get(f"http://127.0.0.1:{server.admin_port}/admin/v1/audit-log?kind=api_key", headers=headers).json()["items"]
    actors = ["settings"] * 6 + [f"cli:{pwd.getpwuid(os.geteuid()).pw_name}"] * 6
    actions = ["revoke", "create", "delete", "rotate", "rotate", "create"] * 2
    assert [(each["actor"], each["action"]) for each in log] == list(zip(actors, actions, strict=True))


def test_lists_longer_than_a_page(server: Any, api: Runner, run: Runner, tmp_path: Path) -> None:
    ids = [f"{number:06x}{'0' * 18}" for number in range(1, 1_205)]
    _put_keys(f"sqlite:///{tmp_path}/tidegate.db", [f"{each}{'5' * 40}" for each in ids])
    for way in (api, run.way()):
        premium = ("list", "--tier", "premium", "--name", "n0")
        assert [each["id"] for each in way.told(*premium, "--limit", "10000")] == ids
        for limit in (1, 499, 500, 501, 1_000, 1_001, 1_203):
            ran = way.keys(*premium, "--json", "--limit", str(limit))
            assert [each["id"] for each in json.loads(ran.out)] == ids[:limit]
            assert ran.err == f"there are more: continue with --after {ids[limit - 1]}\n"
        assert way.keys(*premium, "--limit", "1204").err == "", "there are no more"
        assert [each["id"] for each in way.told(*premium, "--limit", "600", "--after", ids[699])] == ids[700:]
        assert len(way.told("list")) == 100


def test_an_id_that_others_begin_with(server: Any, api: Runner, run: Runner, tmp_path: Path) -> None:
    _put_keys(f"sqlite:///{tmp_path}/tidegate.db", [f"abcdef{number}{'0' * 57}" for number in range(3)])
    for way in (api, run.way()):
        assert "several API keys have this prefix" in way.refused("revoke", "abcdef", "--reason", "x")
        assert way.told("show", "abcdef1")["id"] == f"abcdef1{'0' * 17}"
        assert way.told("list", "--status", "revoked") == [], "nothing was changed"
    url = f"http://127.0.0.1:{server.admin_port}/admin/v1/api-keys"
    for wrong in ("", "ABCDEF", "g", "a" * 25, "a%"):
        answer = httpx.get(url, params={"id_prefix": wrong}, headers={"Authorization": f"Bearer {TOKEN}"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "BAD_REQUEST")


def test_a_revoked_key_stops_long_before_its_entry_ends(
    serve: Callable[..., Any], run: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within a second on idle cores; where nothing were announced or polled, the entry would serve on for an hour."""
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    server = serve(TIDEGATE_ADMIN__TOKEN=TOKEN, TIDEGATE_CACHE__L1_TTL_S="3600")
    api = over_api(run, server, tmp_path / "elsewhere")
    for way in (api, run.way()):
        for change in (("revoke", "--reason", "leaked"), ("rotate",)):
            made = way.told("create", "--tier", "free")
            check = {"path": "/api/a", "api_key": made["api_key"]}
            assert httpx.post(f"{server.url}/v1/check", json=check).status_code == 200
            changed = way.told(change[0], made["id"], *change[1:])
            asked = time.monotonic()
            while (status := httpx.post(f"{server.url}/v1/check", json=check).status_code) != 403:
                assert (status, time.monotonic() < asked + PATIENCE_S) == (200, True)
                time.sleep(0.02)
            print(f"{change[0]}: refused {time.monotonic() - asked:.3f} s after the answer")
            if "replaces" in changed:
                check["api_key"] = changed["api_key"]
                assert httpx.post(f"{server.url}/v1/check", json=check).status_code == 200
    assert "tg_" not in server.stop()[2], "no key is ever logged"


def test_in_the_grace_period_both_keys_work(server: Any, api: Runner, run: Runner) -> None:
    def check(api_key: str) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/check", json={"path": "/api/a", "api_key": api_key})

    for way in (api, run.way()):
        made = way.told("create", "--tier", "free")
        new = way.told("rotate", made["id"], "--grace", "1h")
        for api_key in (made["api_key"], new["api_key"]):
            assert check(api_key).status_code == 200
        made = way.told("create", "--tier", "free")
        new = way.told("rotate", made["id"], "--grace", "1s")
        wait_until(lambda made=made: check(made["api_key"]).status_code == 403, what="the grace period is over")  # type: ignore[misc]
        assert check(made["api_key"]).json()["error"]["code"] == "API_KEY_EXPIRED"
        assert check(new["api_key"]).status_code == 200
        assert way.told("show", made["id"])["status"] == "expired"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", ("create", "list", "show", "revoke", "rotate", "delete", "over the admin API")),
        ("create", ("--tier", "--name", "--expires-in", "90d", "only once", "digest")),
        ("list", ("--tier", "--status", "active|expired|revoked", "--name", "--limit", "10000", "--after")),
        ("show", ("KEY", "6 hex digits", "the key itself")),
        ("revoke", ("KEY", "6 hex digits", "the key itself", "--reason", "within a second")),
        ("rotate", ("KEY", "6 hex digits", "--grace", "1h", "still works", "only once")),
        ("delete", ("KEY", "6 hex digits", "revoked or expired", "audit log")),
    ],
)
def test_help(command: str, words: tuple[str, ...], run: Runner) -> None:
    ran = run.way().keys(*command.split(), "--help")
    assert ran.code == 0
    said = " ".join(ran.out.split())
    for word in words:
        assert word in said
    if command:
        for word in ("--url", "control plane", "--token-file", "TIDEGATE_ADMIN__TOKEN", "list of processes", "--json"):
            assert word in said
