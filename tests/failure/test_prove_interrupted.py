"""A run of `make prove` that is told to end while a sabotaged test has frozen a server leaves no process and no file.

It is the real one, with a claim of its own instead of ours: its test freezes the primary when its feature is out.
"""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import PATIENCE, until

from deploy.local import leftovers
from deploy.local.layout import Layout
from deploy.local.servers import unprivileged_account

CHECKOUT = Path(__file__).parents[2]
MACHINERY = ("prove.py", "proofs.py", "runner.py", "sabotages.py", "conftest.py", "containers.py", "engines.py")
CLAIM = "| It holds. | `tests/it.py` | `tests/test_it.py::test_it` | it does not |\n"
TEST = """
import time
from pathlib import Path

import psutil
import pytest
from it import HOLDS

@pytest.mark.sabotage("tests/it.py", "True", "False")
def test_it(cluster):
    if not HOLDS:
        primary = psutil.Process(cluster.process("primary").pid)
        for process in (primary, *primary.children(recursive=True)):
            process.suspend()
        Path({frozen!r}).write_text(str(cluster.layout.root))
        time.sleep(600)
"""
LONG = 4 * PATIENCE  # seconds; tests are collected, a whole cluster starts, and a test runs twice


def text_of(file: Path) -> str:
    """Return what a file holds; nothing if it is not there yet."""
    return file.read_text() if file.exists() else ""


@pytest.fixture
def frozen(tmp_path: Path) -> Path:
    """The file in which the test says which cluster's primary it has frozen."""
    return tmp_path / "frozen"


@pytest.fixture
def project(tmp_path: Path, frozen: Path) -> Path:
    """A project of one claim, with the machinery that proves it."""
    made = tmp_path / "project"
    for folder in ("tests", "docs"):
        (made / folder).mkdir(parents=True)
    for name in MACHINERY:
        shutil.copy2(CHECKOUT / "tests" / name, made / "tests" / name)
    shutil.copy2(CHECKOUT / "pyproject.toml", made)
    (made / "tests" / "it.py").write_text("HOLDS = True\n")
    (made / "tests" / "test_it.py").write_text(TEST.format(frozen=str(frozen)))
    (made / "docs" / "claims.md").write_text(CLAIM)
    subprocess.run(["git", "init", "-q", str(made)], check=True)  # noqa: S603, S607  # fixed arguments
    return made


@pytest.mark.sabotage("tests/prove.py", "signal.signal(each, lambda *_: None)", "pass")
@pytest.mark.sabotage("deploy/local/supervision.py", "leftovers.wake(self.pid)", "pass")
async def test_a_run_that_is_told_to_end_leaves_nothing(project: Path, frozen: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    # Nothing of this run of pytest: it may itself be one of `make prove`.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TEST_"))}
    told = tmp_path / "told"
    with told.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "tests/prove.py"),
            cwd=project,
            env=own | {"TMPDIR": str(temporary)},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    running: list[psutil.Process] = []

    async def cluster_of_the_frozen() -> str:
        assert process.returncode is None, told.read_text()
        return await asyncio.to_thread(text_of, frozen)

    try:
        layout = Layout.of(Path(await until(cluster_of_the_frozen, seconds=LONG)), unprivileged_account())
        (supervisor, *_) = leftovers.recorded(layout)
        running = [supervisor, *supervisor.children(recursive=True)]
        assert len([each for each in running if each.status() == psutil.STATUS_STOPPED]) > 1
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
        async with asyncio.timeout(LONG):
            assert await process.wait() == 128 + signal.SIGINT, told.read_text()
        assert [each for each in running if leftovers.lives(each)] == []
        assert list(temporary.glob("prove-*")) == []
        assert not layout.state.exists()
        assert told.read_text().endswith("Ended; the next run goes on here.\n")
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        await asyncio.to_thread(leftovers.end, [each for each in running if leftovers.lives(each)], hurry=True)
