"""Instances beside the cluster's own, on its servers, with settings of their own; nobody starts them again.

A test module takes the fixture with `pytest_plugins = ("instances",)`. (PYTEST_DONT_REWRITE: nothing is asserted here.)
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import PATIENCE, until

from deploy.local.cluster import Cluster
from deploy.local.layout import CHECKOUT
from deploy.local.ports import free_port


@dataclass(frozen=True)
class Instance:
    """An instance outside of the cluster's own, on the cluster's servers; nobody starts it again."""

    process: asyncio.subprocess.Process
    client: httpx.AsyncClient
    log: Path

    def tell(self, number: int = signal.SIGTERM) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Wait for its end and return its exit code."""
        async with asyncio.timeout(PATIENCE):
            return await self.process.wait()

    async def answers(self, path: str = "/health/live") -> httpx.Response | None:
        """Ask it something; None while it does not listen."""
        try:
            return await self.client.get(path)
        except httpx.TransportError:
            return None


async def command(
    cluster: Cluster, *arguments: str, output: Any = None, tree: Path = CHECKOUT, **environment: str
) -> asyncio.subprocess.Process:
    """Start `scaleout` of the code in `tree` with these arguments in the cluster's environment."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "app.cli", *arguments),
        cwd=tree,
        env=cluster.environment | {"PATH": os.environ["PATH"]} | environment,
        stdout=output,
        stderr=output,
    )


@pytest.fixture
async def new_instance(cluster: Cluster, tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Instance]]]:
    """Start instances; what still runs is killed at the end."""
    made: list[Instance] = []

    async def make(tree: Path = CHECKOUT, **environment: str) -> Instance:
        port = free_port()
        log = tmp_path / f"{port}.log"
        with log.open("wb") as output:
            own = environment | {"INSTANCE": f"extra-{port}"}
            process = await command(cluster, "api", "--port", str(port), output=output, tree=tree, **own)
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE)
        instance = Instance(process, client, log)
        made.append(instance)
        await until(instance.answers)
        return instance

    yield make
    for instance in made:
        await instance.client.aclose()
        if instance.process.returncode is None:
            instance.process.kill()
            await instance.process.wait()


async def ready(instance: Instance) -> bool:
    """Say whether the instance is ready."""
    answer = await instance.answers("/health/ready")
    return answer is not None and answer.status_code == 200
