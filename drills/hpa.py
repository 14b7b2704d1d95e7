"""Kubernetes' HorizontalPodAutoscaler (autoscaling/v2), as its documentation and its controller have it.

Source: kubernetes.io, "Horizontal Pod Autoscaling" (algorithm details, scaling policies, stabilization window), and
`pkg/controller/podautoscaler` of Kubernetes 1.31 for what the page leaves open: what not-ready pods and missing metrics count
as, what a percentage is of, and how it is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

TOLERANCE: Final = 0.1
SYNC_S: Final = 15
"""How often the controller decides: --horizontal-pod-autoscaler-sync-period."""


class Policy(NamedTuple):
    """How much may change within a period.

    Args:
        type: `Pods` or `Percent` of the pods at the period's start.
        period_s: 1 to 1800.
    """

    type: Literal["Pods", "Percent"]
    value: int
    period_s: int


class Rules(NamedTuple):
    """One direction of a behaviour.

    Args:
        window_s: stabilization: of the recommendations within it, the most careful one counts.
        policies: what may change.
        select: the policy that allows most, or least, or `Disabled`.
    """

    window_s: int
    policies: tuple[Policy, ...]
    select: Literal["Max", "Min", "Disabled"] = "Max"


class Behaviour(NamedTuple):
    """Both directions."""

    up: Rules
    down: Rules


DEFAULT: Final = Behaviour(
    Rules(0, (Policy("Percent", 100, 15), Policy("Pods", 4, 15))),
    Rules(300, (Policy("Percent", 100, 15),)),
)
"""What Kubernetes does where nothing is said."""


class Samples(NamedTuple):
    """What a metric says of the pods.

    Args:
        values: of the pods that are ready and measured.
        unready: pods that are not, or whose metric is from before they were.
        missing: ready pods without a metric.
    """

    values: Sequence[float]
    unready: int = 0
    missing: int = 0


def proposal(current: int, samples: Samples, target: float, missing_as: float) -> int | None:
    """How many pods one metric asks for.

    Args:
        current: pods.
        samples: of the metric.
        target: what a pod should have.
        missing_as: what a pod without a metric counts as when fewer pods are asked for: 100 for CPU in %, the target for others.

    Returns:
        The number of pods; None where no pod has a metric.
    """
    count = len(samples.values)
    if not count:
        return None
    total = sum(samples.values)
    ratio = total / count / target
    more_with_unready = samples.unready > 0 and ratio > 1
    if not more_with_unready and not samples.missing:
        return current if abs(1 - ratio) <= TOLERANCE else _ceil(ratio * count)
    if samples.missing:
        # The careful side in both directions: all of it when there would be fewer pods, nothing when there would be more.
        total += samples.missing * (missing_as if ratio < 1 else 0)
        count += samples.missing
    if more_with_unready:
        count += samples.unready
    again = total / count / target
    if abs(1 - again) <= TOLERANCE or (ratio < 1 < again) or (ratio > 1 > again):
        return current
    wanted = _ceil(again * count)
    return current if (again < 1 and wanted > current) or (again > 1 and wanted < current) else wanted


class Autoscaler:
    """The controller with its memory of what it recommended and did.

    Args:
        behaviour: how fast it may change.
        least: `minReplicas`.
        most: `maxReplicas`.
    """

    def __init__(self, behaviour: Behaviour, least: int, most: int) -> None:
        self._behaviour = behaviour
        self._least = least
        self._most = most
        self._recommended: list[tuple[float, int]] = []
        self._changes: list[tuple[float, int]] = []

    def decide(self, now_s: float, current: int, proposals: Sequence[int | None]) -> int:
        """One round.

        Args:
            now_s: the time, s.
            current: pods.
            proposals: of the metrics; None for one that could not be read.

        Returns:
            How many pods there are to be.
        """
        read = [each for each in proposals if each is not None]
        wanted = max(read, default=current)
        if len(read) < len(proposals) and wanted < current:
            wanted = current  # a metric that is not there might have asked for more
        wanted = self._stabilized(now_s, current, wanted)
        if wanted > current:
            limit = max(self._limit(now_s, current, self._behaviour.up, 1), current)
            wanted = min(wanted, self._most, limit)
        elif wanted < current:
            limit = min(self._limit(now_s, current, self._behaviour.down, -1), current)
            wanted = max(wanted, self._least, limit)
        wanted = min(max(wanted, self._least), self._most)
        if wanted != current:
            self._changes.append((now_s, wanted - current))
        return wanted

    def _stabilized(self, now_s: float, current: int, wanted: int) -> int:
        up, down = self._behaviour
        least = min([each for at, each in self._recommended if at > now_s - up.window_s] + [wanted])
        most = max([each for at, each in self._recommended if at > now_s - down.window_s] + [wanted])
        oldest = now_s - max(up.window_s, down.window_s)
        self._recommended = [(at, each) for at, each in self._recommended if at > oldest]
        self._recommended.append((now_s, wanted))
        return min(max(current, least), most)

    def _limit(self, now_s: float, current: int, rules: Rules, sign: int) -> int:
        if rules.select == "Disabled" or not rules.policies:
            return current
        allowed = []
        for policy in rules.policies:
            # Pods at the beginning of the period: what was added and removed since then is undone.
            begun = current - sum(change for at, change in self._changes if at > now_s - policy.period_s)
            if policy.type == "Pods":
                allowed.append(begun + sign * policy.value)
            elif sign > 0:
                allowed.append(_ceil(begun * (1 + policy.value / 100)))
            else:
                allowed.append(int(begun * (1 - policy.value / 100)))
        return max(allowed) if (rules.select == "Max") == (sign > 0) else min(allowed)


def _ceil(value: float) -> int:
    """Up, but not for what is only a floating point error above."""
    return math.ceil(value - 1e-9)


class Shipped(NamedTuple):
    """What an HPA manifest says.

    Args:
        least: `minReplicas`.
        most: `maxReplicas`.
        cpu_percent: target of CPU utilization.
        pod_rate: target of the pods metric, checks/s.
    """

    behaviour: Behaviour
    least: int
    most: int
    cpu_percent: float
    pod_rate: float


def read_manifest(path: Path) -> Shipped:
    """Read an HPA as it is shipped.

    Args:
        path: of the YAML file, one or several documents.

    Returns:
        What it says; what it leaves out is Kubernetes' default.

    Raises:
        ValueError: if there is no HPA in it, or not with one CPU and one pods metric.
    """
    import yaml

    documents = [each for each in yaml.safe_load_all(path.read_text()) if each]
    found = [each for each in documents if each.get("kind") == "HorizontalPodAutoscaler"]
    if len(found) != 1:
        raise ValueError(f"{path} has {len(found)} HorizontalPodAutoscalers; one is needed")
    spec: dict[str, Any] = found[0]["spec"]
    cpu = [each["resource"]["target"]["averageUtilization"] for each in spec["metrics"] if each["type"] == "Resource"]
    pods = [each["pods"]["target"]["averageValue"] for each in spec["metrics"] if each["type"] == "Pods"]
    if len(cpu) != 1 or len(pods) != 1:
        raise ValueError(f"{path} has {len(cpu)} CPU and {len(pods)} pods metrics; one of each is needed")
    behaviour = spec.get("behavior", {})
    return Shipped(
        Behaviour(_rules(behaviour.get("scaleUp"), DEFAULT.up), _rules(behaviour.get("scaleDown"), DEFAULT.down)),
        spec.get("minReplicas", 1),
        spec["maxReplicas"],
        float(cpu[0]),
        _quantity(str(pods[0])),
    )


def shipped_in(folder: Path) -> Shipped | None:
    """Read the HPA among the manifests of a folder.

    Args:
        folder: with YAML files.

    Returns:
        What it says; None where there is none.

    Raises:
        ValueError: as `read_manifest`.
    """
    for path in sorted(folder.glob("*.yaml")):
        if "kind: HorizontalPodAutoscaler" in path.read_text():
            return read_manifest(path)
    return None


def _rules(given: dict[str, Any] | None, default: Rules) -> Rules:
    if given is None:
        return default
    policies = tuple(Policy(each["type"], each["value"], each["periodSeconds"]) for each in given.get("policies", ()))
    window_s = given.get("stabilizationWindowSeconds", default.window_s)
    return Rules(window_s, policies or default.policies, given.get("selectPolicy", "Max"))


def _quantity(text: str) -> float:
    """A Kubernetes quantity: 10000, 10k, 500m."""
    times = {"m": 1e-3, "k": 1e3, "M": 1e6}.get(text[-1])
    return float(text) if times is None else float(text[:-1]) * times
