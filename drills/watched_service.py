"""What an outage of a Redis looks like to those who watch: a whole installation under load, drawn from its Prometheus.

    python -m drills.watched_service docs/img/service.png [--minutes 4]

Halfway a Redis master is killed, and it is back, empty, after an eighth of the time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.integration.watched import Watched

DIVISOR = 15
"""A scrape each second: rates over 10 s are then as fine as those over 2.5 minutes of the shipped intervals."""
WINDOW = "10s"
PLOT = Path(__file__).parents[1] / "scripts/plot_service.py"


def main() -> None:
    """Run the installation for as long as the command line says, then draw."""
    parser = argparse.ArgumentParser(description="Draw a whole installation that loses a Redis under load.")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("--minutes", type=float, default=4, help="of load (default: 4)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, Watched(Path(directory), DIVISOR) as watched:
        began = time.monotonic()
        time.sleep(given.minutes * 30)
        watched.lose_a_master(given.minutes * 7.5)
        time.sleep(max(0.0, began + given.minutes * 60 - time.monotonic()))
        given.picture.parent.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            PLOT,
            watched.prometheus.url,
            given.picture,
            "--minutes",
            str(given.minutes),
            "--window",
            WINDOW,
        ]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
