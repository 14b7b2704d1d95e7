"""The plan's formulas: properties over any size, units by hand, bad input, and where each constant comes from."""

from __future__ import annotations

import importlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from bench.__main__ import BENCHES
from bench.constants import MEASURED, SOURCES, collect
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.cases.fleet_targets import API_KEY_BYTES, DATABASE_PERCENT, TARGETS, Target
from tidegate.cli import app
from tidegate.errors import SettingsError
from tidegate.tools.plan.assumptions import PRICES, USE, assume
from tidegate.tools.plan.caches import cache_shares
from tidegate.tools.plan.constants import Constant, measured
from tidegate.tools.plan.fleet import CapacityPlan, make_plan
from tidegate.tools.plan.leases import lease_calls
from tidegate.tools.plan.quantities import parse_quantity, short, size

users = st.floats(min_value=1, max_value=1e10)


def constants(**replaced: float) -> dict[str, Constant]:
    """Round figures, so that results can be worked out by hand."""
    values = {
        "check_cpu_us": 50.0,
        "redis_cpu_us": 20.0,
        "authorize_cpu_us": 40.0,
        "counter_bytes": 200.0,
        "question_bytes": 100.0,
        "answer_bytes": 300.0,
        "to_redis_bytes": 200.0,
        "from_redis_bytes": 50.0,
        "api_key_bytes": 500.0,
        "look_up_cpu_us": 100.0,
        "cache_entry_bytes": 500.0,
        "start_s": 1.0,
        "drain_s": 0.5,
        "instance_mb": 100.0,
        "l1_percent": 70.0,
        "l2_percent": 25.0,
        "database_percent": 5.0,
    }
    return {name: Constant(value, "", "", "", "", "", "") for name, value in (values | replaced).items()}


def plan(dau: float = 10e6, *given: str, **options: Any) -> CapacityPlan:
    return make_plan(dau, constants(), assume(overrides=given), **options)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10M", 10e6),
        ("500k", 500e3),
        ("1.5M", 1.5e6),
        ("2000000", 2e6),
        ("2_000_000", 2e6),
        ("2,000", 2e3),
        ("1G", 1e9),
        ("1 k", 1e3),
    ],
)
def test_quantities_are_read(text: str, value: float) -> None:
    assert parse_quantity(text, "--dau") == value


@pytest.mark.parametrize("text", ["", "ten", "-1M", "0", "0k", "1e6", "10MM", "1.2.3", "nan", "inf", "11G", "M", "1,0", "٣"])
def test_other_quantities_are_rejected_with_value_and_remedy(text: str) -> None:
    with pytest.raises(SettingsError, match="--dau") as caught:
        parse_quantity(text, "--dau")
    assert repr(text) in caught.value.message
    assert "expected" in caught.value.message


@given(st.floats(min_value=0.01, max_value=9.9e9))
def test_a_short_number_reads_as_the_number(value: float) -> None:
    assert parse_quantity(short(value), "--dau") == pytest.approx(value, rel=0.006)


def test_short_numbers_do_not_say_1000_thousand() -> None:
    assert [short(value) for value in (999, 999_960, 350_000, 1.5e6)] == ["999", "1M", "350k", "1.5M"]
    assert size(2.5e9) == "2.5 GB"


def test_a_million_users_by_hand() -> None:
    made = plan(1e6)
    assert made.value("peak_rps") == pytest.approx(1e6 * 100 / 86_400 * 3)
    assert made.value("instance_capacity") == 20_000  # 1 s / 50 µs
    assert made.value("instance_target") == 10_000  # 70 % of it is 14,000, above the rate
    assert made.value("instances") == 3  # 0.35 and one to spare, but at least 3
    assert made.value("counters_bytes") == 1e6 * 10 * 200
    assert made.value("database_bytes") == 500e6
    assert made.value("bandwidth") == pytest.approx(3472.22 * 3000 * 8, rel=1e-4)
    assert made.value("bandwidth_edge") == pytest.approx(made.value("bandwidth") * 0.4)
    assert made.value("bandwidth_checks") == pytest.approx(3472.22 * 400 * 8, rel=1e-4)
    assert made.value("shards") == 3
    assert made.value("redis_nodes") == 6
    assert made.value("cost") == 3 * 30 + 6 * 50 + 3 * (120 + 0.5 * 0.12) + 40
    # 100 requests a day of 3,000 bytes, for 30 days.
    assert made.value("cost_traffic") == pytest.approx(1e6 * 100 * 30 * 3000 / 1e9 * 0.05)


def test_cpu_or_rate_bounds_an_instance_whichever_is_less() -> None:
    slow = make_plan(10e6, constants(check_cpu_us=100), assume())
    assert slow.value("instance_target") == 7_000
    assert slow.value("instances") == math.ceil(34_722 / 7_000) + 1
    assert plan(10e6).value("instances") == 4 + 1


def test_shards_are_bounded_by_memory_or_by_cpu() -> None:
    assert plan(100e6).value("shards") == math.ceil(
        (plan(100e6).value("counters_bytes") + plan(100e6).value("cache_bytes")) / 3e9
    )
    busy = plan(1e6, "counters_per_user=0.01", peak=600_000.0)
    assert busy.value("shards") == math.ceil(busy.value("redis_calls") * 20 / 1e6 / 0.6)


@given(users, st.floats(min_value=1, max_value=100))
def test_more_users_never_need_less(dau: float, times: float) -> None:
    # With leases they may: the more often a user comes, the fewer of its checks are calls.
    less, more = plan(dau, "leases=0"), plan(min(dau * times, 1e10), "leases=0")
    for name in ("peak_rps", "instances", "shards", "redis_memory", "database_bytes", "bandwidth", "bandwidth_redis", "cost"):
        assert more.value(name) >= less.value(name) * (1 - 1e-9), name


@given(users)
def test_every_plan_holds_together(dau: float) -> None:
    made = plan(dau)
    value = made.value
    assert value("l1_share") + value("l2_share") + value("database_share") == pytest.approx(1)
    assert all(0 <= value(name) <= 1 for name in ("l1_share", "l2_share", "database_share"))
    # With one instance away, none has more than it is aimed at.
    assert value("peak_rps") <= (value("instances") - 1) * value("instance_target") * (1 + 1e-9)
    assert value("counters_bytes") + value("cache_bytes") <= value("shards") * 3e9 * (1 + 1e-9)
    assert value("bandwidth_edge") <= value("bandwidth")
    assert value("cost") == pytest.approx(sum(value(f"cost_{part}") for part in ("instances", "redis", "database", "balancers")))
    known, assumed = constants(), {*USE, *(f"prices.{name}" for name in PRICES)}
    names = [line.name for line in made.lines]
    assert len(set(names)) == len(names)
    for line in made.lines:
        assert set(line.rests_on) <= set(known)
        assert set(line.assumes) <= assumed
        assert line.formula
        assert line.shown
        assert math.isfinite(line.value)


@given(st.floats(min_value=1, max_value=1e8), st.floats(min_value=0.001, max_value=1e6), st.integers(1, 100))
def test_leases_save_calls_and_most_with_affinity(keys: float, rate: float, instances: int) -> None:
    same, spread = (lease_calls(keys, rate, each, 5.0, 1.0) for each in (1, instances))
    assert 0 < same <= 1
    assert 0 < spread <= 1
    assert same <= spread * 1.05, "within what one group of ranks has in common"


def test_calls_with_leases_by_hand() -> None:
    # 10/s: 50 checks in the life of a lease, after the one that was granted it, and every pause is short.
    assert lease_calls(1, 10, 1, 5.0, 1.0) == pytest.approx((1 / 51) * 1.02, rel=0.001)
    # One in ten minutes: the pause before it was too long for a lease, but for 1 in 30 of them.
    assert lease_calls(1, 1 / 600, 1, 5.0, 1.0) == pytest.approx(1, rel=0.01)


def test_shards_at_a_hundred_million_users_before_and_after_leases() -> None:
    with_leases, same, without = (
        make_plan(100e6, measured(), assume(overrides=each)) for each in ([], ["affinity=1"], ["leases=0"])
    )
    before = with_leases.value("shards_by_cpu_without_leases")
    assert same.value("shards_by_cpu") < with_leases.value("shards_by_cpu") < before
    assert without.value("redis_calls") > with_leases.value("redis_calls") > same.value("redis_calls")
    assert f"max({before:.0f} by CPU" in next(line.formula for line in without.lines if line.name == "shards")
    assert not any("lease" in line.name for line in without.lines)


def test_a_known_peak_and_known_counters_replace_those_derived_from_users() -> None:
    made = plan(1e6, peak=50_000.0, counters=5e6)
    assert made.value("peak_rps") == 50_000
    assert made.value("mean_rps") == pytest.approx(50_000 / 3)
    assert made.value("counters") == 5e6


def test_notes_report_fleets_above_a_maximum() -> None:
    assert any("maxReplicas" in note for note in plan(1e9).notes)
    assert any("most requested key" in note for note in plan(1e9).notes)
    assert not any("maxReplicas" in note for note in plan(1e6).notes)
    assert not any("l2_ttl_s" in note for note in plan(1e6, "l2_ttl_s=86400").notes)


@given(
    st.floats(min_value=1, max_value=1e9),
    st.floats(min_value=0.01, max_value=1e7),
    st.integers(min_value=1, max_value=100),
    st.floats(min_value=0, max_value=3),
)
def test_caches_share_out_all_look_ups(keys: float, rate: float, instances: int, exponent: float) -> None:
    found = cache_shares(keys, rate, instances, 60, 300, 100_000, exponent)
    assert found.l1 + found.l2 + found.database == pytest.approx(1)
    assert min(found.l1, found.l2, found.database) >= -1e-9
    assert found.l1_entries <= 100_000 * (1 + 1e-6)
    assert found.l2_entries <= keys * (1 + 1e-6) + 1
    longer = cache_shares(keys, rate, instances, 60, 3600, 100_000, exponent)
    assert longer.database <= found.database + 1e-9


def test_one_key_by_hand() -> None:
    # 1/s at one instance: an entry answers the 60 that come in its life, after the one that fetched it.
    found = cache_shares(1, 1.0, 1, 60, 300, 100, 1.0)
    assert found.l1 == pytest.approx(60 / 61)
    to_l2 = 1 / 61
    assert found.database == pytest.approx(to_l2 / (1 + to_l2 * 300))
    assert found.hottest == 1


def test_zipf_is_the_law() -> None:
    # The first of a hundred brings 1 / H(100).
    assert cache_shares(100, 1, 1, 60, 300, 1000, 1.0).hottest == pytest.approx(
        1 / sum(1 / rank for rank in range(1, 101)), rel=0.001
    )
    # Ranks taken together stay close to the exact sum.
    exact = 1 / sum(1 / rank for rank in range(1, 100_001))
    assert cache_shares(100_000, 1, 1, 60, 300, 1000, 1.0).hottest == pytest.approx(exact, rel=0.005)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["cpu_target"], "NAME=VALUE"),
        (["cpu_target=2"], "0.05 to 1"),
        (["cpu_target=much"], "must be a number"),
        (["cpu_target=nan"], "out of range"),
        (["min_shards=2.5"], "must be an integer"),
        (["nothing=1"], "expected one of requests_per_user"),
        (["prices.nothing=1"], "prices.instance"),
        (["min_instances=60"], "max_instances"),
        (["cost.instance=1"], "unknown assumption"),
    ],
)
def test_wrong_assumptions_are_rejected(given: list[str], words: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(words)):
        assume(overrides=given)


def test_a_file_of_assumptions_goes_before_the_defaults_and_options_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "ours.toml"
    file.write_text('prices_of = "2027-01-31"\n[use]\ncpu_target = 0.5\nmin_instances = 4\n[prices]\ninstance = 45\n')
    found = assume(file, ["cpu_target=0.6"], {"peak_factor": 5})
    assert (found.use["cpu_target"], found.use["min_instances"], found.prices["instance"]) == (0.6, 4, 45)
    assert found.use["peak_factor"] == 5
    assert found.prices_of == "2027-01-31"
    assert set(found.replaced) == {"cpu_target", "min_instances", "prices.instance", "peak_factor"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[use", "not valid TOML"),
        ("[other]\na = 1", "'other'"),
        ("use = 1", "'use'"),
        ("[use]\ncpu_target = true", "must be a number"),
    ],
)
def test_wrong_files_are_rejected(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=re.escape(words)) as caught:
        assume(file)
    assert str(file) in caught.value.message


def test_constants_are_those_of_benches_that_exist() -> None:
    found = measured()
    assert set(found) == set(SOURCES)
    for name, constant in found.items():
        source = SOURCES[name]
        assert source.bench in BENCHES
        assert constant.command == f"python -m bench.{source.bench}"
        assert (constant.label, constant.unit) == (source.label, source.unit)
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", constant.measured_on)
        assert constant.value > 0
        assert importlib.util.find_spec(f"bench.{source.bench}") is not None
    assert Path(MEASURED).exists()


def results(directory: Path, smoke: bool = False) -> None:
    benches = {source.bench for source in SOURCES.values()}
    for bench in benches:
        figures = [{"label": source.label, "value": 1.23456} for source in SOURCES.values() if source.bench == bench]
        text = {"smoke": smoke, "command": f"python -m bench.{bench}", "measured_on": "2027-01-01", "python": "3", "machine": "m"}
        (directory / f"{bench}.json").write_text(json.dumps(text | {"figures": figures}))


def test_constants_are_collected_from_results(tmp_path: Path) -> None:
    results(tmp_path)
    found = collect(tmp_path)
    assert set(found) == set(SOURCES)
    assert found["check_cpu_us"]["value"] == 1.235
    assert found["check_cpu_us"]["measured_on"] == "2027-01-01"


def test_results_that_are_missing_or_of_smoke_runs_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not there: run python -m bench"):
        collect(tmp_path)
    results(tmp_path, smoke=True)
    with pytest.raises(ValueError, match="smoke run"):
        collect(tmp_path)
    results(tmp_path)
    (tmp_path / "capacity.json").write_text((tmp_path / "capacity.json").read_text().replace("bytes of the question", "renamed"))
    with pytest.raises(ValueError, match="has no figure"):
        collect(tmp_path)


@pytest.mark.parametrize(("name", "target"), [(name, target) for name, targets in TARGETS.items() for target in targets])
def test_a_plan_from_the_measured_constants_meets_the_reference_sizes(name: str, target: Target) -> None:
    value = make_plan(target.dau, measured(), assume()).value(name)
    if target.relation == "equals":
        assert value == pytest.approx(target.value, rel=0.01)
    else:
        assert 0 < value <= target.value


def test_measured_shares_and_sizes_meet_the_reference() -> None:
    found = measured()
    assert found["database_percent"].value <= DATABASE_PERCENT
    assert found["api_key_bytes"].value <= API_KEY_BYTES


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "line", "rect", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "200"})


def test_the_command_prints_formulas_constants_and_assumptions() -> None:
    done = run("--dau", "10M")
    assert done.exit_code == 0
    for text in (
        "A fleet for 10M daily users",
        "10M users × 100 / 86,400 s",
        "check_cpu_us",
        "bench.scaling",
        "requests_per_user",
        "prices.instance",
    ):
        assert text in done.output


def test_json_keeps_its_schema() -> None:
    done = run("--dau", "1M", "--json", "--set", "prices.instance=45")
    found = json.loads(done.output)
    assert set(found) == {"dau", "figures", "lines", "constants", "assumptions", "prices_of", "notes"}
    assert found["dau"] == 1e6
    assert set(found["figures"]) == {line["name"] for line in found["lines"]}
    assert set(found["lines"][0]) == {"name", "value", "unit", "shown", "title", "formula", "rests_on", "assumes"}
    for line in found["lines"]:
        assert set(line["rests_on"]) <= set(found["constants"])
        assert set(line["assumes"]) <= set(found["assumptions"])
    assert set(found["constants"]["check_cpu_us"]) == {"value", "unit", "what", "command", "label", "measured_on", "machine"}
    assert found["assumptions"]["prices.instance"] == {"value": 45.0, "what": PRICES["instance"].description, "replaced": True}


def test_users_follow_from_a_rate() -> None:
    found = json.loads(run("--rps", "35k", "--json").output)
    assert found["figures"]["peak_rps"] == 35_000
    assert found["dau"] == pytest.approx(35_000 / 3 * 86_400 / 100)


def test_the_page_is_whole_and_escapes_what_it_is_given(tmp_path: Path) -> None:
    file, page = tmp_path / "ours.toml", tmp_path / "plan.html"
    file.write_text('prices_of = "<script>alert(1)</script>\\u001b[2J"\n')
    assert run("--dau", "10M", "--assumptions", str(file), "--html", str(page)).exit_code == 0
    text = page.read_text()
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert tags.seen.count("svg") == 4
    assert "script" not in tags.seen
    assert "\x1b" not in text
    assert "A fleet for 10M daily users" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--dau 10M"),
        (("--dau", "ten"), "'ten'"),
        (("--dau", "0"), "more than 0"),
        (("--dau", "0.5"), "at least 1"),
        (("--rps", "fast"), "'fast'"),
        (("--dau", "1M", "--keys", "-5"), "'-5'"),
        (("--dau", "1M", "--requests-per-user", "x"), "--requests-per-user 'x'"),
        (("--dau", "1M", "--peak-factor", "0.5"), "1 to 1000"),
        (("--dau", "1M", "--assumptions", "/nowhere/at.toml"), "/nowhere/at.toml cannot be read"),
        (("--dau", "1M", "--html", "/nowhere/page.html"), "cannot be written"),
    ],
)
def test_errors_name_the_invalid_value_and_what_is_expected(arguments: tuple[str, ...], words: str) -> None:
    done = run(*arguments)
    assert isinstance(done.exception, SettingsError)
    assert words in done.exception.message
