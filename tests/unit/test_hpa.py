"""The autoscaler's algorithm against cases of Kubernetes' documentation, worked out by hand, and the manifest that is shipped."""

from __future__ import annotations

from pathlib import Path

import pytest
from drills.autoscale import MANIFESTS, WINNER, ChargeOutcome, Pods, ranking, replay
from drills.hpa import DEFAULT, Autoscaler, Behaviour, Policy, Rules, Samples, proposal, read_manifest, shipped_in
from hypothesis import given
from hypothesis import strategies as st

OFF = Rules(0, (Policy("Percent", 100, 15),))


@pytest.mark.parametrize(
    ("current", "samples", "target", "missing_as", "wanted"),
    [
        # "if the current metric value is 200m, and the desired value is 100m, the number of replicas will be doubled"
        (2, Samples([200, 200]), 100, 100, 4),
        # "If the current value is instead 50m, you'll halve the number of replicas"
        (2, Samples([50, 50]), 100, 100, 1),
        # The tolerance of 0.1, on both sides.
        (10, Samples([109] * 10), 100, 100, 10),
        (10, Samples([91] * 10), 100, 100, 10),
        (10, Samples([111] * 10), 100, 100, 12),
        (10, Samples([89] * 10), 100, 100, 9),
        # Rounded up: 3 × 80 / 70.
        (3, Samples([80] * 3), 70, 100, 4),
        # Pods that are not ready count as 0 on the way up: (3 × 140) / 4 / 70 = 1.5, of four.
        (4, Samples([140] * 3, unready=1), 70, 100, 6),
        # …which takes back what would have been added: (2 × 100) / 4 / 70 = 0.71 turns the direction, so nothing is done.
        (4, Samples([100] * 2, unready=2), 70, 100, 4),
        # On the way down they are left out: 3 × 35 / 70 of those that are ready.
        (4, Samples([35] * 3, unready=1), 70, 100, 2),
        # A missing metric counts as all of it on the way down: (3 × 20 + 100) / 4 / 70 = 0.57, of four.
        (4, Samples([20] * 3, missing=1), 70, 100, 3),
        # …and as nothing on the way up: (3 × 140) / 4 / 70 = 1.5.
        (4, Samples([140] * 3, missing=1), 70, 100, 6),
        # Missing ones that turn the direction: (2 × 60 + 2 × 100) / 4 / 70 = 1.14 against 0.86.
        (4, Samples([60] * 2, missing=2), 70, 100, 4),
    ],
)
def test_what_one_metric_asks_for(current: int, samples: Samples, target: float, missing_as: float, wanted: int) -> None:
    assert proposal(current, samples, target, missing_as) == wanted


def test_without_any_metric_nothing_is_requested() -> None:
    assert proposal(4, Samples([], unready=4), 70, 100) is None


def test_the_metric_that_asks_for_most_counts_and_a_missing_one_forbids_less() -> None:
    both = Behaviour(OFF, OFF)
    assert Autoscaler(both, 1, 100).decide(0, 10, [12, 15]) == 15
    assert Autoscaler(both, 1, 100).decide(0, 10, [5, None]) == 10
    assert Autoscaler(both, 1, 100).decide(0, 10, [12, None]) == 12
    assert Autoscaler(both, 1, 100).decide(0, 10, [None, None]) == 10


def test_the_documentations_80_pods_go_down_to_10() -> None:
    # Its example: four pods or 10 % a minute, whichever is more; 8, then 8 (7.2 rounded up), …; below 40 it is four at a time.
    down = Rules(0, (Policy("Pods", 4, 60), Policy("Percent", 10, 60)))
    scaler = Autoscaler(Behaviour(OFF, down), 1, 100)
    seen = [80]
    for minute in range(16):
        seen.append(scaler.decide(minute * 60, seen[-1], [10]))
    # 64 × 0.9 = 57.6 leaves 57, and so on.
    assert seen[:7] == [80, 72, 64, 57, 51, 45, 40]
    assert seen[7:] == [36, 32, 28, 24, 20, 16, 12, 10, 10, 10]


def test_the_policy_that_allows_least_and_none_at_all() -> None:
    least = Rules(0, (Policy("Pods", 4, 60), Policy("Percent", 10, 60)), "Min")
    assert Autoscaler(Behaviour(OFF, least), 1, 100).decide(0, 80, [10]) == 76
    assert Autoscaler(Behaviour(OFF, least), 1, 100).decide(0, 20, [10]) == 18
    assert Autoscaler(Behaviour(OFF, OFF._replace(select="Disabled")), 1, 100).decide(0, 80, [10]) == 80


def test_the_default_doubles_or_adds_four_in_15_seconds() -> None:
    scaler = Autoscaler(DEFAULT, 1, 100)
    assert scaler.decide(0, 2, [50]) == 6
    # Within the same 15 s, nothing more: 2 + 4 is what the period began with and may add.
    assert scaler.decide(10, 6, [50]) == 6
    assert scaler.decide(15, 6, [50]) == 12
    assert scaler.decide(30, 12, [50]) == 24


def test_what_was_added_in_a_period_counts_against_what_may_be_removed_in_it() -> None:
    scaler = Autoscaler(Behaviour(OFF, Rules(0, (Policy("Pods", 1, 60),))), 1, 100)
    assert scaler.decide(0, 4, [8]) == 8
    # The period began with 4, so it may end with 3; but never below the minimum and never by more than is asked for.
    assert scaler.decide(15, 8, [6]) == 6


def test_scale_down_waits_for_the_highest_recommendation_of_the_window() -> None:
    scaler = Autoscaler(DEFAULT, 1, 100)
    assert scaler.decide(0, 10, [10]) == 10
    for second in range(15, 300, 15):
        assert scaler.decide(second, 10, [4]) == 10
    assert scaler.decide(300, 10, [4]) == 4


def test_scale_up_waits_for_the_lowest_recommendation_of_its_window() -> None:
    scaler = Autoscaler(Behaviour(OFF._replace(window_s=60), OFF), 1, 100)
    assert scaler.decide(0, 4, [4]) == 4
    assert scaler.decide(15, 4, [8]) == 4
    assert scaler.decide(45, 4, [6]) == 4
    assert scaler.decide(60, 4, [8]) == 6


@given(st.lists(st.integers(min_value=0, max_value=500), min_size=1, max_size=50))
def test_never_outside_the_bounds(asked: list[int]) -> None:
    scaler = Autoscaler(DEFAULT, 3, 50)
    current = 3
    for number, each in enumerate(asked):
        current = scaler.decide(number * 15, current, [each])
        assert 3 <= current <= 50


def test_a_pod_takes_requests_at_the_first_probe_after_its_start() -> None:
    pods = Pods(2, start_s=1.5, drain_s=4)
    pods.scale(100, 4)
    # Scheduled in 3 s, started in 1.5 s: 104.5, found by the probe at 106.
    assert [pods.ready(at) for at in (100, 105, 106)] == [2, 2, 4]
    pods.scale(200, 1)
    assert (pods.ready(200), pods.existing(203), pods.existing(204)) == (1, 4, 1)


def test_a_steady_load_within_the_target_changes_nothing_and_loses_nothing() -> None:
    seen = replay([20_000.0] * 3600, WINNER, capacity=20_000, start_s=1, drain_s=1)
    assert (seen.over, seen.changes, seen.requests) == (0, 0, 72e6)
    assert seen.pod_hours == pytest.approx(3)


def test_what_is_over_capacity_is_counted() -> None:
    # 3 pods of 1,000/s, as many as there may be; 5,000/s come.
    seen = replay([5_000.0] * 60, WINNER._replace(most=3), capacity=1_000, start_s=1, drain_s=1)
    assert seen.over == 60 * 2_000


def test_the_ranking_takes_few_over_capacity_before_few_pod_hours() -> None:
    def day(over: float, pod_hours: float) -> dict[str, ChargeOutcome]:
        return {"day": ChargeOutcome(over, 1e6, pod_hours, 0, ())}

    assert ranking({"cheap": day(200, 1), "dear": day(100, 9), "good": day(101, 5), "worse": day(300, 1)}) == [
        "good",
        "dear",
        "cheap",
        "worse",
    ]


MANIFEST_TEXT = """
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: tidegate}
spec:
  minReplicas: 3
  maxReplicas: 50
  metrics:
    - type: Resource
      resource: {name: cpu, target: {type: Utilization, averageUtilization: 70}}
    - type: Pods
      pods: {metric: {name: checks}, target: {type: AverageValue, averageValue: 10k}}
  behavior:
    scaleDown:
      stabilizationWindowSeconds: 600
      policies: [{type: Percent, value: 10, periodSeconds: 60}]
"""


def test_a_manifest_is_read_with_kubernetes_defaults(tmp_path: Path) -> None:
    path = tmp_path / "hpa.yaml"
    path.write_text(MANIFEST_TEXT)
    found = read_manifest(path)
    assert found.behaviour == Behaviour(DEFAULT.up, Rules(600, (Policy("Percent", 10, 60),)))
    assert (found.least, found.most, found.cpu_percent, found.pod_rate) == (3, 50, 70, 10_000)
    assert shipped_in(tmp_path) == found
    path.write_text(MANIFEST_TEXT.replace("HorizontalPodAutoscaler", "Deployment"))
    assert shipped_in(tmp_path) is None
    with pytest.raises(ValueError, match="has 0 HorizontalPodAutoscalers"):
        read_manifest(path)


def test_what_is_shipped_is_what_won() -> None:
    shipped = shipped_in(MANIFESTS)
    if shipped is None:
        pytest.skip(f"there is no HorizontalPodAutoscaler in {MANIFESTS}")
    assert shipped._replace(behaviour=WINNER.behaviour) == WINNER
    assert shipped.behaviour.down == WINNER.behaviour.down
    assert shipped.behaviour.up.window_s == WINNER.behaviour.up.window_s
    assert set(shipped.behaviour.up.policies) == set(WINNER.behaviour.up.policies)
