"""All benches, one after the other, each in a process of its own: python -m bench [--smoke | --write-constants].

A full run ends with writing the constants that `tidegate plan` computes with; `--write-constants` writes them from the results
that are there, without measuring anything.
"""

import argparse
import subprocess
import sys

from bench.constants import write

BENCHES = (
    "inprocess",
    "memory",
    "matching",
    "adversarial",
    "violations",
    "telemetry",
    "jwt",
    "simulate",
    "http",
    "callers_auth",
    "client",
    "gateways",
    "grpc",
    "redis_calls",
    "redis_memory",
    "redis_http",
    "service_peers",
    "catalog",
    "capacity",
    "scaling",
)


def main() -> None:
    """Run them all, or write the constants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--smoke", action="store_true", help="the smallest size: that it works, not how fast")
    either.add_argument("--write-constants", action="store_true", help="write what `tidegate plan` computes with, and end")
    asked = parser.parse_args()
    if not asked.write_constants:
        for bench in BENCHES:
            flags = ["--smoke"] if asked.smoke else []
            subprocess.run([sys.executable, "-m", f"bench.{bench}", *flags], check=True)
    if not asked.smoke:
        print(f"\nconstants of the plan: {write()}")


if __name__ == "__main__":
    main()
