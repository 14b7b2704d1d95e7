"""A real log: 10,000 lines of a public site, nearly all of them out of order."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tidegate.tools.simulate.command import simulate
from tidegate.tools.simulate.log_formats import parser_of

ROOT = Path(__file__).parents[2]
LOG = ROOT.parent / "shared" / "data" / "apache_access.log"
POLICY = ROOT / "examples" / "simulate.policy.toml"

pytestmark = pytest.mark.skipif(
    not LOG.exists(), reason=f"the log is not there: {LOG.name} beside the repository, in shared/data"
)


def told(capsys: pytest.CaptureFixture[str], log: Path, **options: Any) -> dict[str, Any]:
    assert simulate([str(log)], POLICY, as_json_=True, **options) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_every_line_is_accounted_for(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, LOG)
    assert found["lines"] == 10_000
    assert found["requests"] + found["malformed"] + found["refused_paths"] == 10_000
    assert found["allowed"] + found["blocked"] == found["requests"]
    enforced = [rule for rule in found["rules"] if rule["mode"] != "shadow"]
    assert sum(rule["blocked"] for rule in enforced) == found["blocked"] > 0
    assert sum(step[1] + step[2] for step in found["series"]) == found["requests"]
    assert found["out_of_order"] > 9_000
    assert found["late"] == 0
    assert found["worst_minute"]["blocked"] <= found["top_blocked"][0]["blocked"] * 10


def test_the_order_of_its_lines_does_not_matter(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    parse = parser_of("combined", "ip", None)
    lines = sorted(LOG.read_text(encoding="utf-8").splitlines(), key=lambda line: parse(line).at_us)
    in_order = tmp_path / "sorted.log"
    in_order.write_text("\n".join(lines))
    shuffled = tmp_path / "shuffled.log"
    chance = random.Random(7)
    shuffled.write_text("\n".join(sorted(lines, key=lambda line: parse(line).at_us + chance.uniform(0, 119e6))))
    real, ordered, mixed = (told(capsys, log) for log in (LOG, in_order, shuffled))
    assert ordered.pop("out_of_order") == 0
    assert real.pop("out_of_order") > 9_000
    assert mixed.pop("out_of_order") > 8_000
    assert real == ordered == mixed


def test_a_rule_agrees_with_counting_by_hand(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(
        '[[tiers]]\nname = "t"\n[[tiers.rules]]\nendpoint = "/presentations/*"\nalgorithm = "fixed_window"\n'
        'limits = ["15/minute"]\nsubject = "ip"\n'
    )
    assert simulate([str(LOG)], policy, as_json_=True) == 0
    found = json.loads(capsys.readouterr().out)
    parse = parser_of("combined", "ip", None)
    asked: Counter[tuple[str, int]] = Counter()
    for line in LOG.read_text(encoding="utf-8").splitlines():
        request = parse(line)
        refused = any(piece in request.path for piece in ("//", ";", "%0"))
        if request.path.startswith("/presentations/") and not refused:
            asked[request.ip, request.at_us // 60_000_000] += 1
    blocked = sum(max(count - 15, 0) for count in asked.values())
    rule = next(each for each in found["rules"] if each["rule"] == "/presentations/*")
    assert (rule["requests"], rule["blocked"]) == (asked.total(), blocked)
    assert blocked > 100
