"""Runs tests in processes that are forked from one which has imported already what every run of ours imports.

Starting is most of the work of a short test, and `make prove` starts a thousand times. What is imported beforehand is
other people's only: a run of a changed tree imports all that is ours from there, as an interpreter of its own would.
(PYTEST_DONT_REWRITE: nothing is asserted here.)
"""

import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, Self

import pytest

# The dearest of what conftest.py imports. None of them looks at the environment or at a tree when it is imported.
PRELOADED = (
    "fastapi",
    "httpx",
    "sqlalchemy.ext.asyncio",
    "sqlalchemy.dialects.postgresql.asyncpg",
    "alembic.command",
    "redis.asyncio",
    "pydantic_settings",
    "testcontainers.core.container",
    "cryptography.x509",
    "PIL.Image",
    "hypothesis",
    "aiomysql",
    "structlog",
    "aiosmtplib",
    "limits",
    "snowballstemmer",
)
FAILED = 1  # pytest's exit code for failed tests; any other says that the run itself went wrong


@dataclass(frozen=True)
class Run:
    """What came of a run.

    Attributes:
        passed: whether all tests passed; None if the run itself went wrong.
        took: seconds of each test that passed, by its name without parameters.
        said: the end of what pytest printed.
    """

    passed: bool | None
    took: dict[str, float]
    said: str


class Runner:
    """Runs tests, one run at a time; a context that ends the process from which they are forked."""

    def __init__(self) -> None:
        """Start importing."""
        # Unbuffered, so that what waits in the pipe can be waited for.
        self._nursery = subprocess.Popen(  # noqa: S603  # our own interpreter and file
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for who asks
        )

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._nursery.kill()
        self._nursery.communicate()

    def run(self, tree: Path, arguments: list[str], environment: dict[str, str], hangs: float | None) -> Run:
        """Run pytest in a tree, in a group of its own: one that takes longer than `hangs` seconds has failed."""
        with tempfile.TemporaryDirectory(prefix="prove-run-") as folder:
            said, took = Path(folder) / "said", Path(folder) / "took"
            order = {"tree": str(tree), "arguments": arguments, "environment": environment}
            process = int(self._ask(order | {"said": str(said), "took": str(took)}))
            try:
                code = int(self._line()) if select.select([self._answers], [], [], hangs)[0] else None
            finally:
                # It takes along what it has started.
                with suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGKILL)
            if code is None:
                self._line()  # the code of the one that was just killed
                code = FAILED
            return Run(
                passed={0: True, FAILED: False}.get(code),
                took=json.loads(took.read_text(encoding="utf-8")) if took.exists() else {},
                said=said.read_text(encoding="utf-8", errors="replace")[-3000:],
            )

    def _ask(self, order: dict[str, Any]) -> bytes:
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(json.dumps(order).encode() + b"\n")
        return self._line()

    def _line(self) -> bytes:
        line = self._answers.readline()
        if not line:
            raise RuntimeError("The process from which the tests are forked has ended.")
        return line

    @property
    def _answers(self) -> IO[bytes]:
        assert self._nursery.stdout is not None
        return self._nursery.stdout


class Outcomes:
    """A pytest plugin that notes how long each test took that passed."""

    def __init__(self) -> None:
        self._took: dict[str, float] = {}
        self._not_passed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up the phases of a test, and the parameters of one test."""
        name = report.nodeid.partition("[")[0]
        self._took[name] = self._took.get(name, 0) + report.duration
        if not report.passed:
            self._not_passed.add(name)

    def passed(self) -> dict[str, float]:
        """Return the seconds of those that passed."""
        return {name: seconds for name, seconds in self._took.items() if name not in self._not_passed}


def _serve() -> None:
    """Fork a process for each order that comes in; tell its id and then its exit code."""
    del sys.path[0]  # where this file is: ours comes from the tree of the order
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # the collections that pytest makes need not go through all this
    for line in sys.stdin:
        process = os.fork()
        if not process:
            _become(**json.loads(line))
        _, status = os.waitpid(process, 0)
        _tell(os.waitstatus_to_exitcode(status))


def _tell(number: int) -> None:
    os.write(1, b"%d\n" % number)


def _become(tree: str, arguments: list[str], environment: dict[str, str], said: str, took: str) -> NoReturn:
    """Become a run of pytest in a tree, as if it had been started there; end with its exit code."""
    os.setsid()
    _tell(os.getpid())
    output = os.open(said, os.O_WRONLY | os.O_CREAT)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, standard in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, standard)
    os.close(nothing)
    os.close(output)
    os.chdir(tree)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, tree)
    outcomes = Outcomes()
    code = pytest.main(arguments, plugins=[outcomes])
    Path(took).write_text(json.dumps(outcomes.passed()), encoding="utf-8")
    sys.exit(code)


if __name__ == "__main__":
    _serve()
