"""The alerts of deploy/prometheus as an object of the Prometheus operator, so that they stand written once.

`python -m deploy.k8s.alerts` writes components/monitoring/rules.yaml; a test fails until it has been run.
"""

from pathlib import Path
from typing import Any

import yaml

from deploy.k8s.manifests import HERE

RULES = HERE.parent / "prometheus" / "rules"
OBJECT = HERE / "components" / "monitoring" / "rules.yaml"
HEAD = "# Made from deploy/prometheus/rules by `python -m deploy.k8s.alerts`: change them there.\n"


def groups() -> list[dict[str, Any]]:
    """Return the groups of rules of every file, in the order of the files' names."""
    return [group for file in sorted(RULES.glob("*.yml")) for group in _read(file)["groups"]]


def written() -> str:
    """Return the object, as YAML."""
    made = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "scaleout"},
        "spec": {"groups": groups()},
    }
    # An expression stays on one line, as it is in its file.
    return HEAD + yaml.safe_dump(made, sort_keys=False, width=10_000)


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text())
    return found


if __name__ == "__main__":
    OBJECT.write_text(written())
