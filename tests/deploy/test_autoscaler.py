"""The simulated autoscaler does what Kubernetes documents, and the picture in the docs is of today's manifests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from deploy.k8s.manifests import build
from deploy.k8s.simulation import __main__ as simulation
from deploy.k8s.simulation.autoscaler import Autoscaler

CHECKOUT = Path(__file__).parents[2]
CPU = {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 50}}}
RATE = {"type": "Pods", "pods": {"metric": {"name": "rate"}, "target": {"type": "AverageValue", "averageValue": "100"}}}


def scaler(*metrics: Mapping[str, Any], **behavior: Mapping[str, Any]) -> Autoscaler:
    """An autoscaler of 2 to 40 pods."""
    spec = {"minReplicas": 2, "maxReplicas": 40, "metrics": [*metrics], "behavior": behavior}
    return Autoscaler.parse({"spec": spec})


@pytest.mark.parametrize(
    ("replicas", "utilization", "expected"), [(4, 1.0, 8), (4, 0.25, 2), (4, 0.54, 4), (4, 0.46, 4), (10, 0.6, 12)]
)
def test_pods_follow_the_ratio_of_what_is_used_to_what_is_wanted(
    replicas: int, utilization: float, expected: int
) -> None:
    fast = scaler(CPU, scaleDown={"stabilizationWindowSeconds": 0})
    assert fast.decide(0, replicas, replicas, {"cpu": utilization}) == expected


def test_the_metric_that_wants_most_wins() -> None:
    assert scaler(CPU, RATE).decide(0, 4, 4, {"cpu": 0.25, "rate": 150}) == 6


def test_a_missing_metric_never_takes_pods_away() -> None:
    fast = scaler(CPU, RATE, scaleDown={"stabilizationWindowSeconds": 0})
    assert fast.decide(0, 8, 8, {"cpu": 0.1}) == 8
    assert fast.decide(15, 8, 8, {"cpu": 1.0}) == 16


def test_it_stays_between_its_bounds() -> None:
    fast = scaler(CPU, scaleDown={"stabilizationWindowSeconds": 0})
    assert fast.decide(0, 30, 30, {"cpu": 5.0}) == 40
    assert fast.decide(15, 3, 3, {"cpu": 0.0}) == 2


def test_a_period_allows_its_policy_once() -> None:
    slow = scaler(CPU, scaleUp={"policies": [{"type": "Pods", "value": 3, "periodSeconds": 60}]})
    assert slow.decide(0, 4, 4, {"cpu": 5.0}) == 7
    assert slow.decide(15, 7, 7, {"cpu": 5.0}) == 7
    assert slow.decide(61, 7, 7, {"cpu": 5.0}) == 10


def test_of_two_policies_the_one_that_allows_more_counts_unless_the_other_is_asked_for() -> None:
    policies = [
        {"type": "Pods", "value": 4, "periodSeconds": 15},
        {"type": "Percent", "value": 100, "periodSeconds": 15},
    ]
    assert scaler(CPU, scaleUp={"policies": policies}).decide(0, 3, 3, {"cpu": 5.0}) == 7
    assert scaler(CPU, scaleUp={"policies": policies, "selectPolicy": "Min"}).decide(0, 3, 3, {"cpu": 5.0}) == 6


def test_pods_leave_only_when_they_were_not_needed_for_the_whole_window() -> None:
    patient = scaler(CPU, scaleDown={"stabilizationWindowSeconds": 300})
    assert patient.decide(0, 10, 10, {"cpu": 0.5}) == 10
    for now in range(15, 301, 15):
        assert patient.decide(now, 10, 10, {"cpu": 0.1}) == 10
    assert patient.decide(315, 10, 10, {"cpu": 0.1}) == 2


def test_pods_that_are_starting_are_not_asked_for_twice() -> None:
    fast = scaler(CPU)
    assert fast.decide(0, 4, 4, {"cpu": 1.0}) == 8
    # The four that are there still carry it all; the four that start will take their share.
    assert fast.decide(15, 8, 4, {"cpu": 1.0}) == 8


def test_an_unknown_kind_of_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="type Object"):
        scaler({"type": "Object"})


def test_the_picture_in_the_docs_is_of_these_manifests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = tmp_path / "autoscaling.svg"
    monkeypatch.setattr("sys.argv", ["simulation", str(drawn)])
    simulation.main()
    shown = CHECKOUT / "docs" / "deployment" / "autoscaling.svg"
    assert drawn.read_text() == shown.read_text(), "python -m deploy.k8s.simulation docs/deployment/autoscaling.svg"


@pytest.mark.sabotage("deploy/k8s/base/autoscaling.yaml", "  maxReplicas: 50\n", "  maxReplicas: 10\n")
def test_production_takes_a_load_that_grows_sixfold_in_half_a_minute_without_a_failed_request() -> None:
    built = build("production")
    load = simulation.load_of(simulation.HERE / "sale.csv")
    seconds = simulation.simulate(built, load, simulation.pod_of(built, 0.003, 120e6))
    assert sum(second.failed for second in seconds) == 0
    # Up within a minute of the rise, and down to a third of the peak half an hour after it.
    assert seconds[660].ready > 5 * seconds[0].ready
    assert seconds[-1].pods < max(second.pods for second in seconds) / 3
