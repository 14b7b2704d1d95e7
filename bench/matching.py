"""Finding the rule of a request among 1,000 rules of a tier.

python -m bench.matching [--smoke]
"""

from __future__ import annotations

import statistics
import time

from bench.measure import Goal, asked_for_smoke, report
from tidegate.policy.matching import CompiledTier
from tidegate.policy.model import Tier
from tidegate.policy.rules import Rule


def main() -> None:
    smoke = asked_for_smoke(__doc__)
    rules = [Rule.make(f"/literal/number{number}", ["1/s"]) for number in range(250)]
    rules += [Rule.make(f"/api/v1/{{tenant}}/kind{number}/{{id}}", ["1/s"]) for number in range(250)]
    rules += [Rule.make(f"/files{number}/*", ["1/s"]) for number in range(250)]
    rules += [Rule.make(f"/shared/*/end{number}", ["1/s"]) for number in range(250)]
    by_path = CompiledTier(Tier.make("t", rules))
    rules = [Rule.make("/api/*", ["1/s"], match={"plan": "pro", "org": f"o-{number}"}) for number in range(250)]
    rules += [Rule.make("/api/*", ["1/s"], match={"org": f"o-{number}", "region": "eu-*"}) for number in range(250)]
    rules += [Rule.make("/api/*", ["1/s"], match={"region": f"us-{number}-*"}) for number in range(250)]
    rules += [Rule.make(f"/files{number}/*", ["1/s"], match={"plan": "pro"}) for number in range(250)]
    by_attributes = CompiledTier(Tier.make("t", rules))
    rounds, count = (1, 2_000) if smoke else (7, 50_000)
    figures: list[tuple[str, float, Goal | None]] = []
    for label, tier, path, attributes in (
        ("literal", by_path, "/literal/number200", {}),
        ("{id} pattern", by_path, "/api/v1/acme/kind200/42", {}),
        ("* at the end", by_path, "/files200/a/b/c.bin", {}),
        ("* with 250 of one beginning", by_path, "/shared/x/y/end200", {}),
        ("no match", by_path, "/nothing/here/at/all", {}),
        ("match of two values", by_attributes, "/api/items", {"plan": "pro", "org": "o-200"}),
        ("match of a value and a *", by_attributes, "/api/items", {"org": "o-200", "region": "eu-west-1"}),
        ("match of a *", by_attributes, "/api/items", {"org": "other", "region": "us-200-east"}),
        ("match of a value, * at the end", by_attributes, "/files200/a/b/c.bin", {"plan": "pro"}),
        ("attributes, no match", by_attributes, "/api/items", {"plan": "free", "org": "other", "region": "ap"}),
        ("no attributes, no match", by_attributes, "/api/items", {}),
    ):
        taken = []
        for _ in range(rounds):
            started = time.process_time()
            for _ in range(count):
                tier.match("GET", path, attributes)
            taken.append((time.process_time() - started) / count * 1e6)
        figures.append((f"{label}, µs CPU", statistics.median(taken), Goal(at_most=5)))
    report("matching", "One rule among 1,000", figures, smoke=smoke)


if __name__ == "__main__":
    main()
