"""The policy file is followed however it changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tidegate.errors import CatalogError, CatalogUnavailable, PolicyError, TidegateError
from tidegate.policy.file_watcher import watch_policy
from tidegate.policy.model import Policy


def policy(name: str) -> str:
    return f'[[tiers]]\nname = "{name}"\n'


class Watched:
    """What a watcher has said so far."""

    def __init__(self) -> None:
        self.applied: list[str] = []
        self.refused: list[PolicyError] = []
        self.failures: list[TidegateError] = []

    async def apply(self, new: Policy) -> None:
        if self.failures:
            raise self.failures.pop()
        self.applied.append(new.tiers[0].name)

    async def until(self, condition: Callable[[], Any]) -> None:
        for _ in range(400):
            if condition():
                return
            await asyncio.sleep(0.02)
        raise AssertionError((self.applied, self.refused))


@pytest.fixture
async def watch() -> AsyncIterator[Callable[[Path], Watched]]:
    tasks: list[asyncio.Task[None]] = []

    def start(path: Path) -> Watched:
        watched = Watched()
        tasks.append(asyncio.create_task(watch_policy(path, watched.apply, watched.refused.append, poll_s=0.05)))
        return watched

    yield start
    for task in tasks:
        assert not task.done(), "the watcher never ends by itself"
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_written_in_place_and_renamed_over(tmp_path: Path, watch: Callable[[Path], Watched]) -> None:
    file = tmp_path / "p.toml"
    file.write_text(policy("a"))
    watched = watch(file)
    await watched.until(lambda: watched.applied == ["a"])
    file.write_text(policy("b"))  # same size, same second
    await watched.until(lambda: watched.applied == ["a", "b"])
    (tmp_path / "new").write_text(policy("c"))
    (tmp_path / "new").rename(file)
    await watched.until(lambda: watched.applied == ["a", "b", "c"])
    file.touch()
    await asyncio.sleep(0.3)
    assert watched.applied == ["a", "b", "c"], "a new time alone is no change"


async def test_wrong_content_is_rejected_once(tmp_path: Path, watch: Callable[[Path], Watched]) -> None:
    file = tmp_path / "p.toml"
    file.write_text(policy("a"))
    watched = watch(file)
    await watched.until(lambda: watched.applied == ["a"])
    file.write_text(policy("a") + "x = 1\n")
    await watched.until(lambda: watched.refused)
    await asyncio.sleep(0.3)
    assert [error.line for error in watched.refused] == [3]
    file.write_text(policy("a"))
    await watched.until(lambda: watched.applied == ["a", "a"])


async def test_deleted_and_made_anew(tmp_path: Path, watch: Callable[[Path], Watched]) -> None:
    file = tmp_path / "deep" / "p.toml"
    watched = watch(file)
    await watched.until(lambda: len(watched.refused) == 1)
    assert "cannot be read: No such file or directory" in watched.refused[0].reason
    file.parent.mkdir()
    file.write_text(policy("a"))
    await watched.until(lambda: watched.applied == ["a"])
    file.unlink()
    await watched.until(lambda: len(watched.refused) == 2)
    file.write_text(policy("b"))
    await watched.until(lambda: watched.applied == ["a", "b"])


async def test_swapped_directory_links(tmp_path: Path, watch: Callable[[Path], Watched]) -> None:
    def publish(name: str) -> None:
        (tmp_path / f"..{name}").mkdir()
        (tmp_path / f"..{name}" / "p.toml").write_text(policy(name))
        (tmp_path / "..tmp").symlink_to(f"..{name}")
        (tmp_path / "..tmp").rename(tmp_path / "..data")

    publish("a")
    (tmp_path / "p.toml").symlink_to("..data/p.toml")
    watched = watch(tmp_path / "p.toml")
    await watched.until(lambda: watched.applied == ["a"])
    for name in ("b", "c", "d"):
        publish(name)
        await watched.until(lambda expected=name: watched.applied[-1] == expected)
    assert watched.applied == ["a", "b", "c", "d"]


async def test_half_written_file_is_not_judged(tmp_path: Path, watch: Callable[[Path], Watched]) -> None:
    file = tmp_path / "p.toml"
    file.write_text(policy("a"))
    watched = watch(file)
    await watched.until(lambda: watched.applied == ["a"])
    for length in range(1, 60):
        file.write_text((policy("b") + "# a comment that makes it longer than one piece")[:length])
        await asyncio.sleep(0.01)
    file.write_text(policy("b"))
    await watched.until(lambda: watched.applied[-1] == "b")
    assert not watched.refused


async def test_catalog_that_rejects_or_is_unavailable(tmp_path: Path, watch: Callable[[Path], Watched]) -> None:
    file = tmp_path / "p.toml"
    file.write_text(policy("a"))
    watched = watch(file)
    watched.failures = [CatalogError("tier in use"), CatalogUnavailable("database away")]
    await watched.until(lambda: len(watched.refused) >= 2)
    assert [error.reason for error in watched.refused] == ["database away", "tier in use"], "away: tried again; refused: not"
    await asyncio.sleep(0.2)
    assert watched.applied == []
    file.write_text(policy("b"))
    await watched.until(lambda: watched.applied == ["b"])
