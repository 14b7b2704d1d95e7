"""What a check with attributes costs beside one with an API key: CPU of the server per `POST /v1/check`.

    python -m bench.attributes [--smoke]

Two attributes and a subject of both, in rounds that alternate with checks by API key; medians over the rounds. One limit: limits
of the tier itself would count the address beside, a second subject, where they count the same API key.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from bench.http import cpu_of_threads_s, need_wrk, ours, wrk
from bench.measure import Goal, asked_for_smoke, report

POLICY = """
[callers]
default_tier = "users"
[[tiers]]
name = "users"
  [[tiers.rules]]
  endpoint = "/api/v1/*"
  subject = ["org", "user"]
  limits = ["100000000/minute"]
[[tiers]]
name = "keys"
  [[tiers.rules]]
  endpoint = "/api/v1/*"
  limits = ["100000000/minute"]
[[api_keys]]
key = "demo-free-key-0001"
tier = "keys"
"""
POST = """
wrk.method = "POST"
wrk.body = '{%s,"method":"GET","path":"/api/v1/items","ip":"203.0.113.7"}'
wrk.headers["Content-Type"] = "application/json"
"""
CALLERS = {
    "an API key": '"api_key":"demo-free-key-0001"',
    "two attributes and a subject of both": '"attributes":{"org":"acme","user":"user-42"}',
}


def main() -> None:
    smoke = asked_for_smoke(__doc__)
    rounds, seconds = (1, 1) if smoke else (9, 2)
    need_wrk()
    cpu_us: dict[str, list[float]] = {name: [] for name in CALLERS}
    with tempfile.TemporaryDirectory() as directory, ours(directory, POLICY) as (pid, port):
        for number, fields in enumerate(CALLERS.values()):
            script = Path(directory, f"{number}.lua")
            script.write_text(POST % fields)
            wrk(port, "/v1/check", 1, 64, str(script), ())
        for _ in range(rounds):
            for number, name in enumerate(CALLERS):
                before = cpu_of_threads_s(pid)
                done = wrk(port, "/v1/check", seconds, 64, str(Path(directory, f"{number}.lua")), ())
                if done["errors"]:
                    raise RuntimeError(f"{done['errors']} checks with {name} failed")
                cpu_us[name].append((cpu_of_threads_s(pid) - before) / done["requests"] * 1e6)
    by_key, by_attributes = cpu_us.values()
    report(
        "attributes",
        "POST /v1/check by attributes (CPU of the server's process)",
        [
            *((f"{name}, µs CPU", statistics.median(taken), None) for name, taken in cpu_us.items()),
            (
                "CPU to that of an API key",
                statistics.median(own / key for own, key in zip(by_attributes, by_key, strict=True)),
                Goal(at_most=1.15),
            ),
        ],
        smoke=smoke,
    )


if __name__ == "__main__":
    main()
