"""The last release that served the data plane with Granian, installed beside the present one as a peer of `bench.http`.

    python -m bench.granian_release

It builds that commit of this repository and installs it, with its dependencies from the package registry, into `.venv-granian`.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
COMMIT: Final = "4a0850ebc556bc343bcb43a146a447afc6635865"
"""The parent of the commit that replaced Granian."""
_DIRECTORY: Final = ROOT / ".venv-granian"


def installed() -> str | None:
    """The Python that runs the release; None where it is not installed."""
    python = _DIRECTORY / "bin" / "python"
    return str(python) if (_DIRECTORY / "bin" / "tidegate").exists() else None


def main() -> None:
    known = subprocess.run(["git", "cat-file", "-e", f"{COMMIT}^{{commit}}"], cwd=ROOT, capture_output=True, check=False)
    if known.returncode:
        sys.exit(f"the commit {COMMIT[:12]} is not in {ROOT}: fetch the whole history (git fetch --unshallow)")
    venv.create(_DIRECTORY, clear=True, with_pip=True)
    python = _DIRECTORY / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"git+file://{ROOT}@{COMMIT}"], check=True)
    print(f"installed the release of {COMMIT[:12]} into {_DIRECTORY}")


if __name__ == "__main__":
    main()
