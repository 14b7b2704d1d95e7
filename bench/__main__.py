"""All benches, one after the other, each in a process of its own: python -m bench [--smoke | --write-constants].

A full run ends with writing the constants that `tidegate plan` computes with; `--write-constants` writes them from the results
that are there, without measuring anything.
"""

import argparse
import subprocess
import sys

from drills.side_by_side import run_all

from bench.constants import write

BENCHES = (
    "inprocess",
    "python",
    "memory",
    "matching",
    "adversarial",
    "violations",
    "ledger",
    "telemetry",
    "jwt",
    "attributes",
    "quotas",
    "access",
    "simulate",
    "http",
    "http_work",
    "callers_auth",
    "client",
    "gateways",
    "grpc",
    "redis_calls",
    "redis_memory",
    "redis_http",
    "leases",
    "holds",
    "service_peers",
    "catalog",
    "key_import",
    "console",
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
        if asked.smoke:
            # Nothing is measured: two at a time, so that one works while another waits.
            failed = run_all({bench: [sys.executable, "-m", f"bench.{bench}", "--smoke"] for bench in BENCHES}, at_once=2)
            sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
        for bench in BENCHES:
            subprocess.run([sys.executable, "-m", f"bench.{bench}"], check=True)
    print(f"\nconstants of the plan: {write()}")


if __name__ == "__main__":
    main()
