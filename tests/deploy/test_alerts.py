"""Every alert goes off for what it is for and is quiet otherwise, by promtool, and has a page that says what to do."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.k8s import alerts
from deploy.k8s.manifests import named

CHECKOUT = Path(__file__).parents[2]
PROMETHEUS = CHECKOUT / "deploy" / "prometheus"
PAGE = CHECKOUT / "docs" / "operations" / "alerts.md"
PROMTOOL = shutil.which("promtool")


def kubernetes() -> list[dict[str, Any]]:
    """The groups of what only a cluster has."""
    found: list[dict[str, Any]] = named("production", "PrometheusRule", "kubernetes")["spec"]["groups"]
    return found


def rules() -> list[dict[str, Any]]:
    """Every alert there is."""
    return [rule for group in [*alerts.groups(), *kubernetes()] for rule in group["rules"] if "alert" in rule]


def promtool(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run promtool in a copy of the rules and their tests, with those of Kubernetes as a file like the others."""
    shutil.copytree(PROMETHEUS, folder, dirs_exist_ok=True)
    (folder / "rules" / "kubernetes.yml").write_text(yaml.safe_dump({"groups": kubernetes()}))
    files = sorted(str(path.relative_to(folder)) for path in folder.glob(f"{arguments[-1]}/*.yml"))
    command = [str(PROMTOOL), *arguments[:-1], *files]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603 - ours


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed here: apt install prometheus")
@pytest.mark.sabotage("deploy/prometheus/rules/slo.yml", "slo:failed:ratio1h > 14.4 * 0.0001", "slo:failed:ratio1h > 1")
def test_every_alert_goes_off_for_what_it_is_for_and_is_quiet_otherwise(tmp_path: Path) -> None:
    checked = promtool(tmp_path, "check", "rules", "rules")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = promtool(tmp_path, "test", "rules", "tests")
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_alert_is_tested_both_ways() -> None:
    cases = [
        (case["alertname"], bool(case["exp_alerts"]))
        for file in PROMETHEUS.glob("tests/*.yml")
        for test in yaml.safe_load(file.read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    every = {rule["alert"] for rule in rules()}
    assert {name for name, fires in cases if fires} == every
    assert {name for name, fires in cases if not fires} == every


@pytest.mark.sabotage("docs/operations/alerts.md", "## OrdersStand", "## Orders")
def test_every_alert_has_a_page_that_says_what_to_do_and_every_page_an_alert() -> None:
    found = rules()
    assert re.findall(r"^## (\w+)$", PAGE.read_text(), re.MULTILINE) == [rule["alert"] for rule in found]
    for rule in found:
        assert rule["annotations"].keys() == {"summary", "action", "runbook"}, rule["alert"]
        assert rule["annotations"]["runbook"] == f"docs/operations/alerts.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in {"page", "ticket"}, rule["alert"]


def test_kubernetes_has_the_alerts_of_everywhere() -> None:
    assert alerts.OBJECT.read_text() == alerts.written(), "python -m deploy.k8s.alerts"
