"""The algorithm of Kubernetes' horizontal pod autoscaler (autoscaling/v2), pure: metrics and a clock in, replicas out.

It follows the documentation ("Horizontal Pod Autoscaling: algorithm details" and "Configurable scaling behavior"):
ratio with tolerance, the largest of several metrics, stabilization windows, and policies of Percent and Pods over their
periods. Times are seconds on any clock that only goes forwards.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# kube-controller-manager's defaults: --horizontal-pod-autoscaler-tolerance and -sync-period.
TOLERANCE = 0.1
SYNC_SECONDS = 15.0

# What the API server fills in where a manifest says nothing.
DEFAULT_UP = {
    "stabilizationWindowSeconds": 0,
    "policies": [
        {"type": "Percent", "value": 100, "periodSeconds": 15},
        {"type": "Pods", "value": 4, "periodSeconds": 15},
    ],
}
DEFAULT_DOWN = {
    "stabilizationWindowSeconds": 300,
    "policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}],
}


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of the manifest: `name` is cpu, memory or the metric's own; `target` is an average over the pods.

    For a utilization the target is a fraction of the request (0.7), else the value itself.
    """

    name: str
    target: float


@dataclass(frozen=True, slots=True)
class Policy:
    """How much may change within `seconds`: `value` pods, or `value` percent of the pods at the period's begin."""

    kind: Literal["Percent", "Pods"]
    value: int
    seconds: int


@dataclass(frozen=True, slots=True)
class Direction:
    """The rules of one direction: the window that is looked back over, and the policies."""

    window: int
    policies: tuple[Policy, ...]
    least: bool

    @classmethod
    def parse(cls, given: Mapping[str, Any], default: Mapping[str, Any]) -> Direction:
        """Read `behavior.scaleUp` or `behavior.scaleDown`, with the API server's defaults for what is left out."""
        rules = {**default, **given}
        policies = tuple(Policy(one["type"], one["value"], one["periodSeconds"]) for one in rules["policies"])
        return cls(rules["stabilizationWindowSeconds"], policies, least=rules.get("selectPolicy") == "Min")

    def limit(self, candidates: list[int], *, upwards: bool) -> int:
        """Which of the policies' limits counts: the furthest from now, unless `selectPolicy` is Min."""
        return (max if upwards != self.least else min)(candidates)


@dataclass
class Autoscaler:
    """One HorizontalPodAutoscaler; `decide` is its loop's body, to be called every `SYNC_SECONDS`."""

    minimum: int
    maximum: int
    metrics: tuple[Metric, ...]
    up: Direction
    down: Direction
    _wanted: deque[tuple[float, int]] = field(default_factory=deque)
    _changes: deque[tuple[float, int]] = field(default_factory=deque)

    @classmethod
    def parse(cls, manifest: Mapping[str, Any]) -> Autoscaler:
        """Read a manifest of kind HorizontalPodAutoscaler with metrics of types Resource and Pods.

        Raises:
            ValueError: a metric is of another type.
        """
        spec = manifest["spec"]
        behavior = spec.get("behavior", {})
        return cls(
            minimum=spec["minReplicas"],
            maximum=spec["maxReplicas"],
            metrics=tuple(_metric(one) for one in spec["metrics"]),
            up=Direction.parse(behavior.get("scaleUp", {}), DEFAULT_UP),
            down=Direction.parse(behavior.get("scaleDown", {}), DEFAULT_DOWN),
        )

    def decide(self, now: float, replicas: int, ready: int, seen: Mapping[str, float]) -> int:
        """Return how many pods there should be.

        Args:
            now: the time.
            replicas: how many there are.
            ready: how many of them are ready.
            seen: each metric's average over the ready pods, in the unit of its target; one that is missing is left out,
                and then nothing is scaled down.
        """
        known = [metric for metric in self.metrics if metric.name in seen]
        proposals = [_proposal(replicas, ready, seen[metric.name] / metric.target) for metric in known]
        wanted = max(proposals, default=replicas)
        if len(known) < len(self.metrics):
            wanted = max(wanted, replicas)
        bounded = min(max(self._stabilized(now, replicas, wanted), self.minimum), self.maximum)
        chosen = self._paced(now, replicas, bounded)
        if chosen != replicas:
            self._changes.append((now, chosen - replicas))
        return chosen

    def _stabilized(self, now: float, replicas: int, wanted: int) -> int:
        """Never above the least that was wanted within the window upwards, never below the most of that downwards."""
        self._wanted.append((now, wanted))
        longest = max(self.up.window, self.down.window)
        while self._wanted[0][0] < now - longest:
            self._wanted.popleft()
        lowest = min(value for time, value in self._wanted if time >= now - self.up.window)
        highest = max(value for time, value in self._wanted if time >= now - self.down.window)
        return min(max(replicas, lowest), highest)

    def _paced(self, now: float, replicas: int, wanted: int) -> int:
        """As far towards `wanted` as the policies of its direction let it go."""
        if wanted > replicas:
            limits = [_more(policy, self._at_start(now, replicas, policy)) for policy in self.up.policies]
            return min(wanted, max(self.up.limit(limits, upwards=True), replicas))
        if wanted < replicas:
            limits = [_fewer(policy, self._at_start(now, replicas, policy)) for policy in self.down.policies]
            return max(wanted, min(self.down.limit(limits, upwards=False), replicas))
        return replicas

    def _at_start(self, now: float, replicas: int, policy: Policy) -> int:
        """How many there were when the policy's period that ends now began."""
        return replicas - sum(change for time, change in self._changes if time > now - policy.seconds)


def _metric(given: Mapping[str, Any]) -> Metric:
    if given["type"] == "Resource":
        return Metric(given["resource"]["name"], given["resource"]["target"]["averageUtilization"] / 100)
    if given["type"] == "Pods":
        return Metric(given["pods"]["metric"]["name"], float(given["pods"]["target"]["averageValue"]))
    raise ValueError(f"the simulation knows no metric of type {given['type']}")


def _proposal(replicas: int, ready: int, ratio: float) -> int:
    """How many pods one metric asks for; pods that are starting have no value of it yet."""
    if abs(ratio - 1) <= TOLERANCE:
        return replicas
    # They count as idle where more pods are asked for, and as used to the target where fewer are.
    starting = 0.0 if ratio > 1 else float(replicas - ready)
    overall = (ratio * ready + starting) / replicas
    if abs(overall - 1) <= TOLERANCE or (overall > 1) != (ratio > 1):
        return replicas
    # Rounded first: 3 x 1.4 must not become 5 by the last bit of a binary fraction.
    return math.ceil(round(overall * replicas, 6))


def _more(policy: Policy, at_start: int) -> int:
    if policy.kind == "Pods":
        return at_start + policy.value
    return math.ceil(at_start * (1 + policy.value / 100))


def _fewer(policy: Policy, at_start: int) -> int:
    if policy.kind == "Pods":
        return at_start - policy.value
    return math.floor(at_start * (1 - policy.value / 100))
