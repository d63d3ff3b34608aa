"""kill -9 of a consumer in the middle of its work: the other ones of its group handle what it held."""

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

from apart import Apart, apart_from
from conftest import PATIENCE, until

from app.core.ids import new_id
from app.scaling.events import STREAM
from app.scaling.outbox import Message
from deploy.local.cluster import Cluster
from workers.consumer import BATCH

EVENTS = 2000
OPTIONS = ("--claim-after", "0.5", "--from-start")


def start(apart: Apart, folder: Path, name: str) -> subprocess.Popen[bytes]:
    with (folder / name).open("wb") as output:
        return subprocess.Popen(  # noqa: S603  # our own program
            [sys.executable, "-m", "app.cli", "consume-events", "shipping", "--name", name, *OPTIONS],
            env=apart.environment,
            stdout=output,
            stderr=subprocess.DEVNULL,
        )


def printed(folder: Path, *names: str) -> list[str]:
    """Return the ids in the whole lines that consumers have printed."""
    lines = [line for name in names for line in (folder / name).read_bytes().split(b"\n")[:-1]]
    return [json.loads(line)["id"] for line in lines]


async def test_a_killed_consumers_events_are_handled_by_another(cluster: Cluster, tmp_path: Path) -> None:
    async with apart_from(cluster) as apart:
        subjects = [new_id() for _ in range(EVENTS)]
        messages = [Message(each, new_id(each), "profile.updated", each, {"version": 1}, "-", 1) for each in subjects]
        killed = start(apart, tmp_path, "killed")
        try:
            await apart.resources.events.publish(messages)

            async def at_work() -> bool:
                return len(printed(tmp_path, "killed")) > BATCH

            await until(at_work, seconds=2 * PATIENCE)
            killed.send_signal(signal.SIGKILL)
            await asyncio.to_thread(killed.wait)
            other = start(apart, tmp_path, "other")
        finally:
            killed.kill()
        try:
            wanted = {str(each.id) for each in messages}

            async def all_handled() -> bool:
                return set(printed(tmp_path, "killed", "other")) == wanted

            await until(all_handled, seconds=2 * PATIENCE)

            async def all_confirmed() -> bool:
                return bool((await apart.broker.xpending(STREAM, "shipping"))["pending"] == 0)

            await until(all_confirmed)
            other.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(other.wait, PATIENCE) == 0
        finally:
            other.kill()
        # Twice is only what it had handled and could not say any more.
        assert len(printed(tmp_path, "killed", "other")) - EVENTS <= 1
