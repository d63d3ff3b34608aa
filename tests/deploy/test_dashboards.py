"""The dashboards are what their code makes, and ask for no rule that is not there."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from promql import metrics_of

from deploy.grafana.__main__ import HERE, written
from deploy.k8s import alerts
from deploy.k8s.manifests import named

CHECKOUT = Path(__file__).parents[2]


def panels() -> list[tuple[str, dict[str, Any]]]:
    """Every panel of every file that Grafana reads, with its dashboard."""
    return [
        (file.stem, panel)
        for file in sorted(HERE.glob("*.json"))
        for panel in json.loads(file.read_text())["panels"]
        if panel["type"] != "row"
    ]


@pytest.mark.sabotage("deploy/grafana/dashboards.py", '"Hit rate"', '"Hits"')
def test_the_dashboards_are_what_their_code_makes() -> None:
    assert {file.name: file.read_text() for file in HERE.glob("*.json")} == written(), "python -m deploy.grafana"


def test_there_is_a_dashboard_for_each_question() -> None:
    assert {name for name, _ in panels()} == {"overview", "data", "cache", "orders", "capacity"}
    for name, panel in panels():
        assert panel["targets"], (name, panel["title"])
        assert panel["fieldConfig"]["defaults"]["unit"], (name, panel["title"])
        assert panel["datasource"]["uid"] == "${datasource}"


@pytest.mark.sabotage("deploy/prometheus/rules/rates.yml", '"cache:hits:ratio5m"', '"cache:hits:ratio1m"')
def test_every_rule_that_a_dashboard_or_an_alert_asks_for_is_recorded() -> None:
    recorded = {rule["record"] for group in alerts.groups() for rule in group["rules"] if "record" in rule}
    asked = {
        name
        for expression in [
            *(target["expr"] for _, panel in panels() for target in panel["targets"]),
            *(str(rule["expr"]) for group in alerts.groups() for rule in group["rules"]),
        ]
        for name in metrics_of(expression)
        if ":" in name
    }
    assert asked <= recorded
    assert recorded <= asked, "nobody asks for it"


@pytest.mark.sabotage("deploy/grafana/kustomization.yaml", "orders.json, ", "")
def test_compose_and_kubernetes_give_grafana_every_dashboard() -> None:
    compose = yaml.safe_load((CHECKOUT / "docker-compose.yml").read_text())["services"]["grafana"]
    assert "./deploy/grafana:/var/lib/dashboards:ro" in compose["volumes"]
    config = named("production", "ConfigMap", "dashboards")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert {name: str(text) for name, text in config["data"].items()} == written()
