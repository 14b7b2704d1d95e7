"""Fifty writers at once, on one rule: each change is whole, none is lost, and whoever saw an older revision is told so."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import select

from tests.integration.admin_api import Admin, open_admin
from tidegate.admin.models import RuleRead
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import StaleRevision
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.tables import audit_log, catalog_changes
from tidegate.errors import PolicyError

WRITERS = 20
ROUNDS = 2


class Writers:
    """Editors of one database, each with connections of its own; writers are dealt out to them."""

    def __init__(self, catalogs: list[SqlCatalog]) -> None:
        self.catalogs = catalogs
        self.versions: list[int] = []
        self.editors = [CatalogEditor(each, lambda version, _: self.versions.append(version)) for each in catalogs]

    async def all_edit(self, rule_id: int, seen: set[int] | None, **fields: Any) -> list[RuleRead | BaseException]:
        """All writers at once: each gives the rule a priority of its own."""
        answers = await asyncio.gather(
            *(
                self.editors[number % len(self.editors)].edit_rule(f"w{number}", rule_id, {"priority": number, **fields}, seen)
                for number in range(WRITERS)
            ),
            return_exceptions=True,
        )
        return list(answers)


@pytest.fixture(params=[1, 2], ids=["one pool", "two pools"])
async def writers(request: pytest.FixtureRequest, catalog_url: str) -> AsyncIterator[Writers]:
    made = Writers([await SqlCatalog.open(catalog_url) for _ in range(request.param)])
    yield made
    for each in made.catalogs:
        await each.close()


async def _rule(writers: Writers) -> RuleRead:
    await writers.editors[0].create_tier("me", "free", ())
    return await writers.editors[0].create_rule("me", "free", {"endpoint": "/x", "limits": ["1/s"]})


async def _audited(catalog: SqlCatalog, rule_id: int) -> list[Any]:
    """The changes of a rule, oldest first."""
    async with catalog.database.reading() as connection:
        query = select(audit_log).where(audit_log.c.kind == "rule", audit_log.c.target == str(rule_id)).order_by(audit_log.c.id)
        return list((await connection.execute(query)).mappings())


async def _logged(catalog: SqlCatalog) -> list[tuple[int, int, str, str]]:
    """What `catalog_changes` holds, oldest first."""
    async with catalog.database.reading() as connection:
        c = catalog_changes.c
        return [tuple(row) for row in await connection.execute(select(c.version, c.previous, c.kind, c.name).order_by(c.version))]  # type: ignore[misc]


async def test_of_all_that_saw_a_revision_one_wins(writers: Writers) -> None:
    rule = await _rule(writers)
    for number in range(ROUNDS):
        before = await _logged(writers.catalogs[0])
        answers = await writers.all_edit(rule.id, {number + 1})
        (won,) = [each for each in answers if not isinstance(each, BaseException)]
        lost = [each for each in answers if isinstance(each, BaseException)]
        assert Counter(type(each) for each in lost) == {StaleRevision: WRITERS - 1}
        assert {each.details["revision"] for each in lost} == {number + 2}  # type: ignore[attr-defined]
        assert won.revision == number + 2
        for catalog in writers.catalogs:
            tier = (await catalog.tier("free"))[1]
            assert tier is not None
            assert tier.rules[0].priority == won.priority
        # Those that lost have changed nothing, not even the version.
        assert len(await _logged(writers.catalogs[0])) == len(before) + 1
        audited = await _audited(writers.catalogs[0], rule.id)
        assert len(audited) == number + 2
        assert audited[-1]["actor"] == f"w{won.priority}"


async def test_all_that_saw_none_win_one_after_the_other(writers: Writers) -> None:
    rule = await _rule(writers)
    writers.versions.clear()
    answers = await writers.all_edit(rule.id, None)
    assert sorted(each.revision for each in answers) == list(range(2, WRITERS + 2))  # type: ignore[union-attr]
    made, *changed = await _audited(writers.catalogs[0], rule.id)
    assert len(changed) == WRITERS
    assert {each["actor"] for each in changed} == {f"w{number}" for number in range(WRITERS)}
    for before, after in itertools.pairwise([made, *changed]):
        assert after["before"] == before["after"], "each saw what the one before it left"
        assert after["after"] == {
            **after["before"],
            "priority": int(after["actor"][1:]),
            "revision": after["before"]["revision"] + 1,
        }
    assert changed[-1]["after"]["revision"] == WRITERS + 1
    # Every version is told once, and hangs on the one before it.
    assert len(set(writers.versions)) == WRITERS
    logged = (await _logged(writers.catalogs[0]))[2:]
    assert [version for version, *_ in logged] == sorted(writers.versions)
    assert {row[2:] for row in logged} == {("tier", "free")}
    assert [previous for _, previous, *_ in logged[1:]] == [version for version, *_ in logged[:-1]]
    for catalog in writers.catalogs:
        assert await catalog.version() == max(writers.versions)
        changes = await catalog.changes(logged[0][1])
        assert changes.floor == logged[0][1]
        assert changes.items == ((max(writers.versions), ("tier", "free")),)


async def test_what_is_rejected_among_them_leaves_nothing(writers: Writers) -> None:
    rule = await _rule(writers)
    writers.versions.clear()
    good, bad = await asyncio.gather(writers.all_edit(rule.id, None), writers.all_edit(rule.id, None, limits=["1/s burst 3"]))
    assert {type(each) for each in good} == {RuleRead}
    assert {type(each) for each in bad} == {PolicyError}
    assert len(writers.versions) == WRITERS
    assert len(await _audited(writers.catalogs[0], rule.id)) == WRITERS + 1
    assert len(await _logged(writers.catalogs[0])) == WRITERS + 2


@pytest.fixture
async def admins(catalog_url: str) -> AsyncIterator[list[Admin]]:
    made = [await open_admin(catalog_url) for _ in range(2)]
    yield made
    for each in made:
        await each.http.aclose()
        await each.catalog.close()


async def test_over_http(admins: list[Admin]) -> None:
    first = admins[0]
    await first.tier()
    rule = await first.rule()
    path = f"/rate-limit-rules/{rule['id']}"

    async def all_patch(tag: str) -> list[Any]:
        return await asyncio.gather(
            *(
                admins[number % 2].http.patch(path, json={"priority": number}, headers={"If-Match": tag})
                for number in range(WRITERS)
            )
        )

    answers = await all_patch('"1"')
    assert Counter(each.status_code for each in answers) == {200: 1, 412: WRITERS - 1}
    (won,) = [each for each in answers if each.status_code == 200]
    assert won.headers["etag"] == '"2"'
    assert {each.json()["error"]["details"]["revision"] for each in answers if each.status_code == 412} == {2}
    answers = await all_patch("*")
    assert Counter(each.status_code for each in answers) == {200: WRITERS}
    assert sorted(int(each.headers["etag"].strip('"')) for each in answers) == list(range(3, WRITERS + 3))
    log = (await first.http.get("/audit-log", params={"kind": "rule", "limit": 500})).json()["items"][::-1]
    assert len(log) == WRITERS + 2
    for before, after in itertools.pairwise(log):
        assert after["before"] == before["after"]
    assert (await admins[1].http.get(path)).json()["priority"] == log[-1]["after"]["priority"]
