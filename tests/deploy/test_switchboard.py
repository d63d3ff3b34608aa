"""The switchboard: what it breaks is really broken, it mends what it broke, and it obeys nobody but the console."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import until
from pydantic import ValidationError

from app.core.settings import ConsoleSettings
from deploy.chaos.switchboard import offered
from deploy.local.cluster import Cluster
from deploy.local.layout import read_json
from deploy.local.programs import Sizes


def board_of(cluster: Cluster) -> tuple[str, str]:
    """Return where the switchboard is, and its key."""
    entries = {each["name"]: each for each in read_json(cluster.layout.programs)["processes"]}
    return entries["switchboard"]["address"], entries["switchboard"]["environment"]["SWITCHBOARD_KEY"]


@pytest.fixture
async def board(cluster: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    """A client with the key, as the console is."""
    address, key = board_of(cluster)
    headers = {"Authorization": f"Bearer {key}", "Origin": cluster.url}
    async with httpx.AsyncClient(base_url=address, headers=headers, timeout=10) as client:
        yield client
        (await client.delete("/faults")).raise_for_status()


@pytest.mark.sabotage("deploy/chaos/switchboard.py", "            await self._end(name)\n", "            pass\n")
async def test_a_frozen_process_stands_still_until_it_is_mended(cluster: Cluster, board: httpx.AsyncClient) -> None:
    process = psutil.Process(cluster.process("smtp").pid or 0)

    async def stands() -> bool:
        return process.status() == psutil.STATUS_STOPPED

    async def runs() -> bool:
        return process.status() != psutil.STATUS_STOPPED

    told = (await board.put("/faults/smtp-stopped")).json()["items"]
    (fault,) = [each for each in told if each["name"] == "smtp-stopped"]
    assert fault["active"]
    assert 0 < fault["seconds_left"] <= 60
    assert await until(stands)
    told = (await board.delete("/faults")).json()["items"]
    assert not any(each["active"] for each in told)
    assert await until(runs)


@pytest.mark.sabotage("deploy/chaos/switchboard.py", "async with broken(self._stage, fault):", "if True:")
async def test_a_killed_process_is_killed_again_until_it_is_mended(cluster: Cluster, board: httpx.AsyncClient) -> None:
    seen = {cluster.process("smtp").pid}

    async def killed_twice() -> bool:
        seen.add(cluster.process("smtp").pid)
        return len(seen - {None}) >= 3

    async def ready() -> bool:
        return (await asyncio.to_thread(cluster.status))["smtp"] == "ready"

    (await board.put("/faults/smtp-killed")).raise_for_status()
    assert await until(killed_twice)
    (await board.delete("/faults/smtp-killed")).raise_for_status()
    assert await until(ready)


@pytest.mark.sabotage("deploy/chaos/switchboard.py", "origin not in self._origins) or", "False) or")
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": ""}, 403),
        ({"Authorization": "Bearer guessed"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 400),
    ],
)
async def test_it_obeys_neither_a_stranger_nor_the_page_of_another_site(
    cluster: Cluster, board: httpx.AsyncClient, headers: dict[str, str], status: int
) -> None:
    before = cluster.process("smtp").pid
    for method, path in (("GET", "/faults"), ("PUT", "/faults/smtp-killed"), ("DELETE", "/faults")):
        answer = await board.request(method, path, headers=headers)
        assert answer.status_code == status
        assert "access-control-allow-origin" not in answer.headers or headers.get("Origin") is None
    assert cluster.process("smtp").pid == before


async def test_a_browser_may_call_it_from_this_clusters_console_only(
    cluster: Cluster, board: httpx.AsyncClient
) -> None:
    asks = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "authorization"}
    ours = await board.options("/faults/smtp-killed", headers=asks)
    assert (ours.status_code, ours.headers["access-control-allow-origin"]) == (200, cluster.url)
    other = await board.options("/faults/smtp-killed", headers={**asks, "Origin": "http://evil.example"})
    assert other.status_code == 400
    assert "access-control-allow-origin" not in other.headers


async def test_it_offers_what_this_cluster_has_and_is_itself_none_of_it(
    cluster: Cluster, board: httpx.AsyncClient
) -> None:
    told = (await board.get("/faults")).json()["items"]
    names = {each["name"] for each in told}
    assert {"instance-killed", "primary-stopped", "redis-killed", "worker-slow", "payments-stopped"} <= names
    assert not any(name.startswith("storage") or name.endswith(("-cut", "-silent")) for name in names), "no doors here"
    assert all(each["does"].startswith(each["target"]) for each in told)
    assert "switchboard" not in {process.name for process in cluster.processes}
    assert (await board.put("/faults/storage-killed")).status_code == 404
    assert [fault.name for fault in offered(["worker-1"])] == ["worker-killed", "worker-stopped", "worker-slow"]


def test_each_run_has_a_key_of_its_own(cluster: Cluster, tmp_path: Path) -> None:
    other = Cluster(tmp_path / "c", sizes=Sizes(kinds=("smtp", "switchboard")))
    other.up()
    try:
        assert board_of(other)[1] != board_of(cluster)[1]
        assert len(board_of(other)[1]) >= 40
    finally:
        other.down(wipe=True)


@pytest.mark.sabotage(
    "app/core/variables.py", 'urlsplit(value).hostname != "127.0.0.1"', 'urlsplit(value).hostname == ""'
)
@pytest.mark.parametrize("url", ["http://10.0.0.7:18400", "http://127.0.0.1.evil.example", "http://localhost:1"])
def test_no_deployment_can_name_a_switchboard_elsewhere(url: str) -> None:
    with pytest.raises(ValidationError, match=r"must lead to 127\.0\.0\.1"):
        ConsoleSettings(switchboard=url)
