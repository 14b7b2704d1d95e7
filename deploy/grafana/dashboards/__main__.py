"""Write the dashboards: `python -m dashboards DIRECTORY`, by default `json` beside this package."""

from __future__ import annotations

import sys
from pathlib import Path

from dashboards import load_balancers, postgresql, redis, service, slo
from dashboards.layout import to_json

DASHBOARDS = {
    "service": service.made,
    "redis": redis.made,
    "postgresql": postgresql.made,
    "load_balancers": load_balancers.made,
    "slo": slo.made,
}


def main(directory: Path) -> None:
    """Write each dashboard to a file of its name.

    Args:
        directory: where; made if it is not there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, made in DASHBOARDS.items():
        (directory / f"{name}.json").write_text(to_json(made()))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "json")
