"""A short load test of the running cluster, with each tool, and what stands in its way or leads elsewhere."""

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from deploy.local.cluster import Cluster
from loadtests.load import LoadError
from loadtests.load import __main__ as load

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.sabotage("loadtests/load/__main__.py", "if most < count", "if most < 0")
def test_limits_that_are_too_low_are_named_with_what_to_set(cluster: Cluster) -> None:
    load.look(cluster.url, 20, 60)
    with pytest.raises(LoadError, match=r"RATE_LIMIT_SIGN_IN allows \d+ in 60 s, 2000000 are wanted(?s:.)*make run"):
        load.look(cluster.url, 2_000_000, 60)


@pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="make load installs k6 and Locust")
@pytest.mark.parametrize("tool", ["k6", "locust"])
async def test_a_short_run_is_reported(tool: str, cluster: Cluster, tmp_path: Path) -> None:
    async with httpx.AsyncClient(base_url=cluster.url) as client:
        assert (await client.get("/health/ready")).is_success
    folder = tmp_path / uuid4().hex
    command = [sys.executable, "-m", "loadtests.load", "--scenario", "smoke", "--users", "3", "--duration", "5s"]
    process = await asyncio.create_subprocess_exec(
        *command, "--tool", tool, "--url", cluster.url, "--to", str(folder), stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()
    # On a busy machine a threshold may be missed; that is not what is asked here.
    assert process.returncode in {load.KEPT, load.MISSED}, said.decode()
    (file,) = folder.glob("smoke-*.json")
    told = json.loads(file.read_bytes())
    assert told["figures"]["failed"] == 0
    assert {"sign-up", "sign-in"} <= told["kinds"].keys()
    assert told["kinds"]["sign-in"]["requests"] == 3
    assert max(second["instances"] for second in told["series"]) == 2
    assert told["figures"]["hit_rate"] is not None
    assert "<svg" in file.with_suffix(".html").read_text()


@pytest.mark.parametrize("target", ["smoke", "load"])
@pytest.mark.sabotage("Makefile", "http://127.0.0.1:$(or $(PORT),8000)", "http://127.0.0.1:8000")
def test_a_service_on_another_port_is_found_there(target: str) -> None:
    # What the make that runs the tests was told is not for this one.
    environment = {name: value for name, value in os.environ.items() if name not in {"URL", "MAKEFLAGS", "MFLAGS"}}
    said = subprocess.run(  # noqa: S603 - the Makefile's own targets
        ["make", "--dry-run", target],  # noqa: S607
        cwd=CHECKOUT,
        env=environment | {"PORT": "8001"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "http://127.0.0.1:8001" in said
