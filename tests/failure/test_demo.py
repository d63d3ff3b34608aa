"""A demonstration keeps its promises to the end; one that is told to end, at whatever moment, leaves nothing running.

`DEMO_ENDS=all`, as `make test-failure` sets it, plays one to its end and ends others in every way; else one is ended,
in the way that is hardest to get right: nobody reads any more what it prints, as with `make demo | less`.
"""

import asyncio
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import PATIENCE

from deploy.chaos.demo import ACTS
from deploy.local import leftovers
from deploy.local.layout import Layout
from deploy.local.servers import unprivileged_account

pytestmark = pytest.mark.postgresql("it shows a cluster of its own, on PostgreSQL")

ACT = "replica killed"  # what the first act is about, on a terminal as in lines
ALL = os.environ.get("DEMO_ENDS") == "all"
ENDS = ("unread", "terminal", "starting") if ALL else ("unread",)
LONG = 4 * PATIENCE  # seconds; a whole cluster starts, and clients sign up
WIDE = {"COLUMNS": "200"}  # no line of it is broken into two
EVERY_ACT = 16 * PATIENCE  # seconds; on a quiet machine it is three minutes, and nobody waits for ever


@dataclass
class Demonstration:
    """One that runs, and what it prints, through a pipe or a terminal of its own."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    transport: asyncio.ReadTransport
    printed: str = ""

    async def prints(self, text: str) -> None:
        """Wait until it has printed something."""
        async with asyncio.timeout(LONG):
            while text not in self.printed:
                part = await self.reader.read(4096)
                assert part, f"it ended: {self.printed}"
                self.printed += part.decode(errors="replace")

    async def end(self, within: float = LONG) -> int:
        """Read what it still prints, and return its exit code, which comes within so many seconds."""
        async with asyncio.timeout(within):
            with suppress(OSError):  # how Linux says that the other end of a terminal is closed
                while part := await self.reader.read(4096):
                    self.printed += part.decode(errors="replace")
            return await self.process.wait()


@asynccontextmanager
async def demonstration(folder: Path, *, terminal: bool) -> AsyncIterator[Demonstration]:
    """Start one that keeps what it makes in `folder`; it is gone in the end, and its cluster with it."""
    ours, its = pty.openpty() if terminal else os.pipe()
    # Whoever is started in the background may have been told to ignore Ctrl-C, and tells its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "app.cli", "demo"),
        stdin=its if terminal else asyncio.subprocess.DEVNULL,
        stdout=its,
        stderr=its,
        env={name: value for name, value in os.environ.items() if name != "CI"} | {"TMPDIR": str(folder)} | WIDE,
        start_new_session=True,
    )
    signal.signal(signal.SIGINT, before)
    os.close(its)
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    pipe = os.fdopen(ours, "rb", buffering=0)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    try:
        yield Demonstration(process, reader, transport)
    finally:
        transport.close()
        if process.returncode is None:
            process.kill()
            await process.wait()


def layout_in(folder: Path) -> Layout:
    """Return where the demonstration's cluster keeps its things."""
    (cluster,) = folder.glob("scaleout-demo-*/cluster")
    return Layout.of(cluster, unprivileged_account())


def files_in(folder: Path) -> list[Path]:
    """Return what a folder holds."""
    return list(folder.iterdir())


@pytest.mark.parametrize("way", ENDS)
@pytest.mark.sabotage(
    "deploy/chaos/stage.py", "opened.push_async_callback(asyncio.to_thread, cluster.down, wipe=True)", "pass"
)
async def test_a_demonstration_that_is_told_to_end_leaves_nothing(tmp_path: Path, way: str) -> None:
    async with demonstration(tmp_path, terminal=way == "terminal") as demo:
        await demo.prints("Redis" if way == "starting" else ACT)
        layout = layout_in(tmp_path)
        running = leftovers.recorded(layout)
        assert len(running) > 1, "the supervisor and what it has started"
        try:
            if way == "unread":
                demo.transport.close()
                await asyncio.sleep(0)  # closes it in the next turn of the event loop
            demo.process.send_signal(signal.SIGTERM if way == "starting" else signal.SIGINT)
            code = await demo.end()
            assert [process for process in running if leftovers.lives(process)] == []
            assert files_in(tmp_path) == []
            assert not layout.state.exists()
        finally:
            await asyncio.to_thread(leftovers.end, [process for process in running if leftovers.lives(process)])
            layout.wipe()
    if way != "unread":
        assert "Stopped; nothing is left running." in demo.printed
        assert code == 128 + signal.SIGINT


@pytest.mark.skipif(not ALL, reason="it takes three minutes; make test-failure plays it")
async def test_a_demonstration_keeps_every_promise_to_its_end(tmp_path: Path) -> None:
    async with demonstration(tmp_path, terminal=False) as demo:
        code = await demo.end(EVERY_ACT)
    assert "Every promise was kept." in demo.printed, demo.printed
    assert code == 0
    for act in ACTS:
        assert f"{str(act.fault)[1:]}: {act.promise}" in demo.printed
    assert demo.printed.count("   Kept. ") == len(ACTS)
    assert files_in(tmp_path) == []
