"""Probes: what each promises while the process starts, serves, drains, and while everything is down."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from conftest import settings_from, until
from expectations import check_problem

from app.api import health
from app.core.settings import Settings
from app.main import create_app
from app.scaling.lifecycle import Lifecycle, Phase
from app.wiring import Resources, open_resources
from deploy.local.cluster import Cluster


async def test_probes_of_a_running_instance(client: httpx.AsyncClient) -> None:
    for probe, status in (("live", "alive"), ("startup", "started"), ("ready", "ready")):
        answer = await client.get(f"/health/{probe}")
        assert (answer.status_code, answer.json()) == (200, {"status": status})
        assert answer.headers["cache-control"] == "no-store"


async def test_each_dependency_is_told_by_its_part_and_never_by_its_address(client: httpx.AsyncClient) -> None:
    async def up() -> httpx.Response | None:
        answer = await client.get("/health")
        return answer if answer.json()["status"] == "up" else None

    answer = await until(up)
    body = answer.json()
    names = [dependency["name"] for dependency in body["dependencies"]]
    assert names == ["database-0/primary", "database-0/replica-1", "database-0/replica-2", "redis", "storage"]
    for dependency in body["dependencies"]:
        assert set(dependency) == {"name", "status", "latency_ms"}
        assert (dependency["status"], dependency["latency_ms"] > 0) == ("up", True)
    assert "127.0.0.1" not in answer.text
    assert "://" not in answer.text


@pytest.fixture
async def instance(settings: Settings, resources: Resources) -> AsyncIterator[tuple[httpx.AsyncClient, Lifecycle]]:
    """An instance in this process that has not started yet, and its lifecycle."""
    lifecycle = Lifecycle()
    app = create_app(settings)
    opened = replace(resources, lifecycle=lifecycle)
    app.state.resources = opened
    health.install(app, opened)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://testserver") as client:
        yield client, lifecycle


@pytest.mark.sabotage(path="app/api/health.py", take_out="if phase is not Phase.READY:", put="if False:")
async def test_readiness_follows_the_phase_and_liveness_does_not(
    instance: tuple[httpx.AsyncClient, Lifecycle],
) -> None:
    client, lifecycle = instance

    async def ask() -> list[int]:
        return [(await client.get(f"/health/{probe}")).status_code for probe in ("live", "startup", "ready")]

    check_problem(await client.get("/health/ready"), 503, "starting")
    assert await ask() == [200, 503, 503]
    lifecycle.enter(Phase.READY)
    assert await ask() == [200, 200, 200]
    lifecycle.enter(Phase.DRAINING)
    check_problem(await client.get("/health/ready"), 503, "draining")
    assert await ask() == [200, 200, 503]


@pytest.fixture
async def stranded(cluster: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    """An instance whose database and Redis are not there."""
    nowhere = {
        "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
        "REPLICA_URLS": "",
        "SHARDS": "",
        "REDIS_URL": "redis://127.0.0.1:1/0",
    }
    settings = settings_from(cluster.environment | nowhere)
    app = create_app(settings)
    async with open_resources(settings) as resources:
        app.state.resources = resources
        health.install(app, resources)
        resources.lifecycle.enter(Phase.READY)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://testserver") as client:
            yield client


@pytest.mark.sabotage("app/api/health.py", "if not await board.readable():", "if False:")
async def test_an_instance_that_can_serve_nothing_is_alive_and_not_ready(stranded: httpx.AsyncClient) -> None:
    assert (await stranded.get("/health/live")).status_code == 200
    check_problem(await stranded.get("/health/ready"), 503, "nothing_to_serve")
    body: dict[str, Any] = (await stranded.get("/health")).json()
    assert body["status"] == "down"
    assert {found["name"]: found["status"] for found in body["dependencies"]} == {
        "database-0/primary": "down",
        "redis": "down",
        "storage": "up",
    }


async def test_asking_often_looks_once_a_second(resources: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    assert health._KEPT == 1.0
    monkeypatch.setattr(health, "_KEPT", 60.0)  # on a busy machine the look itself takes a second
    board = health.Board(resources)
    first = await board.dependencies()
    assert all([await board.dependencies() is first for _ in range(20)])
