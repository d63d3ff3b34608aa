"""Everything that the OpenAPI document allows, and much that it does not, sent through NGINX: no 5xx, no breach."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from conftest import Customer

from deploy.local.cluster import Cluster

CONFIGURATION = Path(__file__).with_name("schemathesis.toml")
# What ends the caller's own session or profile, after which everything would be 401; their tests are in test_sessions.
ENDS_THE_CALLER = ("/api/v1/sessions", "/api/v1/sessions/current")


async def expect_no_breach(cluster: Cluster, folder: Path, *arguments: str) -> None:
    """Run Schemathesis with all its checks, and fail with its report if it finds anything."""
    process = await asyncio.create_subprocess_exec(
        *(str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(CONFIGURATION), "run"),
        *(f"{cluster.url}/openapi.json", "--url", cluster.url, "--checks", "all", "--no-color"),
        # The same requests every time.
        *("--generation-deterministic", "--max-examples", "10", "--phases", "examples,coverage,fuzzing"),
        *arguments,
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    if process.returncode != 0:
        pytest.fail(output.decode(errors="replace"), pytrace=False)


@pytest.mark.sabotage("app/api/bodies.py", "return Match.NONE, {}", "return match, child")
async def test_an_administrator_finds_no_breach_of_the_contract(
    cluster: Cluster, admin: Customer, tmp_path: Path
) -> None:
    without = [argument for path in ENDS_THE_CALLER for argument in ("--exclude-path", path)]
    await expect_no_breach(cluster, tmp_path, "-H", f"Authorization: Bearer {admin.token}", *without)


async def test_a_customer_finds_no_breach_of_the_contract(
    cluster: Cluster, new_customer: Callable[..., Awaitable[Customer]], tmp_path: Path
) -> None:
    customer = await new_customer()
    without = [argument for path in ENDS_THE_CALLER for argument in ("--exclude-path", path)]
    await expect_no_breach(cluster, tmp_path, "-H", f"Authorization: Bearer {customer.token}", *without)


async def test_a_stranger_finds_no_breach_of_the_contract(cluster: Cluster, tmp_path: Path) -> None:
    await expect_no_breach(cluster, tmp_path)
