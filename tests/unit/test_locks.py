"""The locks: exact versions with hashes that fit pyproject.toml, and what audits them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.audit import findings

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = {
    # An extra that includes another one names it as an extra of Tidegate itself.
    extra: [each for each in wanted if not each.startswith("tidegate[")]
    for extra, wanted in PROJECT["project"]["optional-dependencies"].items()
}
GROUPS = PROJECT["dependency-groups"]
BASE = PROJECT["project"]["dependencies"]
WANTED = {
    "run": [*BASE, *EXTRAS["server"]],
    "image": [*BASE, *(each for extra in ("server", "postgres", "otel", "envoy", "envoy-tls", "jwt") for each in EXTRAS[extra])],
    "dev": [*BASE, *(each for name in ("test", "check", "bench", "monitoring", "docs", "build") for each in GROUPS[name])],
    "build": GROUPS["build"],
    "supply": GROUPS["supply"],
}


def pins(name: str) -> dict[str, list[tuple[Requirement, int]]]:
    """Package → its pins (one for each range of Python, where they differ) with the number of their hashes."""
    text = re.sub(r"^ *#.*\n", "", (ROOT / "locks" / f"{name}.txt").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[tuple[Requirement, int]]] = {}
    for line in text.splitlines():
        if line.strip():
            requirement = Requirement(line.split(" --hash")[0].strip())
            found.setdefault(canonicalize_name(requirement.name), []).append((requirement, line.count("--hash=sha256:")))
    return found


@pytest.mark.parametrize("name", WANTED)
def test_a_lock_fits_the_ranges(name: str) -> None:
    found = pins(name)
    for text in WANTED[name]:
        wanted = Requirement(text)
        versions = [pin for pin, _ in found[canonicalize_name(wanted.name)]]
        for pin in versions:
            (version,) = [each.version for each in pin.specifier]
            assert wanted.specifier.contains(version, prereleases=True), f"{text} in pyproject.toml, {pin} locked: make lock"


@pytest.mark.parametrize("name", WANTED)
def test_everything_has_one_exact_version_and_its_hashes(name: str) -> None:
    for several in pins(name).values():
        for pin, hashes in several:
            assert [each.operator for each in pin.specifier] == ["=="]
            assert hashes >= 1
        for python in ("3.11", "3.12", "3.13", "3.14"):
            environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
            holding = [pin for pin, _ in several if pin.marker is None or Marker(str(pin.marker)).evaluate(environment)]
            assert len(holding) <= 1, f"{several[0][0].name} twice on Python {python}"


def test_the_image_has_what_the_tests_ran_with() -> None:
    tested = pins("dev")
    for name in ("run", "image", "build"):
        for package, several in pins(name).items():
            assert {str(pin.specifier) for pin, _ in several} <= {str(pin.specifier) for pin, _ in tested[package]}


def test_the_image_and_the_environments_install_by_hash_alone() -> None:
    for file in ("deploy/docker/Dockerfile", "scripts/make-venv"):
        text = re.sub(r"^#.*\n", "", (ROOT / file).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
        lines = re.findall(r"\bpip [^\n&]*install[^\n&]*", text)
        assert len(lines) >= 2
        for line in lines:
            assert "--no-deps" in line
            assert "--require-hashes" in line or "--no-index" in line or "--editable ." in line, line


def test_an_audit_that_looked_nothing_up_is_none() -> None:
    skipped = {"name": "editables", "skip_reason": "Dependency not found on PyPI and could not be audited: editables (0.6)"}
    clean = {"name": "pluggy", "version": "1.7.0", "vulns": []}
    bad = {
        "name": "flask",
        "version": "0.5",
        "vulns": [{"id": "PYSEC-2019-179", "aliases": ["CVE-2019-1010083"], "fix_versions": ["1.0"]}],
    }
    assert findings({"dependencies": [skipped, skipped]}) == (0, [])
    assert findings({"dependencies": [skipped, clean]}) == (1, [])
    assert findings({"dependencies": [clean, bad]}) == (2, ["flask 0.5: PYSEC-2019-179 (CVE-2019-1010083), fixed in 1.0"])
