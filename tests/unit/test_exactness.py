"""The checker of drills: what is above a limit is found, to the unit; what is not certain is not claimed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from drills import exactness
from drills.admissions import Admission, AdmissionLog, admission_of, in_order, read_log
from drills.exactness import prove
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests import oracles
from tests.conftest import MOMENT_US, Clock
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Decision
from tidegate.policy.limits import Algorithm, Limit, LimitSet

S = 1_000_000
MINUTE_US = MOMENT_US // (60 * S) * 60 * S
"""Start of the minute in which the tests stand."""

POLICY = """
[[tiers]]
name = "free"
limits = ["100/minute"]

[[tiers.rules]]
endpoint = "/a"
name = "a"
algorithm = "fixed_window"
limits = ["3/minute", "5/hour"]

[[api_keys]]
sha256 = "DIGEST"
tier = "free"
overrides = [{ rule = "a", limits = ["4/minute"] }]
""".replace("DIGEST", "ab" * 32)


def limit_set(algorithm: Algorithm, *texts: str) -> LimitSet:
    return LimitSet("l", algorithm, [Limit.parse(text) for text in texts])


def at(moment_s: float, cost: int = 1, until_s: float | None = None, degraded: bool = False) -> Admission:
    """An admission, seconds from the start of the minute."""
    from_us = MINUTE_US + round(moment_s * S)
    return Admission("l", "s", cost, True, degraded, from_us, from_us if until_s is None else MINUTE_US + round(until_s * S))


def excess(limits: LimitSet, *admissions: Admission) -> list[int]:
    """Units above each limit."""
    return [report.excess_units for report in prove(admissions, lambda *_: limits)]


FIXED = limit_set(Algorithm.FIXED_WINDOW, "3/minute")
WINDOW = limit_set(Algorithm.SLIDING_WINDOW, "4/minute")
LOG = limit_set(Algorithm.SLIDING_LOG, "3/minute")
BUCKET = limit_set(Algorithm.TOKEN_BUCKET, "6/minute burst 2")
LEAKY = limit_set(Algorithm.LEAKY_BUCKET, "6/minute")
MONTH = limit_set(Algorithm.FIXED_WINDOW, "3/month")


@pytest.mark.parametrize(
    ("limits", "admissions", "expected"),
    [
        (FIXED, [at(0), at(1), at(59.999999), at(60)], 0),
        (FIXED, [at(0), at(1), at(59.999999), at(59.999999)], 1),
        (FIXED, [at(0, 7)], 4),
        (FIXED, [at(0, 3), at(59, until_s=61)], 0),
        (FIXED, [at(0, 3), at(59, until_s=59.9)], 1),
        (FIXED, [at(59, 3, until_s=61), at(61, 3), at(0, 3)], 0),
        # A window that was left is not gone back to: intervals may come late.
        (FIXED, [at(61, 2), at(59, 3, until_s=62), at(62, 2)], 1),
        # 4 of the minute before weigh 2 at its half, 1 from 0.75 on (floor of 0.999).
        (WINDOW, [at(0, 4), at(90, 2)], 0),
        (WINDOW, [at(0, 4), at(90, 3)], 1),
        (WINDOW, [at(0, 4), at(89.999999, 2)], 0),
        (WINDOW, [at(0, 4), at(75, 2)], 1),
        (WINDOW, [at(0, 4), at(75, 2, until_s=90)], 0),
        (WINDOW, [at(0, 4), at(120, 4)], 0),
        (WINDOW, [at(0, 4), at(59, 4, until_s=60), at(119.999999, 4)], 0),
        (LOG, [at(0, 3), at(60, 3)], 0),
        (LOG, [at(0, 3), at(59.999999, 3)], 3),
        (LOG, [at(30), at(50), at(70), at(89.999999)], 1),
        (LOG, [at(0, 3, until_s=1), at(59, until_s=60.5)], 0),
        (LOG, [at(1, 3, until_s=2), at(59, until_s=60.5)], 1),
        (LOG, [at(1, 3, until_s=100), at(99, until_s=99.5)], 0),
        (BUCKET, [at(0, 2), at(10), at(20)], 0),
        (BUCKET, [at(0, 2), at(10), at(19.999999)], 1),
        (BUCKET, [at(0, 2), at(9.999999)], 1),
        (BUCKET, [at(0), at(100, 2), at(105)], 1),
        (BUCKET, [at(0, 2, until_s=1), at(9, until_s=10)], 0),
        (BUCKET, [at(1, 2, until_s=2), at(9, until_s=10)], 1),
        # Between 1 and 10 s there are 5, and 2 + 0.9 may be; the long interval says nothing and hides nothing.
        (BUCKET, [at(1, 2, until_s=2), at(0, 9, until_s=300), at(9, 3, until_s=10)], 3),
        (LEAKY, [at(0), at(10), at(20)], 0),
        (LEAKY, [at(0), at(10), at(19)], 1),
        (MONTH, [at(0, 3), at(86_400 * 16, 3)], 3),
        (MONTH, [at(0, 3), at(86_400 * 17, 3)], 0),
    ],
)
def test_known_excess_is_found_to_the_unit(limits: LimitSet, admissions: list[Admission], expected: int) -> None:
    assert excess(limits, *admissions) == [expected]
    assert excess(limits, *reversed(admissions)) == [expected], "logs come in any order"


def test_the_worst_window_is_reported_with_its_times_and_the_admissions_of_the_store() -> None:
    other = Admission("l", "t", 5, True, False, MINUTE_US, MINUTE_US)
    (report,) = prove([at(0, 3), at(1, 4, degraded=True), other], lambda *_: FIXED)
    assert (report.excess_units, report.excess_subjects, report.store_excess_units) == (4 + 2, 2, 2)
    assert (report.worst_subject, report.worst) == ("s", (4, 7, 3, MINUTE_US, MINUTE_US + 60 * S))
    assert (report.units, report.degraded_units, report.subjects) == (12, 4, 2)


def test_denials_and_peeks_count_nothing() -> None:
    denied = Admission("l", "s", 9, False, False, MINUTE_US, MINUTE_US)
    (report,) = prove([at(0, 3), at(0, 0), denied], lambda *_: FIXED)
    assert (report.units, report.admissions, report.excess_units) == (3, 1, 0)


def test_a_clock_that_may_be_wrong_makes_intervals_wider_and_known_times_not() -> None:
    interval = [at(0, 3), at(59, until_s=59.5)]
    for skew_us, expected in ((0, 1), (400_000, 1), (600_000, 0)):
        (report,) = prove(interval, lambda *_: FIXED, skew_us=skew_us)
        assert report.excess_units == expected
    (report,) = prove([at(0, 3), at(59.9)], lambda *_: FIXED, skew_us=600_000)
    assert (report.excess_units, report.uncertain) == (1, 0)


@st.composite
def runs(draw: st.DrawFn) -> tuple[LimitSet, list[Admission], Admission | None]:
    """What the real algorithm admitted, and a denied check as if it had been admitted."""
    algorithm = draw(st.sampled_from(list(Algorithm)))
    windows = draw(st.lists(st.sampled_from(["10s", "minute", "7m", "month"]), min_size=1, max_size=2, unique=True))
    burst = f" burst {draw(st.integers(1, 9))}" if algorithm.is_bucket and draw(st.booleans()) else ""
    limits = limit_set(algorithm, *(f"{draw(st.integers(1, 9))}/{window}{burst}" for window in windows))
    clock = Clock(MOMENT_US + draw(st.integers(0, 600 * S)))
    counters = MemoryCounters(clock=clock)
    window_us = limits.limits[0].window_us
    step = st.one_of(st.just(0), st.integers(1, 3), st.integers(0, window_us // 4), st.integers(0, 3 * window_us))
    admitted, denied = [], []
    for step_us, cost in draw(st.lists(st.tuples(step, st.integers(1, 5)), min_size=1, max_size=40)):
        clock.now_us += step_us
        decision = counters.charge_all(((limits, "s"),), cost)
        answer = admission_of(decision, "s", cost, clock.now_us - 1, clock.now_us + 1)
        (admitted if decision.allowed else denied).append(answer)
    one_too_many = draw(st.sampled_from(denied)) if denied else None
    return limits, admitted, one_too_many


@settings(max_examples=300)
@given(runs(), st.data())
def test_what_the_algorithms_admit_shows_no_excess_and_one_more_always_does(
    run: tuple[LimitSet, list[Admission], Admission | None], draw: st.DataObject
) -> None:
    limits, admitted, one_too_many = run
    assert not any(excess(limits, *admitted))
    before, after = (st.lists(st.integers(0, 20 * S), min_size=len(admitted), max_size=len(admitted)) for _ in range(2))
    blurred = [
        Admission(each.limits, each.subject, each.cost, True, False, each.from_us - early, each.to_us + late)
        for each, early, late in zip(admitted, draw.draw(before), draw.draw(after), strict=True)
    ]
    assert not any(excess(limits, *blurred)), "an interval that holds the true moment claims nothing false"
    if one_too_many is not None:
        injected = Admission("l", "s", one_too_many.cost, True, False, one_too_many.from_us, one_too_many.to_us)
        assert any(excess(limits, *admitted, injected))


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 90 * S), st.integers(0, 30 * S), st.integers(1, 3)), min_size=1, max_size=25),
    st.integers(1, 20),
    st.integers(1, 6),
)
def test_the_excess_of_a_bucket_and_of_a_log_is_that_of_all_pairs_of_times(
    asked: list[tuple[int, int, int]], amount: int, burst: int
) -> None:
    admissions = [Admission("l", "s", cost, True, False, MINUTE_US + at, MINUTE_US + at + width) for at, width, cost in asked]
    bucket, log = (
        limit_set(Algorithm.TOKEN_BUCKET, f"{amount}/minute burst {burst}"),
        limit_set(Algorithm.SLIDING_LOG, f"{amount}/10s"),
    )
    worst_bucket = worst_log = 0
    for first in admissions:
        for last in admissions:
            inside = [each for each in admissions if each.from_us >= first.from_us and each.to_us <= last.to_us]
            held, span = sum(each.cost for each in inside), last.to_us - first.from_us
            if inside:
                worst_bucket = max(worst_bucket, held - burst - amount * span // (60 * S))
                worst_log = max(worst_log, held - amount if span < 10 * S else 0)
    assert excess(bucket, *admissions) == [worst_bucket]
    assert excess(log, *admissions) == [worst_log]


@given(st.data(), st.sampled_from(["10s", "minute", "month"]))
def test_the_excess_of_windows_is_that_of_whole_histories(draw: st.DataObject, window: str) -> None:
    steps = st.lists(st.tuples(st.integers(0, 40 * S), st.integers(1, 3)), min_size=1, max_size=25)
    now, history = MINUTE_US, []
    for step, cost in draw.draw(steps):
        now += step
        history.append((now, cost))
    assume(len({moment for moment, _ in history}) == len(history))
    for algorithm in (Algorithm.FIXED_WINDOW, Algorithm.SLIDING_WINDOW):
        limits = limit_set(algorithm, f"4/{window}")
        worst = max(
            oracles.used(algorithm, limits.limits[0], history[: place + 1], moment) - 4
            for place, (moment, _) in enumerate(history)
        )
        assert excess(limits, *(Admission("l", "s", cost, True, False, moment, moment) for moment, cost in history)) == [
            max(worst, 0)
        ]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9), st.integers(0, 9)), max_size=30), st.integers(1, 7))
def test_logs_are_sorted_in_pieces_as_they_are_whole(rows: list[tuple[str, int, int]], in_memory: int) -> None:
    admissions = [Admission(name, name, 1, True, False, moment, moment + width) for name, moment, width in rows]
    whole = sorted(admissions, key=lambda each: (each.limits, each.subject, each.to_us, each.from_us))
    assert list(in_order(admissions, in_memory)) == whole


def test_an_answer_is_logged_with_the_stores_time_where_the_store_gave_it() -> None:
    decision = Decision(True, at_us=MINUTE_US, limits=FIXED)
    assert admission_of(decision, "s", 2, 1, 9) == Admission("l", "s", 2, True, False, MINUTE_US, MINUTE_US)
    away = Decision(True, at_us=MINUTE_US, limits=FIXED, degraded=True)
    assert admission_of(away, "s", 2, 1, 9) == Admission("l", "s", 2, True, True, 1, 9)
    with pytest.raises(ValueError, match="no limit"):
        admission_of(Decision(True), "s", 1, 1, 9)


# The command.


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(POLICY)
    return path


def write(path: Path, *admissions: Admission) -> str:
    with AdmissionLog(path) as log:
        for each in admissions:
            log.write(each)
    return str(path)


def admission(limits: str, subject: str, moment_s: float = 0, cost: int = 1) -> Admission:
    moment = MINUTE_US + round(moment_s * S)
    return Admission(limits, subject, cost, True, False, moment, moment)


def test_logs_of_several_clients_are_held_against_the_policy(
    tmp_path: Path, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write(tmp_path / "1.log", admission("free:a", "k:x", 0), admission("free:a", "k:x", 1), admission("free", "k:x", 0))
    two = write(tmp_path / "2.log", admission("free:a", "k:x", 2))
    assert exactness.main([one, two, "--policy", str(policy)]) == 0
    assert "no window of any limit held more than allowed" in capsys.readouterr().out
    write(tmp_path / "2.log", admission("free:a", "k:x", 3))
    assert exactness.main([one, two, "--policy", str(policy)]) == 1
    said = capsys.readouterr().out
    assert "EXCESS    1 units over 1 subjects" in said
    assert "k:x: 4 where 3 are allowed, 2023-11-14T22:13:00.000000Z to 2023-11-14T22:14:00.000000Z" in said
    assert said.endswith("1 units above the limits\n")
    assert exactness.main([one, two, "--policy", str(policy), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["answers"], told["denied"], told["excess_units"]) == (5, 0, 1)
    assert {(each["limits"], each["limit"]): each["excess_units"] for each in told["limits"]} == {
        ("free", "100/minute"): 0,
        ("free:a", "3/minute"): 1,
        ("free:a", "5/hour"): 0,
    }


def test_a_keys_own_limits_hold_for_it(tmp_path: Path, policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "k:" + "ab" * 12
    log = write(tmp_path / "log", admission("free:a", key, cost=4))
    assert exactness.main([log, "--policy", str(policy)]) == 0
    write(tmp_path / "log", admission("free:a", key))
    assert exactness.main([log, "--policy", str(policy), "--json"]) == 1
    told = json.loads(capsys.readouterr().out.partition("allowed\n")[2])
    assert [(each["limit"], each["excess_units"]) for each in told["limits"]] == [("4/minute", 1)]


def test_the_last_line_of_a_killed_client_is_left_out_and_said(
    tmp_path: Path, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    write(path, admission("free:a", "k:x"))
    with path.open("ab") as file:
        file.write(b'["free:a","k:x",1,tr')
    assert len(list(read_log(path))) == 1
    assert exactness.main([str(path), "--policy", str(policy)]) == 0
    assert "the last line is not whole" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('["free:a","k:x",1,tr\n', "log:1: "),
        ('\n["free:a","k:x",-1,true,false,1,1]\n', "log:2: Expected `int` >= 0"),
        ('["free:a","k:x",1,true,false,2,1]\n', "from_us 2 is after to_us 1: log the moment of sending first"),
        ('["free:z","k:x",1,true,false,1,1]\n', "'free:z', which"),
        ("", "did the clients log?"),
        (None, "the log cannot be read: No such file"),
    ],
)
def test_what_cannot_be_checked_is_rejected(
    tmp_path: Path, policy: Path, capsys: pytest.CaptureFixture[str], text: str | None, said: str
) -> None:
    path = tmp_path / "log"
    if text is not None:
        path.write_text(text)
    assert exactness.main([str(path), "--policy", str(policy)]) == 2
    assert said in capsys.readouterr().err


def test_a_policy_that_is_rejected_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write(tmp_path / "log", admission("free:a", "k:x"))
    bad = tmp_path / "bad.toml"
    bad.write_text("tiers = 1")
    assert exactness.main([log, "--policy", str(bad)]) == 2
    assert "bad.toml:1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        exactness.main([log, "--policy", str(bad), "--skew-ms", "-1"])
    assert ended.value.code == 2
    assert "--skew-ms -1 must be" in capsys.readouterr().err
