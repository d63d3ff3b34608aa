"""The runner of `make prove`: each run is of its own tree, and ends whatever it has started."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import until
from runner import Runner

ARGUMENTS = ["-q", "-p", "no:cacheprovider", "tests"]


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner() as opened:
        yield opened


def plant(tree: Path, test: str) -> Path:
    """Make a project of one module and one file of tests."""
    (tree / "tests").mkdir(parents=True)
    (tree / "tests" / "test_it.py").write_text(test, encoding="utf-8")
    (tree / "app.py").write_text(f"HOME = {str(tree)!r}\n", encoding="utf-8")
    (tree / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    return tree


def alone() -> dict[str, str]:
    """Return this process's environment, without what it loads by itself."""
    return os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


@pytest.mark.sabotage("tests/runner.py", "    sys.path.insert(0, tree)\n", "")
def test_each_run_is_of_its_own_tree(runner: Runner, tmp_path: Path) -> None:
    test = """
import app, pytest
@pytest.mark.parametrize("number", [1, 2])
def test_home(number): assert app.HOME == {home!r}
@pytest.mark.parametrize("number", [1, 2])
def test_half(number): assert number == 1
"""
    for name in ("one", "other"):
        tree = plant(tmp_path / name, test.format(home=str(tmp_path / name)))
        run = runner.run(tree, ARGUMENTS, alone(), None)
        assert (run.passed, set(run.took)) == (False, {"tests/test_it.py::test_home"}), run.said
    assert "1 failed, 3 passed" in run.said


@pytest.mark.sabotage("tests/runner.py", "os.killpg(process, signal.SIGKILL)", "os.kill(process, signal.SIGKILL)")
async def test_a_run_that_hangs_has_failed_and_takes_along_what_it_started(runner: Runner, tmp_path: Path) -> None:
    started = tmp_path / "started"
    command = [sys.executable, "-c", f"import os, time; print(os.getpid(), file=open({str(started)!r}, 'w')); "]
    command[-1] += "time.sleep(600)"
    tree = plant(tmp_path / "tree", f"def test_it():\n    __import__('subprocess').run({command!r})\n")
    hangs = 1.0
    while not started.exists() or not started.read_text(encoding="utf-8"):  # on a slow machine it takes a while
        hangs *= 2
        assert hangs < 200, "it does not even start"
        run = runner.run(tree, ARGUMENTS, alone(), hangs)
        assert run.passed is False
        assert not run.took
    number = int(started.read_text(encoding="utf-8"))

    async def gone() -> bool:
        states = {process.pid: process.info["status"] for process in psutil.process_iter(["status"])}
        return states.get(number, psutil.STATUS_ZOMBIE) == psutil.STATUS_ZOMBIE

    await until(gone)
