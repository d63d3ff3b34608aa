"""What each overlay may open on the databases, added up from its manifests, fits what the overlay says they allow."""

import re
from pathlib import Path

import pytest

from deploy.k8s import connections
from deploy.k8s.manifests import OVERLAYS, named, of_kind

CHECKOUT = Path(__file__).parents[2]
# They share the primaries of one of them.
REGIONS = ("us-east", "us-west", "eu-west", "asia-southeast")


@pytest.mark.sabotage("deploy/k8s/connections.py", "(workers + more_workers) * children", "0")
def test_the_fleet_of_an_overlay_is_everything_at_its_maximum_in_a_rollout() -> None:
    # 25 % of 50 instances, one worker and one relay more in a rollout; two children a worker; 6 chores and a migration.
    fleet = connections.fleet_of("production")
    assert (fleet.instances, fleet.surge, fleet.worker_children, fleet.relays, fleet.chores) == (50, 13, 62, 3, 7)
    assert connections.fleet_of("production-keda") == fleet
    # The stand-ins are not ours, and a region without primaries has instances only.
    assert connections.fleet_of("local").chores == 7
    fleet = connections.fleet_of("eu-west")
    assert (fleet.instances, fleet.surge, fleet.worker_children, fleet.relays, fleet.chores) == (20, 5, 0, 0, 0)


@pytest.mark.sabotage("deploy/k8s/connections.py", "DOES_NOT_FIT if wrong else FITS", "FITS")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_all_pools_of_an_overlay_at_full_size_fit_its_connections(
    overlay: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert connections.check(overlay) == connections.FITS, capsys.readouterr().err
    processes = connections.fleet_of(overlay).processes
    needed = processes * (2 * int(named(overlay, "ConfigMap", "settings")["data"]["DATABASE_POOL_SIZE"]) + 1)
    said = capsys.readouterr().out
    assert f"{needed} of {connections.allowed_of(overlay)} connections" in said
    # And one less is refused, with what to change.
    monkeypatch.setattr(connections, "allowed_of", lambda _: needed - 1)
    assert connections.check(overlay) == connections.DOES_NOT_FIT
    assert f"need {needed}, it allows {needed - 1}; set DATABASE_POOL_SIZE=" in capsys.readouterr().err


@pytest.mark.sabotage("deploy/k8s/overlays/us-west/kustomization.yaml", "ALLOWED=182", "ALLOWED=183")
def test_what_overlays_may_open_is_what_their_servers_allow() -> None:
    database = (CHECKOUT / "deploy" / "terraform" / "modules" / "database" / "main.tf").read_text()
    allowed = {int(number) for number in re.findall(r'"max_connections"\s*= "(\d+)"', database)}
    # Kept back: superuser_reserved_connections (3) and RDS's own rds.rds_superuser_reserved_connections (2).
    assert {connections.allowed_of("production") + 5} == allowed
    # The regions share the primaries of one.
    assert sum(connections.allowed_of(region) for region in REGIONS) <= connections.allowed_of("production")
    (primary,) = (one for one in of_kind("local", "StatefulSet") if one["metadata"]["name"] == "primary")
    started_with = primary["spec"]["template"]["spec"]["containers"][0]["args"]
    assert f"max_connections={connections.allowed_of('local') + 3}" in started_with


@pytest.mark.sabotage("docs/deployment/regions.md", "136 x 7 = 952 of 969", "136 x 7 = 952 of 1000")
def test_what_the_docs_quote_is_what_the_check_says(capsys: pytest.CaptureFixture[str]) -> None:
    quoted = {
        line
        for page in (CHECKOUT / "docs").rglob("*.md")
        for line in page.read_text().splitlines()
        if re.match(r"[a-z-]+, each server: \d", line)
    }
    assert len(quoted) >= len(REGIONS)
    for line in quoted:
        connections.check(line.partition(",")[0])
        assert capsys.readouterr().out.strip() == line


def test_an_overlay_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert connections.check("produktion") == connections.MISUSED
    assert capsys.readouterr().err.startswith("There is no overlay 'produktion'; use one of: asia-southeast, ")
