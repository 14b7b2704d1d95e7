"""The documentation as a site: it is built, no link leads nowhere, and nothing is left out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "TIDEGATE_REPO_URL": "https://git.example.org/our/tidegate"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    return directory


def test_every_page_is_there_and_reached(site: Path) -> None:
    start = (site / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        if page.stem != "index":
            assert (site / page.stem / "index.html").exists()
            assert f'href="{page.stem}/"' in start, f"{page.name} is in no menu"


def test_what_is_made_from_the_code_is_there(site: Path) -> None:
    told = {name: (site / f"reference/{name}/index.html").read_text() for name in ("python", "data-plane", "control-plane")}
    assert 'id="tidegate.Limiter.check"' in told["python"]
    assert "POST /v1/check" in told["data-plane"]
    assert "/v1/authorize" in told["data-plane"]
    assert "/admin/v1/api-keys" in told["control-plane"]


def test_links_to_other_files_lead_to_the_repository(site: Path) -> None:
    assert "https://git.example.org/our/tidegate/blob/main/deploy/postgres/README.md" in (site / "catalog/index.html").read_text()
