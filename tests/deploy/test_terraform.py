"""What can be known of deploy/terraform without an account: its settings exist, its machines start what is right."""

import re
import shutil
import subprocess
from pathlib import Path

import machine
import pytest

from app.api import serving
from app.core.settings import ServiceSettings, environment_names
from app.domain.profiles.avatars import AVATARS
from deploy.capacity import model, report
from deploy.terraform import costs
from workers.tasks import TASKS

TERRAFORM = Path(__file__).parents[2] / "deploy" / "terraform"
# What relays and workers listen on for Prometheus, inside their containers.
PORT = "9100"


def commands(role: str) -> dict[str, dict[str, list[str]]]:
    """The options of each container that the script of a role starts, by the container's name."""
    lines = machine.script(role).replace("\\\n", " ").splitlines()
    started = [line.strip() for line in lines if re.match(r"\s*(start (?!\(\))|docker run .*--name nginx)", line)]
    return {re.split(r"start |--name ", line)[1].split()[0].strip('"'): machine.options(line) for line in started}


@pytest.mark.sabotage("deploy/terraform/main.tf", "STORAGE_PUBLIC_URL =", "STORAGE_CDN_URL =")
def test_every_setting_that_machines_get_is_one_of_the_services() -> None:
    (plain,) = re.findall(r"settings = \{\n(.*?)\n  \}", (TERRAFORM / "main.tf").read_text(), re.DOTALL)
    (secret,) = re.findall(r"jsonencode\(\{\n(.*?)\n  \}\)", (TERRAFORM / "secrets.tf").read_text(), re.DOTALL)
    given = re.findall(r"^ +([A-Z_]+) +=", f"{plain}\n{secret}", re.MULTILINE)
    assert {"REGION", "REDIS_CACHE_URL", "STORAGE_PUBLIC_URL", "SECRET_KEY"} <= set(given)
    # Of all these only the object storage's own is not ours.
    assert set(given) - environment_names() == {"AWS_REGION"}


@pytest.mark.sabotage("deploy/terraform/modules/storage/main.tf", "}/avatars/*", "}/assets/*")
def test_the_cdn_may_read_what_the_service_leads_to_and_nothing_else() -> None:
    storage = (TERRAFORM / "modules" / "storage" / "main.tf").read_text()
    assert re.findall(r"aws_s3_bucket\.objects\.arn}/([^\"]+)", storage) == [f"{AVATARS}/*"]


@pytest.mark.parametrize("role", ["api", "worker"])
def test_the_start_script_is_one_that_bash_reads(role: str) -> None:
    script = machine.script(role)
    assert "%{" not in script
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=30, check=False)  # noqa: S607 - the shell that cloud-init finds, too
    assert done.returncode == 0, done.stderr
    assert ("nginx" in commands(role)) == (role == "api")


# Stands in for every program of the machine: containers and the network are files, a second one of a name is refused.
MACHINE = """#!/bin/bash
case "$(basename "$0") $*" in
    "docker network inspect"*) [ -e "$STATE/network" ] ;;
    "docker network create"*) [ ! -e "$STATE/network" ] && touch "$STATE/network" ;;
    "docker ps"*) name=${!#} name=${name#name=^} name=${name%?}; [ ! -e "$STATE/$name" ] || echo "$name" ;;
    "docker rm --force"*) rm "$STATE/$3" ;;
    "docker run --detach --name"*) [ -s "$ROOT/run/scaleout/KEY" ] && [ ! -e "$STATE/$4" ] && touch "$STATE/$4" ;;
    "aws secretsmanager"*) echo '{"KEY": "secret"}' ;;
    "jq -r"*) echo KEY ;;
    "jq -j"*) echo secret ;;
    "install -d"*) mkdir -p "${!#}" ;;
    "install -D"*) mkdir -p "$(dirname "${!#}")" && cp -p "${@: -2:1}" "${!#}" ;;
    "install"*) cat >"${!#}" ;;
esac
"""


@pytest.mark.sabotage(
    "deploy/terraform/modules/service/machine.sh.tftpl", '    without "$name"\n    docker run', "    docker run"
)
@pytest.mark.sabotage(
    "deploy/terraform/modules/service/machine.sh.tftpl",
    '[[ $0 == "$every_boot" ]] || install -D -m 700 "$0" "$every_boot"\n',
    "",
)
@pytest.mark.parametrize("role", ["api", "worker"])
def test_a_machine_that_boots_again_has_its_secrets_and_its_containers(role: str, tmp_path: Path) -> None:
    root, state, programs = tmp_path / "root", tmp_path / "state", tmp_path / "programs"
    for folder in (root / "etc", root / "run", state, programs):
        folder.mkdir(parents=True)
    for name in ("docker", "aws", "jq", "install", "dnf", "systemctl"):
        (programs / name).write_text(MACHINE)
        (programs / name).chmod(0o755)
    first = tmp_path / "part-001"
    first.write_text(re.sub(r"(?<![\w$}])/(etc|run|var)/", rf"{root}/\1/", machine.script(role)))
    first.chmod(0o755)
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "STATE": str(state), "ROOT": str(root)}
    subprocess.run([first], env=environment, check=True, timeout=60)  # noqa: S603  # our own
    containers = {path.name for path in state.iterdir()}
    assert len(containers) > 2
    shutil.rmtree(root / "run")  # it is memory
    (root / "run").mkdir()
    (again,) = (root / "var" / "lib" / "cloud" / "scripts" / "per-boot").iterdir()
    subprocess.run([again], env=environment, check=True, timeout=60)  # noqa: S603  # our own
    assert {path.name for path in state.iterdir()} == containers
    assert (root / "run" / "scaleout" / "KEY").read_text()


@pytest.mark.sabotage(
    "deploy/terraform/modules/service/machine.sh.tftpl",
    "start relay --env READY_FILE=/tmp/ready --env METRICS_PORT=9100",
    "start relay --env READY_FILE=/tmp/ready",
)
def test_prometheus_finds_every_process_at_a_port_of_its_own() -> None:
    api, background = commands("api"), commands("worker")
    assert background.keys() == {"worker-$number", "relay", "scheduler"}
    for name in ("worker-$number", "relay"):
        assert f"METRICS_PORT={PORT}" in background[name]["--env"], name
        (published,) = background[name]["--publish"]
        assert published.endswith(f":{PORT}"), name
    assert api["api-$number"]["--publish"] == ["$((9100 + number)):8000"]
    # The machines' group lets Prometheus in at these, and nobody else.
    network = (TERRAFORM / "modules" / "network" / "main.tf").read_text()
    assert re.search(r"referenced_security_group_id = var.prometheus_group\n\s+from_port\s+= 9100\n", network)


@pytest.mark.sabotage("deploy/terraform/modules/service/machine.sh.tftpl", "--stop-timeout 180", "--stop-timeout 90")
def test_a_machine_that_leaves_lets_its_work_end() -> None:
    (default,) = re.findall(r'docker run --detach --name "\$name".*--stop-timeout (\d+)', machine.script("api"))
    drain = ServiceSettings.model_fields["drain_seconds"].default
    assert int(default) > drain + serving._FINISH
    (longest,) = commands("worker")["worker-$number"]["--stop-timeout"]
    assert int(longest) > max(task.longest for task in TASKS)
    assert int(commands("api")["nginx"]["--stop-timeout"][0]) > serving._FINISH


@pytest.mark.sabotage("deploy/terraform/prices-2026-11.json", '"c7g.large": 0.0725', '"c7g.large": 0.0825')
def test_the_costs_on_the_page_are_those_of_the_newest_prices() -> None:
    page = costs.PAGE.read_text()
    assert page == costs.written(page), "python -m deploy.capacity"
    assert [f"| {requests:,} |" in page for requests in costs.SIZES] == [True] * 6


def test_the_plan_on_the_page_is_of_the_newest_figures() -> None:
    page = report.PAGE.read_text()
    assert "\nFor 1,000 requests a second at the peak" in page
    assert page == report.written(page), "python -m deploy.capacity"


def test_the_costs_are_of_what_terraform_makes() -> None:
    modules = {path.parent.name: path.read_text() for path in TERRAFORM.glob("modules/*/main.tf")}
    variables = (TERRAFORM / "variables.tf").read_text()
    usual = costs.size(1_000)
    chosen = {"instance_type": usual.machine, "database_class": usual.database, "cache_node": usual.redis}
    for variable, type_ in chosen.items():
        assert re.search(rf'variable "{variable}" \{{[^}}]*default\s+= "{type_}"', variables)
    assert re.search(rf'variable "replicas" \{{[^}}]*default\s+= {model.REPLICAS}\b', variables)
    main = (TERRAFORM / "main.tf").read_text()
    (nodes,) = re.findall(r"num_cache_clusters\s+= (\d)", modules["redis"])
    assert main.count("./modules/redis") * int(nodes) == costs.REDIS_NODES
    assert re.findall(r"minimum\s+= (\d)", main) == [str(model.FEWEST)] * 2
    assert f"allocated_storage     = {costs.DATABASE_GIGABYTES}" in modules["database"]
    assert f"volume_size           = {costs.MACHINE_GIGABYTES}" in modules["service"]
    assert re.search(rf'"aws_nat_gateway" "this" \{{\s+count = {costs.ZONES}', modules["network"])


def test_no_size_asks_a_database_for_more_connections_than_it_allows() -> None:
    database = (TERRAFORM / "modules" / "database" / "main.tf").read_text()
    (allowed,) = {int(number) for number in re.findall(r'"max_connections"\s*= "(\d+)"', database)}
    # PostgreSQL keeps three for itself and RDS two.
    assert int(allowed) == model.CONNECTIONS + 5
    assert max(costs.size(requests).connections for requests in costs.SIZES) <= model.CONNECTIONS
