"""`tidegate`, and `python -m tidegate`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say what must be installed for it."""
    try:
        from tidegate.cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "tidegate":
            raise
        print(f"the command tidegate needs {error.name}: pip install 'tidegate[server]'", file=sys.stderr)
        raise SystemExit(2) from None
    run()


if __name__ == "__main__":
    main()
