"""Attributes of callers in a simulation: from fields of the log, counted as live checks with the same attributes are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cases.logs import COMBINED, T0
from tidegate.errors import SettingsError
from tidegate.tools.simulate.command import simulate
from tidegate.tools.simulate.log_formats import csv_columns, parser_of
from tidegate.tools.simulate.log_times import Malformed

POLICY = """
[callers]
tier_from = "plan"
default_tier = "free"
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/api/*"
  algorithm = "fixed_window"
  subject = "user"
  limits = ["2/minute"]
  [[tiers.rules]]
  endpoint = "/both"
  algorithm = "fixed_window"
  subject = ["org", "user"]
  on_missing = "deny"
  limits = ["1/minute"]
  [[tiers.rules]]
  endpoint = "/api/*"
  algorithm = "fixed_window"
  match = { region = "eu-*" }
  subject = "user"
  limits = ["1/minute"]
  name = "europe"
  [[tiers.rules]]
  endpoint = "/api/*"
  algorithm = "fixed_window"
  subject = "org"
  on_missing = "skip"
  limits = ["3/minute"]
  mode = "shadow"
  name = "orgs"
[[tiers]]
name = "pro"
  [[tiers.rules]]
  endpoint = "/*"
  algorithm = "fixed_window"
  subject = "user"
  limits = ["4/minute"]
"""


@pytest.fixture
def report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY)
    log = tmp_path / "access.log"

    def run(lines: list[str], *field: str, **options: Any) -> dict[str, Any]:
        log.write_text("\n".join(lines) + "\n")
        assert simulate([str(log)], policy, field=list(field), as_json_=True, **options) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def record(path: str = "/api/x", **fields: object) -> str:
    return json.dumps({"time": T0, "ip": "203.0.113.7", "path": path, **fields})


def counts(report: dict[str, Any]) -> dict[tuple[str, str], tuple[int, int]]:
    return {(row["tier"], row["rule"]): (row["allowed"], row["blocked"]) for row in report["rules"] if row["requests"]}


def test_users_organisations_and_plans_of_a_json_log(report: Any) -> None:
    lines = [record(claims={"sub": user}) for user in ("1", "1", "1", "2")]
    lines += [record(claims={"sub": "3", "org": "acme"}, region="eu-west") for _ in range(2)]
    lines += [record("/both", claims={"sub": "1", "org": org}) for org in ("a", "b", "b")]
    lines += [record("/both", claims={"sub": "1"})]
    lines += [record(claims={"sub": "1"}, plan="pro") for _ in range(5)]
    lines += [record(claims={"sub": "9"}, plan="gold"), record(), record()]
    found = report(lines, "user=claims.sub", "org=claims.org", "region=region", "plan=plan")
    assert counts(found) == {
        ("free", "/api/*"): (6, 1),  # 1, 1, 2, 9, and two by address
        ("free", "europe"): (1, 1),
        ("free", "/both"): (2, 1),
        ("free", "orgs"): (2, 0),
        ("pro", "/*"): (4, 1),
    }
    assert found["refused_attributes"] == 1
    assert {(row["subject"], row["rule"]) for row in found["top_blocked"]} == {
        ("user=1", "/api/*"),
        ("user=1", "/*"),
        ("user=3", "europe"),
        ("org=b&user=1", "/both"),
    }


def test_a_tier_that_is_named_comes_before_the_plan(report: Any) -> None:
    lines = [record(user="1", plan="pro") for _ in range(3)]
    assert counts(report(lines, "user=user", "plan=plan", tier="free")) == {("free", "/api/*"): (2, 1)}
    assert counts(report(lines, "user=user", "plan=plan")) == {("pro", "/*"): (3, 0)}


def test_named_fields_of_text_formats(report: Any) -> None:
    lines = [COMBINED.replace("/a/b", "/api/x").replace("- - [", f"- {user} [") for user in ("ann", "ann", "ann", "bob")]
    assert counts(report(lines, "user=user", "org=Agent")) == {("free", "/api/*"): (3, 1), ("free", "orgs"): (3, 1)}
    with pytest.raises(SettingsError, match="has no field 'x_user'; its fields are ip, user"):
        report(lines, "user=x_user")


def test_columns_of_csv() -> None:
    header = csv_columns("time,ip,path,X-User,X-Org")
    parse = parser_of("csv", "ip", None, header=header, attributes=["x-user", "X-Org"])
    assert parse(f"{T0},1.1.1.1,/a,42,").attributes == ("42", "")
    assert parse(f"{T0},,/a,42,acme").attributes == ("42", "acme"), "a line with an attribute needs no address"
    with pytest.raises(Malformed, match="more than 255"):
        parse(f"{T0},1.1.1.1,/a,{'x' * 256},")
    with pytest.raises(SettingsError, match="no column x-team"):
        parser_of("csv", "ip", None, header=header, attributes=["x-team"])


def test_a_line_inside_a_json_field_has_them_too() -> None:
    parse = parser_of("json", "ip", None, attributes=["user"])
    assert parse(json.dumps({"log": COMBINED.replace("- - [", "- ann [")})).attributes == ("ann",)
    assert parse(json.dumps({"log": record(user=7)})).attributes == ("7",)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("colour=x", "the attributes that the policy reads"),
        ("USER", "expected NAME=FIELD"),
        ("org=", "expected NAME=FIELD"),
        ("tier=x", "use --tier"),
        ("api_key=x", "use --key-field"),
        ("x" * 500 + "=y", "is not valid"),
    ],
)
def test_what_is_no_attribute_of_the_policy_is_refused(report: Any, field: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as refused:
        report([record()], field)
    assert len(str(refused.value)) < 400
