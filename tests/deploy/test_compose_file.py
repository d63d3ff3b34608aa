"""What docker-compose.yml promises without an engine: memory, accounts, health, one image, and the one template."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.local import nginx

CHECKOUT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((CHECKOUT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ONE_SHOTS = {name for name, service in SERVICES.items() if service["restart"] == "no"}
LASTING = SERVICES.keys() - ONE_SHOTS
# What runs without a profile.
DEFAULT = {name for name in LASTING if "profiles" not in SERVICES[name]}
TOOLS = {"nginx", "mail", "prometheus", "grafana", "traces"}
# Their images bring nothing to ask with; whoever needs them waits for an answer.
SILENT = {"storage", "mail", "payments", "postgres-exporter", "redis-exporter", "traces"}
OURS = ("api", "worker", "relay", "scheduler", "migrate", "seed")

# The default stack fits beside a browser and an editor on a laptop of 8 GB.
MEMORY_MEGABYTES = 2048


@pytest.mark.sabotage("docker-compose.yml", "    mem_limit: 192m\n", "    mem_limit: 1192m\n")
def test_the_whole_stack_is_limited_to_less_than_two_gigabytes() -> None:
    total = 0
    for name in DEFAULT:
        limit = re.fullmatch(r"(\d+)m", SERVICES[name]["mem_limit"])
        assert limit, name
        copies = str(SERVICES[name].get("deploy", {}).get("replicas", 1))
        # A number, or a variable with the number that it has without a profile.
        total += int(limit[1]) * int(copies.rpartition(":-")[2].rstrip("}"))
    assert total < MEMORY_MEGABYTES


@pytest.mark.sabotage("docker-compose.yml", "  cap_drop: [ALL]\n", "  cap_drop: []\n")
@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_limited_hardened_and_cannot_fill_the_disk(name: str) -> None:
    service = SERVICES[name]
    assert service["mem_limit"]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"max-size", "max-file"} <= service["logging"]["options"].keys()
    assert not service.get("privileged")


@pytest.mark.parametrize("name", sorted(LASTING - SILENT - {*OURS}))
def test_every_server_says_whether_it_is_healthy(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"]


def test_the_image_says_it_for_our_own_processes() -> None:
    assert "HEALTHCHECK" in (CHECKOUT / "deploy" / "Dockerfile").read_text()
    for name in LASTING & {*OURS, "payments"}:
        assert "healthcheck" not in SERVICES[name]


@pytest.mark.parametrize("name", ["api", "worker", "relay", "scheduler", "seed"])
def test_nothing_of_ours_starts_before_the_tables_are_there(name: str) -> None:
    assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}


def test_all_roles_are_commands_of_one_image() -> None:
    assert {SERVICES[name]["image"] for name in OURS} == {"scaleout:local"}
    assert {SERVICES[name]["command"][0] for name in OURS} == set(OURS)


@pytest.mark.sabotage("docker-compose.yml", '["127.0.0.1:${PORT:-8000}:8080"]', '["${PORT:-8000}:8080"]')
def test_only_nginx_and_the_pages_of_tools_are_published_and_only_to_this_machine() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published.keys() == TOOLS
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


def test_no_password_is_written_down() -> None:
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            assert not re.search(r"PASSWORD$|SECRET(?!S_DIR)|ACCESS_KEY", name), name
            # Where a password belongs there is a placeholder, which secrets.sh fills.
            assert re.fullmatch(r"[^@]*|.*://[a-z]*:\{[a-z]+\}@.*", str(value or "")), name


def test_a_container_has_as_long_to_stop_as_an_instance_takes_to_drain() -> None:
    for name in (*OURS, "nginx"):
        assert SERVICES[name]["stop_grace_period"] == "30s"


def test_compose_fills_in_every_name_of_the_one_nginx_template() -> None:
    values = {name: str(value) for name, value in SERVICES["nginx"]["environment"].items()}
    filled = nginx.render(nginx.TEMPLATE.read_text(), values)
    assert "server api:8000 resolve" in filled
    assert not re.search(r"\$\{[A-Z_]+\}", filled)


def test_no_tag_of_a_base_image_is_left_open() -> None:
    images = {service["image"] for service in SERVICES.values()}
    images |= set(re.findall(r"^ARG BASE=(\S+)", (CHECKOUT / "deploy" / "Dockerfile").read_text(), re.MULTILINE))
    assert all(re.search(r":[^:]*(\d|local|slim)", image) for image in images)
    assert not any(image.endswith(":latest") for image in images)
