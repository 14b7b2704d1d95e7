"""Every test is of one kind, and the kinds are what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import markers

TESTS = Path(__file__).parents[1]


def test_every_test_has_exactly_one_kind(request: pytest.FixtureRequest) -> None:
    """Of those that run now: with `make test`, of all that there are."""
    for item in request.session.items:
        kinds = [mark.name for mark in item.iter_markers() if mark.name in markers.MEANINGS]
        assert len(kinds) == 1, (item.nodeid, kinds)
        assert kinds[0] != markers.UNIT or item.path.parent == TESTS / "unit", item.nodeid


@pytest.mark.parametrize(
    ("path", "fixtures", "kind"),
    [
        ("tests/unit/test_gate.py", ("clock", "gate", "tmp_path"), markers.UNIT),
        ("tests/unit/test_subjects.py", ("running_redis", "redis_server"), markers.SERVERS),
        ("tests/unit/test_logs.py", ("serve",), markers.SERVERS),
        ("tests/integration/test_admin.py", (), markers.SERVERS),
        ("tests/browser/test_console.py", (), markers.SERVERS),
        ("tests/integration/test_kubernetes.py", ("tmp_path",), markers.DEPLOY),
    ],
)
def test_the_folder_and_the_fixtures_decide(path: str, fixtures: tuple[str, ...], kind: str) -> None:
    assert markers.kind_of(Path(path), fixtures) == kind


def test_files_about_deploy_are_there() -> None:
    """One that was renamed would silently become `servers`: name it in `tests/markers.py`."""
    assert {path.name for path in (TESTS / "integration").iterdir()} >= markers.DEPLOY_FILES


def test_no_file_marks_its_own_tests() -> None:
    for file in TESTS.rglob("test_*.py"):
        text = file.read_text()
        assert not any(f"pytest.mark.{kind}" in text.replace('"', "") for kind in markers.MEANINGS if file != Path(__file__)), (
            file
        )


def test_no_example_of_hypothesis_fails_for_being_slow() -> None:
    assert settings().deadline is None
    assert HealthCheck.too_slow in settings().suppress_health_check
    for file in TESTS.rglob("*.py"):
        assert file in (Path(__file__), TESTS / "conftest.py") or "deadline=None" not in file.read_text(), (
            f"{file}: the profile in tests/conftest.py says it for all"
        )
