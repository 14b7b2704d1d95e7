"""`make sbom`: the bill of materials of the image's Python packages, CycloneDX 1.6, from `locks/image.txt`.

Offline and reproducible. What the base image brings (Debian, Python) is not in it: `syft` on the built image lists both.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]


UPLOT: Final = ROOT / "src" / "tidegate" / "doors" / "console" / "static" / "vendor" / "uplot.iife.min.js"


def _add_vendored(target: Path) -> None:
    """Add what the console brings along: uPlot, of which the first line says the version."""
    script = UPLOT.read_bytes()
    found = re.search(rb"uPlot \(v([0-9.]+)\)", script)
    assert found is not None
    version = found[1].decode()
    bill = json.loads(target.read_text())
    bill["components"].append(
        {
            "type": "library",
            "bom-ref": f"uplot=={version}",
            "name": "uplot",
            "version": version,
            "purl": f"pkg:npm/uplot@{version}",
            "licenses": [{"license": {"id": "MIT"}}],
            "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(script).hexdigest()}],
        }
    )
    target.write_text(json.dumps(bill, indent=2, sort_keys=True) + "\n")


def main() -> int:
    """Write `dist/tidegate-VERSION.cdx.json`.

    Returns:
        The exit code of cyclonedx-py; 1 if it left out a package, or added one.
    """
    found = re.search(r'__version__ = "([^"]+)"', (ROOT / "src" / "tidegate" / "_version.py").read_text())
    assert found is not None
    target = ROOT / "dist" / f"tidegate-{found[1]}.cdx.json"
    target.parent.mkdir(exist_ok=True)
    # The lock does not separate direct dependencies from others, so the root has no edges; cyclonedx-py warns of that.
    command = [
        sys.executable,
        "-W",
        "ignore:The Component this BOM is describing:UserWarning",
        "-m",
        "cyclonedx_py",
        "requirements",
        "--pyproject",
        str(ROOT / "pyproject.toml"),
    ]
    command += [
        "--mc-type",
        "application",
        "--output-reproducible",
        "--output-file",
        str(target),
        str(ROOT / "locks" / "image.txt"),
    ]
    done = subprocess.run(command, check=False)
    if done.returncode != 0:
        return done.returncode
    pinned = set(re.findall(r"^([a-z0-9._-]+)(?:\[[^]]*\])?==", (ROOT / "locks" / "image.txt").read_text(), re.MULTILINE))
    listed = {component["name"].lower() for component in json.loads(target.read_text())["components"]}
    if listed != pinned:
        print(
            f"sbom: {target.relative_to(ROOT)} and locks/image.txt differ in {', '.join(sorted(listed ^ pinned))}",
            file=sys.stderr,
        )
        return 1
    _add_vendored(target)
    print(f"sbom: {target.relative_to(ROOT)}, {len(listed)} packages, and uPlot")
    return 0


if __name__ == "__main__":
    sys.exit(main())
