"""A real worker process: it logs whose work it does, outlives its broker and what kills its children."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest
from apart import Apart, answers, running_redis
from conftest import PATIENCE, read_lines, settings_from, until

from app.scaling.outbox import Message
from deploy.local.leftovers import lives
from workers.broker import Posting
from workers.task import Delivery

pytest_plugins = ("apart",)

CHILDREN = 2

# Tasks for these tests, run by the worker's own `run_worker`.
PROGRAM = """
import asyncio, os, signal
from pathlib import Path
from billiard import Process
from workers.main import run_worker
from workers.task import once, task

@task("orders.good", seconds=20)
async def good(resources, delivery):
    async with once(resources, delivery):
        pass

@task("orders.deadly", seconds=20)
async def deadly(resources, delivery):
    os.kill(os.getpid(), signal.SIGKILL)

@task("orders.patient", seconds=20)
async def patient(resources, delivery):
    folder = Path(os.environ["TEST_FOLDER"])
    (folder / f"began-{delivery.message.id}").touch()
    while not (folder / "go on").exists():
        await asyncio.sleep(0.02)
    async with once(resources, delivery):
        pass

def stay():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(os.environ["TEST_FOLDER"], "stays").write_text(str(os.getpid()))
    while True:
        signal.pause()

if os.environ.get("LEFT_OVER"):
    Process(target=stay, daemon=True).start()

run_worker((good, deadly, patient))
"""


@dataclass(frozen=True)
class Worker:
    """A worker process and its log."""

    process: "subprocess.Popen[bytes]"
    folder: Path
    children: int

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What it has logged, as far as it is JSON."""
        return [orjson.loads(line) for line in read_lines(self.folder / "log") if line.startswith("{")]

    async def ready(self) -> bool:
        """Whether it takes messages; fails the test if it has ended."""
        assert self.process.poll() is None, (self.folder / "log").read_text()
        return (self.folder / "ready").exists()

    async def busy(self) -> bool:
        """Whether all children are at a patient task."""
        return len(list(self.folder.glob("began-*"))) == self.children


@contextmanager
def running_worker(environment: dict[str, str], folder: Path, children: int = CHILDREN) -> Iterator[Worker]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    root = str(Path(__file__).resolve().parents[2])
    with (folder / "log").open("wb") as output:
        process = subprocess.Popen(  # noqa: S603  # our own program
            [sys.executable, str(program)],
            env=environment
            | {
                "READY_FILE": str(folder / "ready"),
                "TEST_FOLDER": str(folder),
                "LOG_FORMAT": "json",
                "PYTHONPATH": root,
                "WORKER_CONCURRENCY": str(children),
            },
            stdout=output,
            stderr=output,
        )
    try:
        yield Worker(process, folder, children)
    finally:
        process.terminate()
        process.wait(PATIENCE)


def posting(message: Message, task: str) -> Posting:
    return Posting(task, Delivery(task, message, 1, {}).to_json(), str(message.id))


async def settled(apart: Apart, message: Message) -> bool:
    return (await apart.row(message.subject_id)).done_at is not None


async def test_log_lines_of_a_task_carry_the_request_that_led_to_it(apart: Apart, tmp_path: Path) -> None:
    message = await apart.message("order.placed")
    with running_worker(apart.environment, tmp_path) as worker, apart.publisher() as publisher:
        await until(worker.ready)
        await asyncio.to_thread(publisher.publish, [posting(message, "orders.good")])
        await until(settled, apart, message)
    (line,) = [line for line in worker.lines if line["event"] == "task"]
    assert (line["task"], line["outcome"], line["request_id"]) == ("orders.good", "done", message.request_id)
    assert worker.process.returncode == 0
    assert not (tmp_path / "ready").exists()
    assert not [line for line in worker.lines if line["level"] in {"error", "critical"}]


async def test_a_message_that_kills_its_process_ends_as_a_dead_letter_and_blocks_nobody(
    apart: Apart, tmp_path: Path
) -> None:
    deadly = await apart.message("order.placed")
    good = [await apart.message("order.placed") for _ in range(5)]
    with running_worker(apart.environment, tmp_path) as worker, apart.publisher() as publisher:
        await until(worker.ready)
        await asyncio.to_thread(
            publisher.publish, [posting(deadly, "orders.deadly"), *(posting(one, "orders.good") for one in good)]
        )
        for one in good:
            await until(settled, apart, one)
        letters = await until(apart.dead_letters, seconds=2 * PATIENCE)
    assert [(letter.task, letter.message_id) for letter in letters] == [("orders.deadly", deadly.id)]
    assert await settled(apart, deadly)


@pytest.mark.sabotage("workers/main.py", "    worker.start()\n    _end_children()", "    worker.start()")
async def test_a_worker_ends_and_leaves_no_child_that_has_outlived_its_pool(apart: Apart, tmp_path: Path) -> None:
    async def stays() -> psutil.Process | None:
        written = tmp_path / "stays"
        return psutil.Process(int(written.read_text())) if written.exists() and written.read_text() else None

    async def gone() -> bool:
        return not lives(left_over)

    with running_worker(apart.environment | {"LEFT_OVER": "1"}, tmp_path) as worker:
        await until(worker.ready)
        left_over = await until(stays)
    try:
        assert worker.process.returncode == 0
        assert await until(gone)
    finally:
        with suppress(psutil.NoSuchProcess):
            left_over.kill()


@pytest.mark.sabotage("workers/main.py", "self._connection_errors = ()", "pass")
async def test_a_worker_whose_broker_hung_when_its_task_ended_goes_on_afterwards(
    apart: Apart, tmp_path: Path, free_port: int
) -> None:
    environment = apart.environment | {"REDIS_BROKER_URL": f"redis://127.0.0.1:{free_port}/0"}
    held, afterwards = [await apart.message("order.placed") for _ in range(2)]
    with running_redis(free_port, tmp_path) as broker:
        await until(answers, free_port)
        publishing = apart.publisher(settings_from(environment))
        with running_worker(environment, tmp_path, children=1) as worker, publishing as publisher:
            await until(worker.ready)
            await asyncio.to_thread(publisher.publish, [posting(held, "orders.patient")])
            await until(worker.busy)
            broker.send_signal(signal.SIGSTOP)
            try:
                (tmp_path / "go on").touch()
                await until(_saw_the_loss, worker)
            finally:
                broker.send_signal(signal.SIGCONT)
            await asyncio.to_thread(publisher.publish, [posting(afterwards, "orders.good")])
            await until(settled, apart, afterwards, seconds=2 * PATIENCE)


async def test_a_worker_whose_broker_was_away_while_it_worked_goes_on_afterwards(
    apart: Apart, tmp_path: Path, free_port: int
) -> None:
    environment = apart.environment | {"REDIS_BROKER_URL": f"redis://127.0.0.1:{free_port}/0"}
    settings = settings_from(environment)
    messages = [await apart.message("order.placed") for _ in range(CHILDREN)]
    afterwards = await apart.message("order.placed")
    # Entered first, so that the brokers end after the worker.
    with ExitStack() as brokers:
        first = brokers.enter_context(running_redis(free_port, tmp_path))
        await until(answers, free_port)
        with running_worker(environment, tmp_path) as worker, apart.publisher(settings) as publisher:
            await until(worker.ready)
            postings = [posting(message, "orders.patient") for message in messages]
            await asyncio.to_thread(publisher.publish, postings)
            await until(worker.busy)
            first.send_signal(signal.SIGTERM)
            await asyncio.to_thread(first.wait, 10)
            (tmp_path / "go on").touch()
            await until(_saw_the_loss, worker)
            publisher.close()
            brokers.enter_context(running_redis(free_port, tmp_path))
            await until(answers, free_port)
            await asyncio.to_thread(publisher.publish, [posting(afterwards, "orders.good")])
            await until(settled, apart, afterwards, seconds=2 * PATIENCE)


async def _saw_the_loss(worker: Worker) -> bool:
    return any("Couldn't ack" in line["event"] or "onnection to broker lost" in line["event"] for line in worker.lines)
